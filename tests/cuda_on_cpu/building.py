"""Compiling C and C++ once and keeping the results on disk, for any number of processes at a time."""

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
HEADERS = HERE / "include"
CXX_FLAGS = ("-O1", "-std=c++17", "-fPIC", "-w", "-fpermissive")


def cache_folder() -> Path:
    """Return where everything compiled is kept; safe to delete."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "tinyddpm-cuda-on-cpu"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """Return the file or folder `name` of the cache; where it is missing, `make` writes it.

    `make` gets a path of its own, which is renamed afterwards: another process sees all of it or nothing.
    """
    target = cache_folder() / name
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix="unfinished-") as scratch:
        unfinished = Path(scratch) / name
        make(unfinished)
        try:
            unfinished.rename(target)
        except OSError:
            if not target.exists():  # it does where another process has just made the same folder
                raise
    return target


@functools.cache
def headers_fingerprint() -> bytes:
    """Return a digest of the headers of this package and of their compilers' versions."""
    digest = hashlib.sha256(" ".join(CXX_FLAGS).encode())
    for path in sorted(path for path in HEADERS.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(HEADERS)}\n".encode() + path.read_bytes())
    for compiler in ("gcc", "g++"):
        digest.update(subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout)
    return digest.digest()


def fingerprint(*parts: str) -> str:
    """Return a name for what is compiled from `parts` with this package's headers and this machine's compilers."""
    return hashlib.sha256(headers_fingerprint() + "\0".join(parts).encode()).hexdigest()[:24]


def toolkit() -> Path:
    """Return a folder in place of a CUDA toolkit's: `include` holds this package's headers.

    `shim.h` is there compiled in advance as well, which more than halves the time that a kernel takes, and so is an
    empty `cuda_runtime.h`, without which CuPy takes the toolkit to be missing.
    """

    def make(folder: Path) -> None:
        include = folder / "include"
        shutil.copytree(HEADERS, include)
        include.joinpath("cuda_runtime.h").touch()
        shim = include / "shim.h"
        run(["g++", *CXX_FLAGS, "-x", "c++-header", str(shim), "-o", f"{shim}.gch"])

    return cached(f"toolkit-{fingerprint()}", make)


def shared_library(compiler: str, source: str, suffix: str, flags=(), first_flags=()) -> Path:
    """Return the shared library compiled from `source`, a file's text."""

    def make(library: Path) -> None:
        text = library.with_suffix(suffix)
        text.write_text(source)
        run([compiler, *first_flags, "-shared", "-fPIC", str(text), *flags, "-o", str(library)])

    return cached(f"{fingerprint(compiler, source, *first_flags, *flags)}.so", make)


def run(command: list[str]) -> None:
    """Run a compiler. Raises RuntimeError with the first lines of what it said if it failed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        first_lines = "\n".join(done.stderr.splitlines()[:20])
        raise RuntimeError(f"{command[0]} failed:\n{first_lines}")
