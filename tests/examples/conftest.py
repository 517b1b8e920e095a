"""The tests of the examples run them in this process, since a new one takes a second."""

import collections
import pathlib
import runpy
import sys
import types

import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
Said = collections.namedtuple("Said", "out err")


def path_of(name):
    return next(EXAMPLES.rglob(f"{name}.py"))


@pytest.fixture(scope="session")
def script():
    """script(name) is the path of an example; script.loaded(name) is a module that has what the example defines."""

    def loaded(name):
        module = types.ModuleType(name)
        vars(module).update(runpy.run_path(str(path_of(name))))
        return module

    path_of.loaded = loaded
    return path_of


@pytest.fixture
def ran(ended, monkeypatch):
    """ran(name, *arguments) runs an example as a user does and returns what it prints and what it says on stderr."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [str(path_of(name)), *map(str, arguments)])
        code, *said = ended(runpy.run_path, str(path_of(name)), None, "__main__")
        assert code == 0, said
        return Said(*said)

    return run
