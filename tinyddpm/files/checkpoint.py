"""A training run that can end at any moment, and goes on as if it never had: checkpoints, signals, the log.

A checkpoint is one file (see checkpoint.py): a model that `load_model` reads, with the averaged weights, and beside
them what training needs to go on. Of random generators nothing has to be saved: whatever is drawn for a step comes from
a stream made anew from (seed, step), so the seed and the step are their state.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import pathlib
import signal
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TextIO

import numpy as np

from .backend import to_device, to_numpy
from .checkpoint import TRAINING, Path, configuration, previous, replacing, stored_tensors, write_tensors
from .diffusion import Diffusion
from .nn import Module
from .unet import UNet


def write_checkpoint(
    path: Path, average: Module, diffusion: Any, vectors: Mapping[str, np.ndarray], facts: Mapping[str, Any]
) -> None:
    """Write a checkpoint in one move, and keep the one before, as run.previous.safetensors for run.safetensors.

    Args: average: the model with the averaged weights. vectors: theta and Adam's m and v, each (P,). facts: all else,
    of JSON's types; facts["config"] is what has to be the same when the run goes on.
    Raises OSError, and leaves the checkpoint that is there, if it cannot be written.
    """
    tensors, metadata = average.state_dict(), {"training": json.dumps(facts)}
    if type(average) is UNet and type(diffusion) is Diffusion:
        tensors["schedule.beta"] = diffusion.schedule.beta
        metadata["tinyddpm"] = json.dumps(configuration(average, diffusion))
    tensors |= {TRAINING + name: to_numpy(vector) for name, vector in vectors.items()}
    path = pathlib.Path(path)
    with replacing(path, keep=True) as (unfinished,):
        write_tensors(unfinished, tensors, metadata)


def read_checkpoint(
    path: Path, average: Module, vectors: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Read a checkpoint into `average` and `vectors`, and return its facts; None if there is none.

    If it is damaged, the one before is read, with a warning. Nothing is changed unless all fits. What `config` lacks is
    as it was.
    Raises ValueError or OSError if neither is whole, ValueError if it is of a run with another configuration; the
    fields are named.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return None
    try:
        facts, found = _read(path, average.dtype)
    except (ValueError, OSError) as error:  # OSError: of a bad disk
        if not previous(path).exists():
            raise
        warnings.warn(f"{error}; going on from the one before it, {previous(path).name}", stacklevel=2)
        facts, found = _read(previous(path), average.dtype)
    if differing := differences(facts["config"], facts["config"] | config):
        more = f"; and {len(differing) - 8} more" if len(differing) > 8 else ""
        raise ValueError(f"{path} is of another run: {'; '.join(differing[:8])}{more}")
    found.pop("schedule.beta", None)
    for name, vector in vectors.items():
        vector[...] = to_device(found.pop(TRAINING + name), average.device)
    average.load_state_dict(found)
    return facts


def _read(path: pathlib.Path, dtype: np.dtype) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The facts and the tensors of a checkpoint."""
    with stored_tensors(path) as (stored, metadata):
        if "training" not in metadata:
            raise ValueError(f"path: {path} is no checkpoint of a training")
        return json.loads(metadata["training"]), {name: tensor.read(dtype) for name, tensor in stored.items()}


def differences(first: Any, second: Any, name: str = "", where: tuple[str, str] = ("there", "here")) -> list[str]:
    """What differs between two configurations, such as "lr: 0.1 there, 0.2 here", field by field."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        keys = sorted(first.keys() | second.keys())
        parts = [differences(first.get(k), second.get(k), f"{name}.{k}" if name else k, where) for k in keys]
        return [line for part in parts for line in part]
    return [] if first == second else [f"{name}: {first!r} {where[0]}, {second!r} {where[1]}"]


def run_config(model: Module, diffusion: Any, images: Any, labels: np.ndarray | None, **settings: Any) -> dict:
    """What decides about the outcome of a training, and so has to be the same when it goes on, of JSON's types."""
    if isinstance(model, UNet) and isinstance(diffusion, Diffusion):
        config = configuration(model, diffusion) | {"T": diffusion.T}
        if diffusion.schedule.name == "custom":  # of others, name, T and parameters tell all
            config["beta"] = checksum(diffusion.schedule.beta)
    else:
        config = {"parameters": {name: list(p.shape) for name, p in model.named_parameters().items()}}
    config |= {
        "types": [type(model).__qualname__, type(diffusion).__qualname__],
        "dtype": str(model.dtype),
        "precision": model.precision,
        "images": [list(images.shape), getattr(images, "fingerprint", None) or checksum(_some(images))],
        "labels": None if labels is None else checksum(labels.astype(np.int64)),
    }
    return json.loads(json.dumps(config | settings, default=_plain))


def _plain(value: Any) -> Any:
    """What stands in a configuration for a value of a type that JSON does not have."""
    if isinstance(value, np.generic):
        return value.item()
    return checksum(value) if isinstance(value, np.ndarray) else type(value).__qualname__


def checksum(x: np.ndarray) -> str:
    """A few digits that recognise an array's values."""
    return f"{zlib.crc32(np.ascontiguousarray(x)):08x}"


def _some(images: np.ndarray) -> np.ndarray:
    """A hundred of them, for all may be more than fit into memory."""
    return images[np.linspace(0, len(images) - 1, 100).astype(int)]


def set_aside(folder: Path, names: Iterable[str]) -> pathlib.Path:
    """Move the files of these names, which may be patterns such as step_*.png, as far as they are in `folder`, to a new
    folder in it, earlier-1 or earlier-2 or ..., and return that."""
    numbered = (pathlib.Path(folder, f"earlier-{n}") for n in itertools.count(1))
    earlier = next(candidate for candidate in numbered if not candidate.exists())
    earlier.mkdir()
    for path in [path for name in names for path in pathlib.Path(folder).glob(name)]:
        os.replace(path, earlier / path.name)
    return earlier


@contextlib.contextmanager
def stop_signals(notice: str = "") -> Iterator[Callable[[], bool]]:
    """Within this block, Ctrl-C and SIGTERM ask for an end instead of making one; yields a function that says whether
    they have. The second one ends the program at once. `notice` is printed on stderr at the first.

    In another thread than the first, nothing changes, for signals are for the first.
    """
    asked, before = [], {}

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        for number in before:
            signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # nobody may be reading any more
            os.write(2, f"\n{notice}\n".encode() if notice else b"")  # print may be at work where this breaks in

    with contextlib.suppress(ValueError):  # in another thread
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class MetricsLog:
    """A CSV file with a line for each step: what `TrainState.metrics` says of it.

    The first step that is written decides what stays of a log that is there: the lines of earlier steps. So a run that
    goes on appends, without a line twice, and one that begins anew begins the log anew. None is left out either if the
    log is flushed before a checkpoint is saved. Of a GPU, which runs behind, the lines of some steps are written
    together, when somebody has looked at the loss.
    Raises OSError if it cannot be written, and the next step tries again; or if the file is no such log.
    """

    def __init__(self, path: Path):
        self.path, self.file, self.pending = pathlib.Path(path), None, []

    def write(self, state: Any) -> None:
        """Append the step of a `TrainState`, as soon as its loss is a number."""
        self.pending.append(state)
        if state.seen:
            self._write_pending()

    def flush(self) -> None:
        """Have all steps on the disk; of a GPU's, this waits for the last."""
        self._write_pending()
        if self.file:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Have all steps on the disk, and end."""
        self.flush()
        if self.file:
            self.file.close()
        self.file = None

    def losses(self) -> tuple[np.ndarray, np.ndarray]:
        """The losses of all steps, and the steps."""
        self._write_pending()
        return np.loadtxt(self.path, delimiter=",", skiprows=1, usecols=(1, 0), ndmin=2, unpack=True)

    def _write_pending(self) -> None:
        if not self.pending:
            return
        rows = [state.metrics() for state in self.pending]
        try:
            self.file = self.file or self._begin(rows[0])
            self.file.writelines(",".join(map(str, row.values())) + "\n" for row in rows)
            self.file.flush()
        except OSError:
            if self.file:
                with contextlib.suppress(OSError):
                    self.file.close()
            self.file = None  # `_begin` will find out how much of it is there
            raise
        self.pending.clear()

    def _begin(self, row: dict[str, float]) -> TextIO:
        """Open the file, with the lines in it that are whole and of steps before that of `row`."""
        text = self.path.read_text(errors="replace") if self.path.exists() else ""
        header, *lines = text.splitlines(keepends=True) or [""]
        if header not in ("", names := ",".join(row) + "\n"):
            raise FileExistsError(f"path: {self.path} is another file, it begins with {header[:60]!r}")
        with replacing(self.path) as (unfinished,):
            unfinished.write_text(names + "".join(line for line in lines if _step(line, len(row)) < row["step"]))
        return self.path.open("a")


def _step(line: str, count: int) -> float:
    """The first number of a line with so many of them; infinity if it is no such line, or not the whole of it."""
    try:
        numbers = list(map(float, line.split(",")))
    except ValueError:
        return math.inf
    return numbers[0] if len(numbers) == count and line.endswith("\n") else math.inf
