"""Mutation testing: which changes to the package does no test notice?

    pip install mutmut==2.5.1 coverage
    python tests/mutation.py                              # all files, with all processors: within an hour
    python tests/mutation.py tinyddpm/autograd/conv.py    # one, or a folder

mutmut makes the mutants: a number, an operator, a string, a condition or an argument changed at a time. Each meets the
tests of the default run that pass its line, those of its room first, until one fails. Starting Python for each would
take a day, so a process that has imported package and tests once is forked, and in the fork the mutated function gets
its new code. What is decided at import (a default, a table, a decorator) is mutated in a copy of the folder and
imported anew; so is what survived and may have been called at import.

Survivors that are known, with the reason why no test can tell, are in mutation_survivors.txt. Others are printed, and
the exit status is 1.
"""

import argparse
import collections
import difflib
import gc
import json
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
OPTIONS += [f"--ignore=tests/{left_out}" for left_out in ("examples", "test_readme.py")]
LONGEST = 300  # seconds that the tests may take with a mutant: one that hangs is noticed
LISTED = ROOT / "tests" / "mutation_survivors.txt"

Mutant = collections.namedtuple("Mutant", "file line number source")  # `number` among those of a line


def mutants(file):
    from mutmut import Context, list_mutations, mutate, mutations_by_type

    kinds = set(mutations_by_type) - {"fstring"}  # how the text of an f-string begins and ends
    settings = types.SimpleNamespace(mutation_types_to_apply=kinds, covered_lines_by_filename=None)
    source = Path(file).read_text()
    for which in list_mutations(Context(source, filename=file, config=settings)):
        mutated, _ = mutate(Context(source, which, filename=file, config=settings))
        yield Mutant(file, which.line_number + 1, which.index, mutated)


def change(mutant):
    """The lines that it changes, as `diff` shows them, without their indentation: its name in the list."""
    before, after = Path(mutant.file).read_text().splitlines(), mutant.source.splitlines()
    lines = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    return f"{mutant.file}: " + "  ".join(f"{line[0]} {line[2:].strip()}" for line in lines)


# ------------------------------------------------------------------------------------------------ what tests pass


class Coverage:
    """The lines that each test passes, and those passed at import under "", into `path`."""

    def __init__(self, path):
        import coverage

        self.coverage, self.path = coverage.Coverage(data_file=None, source=["tinyddpm"]), path
        self.seconds, self.failed = {}, []
        self.coverage.start()

    def pytest_runtest_logstart(self, nodeid):
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration
        if report.failed:
            self.failed.append(report.nodeid)
        if report.when == "teardown":
            self.coverage.switch_context("")

    def pytest_sessionfinish(self):
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = {os.path.relpath(file): data.contexts_by_lineno(file) for file in data.measured_files()}
        self.path.write_bytes(pickle.dumps((lines, self.seconds, self.failed)))


class Selection:
    """Which tests to run for a mutant, the likeliest to fail first."""

    def __init__(self, path):
        self.lines, self.seconds, failed = pickle.loads(path.read_bytes())
        self.useless = {"", *failed}
        if failed:
            print(len(failed), "tests fail as it is, or here, and say nothing:", *failed[:5], flush=True)

    def at_import(self, mutant):
        passed = self.lines.get(mutant.file, {})
        return any("" in passed.get(line, ()) for line in self.function(mutant))

    def function(self, mutant):  # the changed line, and the line that a statement of several begins on
        return range(max(1, mutant.line - 12), mutant.line + 1)

    def tests(self, mutant):
        passed = self.lines.get(mutant.file, {})
        passing = set(passed.get(mutant.line, ()))
        for line in range(mutant.line - 1, max(0, mutant.line - 30), -1):  # amid a statement of several lines
            if passing - {""}:
                break
            passing |= set(passed.get(line, ()))
        if not passing - {""}:  # only in processes of its own
            passing = set(self.seconds)
        room = mutant.file.replace("tinyddpm", "tests").rpartition("/")[0]
        return sorted(passing - self.useless, key=lambda test: (not test.startswith(room), self.seconds.get(test, 1)))


# ------------------------------------------------------------------------------------------------- warm: new code


def functions_by_code():
    """{the code of a function of the package: those functions}: closures may be several."""
    found = collections.defaultdict(list)
    for x in gc.get_objects():
        if isinstance(x, types.FunctionType) and "tinyddpm/" in x.__code__.co_filename:
            found[key(x.__code__)].append(x)
    return found


def key(code):
    return os.path.relpath(code.co_filename), code.co_qualname, code.co_firstlineno


def replaced(file, source, functions):
    """Give functions their mutated code; False if something else than functions has changed."""
    old, new = (compile(text, os.path.abspath(file), "exec") for text in (Path(file).read_text(), source))
    return _replace(old, new, functions, False)


def _replace(old, new, functions, in_function):
    if old == new:
        return True
    if in_function and functions.get(key(old)):
        for function in functions[key(old)]:
            if len(function.__code__.co_freevars) != len(new.co_freevars):
                return False
            function.__code__ = new
        return True
    if in_function:
        return False
    inner = lambda code: [x for x in code.co_consts if isinstance(x, types.CodeType)]
    plain = lambda code: [x for x in code.co_consts if not isinstance(x, types.CodeType)]
    same = old.co_code == new.co_code and old.co_names == new.co_names and repr(plain(old)) == repr(plain(new))
    if not same or len(inner(old)) != len(inner(new)):
        return False
    is_class = lambda code: "__qualname__" in code.co_names and "__module__" in code.co_names
    return all(_replace(o, n, functions, not is_class(o)) for o, n in zip(inner(old), inner(new)))


class Warm:
    """In a process that has collected the tests: a fork for each mutant that `take` gives out, `tell` of its end."""

    def __init__(self, take, tell, selection):
        self.take, self.tell, self.selection, self.in_fork = take, tell, selection, False

    def pytest_runtestloop(self, session):
        items = {item.nodeid: item for item in session.items}
        functions = functions_by_code()
        gc.collect()
        gc.freeze()
        for mutant in iter(self.take, None):
            chosen = [items[test] for test in self.selection.tests(mutant) if test in items]
            self.tell(mutant, run_in_fork(lambda: self.run(session, mutant, chosen, functions)))  # noqa: B023
        os._exit(0)

    def run(self, session, mutant, chosen, functions):
        self.in_fork = True
        if not replaced(mutant.file, mutant.source, functions):
            return "cold"
        session.config._tmp_path_factory._basetemp = Path(tempfile.mkdtemp(dir=os.environ["TMPDIR"]))
        for item, after in zip(chosen, [*chosen[1:], None]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        return "survived"

    def pytest_runtest_logreport(self, report):
        if self.in_fork and report.failed:
            finish("killed by " + report.nodeid)


OUTCOME = {}


def finish(outcome):
    os.write(OUTCOME["pipe"], outcome.encode())
    os._exit(0)


def run_in_fork(function):
    """What `function`, or `finish` below it, says in a process of its own."""
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setsid()
            silence = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(silence, stream)
            os.close(readable)
            OUTCOME["pipe"] = writable
            finish(function() or "killed")
        finally:
            os._exit(1)
    os.close(writable)
    until, said = time.monotonic() + LONGEST, b""
    import select

    while select.select([readable], [], [], max(0, until - time.monotonic()))[0]:
        if not (part := os.read(readable, 4096)):
            break
        said += part
        if os.waitpid(child, os.WNOHANG)[0]:
            child = None
            said += os.read(readable, 4096) if select.select([readable], [], [], 0)[0] else b""
            break
    else:
        said = b"killed by the clock"
    os.close(readable)
    if child:
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        os.waitpid(child, 0)
    return said.decode() or "killed by a crash"


# ------------------------------------------------------------------------------------------------ cold: a new import


class Cold:
    """The tests `chosen` in their order, until one fails."""

    def __init__(self, chosen):
        self.order = {test: i for i, test in enumerate(chosen)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((x for x in items if x.nodeid in self.order), key=lambda x: self.order[x.nodeid])

    def pytest_runtest_logreport(self, report):
        if report.failed:
            finish("killed by " + report.nodeid)

    def pytest_collectreport(self, report):
        if report.failed:
            finish("killed by " + report.nodeid)


def cold(mutant, chosen, folder, options):
    """Mutate the file in `folder`, a copy, and import it anew."""
    path = folder / mutant.file
    before, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_text(mutant.source)
    try:
        return run_in_fork(lambda: _cold(chosen, folder, options))
    finally:
        path.write_bytes(before)
        os.utime(path, ns=times)  # the compiled one still holds


def _cold(chosen, folder, options):
    os.chdir(folder)
    sys.path[0] = os.environ["PYTHONPATH"] = str(folder)
    sys.dont_write_bytecode = True
    tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp()
    files = sorted({test.partition("::")[0] for test in chosen})
    status = pytest.main([*options, *files], plugins=[Cold(chosen)])
    return "survived" if status == 0 else f"killed by status {status}"


# ---------------------------------------------------------------------------------------------------------- the run


def out_of(queue):
    """A function that gives out what is in the list `queue`, each once, to whichever process asks; then None."""
    counter = tempfile.TemporaryFile()

    def take():
        import fcntl

        fcntl.lockf(counter, fcntl.LOCK_EX)
        try:
            n = os.fstat(counter.fileno()).st_size
            os.write(counter.fileno(), b".")
        finally:
            fcntl.lockf(counter, fcntl.LOCK_UN)
        return queue[n] if n < len(queue) else None

    return take


def in_processes(count, work):
    """Run work(i) in `count` processes."""
    children = []
    for i in range(count):
        if not (child := os.fork()):
            try:
                work(i)
                os._exit(0)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
        children.append(child)
    if any([os.waitpid(child, 0)[1] for child in children]):
        sys.exit("a process of the run failed")


def listed():
    """{change: reason} of the survivors that are known."""
    reasons, reason = {}, ""
    for line in LISTED.read_text().splitlines() if LISTED.exists() else ():
        if line.startswith("# "):
            reason = line[2:]
        elif line.strip():
            reasons[line] = reason
    return reasons


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", default=[f"tinyddpm/{file}" for file in MUTATED], help="what to mutate")
    parser.add_argument("--only", type=Path, help="a file of survivors, as printed: only these mutants")
    parser.add_argument("--all", action="store_true", help="those too that are known to survive")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--tests", default="tests", help="what of the tests to run")
    args = parser.parse_args()
    os.chdir(ROOT)
    scratch = Path(tempfile.mkdtemp(prefix="mutation"))
    os.environ |= {"TMPDIR": str(scratch), "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    tempfile.tempdir = None
    sys.path[:0] = [str(ROOT)]
    try:
        sys.exit(run(args, scratch))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def run(args, scratch):
    files = [
        str(f) for path in map(Path, args.files) for f in (sorted(path.rglob("*.py")) if path.is_dir() else [path])
    ]
    known = {} if args.all else listed()
    only = args.only and set(args.only.read_text().splitlines())
    todo, skipped = [], 0
    for mutant in (mutant for file in files for mutant in mutants(file)):
        name = change(mutant)
        if name in known or only and name not in only:
            skipped += 1
        else:
            todo.append(mutant)
    print(f"{len(todo)} mutants of {len(files)} files, {skipped} left out", flush=True)
    import hypothesis.extra.numpy  # noqa: F401  what takes long to import, and is not mutated
    import PIL.Image  # noqa: F401
    import safetensors.numpy  # noqa: F401
    import tqdm  # noqa: F401

    options = [*OPTIONS, *args.tests.split()]
    began = time.monotonic()
    in_processes(1, lambda i: pytest.main(options, plugins=[Coverage(scratch / "coverage")]))
    selection = Selection(scratch / "coverage")
    print(f"{len(selection.seconds)} tests took {time.monotonic() - began:.0f} s", flush=True)

    results = scratch / "results"
    numbers = {id(mutant): n for n, mutant in enumerate(todo)}

    def tell(mutant, outcome):
        with results.open("a") as file:
            file.write(json.dumps([numbers[id(mutant)], outcome]) + "\n")

    take = out_of(todo)
    in_processes(args.jobs, lambda i: pytest.main(options, plugins=[Warm(take, tell, selection)]))
    outcomes = read(results)
    print(f"{len(outcomes)} mutants took {time.monotonic() - began:.0f} s", flush=True)
    anew = lambda n: outcomes[n] == "cold" or outcomes[n] == "survived" and selection.at_import(todo[n])
    left = [mutant for n, mutant in enumerate(todo) if anew(n)]
    print(f"{len(left)} of them are imported anew", flush=True)

    def work(i):
        folder = scratch / str(i)
        tracked = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True
        ).stdout
        for name in tracked.splitlines():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(name, folder / name)
        subprocess.run([sys.executable, "-m", "compileall", "-q", "tinyddpm"], cwd=folder)
        for mutant in iter(take, None):
            tell(mutant, cold(mutant, selection.tests(mutant), folder, OPTIONS))

    take = out_of(left)
    in_processes(args.jobs, work)
    outcomes |= read(results)
    return report(todo, outcomes, time.monotonic() - began)


def read(results):
    return dict(map(json.loads, results.read_text().splitlines())) if results.exists() else {}


def report(todo, outcomes, seconds):
    killed = collections.Counter()
    total = collections.Counter(mutant.file for mutant in todo)
    survivors = []
    for n, mutant in enumerate(todo):
        if outcomes[n].startswith("killed"):
            killed[mutant.file] += 1
        else:
            survivors.append(change(mutant))
    for file in total:
        print(f"{killed[file]:5} of {total[file]:5} noticed  {file}")
    print(f"{killed.total():5} of {total.total():5} noticed, {killed.total() / total.total():.1%}, in {seconds:.0f} s")
    print(*survivors, sep="\n")
    return bool(survivors)


if __name__ == "__main__":
    main()
