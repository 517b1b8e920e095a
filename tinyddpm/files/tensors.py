"""Tensors in a safetensors file: written with a checksum, which tells whether they still are what was written, and read
one by one to where they stay. Nothing is ever unpickled."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .mistaken import what_it_is, where_it_is

Path = str | pathlib.Path


def write_tensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a safetensors file with a checksum, within `replacing`.

    The checksum is the SHA-256 of the file with zeros in the checksum's place, so that it covers every byte.
    Raises ValueError, before anything is written, unless all numbers are finite.
    """
    check_finite(tensors)
    # the library takes memory as it lies, whatever the strides. It would put the metadata in any order, so that equal
    # models were different files, and its own writer leaves a file of another name behind when it is killed
    content = memoryview(save({name: np.ascontiguousarray(x) for name, x in tensors.items()}))
    start = 8 + int.from_bytes(content[:8], "little")
    entries, numbers = json.loads(bytes(content[8:start])), content[start:]
    header = json.dumps({"__metadata__": metadata | {"sha256": _ZEROS}} | entries, separators=(",", ":"))
    header += -len(header) % 8 * " "  # so that the numbers begin at a multiple of 8
    header = len(header).to_bytes(8, "little") + header.encode()
    checksum = hashlib.sha256(header)
    checksum.update(numbers)
    with path.open("wb") as file:
        file.write(header.replace(_entry(_ZEROS), _entry(checksum.hexdigest())))
        file.write(numbers)


def check_finite(tensors: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError, which names the first that is not, unless all of these tensors are finite: with others a
    network draws nothing."""
    counts = {name: np.count_nonzero(~np.isfinite(x)) for name, x in tensors.items()}
    if bad := [name for name, count in counts.items() if count]:
        raise ValueError(
            f"{bad[0]}: {counts[bad[0]]:,} of its {tensors[bad[0]].size:,} numbers are nan or infinite"
            + (f", and some in {len(bad) - 1} other tensors" if bad[1:] else "")
            + ". Nothing can be drawn with such weights: take those of an earlier step"
        )


_ZEROS = "0" * 64


def _entry(checksum: str) -> bytes:
    """As it stands in the header of a file; within the other metadata quotes are escaped."""
    return f'"sha256":"{checksum}"'.encode()


def _check(file: BinaryIO, path: pathlib.Path, checksum: str) -> None:
    """Raise ValueError unless this is the checksum of an opened file."""
    file.seek(0)
    length = file.read(8)
    found = hashlib.sha256(length)
    found.update(file.read(int.from_bytes(length, "little")).replace(_entry(checksum), _entry(_ZEROS)))
    while chunk := file.read(2**20):
        found.update(chunk)
    if found.hexdigest() != checksum:
        raise ValueError(f"path: {path} has been damaged since it was written: its checksum does not fit")


# ----------------------------------------------------------------------------------------- out of a file, one by one


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file, not yet read: where it is and what it is."""

    file: BinaryIO
    offset: int
    shape: tuple[int, ...]
    format: str
    name: str = ""

    def read(self, dtype: np.dtype) -> np.ndarray:
        """Return it as an array of its own of `dtype`, float32 or float64. Raises ValueError unless its numbers are of
        a type in FORMATS and finite."""
        if self.format not in FORMATS:
            raise ValueError(f"{self.name} is of type {self.format} instead of {', '.join(FORMATS)}")
        # not mapped but read: pages of a mapped file would count as memory in use beside the weights
        self.file.seek(self.offset)
        x = np.fromfile(self.file, FORMATS[self.format], math.prod(self.shape))
        if self.format == "BF16":  # the upper half of a float32
            x = (x.astype(np.uint32) << 16).view(np.float32)
        x = x.reshape(self.shape).astype(dtype, copy=False)
        check_finite({self.name: x})
        return x


FORMATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@contextlib.contextmanager
def stored_tensors(path: Path) -> Iterator[tuple[dict[str, Stored], dict[str, str]]]:
    """Yield what a safetensors file holds, {name: tensor}, and its metadata; of the tensors nothing is read yet. The
    file is opened once, so that all are of one model, even if another takes its place meanwhile. If it has a checksum,
    as all have that `write_tensors` wrote, that is checked.

    Raises FileNotFoundError, or ValueError unless it is a whole and sound file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        fault = f"{path} is a folder. {where_it_is(path)}" if path.is_dir() else f"there is no file {path}"
        raise FileNotFoundError(f"path: {fault}")
    with path.open("rb") as file:
        try:
            with safe_open(path, framework="numpy") as checked:  # that the tensors fill the file and do not overlap
                checked.metadata()
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", None) or {}
            stored = {
                name: Stored(
                    file, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), str(entry["dtype"]), name
                )
                for name, entry in header.items()
            }
        except (SafetensorError, TypeError) as error:  # TypeError: a list for an object passes the check
            raise ValueError(f"path: {path} is not a readable safetensors file: {_fault(path, error)}") from error
        if "sha256" in metadata or "training" in metadata:
            _check(file, path, metadata.get("sha256", ""))
        yield stored, metadata


def _fault(path: pathlib.Path, error: Exception) -> str:
    """Why a file is no safetensors file: it is another, not all of it is there, or what the library says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if known := what_it_is(start := file.read(1000)):
            return known
        file.seek(8)
        length = int.from_bytes(start[:8], "little")
        header = file.read(min(length, size)) if length < 10**8 else b""  # the most that the library takes
    ends = re.findall(rb'"data_offsets"\s*:\s*\[\s*\d+\s*,\s*(\d{1,18})\b', header)
    whole = 8 + length + max(map(int, ends), default=0)
    if length < 10**8 and size < whole:
        least = "at least " if len(header) < length else ""
        return f"it ends after {size:,} of {least}{whole:,} bytes: download or copy it again"
    return f"{error} (it has {size:,} bytes)"
