"""The tests of the examples run them in this process, since a new one takes a second."""

import pathlib
import runpy
import signal
import sys
import types
import warnings

import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


def path_of(name):
    return next(EXAMPLES.rglob(f"{name}.py"))


@pytest.fixture(scope="session")
def script():
    """script(name) is the path of an example, script.loaded(name) has its functions as attributes, without main."""

    def loaded(name):
        module = types.ModuleType(name)
        vars(module).update(runpy.run_path(str(path_of(name))))
        return module

    path_of.loaded = loaded
    return path_of


@pytest.fixture
def ran(monkeypatch, capsys):
    """ran(name, *arguments) runs an example as a user does and returns what it prints and what it says on stderr."""

    def run(name, *arguments):
        handler, before = signal.getsignal(signal.SIGINT), warnings.formatwarning
        monkeypatch.setattr(sys, "argv", [str(path_of(name)), *map(str, arguments)])
        try:
            runpy.run_path(str(path_of(name)), run_name="__main__")
        except SystemExit as end:
            assert not end.code, end.code
        finally:
            signal.signal(signal.SIGINT, handler)
            warnings.formatwarning = before
        return capsys.readouterr()

    return run
