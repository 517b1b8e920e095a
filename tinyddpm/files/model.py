"""A trained model in one safetensors file: the weights, and as JSON metadata what is needed to build it again.

Nothing is ever unpickled, a file appears whole or not at all, a checksum tells whether it still is what was written,
and weights are read one by one to where they stay. A training run's checkpoint is such a file with more in it: run.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .diffusion import Diffusion
from .layouts import Layout, own_layout
from .schedule import Schedule
from .unet import UNet

Path = str | pathlib.Path
DIGITS_MODEL = pathlib.Path(__file__).parent / "digits" / "model.safetensors"
TRAINING = "training."  # so begin the names of the tensors that only matter for going on with a training


def save_model(path: Path, unet: UNet, diffusion: Diffusion, dtype: np.dtype | str | None = None) -> None:
    """Write the weights of `unet` and the configuration of both to `path`, replacing it in one move.

    `dtype` is that of the weights in the file: None, as they are; "float16" halves it, for 3 digits will do to draw
    samples. Raises FileNotFoundError if the folder does not exist, OSError if it cannot be written, ValueError for
    another dtype than float16, 32 or 64, or weights too large for it.
    """
    path, dtype = pathlib.Path(path), getattr(dtype, "__name__", dtype)
    if dtype is not None and dtype not in ("float16", "float32", "float64"):
        raise ValueError(f"dtype: expected 'float16', 'float32' or 'float64', got {dtype!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: there is no folder {path.parent}")
    tensors = unet.state_dict()
    if dtype is not None:
        tensors = {name: _rounded(name, w, dtype) for name, w in tensors.items()}
    tensors["schedule.beta"] = diffusion.schedule.beta
    with replacing(path) as (unfinished,):
        write_tensors(unfinished, tensors, {"tinyddpm": json.dumps(configuration(unet, diffusion))})


def configuration(unet: UNet, diffusion: Diffusion) -> dict[str, dict]:
    """What `load_model` needs besides the weights and the betas, of JSON's types."""
    schedule = diffusion.schedule
    parts = {"name": schedule.name, "input_scale": schedule.input_scale, "parameters": dict(schedule.parameters)}
    fields = [field.name for field in dataclasses.fields(diffusion) if field.name != "schedule"]
    return {"unet": unet.config, "schedule": parts, "diffusion": {name: getattr(diffusion, name) for name in fields}}


def _rounded(name: str, w: np.ndarray, dtype: np.dtype | str) -> np.ndarray:
    with np.errstate(over="ignore"):
        rounded = w.astype(dtype)
    if np.isinf(rounded).any():
        raise ValueError(f"dtype: {name} has weights of up to {np.abs(w).max():.3g}, too large for {dtype}")
    return rounded


def load_model(path: Path = DIGITS_MODEL) -> tuple[UNet, Diffusion]:
    """Return the U-Net and the diffusion that `save_model` wrote to `path`; by default those of the digits that come
    with the package, made as digits/README.txt says. Of a training run's checkpoint, those with the averaged weights.

    Raises FileNotFoundError, or ValueError if it is not such a file, has been damaged since it was written, or its
    weights do not fit its configuration.
    """
    with stored_tensors(path) as (stored, metadata):
        if "tinyddpm" not in metadata:
            raise ValueError(f"path: {path} was not written by save_model: its metadata has no entry 'tinyddpm'")
        try:
            config = json.loads(metadata["tinyddpm"])
            stored = {name: tensor for name, tensor in stored.items() if not name.startswith(TRAINING)}
            schedule = Schedule(stored.pop("schedule.beta").read(np.float64), **config["schedule"])
            unet = unet_from(stored, config["unet"])
            return unet, Diffusion(schedule, **config["diffusion"])
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"path: {path} holds no model that can be built: {error}") from error


# ------------------------------------------------------------------------------------------------ into a file, whole


@contextlib.contextmanager
def replacing(*paths: pathlib.Path, keep: bool = False) -> Iterator[list[pathlib.Path]]:
    """Yield a path beside each of `paths`, with ".part" appended, to write to; at the end, when all are complete and on
    the disk, they are moved to `paths`. An error before that leaves everything as it was. One writer at a time.

    With `keep`, what was at a path stays as its `previous` one. Raises OSError if a file cannot be written.
    """
    unfinished = [path.with_name(path.name + ".part") for path in paths]
    if folders := [str(path) for path in paths if path.is_dir()]:
        raise IsADirectoryError(f"path: cannot write {', '.join(folders)}, which is a folder")
    try:
        yield unfinished
        for part in unfinished:
            with part.open("rb+") as file:
                os.fsync(file)  # or a name could outlive a power cut that its content does not
        for part, path in zip(unfinished, paths):
            if keep and path.exists():
                _give_second_name(path, previous(path))
            os.replace(part, path)
        for folder in {path.parent for path in paths}:
            _sync_folder(folder)
    except OSError as error:
        raise OSError(error.errno, f"path: cannot write {paths[0]}: {error.strerror or error}") from error
    finally:
        for part in unfinished:
            part.unlink(missing_ok=True)


def _give_second_name(path: pathlib.Path, name: pathlib.Path) -> None:
    """And leave it its first, so that there is a file of that name at any moment."""
    name.unlink(missing_ok=True)
    try:
        os.link(path, name)
    except OSError:  # not every file system has links
        shutil.copyfile(path, name)


def _sync_folder(folder: pathlib.Path) -> None:
    """Have the new names in it survive a power cut, where a folder can be opened for that."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def previous(path: pathlib.Path) -> pathlib.Path:
    """Where `replacing` keeps what was at `path`: run.safetensors becomes run.previous.safetensors."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


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


def unet_from(stored: Mapping[str, Stored], config: Mapping, layout: Layout = own_layout) -> UNet:
    """Build the U-Net of this configuration and read its weights, each straight to where it stays.

    `layout` says how the file has them. A 1x1 filter will do for the weights of a dense layer, 16-bit floats are
    widened, and the network is float64 if any tensor is. Raises ValueError, which lists them all, if tensors are
    missing, unknown, of another shape or not floats; and what `UNet` does of a configuration that makes none.
    """
    unet = UNet(**config, rng=_NoWeights(stored))
    left, wrong, found = dict(stored), [], []
    for ours, p in unet.named_parameters().items():
        name, axes = layout(ours, p.ndim)
        shape, tensor = tuple(p.shape[axis] for axis in axes), left.pop(name, None)
        if tensor is None:
            wrong.append(f"{name} is missing")
        elif tensor.format not in FORMATS:
            wrong.append(f"{name} is of type {tensor.format} instead of {', '.join(FORMATS)}")
        elif tensor.shape != shape and not (len(shape) == 2 and tensor.shape == (*shape, 1, 1)):
            wrong.append(f"{name} has shape {tensor.shape} instead of {shape}")
        else:
            found.append((p, tensor, shape, np.argsort(axes)))  # which puts the axes back
    wrong += [f"{name} is unknown" for name in left]
    if wrong:
        raise ValueError(f"the weights do not fit the configuration: {'; '.join(wrong)}")
    dtype = np.float64 if any(tensor.format == "F64" for tensor in stored.values()) else np.float32
    for p, tensor, shape, back in found:
        p.data = np.ascontiguousarray(tensor.read(dtype).reshape(shape).transpose(back))
    return unet


class _NoWeights(np.random.Generator):
    """What `UNet` draws its initial weights from when they are about to be replaced by those `stored`: it gives zeros
    that take no time and no memory.

    Raises ValueError once a configuration asks for far more than these are, before its network fills the memory.
    """

    def __init__(self, stored: Mapping[str, Stored]):
        super().__init__(np.random.PCG64(0))
        self.arrays = 1000 + 4 * len(stored)
        self.numbers = 10**6 + 10 * sum(math.prod(tensor.shape) for tensor in stored.values())

    def uniform(self, low: float, high: float, size: tuple[int, ...]) -> np.ndarray:
        self.arrays, self.numbers = self.arrays - 1, self.numbers - math.prod(size)
        if self.arrays < 0 or self.numbers < 0:
            raise ValueError("the configuration is of a network many times as large as the weights that are there")
        return np.broadcast_to(np.float32(0), size)
