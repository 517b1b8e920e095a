"""The shape of the source itself: which room may import from which, how long files and functions may be, what every
file says first, what `import tinyddpm` loads."""

import ast
import functools
import io
import pathlib
import subprocess
import sys
import tokenize

import pytest

import tinyddpm

PACKAGE = pathlib.Path(tinyddpm.__file__).parent

# The stairs: each room stands on those before it, as far as it names them. A room is a folder, or a file beside them.
ROOMS = {
    "backend": set(),
    "bar": set(),
    "arguments": {"backend"},
    "autograd": {"backend", "arguments"},
    "network": {"backend", "arguments", "autograd"},
    "diffusion": {"backend", "arguments", "bar", "autograd"},  # a network is any callable
    "speed": {"backend", "arguments", "autograd"},
    "files": {"backend", "arguments", "bar", "network", "diffusion"},
    "training": {"backend", "arguments", "autograd", "network", "diffusion", "speed", "files"},
    "exchange": {"backend", "arguments", "network", "diffusion", "files", "training"},
    "cli": {"files"},
    "options": {"diffusion", "files", "speed", "cli"},
    "program": {"network", "diffusion", "files", "speed", "exchange", "cli", "options"},
    "__main__": {"diffusion", "files", "exchange", "cli", "options", "program", "tinyddpm"},
}
# What a learner reads: these files import nothing that is only faster, or only practical. Of training it is the loop
# and what it needs; train.py, which goes on from checkpoints and hands the work out, is for users.
SHELVES = ("autograd", "network", "diffusion", "training")
FOR_USERS = {"training/train.py"}
PRACTICAL = {"speed", "files", "exchange", "cli", "options", "program", "__main__"}

# other packages, and the only files that may import them
ONLY_IN = {
    "cupy": "backend.py speed/cuda.py", "cupy_backends": "speed/cuda.py", "cupyx": "speed/cuda.py",
    "concurrent": "speed/workers.py", "multiprocessing": "speed/workers.py", "mmap": "speed/workers.py",
    "ctypes": "speed/workers.py", "threadpoolctl": "speed/workers.py", "mpi4py": "speed/ranks.py",
    "threading": "backend.py autograd/tensor.py speed/winograd.py speed/workers.py files/folder.py files/quiet.py",
    "argparse": "cli.py options.py program.py", "signal": "cli.py speed/workers.py", "tqdm": "bar.py",
    "importlib": "backend.py",  # the twins, when they are first needed
    "fcntl": "files/lock.py", "msvcrt": "files/lock.py", "safetensors": "files/tensors.py",
    "PIL": "files/pictures.py files/data.py files/decoding.py", "matplotlib": "files/pictures.py",
    "torch": "", "diffusers": "", "scipy": "", "numba": "", "pickle": "",
}  # fmt: skip

FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
FACES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.glob("*/__init__.py"))  # of the rooms


def room(file):
    return file.split("/")[0].removesuffix(".py")


@functools.cache
def imports(file):
    """What a file imports: files of the package, such as "autograd/conv.py", and the top-level names of all others.
    Not what is there for type checkers alone."""
    ours, others = set(), set()
    tree = ast.parse((PACKAGE / file).read_text())
    for_checkers = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    skipped = {id(inner) for block in for_checkers for statement in block.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = PACKAGE.joinpath(file).parents[node.level - 1]
            base = folder.joinpath(*(node.module or "").split("."))
            for found in [base / alias.name for alias in node.names] if base.is_dir() else [base]:
                path = found.with_suffix(".py").relative_to(PACKAGE).as_posix()
                ours.add(path if path in FILES else "tinyddpm")  # a public name, from the package itself
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
    return ours, others


def test_every_file_is_in_a_room_and_a_room_loads_nothing_by_itself():
    assert {room(file) for file in FILES} == set(ROOMS)
    assert all(imports(face) == (set(), set()) for face in FACES)


@pytest.mark.parametrize("file", FILES)
def test_imports_go_down_the_stairs(file):
    ours, others = imports(file)
    assert {room(other) for other in ours} - {room(file)} <= ROOMS[room(file)]
    assert "tinyddpm" not in others
    for package, files in ONLY_IN.items():
        assert package not in others or file in files.split(), f"{file} imports {package}"


@pytest.mark.parametrize("edges", ["rooms", "files"])
def test_the_stairs_have_no_circle(edges):
    left = dict(ROOMS) if edges == "rooms" else {file: imports(file)[0] for file in FILES}
    left = {name: others - {"tinyddpm"} for name, others in left.items()}
    while left:
        free = {name for name, others in left.items() if not others & left.keys()}
        assert free, f"a circle among {left}"
        left = {name: others for name, others in left.items() if name not in free}


@pytest.mark.parametrize("file", [f for f in FILES if room(f) in SHELVES and f not in FOR_USERS])
def test_what_a_learner_reads_does_not_lead_to_what_is_only_faster_or_practical(file):
    """Not over other files either: all that it needs is on the shelves."""
    todo, seen = [file], set()
    while todo:
        for other in imports(todo.pop())[0] - seen:
            assert room(other) not in PRACTICAL and other not in FOR_USERS, f"{file} leads to {other}"
            seen.add(other)
            todo.append(other)


@functools.cache
def code_rows(source):
    """The numbers of the lines that hold code: no blank lines, comments or docstrings."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return lines - docstrings


def lines_of_code(path):
    return len(code_rows(path.read_text()))


def rows_within(file, name):
    """How many lines of code a class or function of a file has, and its tree."""
    source = (PACKAGE / file).read_text()
    (found,) = [n for n in ast.walk(ast.parse(source)) if getattr(n, "name", None) == name]
    return len(code_rows(source) & set(range(found.lineno, found.end_lineno + 1))), found


@pytest.mark.parametrize("file", [f for f in FILES if room(f) in SHELVES])
def test_what_a_learner_reads_is_short(file):
    source = (PACKAGE / file).read_text()
    assert lines_of_code(PACKAGE / file) <= 250
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            count = len(code_rows(source) & set(range(node.lineno, node.end_lineno + 1)))
            assert count <= 60, f"{node.name} has {count} lines of code"


def test_algorithm_1_is_in_sight_and_the_process_fits_two_screens():
    """The loop has twenty lines at most, and what the paper's algorithm says in the order in which it says it."""
    count, loop = rows_within("training/loop.py", "descend")
    assert count <= 20 and rows_within("diffusion/process.py", "Diffusion")[0] <= 120
    called = [n.func for n in ast.walk(loop) if isinstance(n, ast.Call)]
    called.sort(key=lambda f: (f.lineno, f.col_offset))
    names = [ast.unparse(f) for f in called if ast.unparse(f) not in ("range", "rate", "check")]
    assert names == ["draw_and_differentiate", "clip_norm", "optimizer.step", "ema.update"]


def test_the_budget_of_lines():
    """For thought, not a golf score: no line is made denser to meet it."""
    sizes = {file: lines_of_code(PACKAGE / file) for file in FILES}
    read = sum(count for file, count in sizes.items() if room(file) in SHELVES)
    assert read < 2400 and sum(sizes.values()) - read < 3600 and max(sizes.values()) < 300, (read, sizes)
    assert len((pathlib.Path(__file__).parents[1] / "examples" / "mnist_ddpm.py").read_text().splitlines()) < 100


PLAIN = {  # NumPy's own, which say nothing else
    "add", "sub", "mul", "div", "neg", "exp", "log", "sqrt", "tanh", "reduce_sum", "reduce_mean", "reshape"
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_file_and_every_public_name_says_what_it_is_for(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert node.name in PLAIN or node.name == "main" or ast.get_docstring(node), node.name


@pytest.mark.parametrize("folder", sorted({room(file) for file in FILES if "/" in file}))
def test_a_room_names_its_files(folder):
    """So that who opens it knows where to begin."""
    text = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text()))
    for file in FILES:
        if file.startswith(f"{folder}/"):
            assert file.split("/")[1] in text, file


def test_public_names():
    assert set(tinyddpm.__all__) == {
        "EMA", "Adam", "Diffusion", "ImageFolder", "Parameter", "Schedule", "Tensor", "TrainState", "UNet", "backward",
        "load_diffusers", "load_digits", "load_fashion_mnist", "load_mnist", "load_model", "load_original",
        "make_schedule", "no_grad", "sample", "save_diffusers", "save_model", "train",
    }  # fmt: skip
    assert all(hasattr(tinyddpm, name) for name in tinyddpm.__all__)


def test_import_loads_no_extra_and_twins_when_they_are_needed():
    """Those for a CPU are not needed to import the package, those for a GPU not without one."""
    late = "cupy", "mpi4py", "matplotlib", "torch", "hypothesis", "PIL", "tinyddpm.speed.cpu", "tinyddpm.speed.cuda"
    code = (
        "import sys, numpy, tinyddpm; from tinyddpm.autograd.functional import column_sums\n"
        f"seen = lambda: print([name for name in {late} if name in sys.modules])\n"
        "seen(); column_sums(numpy.ones((3, 1))); seen()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n['tinyddpm.speed.cpu']\n"
