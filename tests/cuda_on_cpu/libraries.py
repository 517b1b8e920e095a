"""Libraries in place of cuBLAS and cuRAND, loaded under the names that CuPy's modules ask for before these are."""

import ctypes
import importlib
import importlib.util
import re
import subprocess
from collections import Counter
from pathlib import Path

from . import building

ADMINISTRATION = re.compile(r"cublas(Create|Destroy|Get|Set)(_v2|Version|Stream|PointerMode|MathMode)")


class Library:
    """A library of which CuPy's module `module_name` needs functions, compiled from C.

    `implementation` is C code with some of them; the others are added. With `numbers` these fail and say so on
    stderr, with `failure` as their status; else they count and return 0, "success".
    """

    def __init__(self, module_name: str, prefix: str, implementation: str, numbers: bool, failure: int) -> None:
        self.names, library_name = needed(module_name, prefix)
        source = [f"#define NUMBERS {int(numbers)}\n", self.counters(), implementation]
        for name in self.names:
            if not re.search(rf"\b{implemented(name)}\b", implementation):
                source.append(self.stub(name, numbers, failure))
        version_script = building.cached(
            f"{library_name}.map", lambda path: path.write_text(f"{library_name} {{ global: *; }};\n")
        )
        flags = (
            "-O3",
            "-w",
            f"-I{building.HEADERS}",
            f"-Wl,-soname,{library_name}",
            f"-Wl,--version-script={version_script}",
        )
        path = building.shared_library("gcc", "".join(source), ".c", (*flags, "-lm"))
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.calls = (ctypes.c_long * len(self.names)).in_dll(library, "calls")

    def counters(self) -> str:
        """Return C code of one counter for each function."""
        indices = ", ".join(f"index_{name}" for name in self.names)
        return (
            "#include <stdio.h>\n"
            f"enum {{ {indices} }};\n"
            f"long calls[{len(self.names)}];\n"
            "#define COUNT(name) __atomic_add_fetch(&calls[index_##name], 1, __ATOMIC_RELAXED)\n"
        )

    def stub(self, name: str, numbers: bool, failure: int) -> str:
        """Return C code of a function that does nothing."""
        body = f"COUNT({name});"
        if numbers:
            body += f' fprintf(stderr, "cuda_on_cpu: {name} is not emulated\\n"); return {failure};'
        else:
            body += " return 0;"
        return f"int {name}() {{ {body} }}\n"

    def launching_calls(self) -> "Counter[str]":
        """Return how often each function that gives the device work has been called since the process began."""
        return Counter(
            {
                name: count
                for name, count in zip(self.names, self.calls)
                if count and not ADMINISTRATION.match(name) and not re.match("curand(Create|Destroy|Get|Set)", name)
            }
        )


def implemented(name: str) -> str:
    """Return what stands in cublas.c where `name` is implemented there: some names are put together by macros."""
    pasted = re.fullmatch(r"cublas([SD])(gemm.*|gemv_v2|ger_v2|dot_v2|nrm2_v2|asum_v2|axpy_v2|scal_v2)", name)
    if pasted and pasted[2] != "gemmEx":
        return f"cublas##LETTER##{pasted[2]}"
    prop = re.fullmatch(r"cublas[GS]et(Stream_v2|PointerMode_v2|MathMode)", name)
    return f"PROPERTY\\({prop[1]}" if prop else name


def needed(module_name: str, prefix: str) -> tuple[list[str], str]:
    """Return the functions that a compiled module of CuPy wants from a library, and that library's name."""
    package = importlib.util.find_spec("cupy_backends")
    (path,) = Path(package.submodule_search_locations[0]).glob(f"cuda/libs/{module_name}.*.so")
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(path)], capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(rf"\b({prefix}\w+)@+(\S+)", listed)
    return [name for name, _ in found], found[0][1]


def install(numbers: bool) -> list[Library]:
    """Load both libraries, and CuPy's modules that need them.

    CuPy would import these on their first use, but after a search for a toolkit's libraries, in vain.
    """
    cublas = Library("cublas", "cublas", (building.HERE / "cublas.c").read_text(), numbers, failure=15)
    version = "int curandGetVersion(int *version) { *version = 10400; return 0; }\n"
    curand = Library("curand", "curand", version, numbers, failure=203)
    importlib.import_module("cupy_backends.cuda.libs.cublas")
    importlib.import_module("cupy_backends.cuda.libs.curand")
    return [cublas, curand]
