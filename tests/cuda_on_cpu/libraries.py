"""Libraries in place of cuBLAS and cuRAND, loaded under the names that CuPy's modules ask for before these are."""

import ctypes
import importlib
import importlib.util
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from . import building

ADMINISTRATION = re.compile(r"cu(blas|rand)(Create|Destroy|Get|Set)")


def load(name: str, implementation: str, numbers: bool, failure: int) -> Callable[[], Counter]:
    """Load a library of which CuPy's module `name` needs functions, compiled from C; return what tells how often each
    of those that give the device work has been called since the process began.

    `implementation` is C code with some of them; the others are added. With `numbers` these fail and say so on stderr,
    with `failure` as their status; else they count and return 0, "success".
    """
    names, library_name = needed(name)
    missing = [function for function in names if not re.search(rf"\b{function}\b", implementation)]
    fail = f'fprintf(stderr, "cuda_on_cpu: %s is not emulated\\n", __func__); return {failure};'
    stubs = [f"int {f}() {{ COUNT({f}); {fail if numbers else 'return 0;'} }}\n" for f in missing]
    start = (
        "#include <stdio.h>\n"
        f"#define NUMBERS {int(numbers)}\n"
        f"enum {{ {', '.join(f'index_{function}' for function in names)} }};\n"
        f"long calls[{len(names)}];\n"
        "#define COUNT(name) __atomic_add_fetch(&calls[index_##name], 1, __ATOMIC_RELAXED)\n"
    )
    versions = f"{library_name} {{ global: *; }};\n"
    script = building.cached(f"{library_name}.map", lambda path: path.write_text(versions))
    linking = f"-Wl,-soname,{library_name}", f"-Wl,--version-script={script}"
    flags = "-O3", "-w", f"-I{building.HEADERS}", *linking
    path = building.shared_library("gcc", "".join((start, implementation, *stubs)), ".c", flags)
    calls = (ctypes.c_long * len(names)).in_dll(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL), "calls")
    return lambda: Counter({f: count for f, count in zip(names, calls) if count and not ADMINISTRATION.match(f)})


def needed(name: str) -> tuple[list[str], str]:
    """The functions that a compiled module of CuPy wants from a library, and that library's name."""
    package = importlib.util.find_spec("cupy_backends")
    (path,) = Path(package.submodule_search_locations[0]).glob(f"cuda/libs/{name}.*.so")
    command = ["nm", "-D", "--undefined-only", str(path)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(rf"\b({name}\w+)@+(\S+)", listed)
    return [function for function, _ in found], found[0][1]


def install(numbers: bool) -> Callable[[], Counter]:
    """Load both libraries, and CuPy's modules that need them; return what tells how often each function was called.

    CuPy would import these on their first use, but after a search for a toolkit's libraries, in vain.
    """
    of_cublas = load("cublas", (building.HERE / "cublas.c").read_text(), numbers, failure=15)
    of_curand = load("curand", "", numbers, failure=203)
    for name in ("cublas", "curand"):
        importlib.import_module(f"cupy_backends.cuda.libs.{name}")
    return lambda: of_cublas() + of_curand()
