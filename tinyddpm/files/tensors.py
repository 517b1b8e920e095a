"""Tensors in a safetensors file: written with a checksum, which tells whether they still are what was written, and read
one by one to where they stay. Nothing is ever unpickled."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

Path = str | pathlib.Path


def write_tensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a safetensors file with a checksum, within `replacing`.

    The checksum is the SHA-256 of the file with zeros in the checksum's place, so that it covers every byte.
    """
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

    def read(self, dtype: np.dtype) -> np.ndarray:
        """Return it as an array of its own of `dtype`, float32 or float64."""
        # not mapped but read: pages of a mapped file would count as memory in use beside the weights
        self.file.seek(self.offset)
        x = np.fromfile(self.file, FORMATS[self.format], math.prod(self.shape))
        if self.format == "BF16":  # the upper half of a float32
            x = (x.astype(np.uint32) << 16).view(np.float32)
        return x.reshape(self.shape).astype(dtype, copy=False)


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
        raise FileNotFoundError(f"path: there is no file {path}")
    with path.open("rb") as file:
        try:
            with safe_open(path, framework="numpy") as checked:  # that the tensors fill the file and do not overlap
                checked.metadata()
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", None) or {}
            stored = {
                name: Stored(file, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), str(entry["dtype"]))
                for name, entry in header.items()
            }
        except (SafetensorError, TypeError) as error:  # TypeError: a list for an object passes the check
            raise ValueError(
                f"path: {path} is not a readable safetensors file: {error} (it has {path.stat().st_size:,} bytes)"
            ) from error
        if "sha256" in metadata or "training" in metadata:
            _check(file, path, metadata.get("sha256", ""))
        yield stored, metadata
