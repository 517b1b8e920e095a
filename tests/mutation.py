"""Mutation testing: which change to the package does no test notice?

    pip install mutmut==2.5.1 coverage
    python tests/mutation.py                              # most of the package: within an hour on two cores
    python tests/mutation.py tinyddpm/autograd/conv.py    # a file, or a folder
    python tests/mutation.py --all                        # those too that are listed in mutation_survivors.txt
    python tests/mutation.py --by guards.txt              # and say by which test each is noticed

mutmut makes the mutants: one number, operator, string, condition or argument changed in each. A mutant meets tests of
the default run that pass its line, as many as take `ENOUGH` seconds: those of its room first, and of these the quick
ones, until one fails. To start Python for each would take a day, so a process per CPU imports package and tests once
and forks for each mutant, where the mutated function gets its new code. What is decided at import (a default, a table,
a decorator) is mutated in a copy of the folder and imported anew; so is what survives though it may have been called at
import. A mutant that crashes or hangs counts as noticed. Of lines that a fixture of a whole file passes, only the first
test of the file is known to, so that such a mutant may seem to survive.

Left out are programs (cli.py, program.py, __main__.py), processes (speed/workers.py and what uses it), speed/cuda.py,
whose tests start processes or want a GPU; and the tests of examples and pages, which are about these.

mutation_survivors.txt lists the mutants that no test can tell from the package, each below the reason. Others that
survive are printed, and the exit status is 1.
"""

import argparse
import ast
import collections
import difflib
import gc
import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MUTATED = "autograd network diffusion training files exchange speed/winograd.py speed/group_norm.py".split()
OPTIONS = "-p no:cacheprovider -p no:terminal --assert=plain --hypothesis-profile=no_shrinking".split()
OPTIONS += ["--ignore=tests/examples", "--ignore=tests/test_readme.py"]  # about examples and pages
ENOUGH = 30  # seconds that the tests take which a mutant meets, if there are more
PATIENCE = 30  # seconds, and ten times what they take without it, that they may take with it: one that hangs is noticed
SURVIVED, NOTICED, ANEW = range(3)  # exit statuses of a fork, that of one that crashed is another; ANEW: by import
processes = multiprocessing.get_context("fork")
Mutant = collections.namedtuple("Mutant", "file line change source")


def mutants(file):
    """All of a file. `change`, the function and the lines changed in it, as `diff` has them, is the name in lists."""
    from mutmut import Context, list_mutations, mutate, mutations_by_type

    kinds = set(mutations_by_type) - {"fstring"}  # how the text of an f-string begins and ends
    settings = types.SimpleNamespace(mutation_types_to_apply=kinds, covered_lines_by_filename=None)
    text, seen = Path(file).read_text(), collections.Counter()
    lines = text.splitlines(keepends=True)
    for node in ast.parse(text).body:  # function by function, since mutmut parses anew for each mutant
        first, last = min(n.lineno for n in [node, *getattr(node, "decorator_list", [])]) - 1, node.end_lineno
        part = "".join(lines[first:last])
        for which in list_mutations(Context(part, filename=file, config=settings)):
            mutated, _ = mutate(Context(part, which, filename=file, config=settings))
            changed = [x for x in difflib.ndiff(part.splitlines(), mutated.splitlines()) if x[0] in "+-"]
            change = f"{file} {getattr(node, 'name', '')}: " + "  ".join(f"{x[0]} {x[2:].strip()}" for x in changed)
            seen[change] += 1
            change += f" ({seen[change]})" * (seen[change] > 1)  # the same in another place of it
            source = "".join([*lines[:first], mutated, *lines[last:]])
            yield Mutant(file, first + which.line_number + 1, change, source)


class Coverage:
    """Notes which lines each test passes, and under "" those passed at import; what it takes, and whether it fails."""

    def __init__(self, path):
        import coverage

        self.path, self.seconds, self.failed = path, collections.Counter(), {""}
        self.coverage = coverage.Coverage(data_file=None, source=["tinyddpm"])
        self.coverage.start()

    def pytest_runtest_logstart(self, nodeid):
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.add(report.nodeid)
        if report.when == "teardown":
            self.coverage.switch_context("")

    def pytest_sessionfinish(self):
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = {os.path.relpath(file): data.contexts_by_lineno(file) for file in data.measured_files()}
        self.path.write_bytes(pickle.dumps((lines, self.seconds, self.failed)))


class Selection:
    """Of the tests those that pass a mutant's line: of its room first, then quick ones, those of a file together."""

    def __init__(self, path):
        self.lines, self.seconds, self.failed = pickle.loads(path.read_bytes())
        for test in self.failed - {""}:
            print("fails without any change, or here:", test)

    def passing(self, mutant):
        passed = self.lines.get(mutant.file, {})
        lines = range(mutant.line, 0, -1)  # amid a statement of several lines: where this begins
        return set(passed[next(line for line in lines if line in passed)]) if passed else set()

    def at_import(self, mutant):
        return "" in self.passing(mutant)

    def tests(self, mutant):
        """What is decided at import meets the tests that pass any line of the file; if only other processes do, all."""
        whole_file = set().union(*self.lines.get(mutant.file, {}).values())
        passing = set() if self.at_import(mutant) else self.passing(mutant)
        passing = next(filter(None, (tests - self.failed for tests in (passing, whole_file, {*self.seconds}))))
        room = mutant.file.replace("tinyddpm", "tests").rpartition("/")[0]
        order = lambda t: (not t.startswith(room), self.seconds[t] > 0.1, t.partition("::")[0], self.seconds[t])
        tests = sorted(passing, key=order)
        spent = itertools.accumulate(self.seconds[test] for test in tests)
        return [test for test, seconds in zip(tests, spent) if seconds < ENOUGH] or tests[:1]

    def longest(self, tests):
        return PATIENCE + 10 * sum(self.seconds[test] for test in tests)


def in_fork(longest, work, *arguments):
    """The exit status of work(*arguments) in a process of its own, which says nothing and leaves no process behind."""
    child = os.fork()
    if not child:
        try:
            os.setsid()
            for stream in range(3):
                os.dup2(os.open(os.devnull, os.O_RDWR), stream)
            os._exit(work(*arguments))
        finally:
            os._exit(NOTICED)
    until, ended, status = time.monotonic() + longest, 0, 0
    while not ended and time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0 if ended else 0.002)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
    if not ended:
        os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if ended else NOTICED


class Forked:
    """Collects the tests, and forks for each mutant."""

    def __init__(self, mutants, statuses, selection, by, control):
        self.mutants, self.statuses, self.selection, self.by, self.control = mutants, statuses, selection, by, control

    def pytest_runtestloop(self, session):
        items = {item.nodeid: item for item in session.items}
        functions = collections.defaultdict(list)  # of the package, by what is theirs before and after the mutation
        gc.unfreeze()  # what conftest.py has frozen would not be found
        for x in gc.get_objects():
            if isinstance(x, types.FunctionType) and "tinyddpm/" in x.__code__.co_filename:
                functions[name_of(x.__code__)].append(x)
        gc.freeze()

        def status(mutant, tests):
            return in_fork(self.selection.longest(tests), self.run, mutant, [items[t] for t in tests], functions)

        file = "tinyddpm/__init__.py"
        if status(Mutant(file, 1, "nothing", Path(file).read_text()), self.control) != SURVIVED:
            print("in a fork, a test fails without any change: see --by")
            os._exit(1)
        for n, mutant in self.mutants:
            self.statuses[n] = status(mutant, self.selection.tests(mutant))
        os._exit(0)

    def run(self, mutant, chosen, functions):
        path = os.path.abspath(mutant.file)
        if not replace(*(compile(text, path, "exec") for text in (Path(path).read_text(), mutant.source)), functions):
            return ANEW
        self.mutant = mutant
        chosen[0].config._tmp_path_factory._basetemp = Path(tempfile.mkdtemp())
        for item, after in zip(chosen, [*chosen[1:], None]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        return SURVIVED

    def pytest_runtest_logreport(self, report):
        if report.failed:
            noticed(report.nodeid, self.mutant, self.by)


def noticed(test, mutant, by):
    if by:
        with by.open("a") as file:
            file.write(f"{test}\t{mutant.change}\n")
    os._exit(NOTICED)


def name_of(code):
    return code.co_filename, code.co_qualname, code.co_firstlineno


def replace(old, new, functions, anew=False):
    """Give the functions with code in `old` what `new` has instead. False if not only functions have changed, but for
    what is made anew whenever a function around it is called."""
    if old == new:
        return True
    inner = lambda code: [x for x in code.co_consts if isinstance(x, types.CodeType)]
    own = lambda code: (code.co_code, code.co_names, [repr(x) for x in code.co_consts if x not in inner(code)])
    found = functions.get(name_of(old), [])
    try:
        for function in found:  # several, if it is a closure
            function.__code__ = new
    except ValueError:  # it closes over other variables
        return False
    anew = anew or bool(found)
    if len(inner(old)) != len(inner(new)) or not anew and own(old) != own(new):
        return anew and not any(name_of(code) in functions for code in inner(old))
    return all(replace(*pair, functions, anew) for pair in zip(inner(old), inner(new)))


class Chosen:
    """Collects and runs the tests of a mutant alone."""

    def __init__(self, tests, mutant, by):
        self.order, self.mutant, self.by = {test: i for i, test in enumerate(tests)}, mutant, by

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((x for x in items if x.nodeid in self.order), key=lambda x: self.order[x.nodeid])

    def pytest_runtest_logreport(self, report):
        if report.failed:
            noticed(report.nodeid, self.mutant, self.by)


def import_anew(mutants, statuses, selection, by, control):
    """Each from a copy of the folder, with its file mutated."""
    folder = Path(tempfile.mkdtemp()) / ROOT.name
    if (data := ROOT.parent / "shared").exists():  # the full MNIST, which some tests are skipped without
        (folder.parent / data.name).symlink_to(data)
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True
    )
    for name in filter(os.path.exists, listed.stdout.splitlines()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(name, folder / name)
    subprocess.run([sys.executable, "-m", "compileall", "-q", "tinyddpm"], cwd=folder, check=True)

    def work(tests, mutant):
        os.chdir(folder)
        sys.path[0] = os.environ["PYTHONPATH"] = str(folder)
        sys.dont_write_bytecode = True
        files = sorted({test.partition("::")[0] for test in tests})
        return SURVIVED if pytest.main([*OPTIONS, *files], plugins=[Chosen(tests, mutant, by)]) == 0 else NOTICED

    if in_fork(PATIENCE + selection.longest(control), work, control, Mutant("", 0, "nothing", "")) != SURVIVED:
        sys.exit("in a copy of the folder, a test fails without any change: see --by")
    for n, mutant in mutants:
        path = folder / mutant.file
        path.write_text(mutant.source)
        tests = selection.tests(mutant)
        statuses[n] = in_fork(PATIENCE + selection.longest(tests), work, tests, mutant)  # to begin takes a while, too
        shutil.copy2(mutant.file, path)  # with its time, so that what was compiled holds again


def side_by_side(count, work, *arguments):
    workers = [processes.Process(target=work, args=arguments) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        sys.exit("a process ended before its work")


def known():
    """The survivors that are listed."""
    path = ROOT / "tests" / "mutation_survivors.txt"
    return {line for line in path.read_text().splitlines() if line and line[0] != "#"} if path.exists() else set()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", default=[f"tinyddpm/{file}" for file in MUTATED], help="what to mutate")
    parser.add_argument("--tests", default="tests", help="the tests to run, if not all")
    parser.add_argument("--only", type=Path, help="a file of changes as they are printed: only these")
    parser.add_argument("--all", action="store_true", help="those too that are known to survive")
    parser.add_argument("--by", type=Path, help="a file to add the test to by which each is noticed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes side by side [%(default)s]")
    args = parser.parse_args()
    args.by = args.by and args.by.absolute()
    os.chdir(ROOT)
    scratch = tempfile.mkdtemp(prefix="mutation")
    os.environ |= {"TMPDIR": scratch, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    tempfile.tempdir = None  # it is read from TMPDIR anew
    sys.path.insert(0, str(ROOT))
    try:
        sys.exit(run(args, Path(scratch) / "coverage"))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def run(args, coverage):
    began, options = time.monotonic(), [*OPTIONS, *args.tests.split()]
    files = [
        str(f) for path in map(Path, args.files) for f in (sorted(path.rglob("*.py")) if path.is_dir() else [path])
    ]
    found = [mutant for file in files for mutant in mutants(file)]
    if args.only:
        only = set(args.only.read_text().splitlines())
        found = [mutant for mutant in found if mutant.change in only]
    left_out = set() if args.all else known()
    todo = [mutant for mutant in found if mutant.change not in left_out]
    print(f"{len(found)} mutants of {len(files)} files, {len(found) - len(todo)} left out", flush=True)

    import hypothesis.extra.numpy  # noqa: F401  what takes long to import, for all forks
    import PIL.Image  # noqa: F401
    import safetensors.numpy  # noqa: F401
    import tqdm  # noqa: F401

    side_by_side(1, lambda: pytest.main(options, plugins=[Coverage(coverage)]))
    selection, statuses = Selection(coverage), processes.Array("b", len(todo))
    print(f"{time.monotonic() - began:.0f} s: {len(selection.seconds)} tests were run", flush=True)

    def dealt(numbers):
        """Each mutant and its number, to one of the processes."""
        following = processes.Value("i", 0)

        def deal():
            while True:
                with following:
                    place, following.value = following.value, following.value + 1
                if place >= len(numbers):
                    return
                yield numbers[place], todo[numbers[place]]

        return deal

    def in_use(numbers):
        """The tests that these mutants meet. Without any change, all have to pass in the same setting."""
        return sorted(set().union(*(selection.tests(todo[n]) for n in numbers)))

    control = in_use(range(len(todo)))
    deal = dealt(range(len(todo)))
    side_by_side(
        args.jobs, lambda: pytest.main(options, plugins=[Forked(deal(), statuses, selection, args.by, control)])
    )
    doubtful = lambda n: statuses[n] == ANEW or statuses[n] == SURVIVED and selection.at_import(todo[n])
    anew = [n for n in range(len(todo)) if doubtful(n)]
    print(f"{time.monotonic() - began:.0f} s: {len(anew)} of them have to be imported anew", flush=True)
    deal = dealt(anew)
    side_by_side(args.jobs if anew else 0, lambda: import_anew(deal(), statuses, selection, args.by, in_use(anew)))

    total, survivors = collections.Counter(), [m for m, status in zip(todo, statuses) if status == SURVIVED]
    total.update(m.file for m in found)
    unnoticed = collections.Counter(m.file for m in [*survivors, *(m for m in found if m.change in left_out)])
    for file in files:
        if total[file]:
            print(f"{total[file] - unnoticed[file]:5} of {total[file]:5} noticed in {file}")
    share = 1 - unnoticed.total() / max(1, total.total())
    print(f"{share:.2%} of {total.total()} in {time.monotonic() - began:.0f} s. Survivors that are not listed:")
    print(*(m.change for m in survivors), sep="\n")
    return bool(survivors)


if __name__ == "__main__":
    main()
