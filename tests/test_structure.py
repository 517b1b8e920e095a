"""The shape of the source itself: who may import whom, how long files may be, what `import tinyddpm` loads."""

import ast
import io
import pathlib
import subprocess
import sys
import tokenize

import pytest

import tinyddpm

PACKAGE = pathlib.Path(tinyddpm.__file__).parent
OPS = {"backend", "tensor", "functional", "conv", "fused"}
NETWORK = OPS | {"nn", "unet"}

# the stairs: each file, and what it may import from the package
MAY_IMPORT = {
    "backend": set(),
    "tensor": {"backend"},
    "functional": {"backend", "tensor"},
    "cuda": {"backend", "functional"},
    "winograd": {"backend", "functional"},
    "conv": {"backend", "tensor", "functional", "winograd"},
    "fused": {"backend", "tensor", "functional"},
    "nn": OPS,
    "unet": OPS | {"nn"},
    "schedule": set(),
    "likelihood": {"backend", "tensor", "functional"},
    "limit": {"backend"},
    "parallel": {"backend"},
    "diffusion": OPS | {"schedule", "likelihood", "limit", "parallel", "winograd"},
    "sample": {"backend", "tensor", "winograd", "schedule", "limit", "diffusion", "parallel"},
    "editing": {"backend", "limit", "diffusion", "sample"},
    "optim": {"backend", "tensor"},
    "download": set(),
    "data": {"backend", "download"},
    "folder": set(),
    "image": {"backend"},
    "run": {"backend", "checkpoint", "diffusion", "nn", "unet"},
    "record": {"checkpoint", "image", "run"},
    "train": {"backend", "tensor", "nn", "diffusion", "optim", "parallel", "data", "run"},
    "layouts": set(),
    "checkpoint": NETWORK | {"schedule", "diffusion", "layouts"},
    "diffusers_config": {"unet", "schedule", "limit", "diffusion"},
    "exchange": {"backend", "checkpoint", "diffusers_config", "layouts", "optim", "unet", "schedule", "diffusion"},
}
# other packages, and the only files that may import them
ONLY_IN = {"cupy": {"backend", "cuda"}, "cupy_backends": {"cuda"}, "cupyx": {"cuda"}, "concurrent": {"parallel"},
           "threading": {"tensor", "winograd", "parallel", "folder"}, "multiprocessing": {"parallel"},
           "mmap": {"parallel"}, "ctypes": {"parallel"}, "threadpoolctl": {"parallel"}, "mpi4py": {"parallel"},
           "PIL": {"image", "data", "folder"}, "matplotlib": {"image"}, "safetensors": {"checkpoint"}, "torch": set(),
           "diffusers": set(), "scipy": set(), "numba": set(), "pickle": set()}  # fmt: skip

FILES = sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__")


def imports(name):
    """The modules a file imports: its siblings, and the top-level names of all others."""
    siblings, others = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            siblings |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
    return siblings, others


def test_every_file_stands_on_the_stairs():
    assert set(FILES) == set(MAY_IMPORT)


@pytest.mark.parametrize("name", FILES)
def test_imports_go_one_way(name):
    siblings, others = imports(name)
    assert siblings <= MAY_IMPORT[name]
    assert "tinyddpm" not in others
    for package, files in ONLY_IN.items():
        assert package not in others or name in files, f"{name} imports {package}"


def test_the_stairs_have_no_circle():
    done = set()
    while left := set(MAY_IMPORT) - done:
        free = {name for name in left if MAY_IMPORT[name] <= done}
        assert free, f"a circle among {left}"
        done |= free


def lines_of_code(path):
    """Lines that hold code: no blank lines, comments or docstrings."""
    source = path.read_text()
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_the_budget_of_lines():
    sizes = {path.name: lines_of_code(path) for path in PACKAGE.glob("*.py")}
    # the plan was 2500, which did not count what a GPU needs (210), diffusers' folders (430), data sets and folders of
    # pictures (360), checkpoints, faults and ranks (460)
    assert sum(sizes.values()) < 4150
    assert max(sizes.values()) < 300, sizes


@pytest.mark.parametrize("name", ["__init__", *FILES])
def test_every_file_and_every_public_name_says_what_it_is_for(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    assert ast.get_docstring(tree)
    plain = {
        "add",
        "sub",
        "mul",
        "div",
        "neg",
        "exp",
        "log",
        "sqrt",
        "tanh",
        "reduce_sum",
        "reduce_mean",
        "reshape",
    }  # NumPy's own
    for node in tree.body:
        if (
            isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and not node.name.startswith("_")
            and node.name not in plain
        ):
            assert ast.get_docstring(node), f"{name}.{node.name}"


def test_public_names():
    assert set(tinyddpm.__all__) >= {"UNet", "Diffusion", "make_schedule", "sample", "no_grad", "backward"}
    assert all(hasattr(tinyddpm, name) for name in tinyddpm.__all__)


def test_import_loads_no_extra():
    extras = ("cupy", "mpi4py", "matplotlib", "torch", "hypothesis", "PIL")
    code = f"import sys, tinyddpm; print([m for m in {extras} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
