"""A training run that can end at any moment, and goes on as if it never had: checkpoints, signals, the log.

A checkpoint is one file (see checkpoint.py): a model that `load_model` reads, with the averaged weights, and beside
them what training needs to go on. Of random generators nothing has to be saved: whatever is drawn for a step comes from
a stream made anew from (seed, step), so the seed and the step are their state.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import signal
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
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

    Args: average: the model with the averaged weights. vectors: all else that is as long as they are. facts: all that
    is of JSON's types; facts["config"] is what has to be the same when the run goes on.
    Raises OSError, and leaves what is there as it was, if it cannot be written.
    """
    tensors, metadata = average.state_dict(), {"training": json.dumps(facts)}
    if isinstance(average, UNet) and isinstance(diffusion, Diffusion):
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

    If that at `path` is damaged, or missing since the run was stopped as it was being replaced, the one before is read,
    in the first case with a warning. Nothing is changed unless all fits. What is None in `config` is as it was.
    Raises ValueError if neither is whole, or if it is of a run with another configuration; the fields are named.
    """
    paths = [candidate for candidate in (pathlib.Path(path), previous(pathlib.Path(path))) if candidate.exists()]
    for i, candidate in enumerate(paths):
        try:
            with stored_tensors(candidate) as (stored, metadata):
                if not {"training", "sha256"} <= metadata.keys():
                    raise ValueError(f"path: {candidate} is no checkpoint of a training")
                facts = json.loads(metadata["training"])
                found = {name: tensor.read(average.dtype) for name, tensor in stored.items()}
        except ValueError as error:
            if i + 1 == len(paths):
                raise
            warnings.warn(f"{error}; going on from the one before it, {paths[i + 1].name}", stacklevel=2)
            continue
        config = facts["config"] | {name: value for name, value in config.items() if value is not None}
        if differing := differences(facts["config"], config):
            raise ValueError(f"{candidate} is of another run: {'; '.join(differing)}")
        found.pop("schedule.beta", None)
        for name, vector in vectors.items():
            vector[...] = to_device(found.pop(TRAINING + name), average.device)
        average.load_state_dict(found)
        return facts
    return None


def differences(stored: Any, ours: Any, name: str = "") -> list[str]:
    """What differs between two configurations, "lr: 0.1 there, 0.2 here", field by field."""
    if isinstance(stored, Mapping) and isinstance(ours, Mapping):
        keys = sorted(stored.keys() | ours.keys())
        parts = [differences(stored.get(k), ours.get(k), f"{name}.{k}" if name else k) for k in keys]
        return [line for part in parts for line in part]
    return [] if stored == ours else [f"{name}: {stored!r} there, {ours!r} here"]


def run_config(model: Module, diffusion: Any, images: Any, labels: np.ndarray | None, **settings: Any) -> dict:
    """What decides about the outcome of a training, and so has to be the same when it goes on, of JSON's types."""
    if isinstance(model, UNet) and isinstance(diffusion, Diffusion):
        parts = configuration(model, diffusion) | {"beta": checksum(diffusion.schedule.beta)}
    else:
        parts = {"model": type(model).__name__, "diffusion": type(diffusion).__name__}
    parts |= {
        "parameters": {name: list(p.shape) for name, p in model.named_parameters().items()},
        "dtype": str(model.dtype),
        "precision": model.precision,
        "images": [list(images.shape), getattr(images, "fingerprint", None) or checksum(_some(images))],
        "labels": "none" if labels is None else checksum(labels.astype(np.int64)),
    }
    return json.loads(json.dumps(parts | settings, default=lambda number: number.item()))


def checksum(x: np.ndarray) -> str:
    """A few digits that recognise an array's values."""
    return f"{zlib.crc32(np.ascontiguousarray(x)):08x}"


def _some(images: np.ndarray) -> np.ndarray:
    """A hundred of them, for all may be more than fit into memory."""
    return images[np.linspace(0, len(images) - 1, 100).astype(int)]


@contextlib.contextmanager
def stop_signals(notice: str = "") -> Iterator[Callable[[], bool]]:
    """Within this block, Ctrl-C and SIGTERM ask for an end instead of making one; yields a function that says whether
    they have. The second one ends the program at once. `notice` is printed on stderr at the first.

    In another thread than the first, nothing changes, for signals are for the first.
    """
    asked = []

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        for number in before:
            signal.signal(number, signal.SIG_DFL)
        os.write(2, f"\n{notice}\n".encode() if notice else b"")  # not print, which may be at work where this breaks in

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # this is another thread
        before = {}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class MetricsLog:
    """A CSV file with a line for each step: what `TrainState.metrics` says of it.

    The first step that is written decides what stays of a file that is there: the lines of earlier steps. So a run that
    goes on appends, without a line twice, and one that begins anew begins the file anew. None is left out either if a
    step is written before its checkpoint is saved. Of a GPU, which runs behind, the lines of some steps are written
    together, when somebody has looked at the loss or by `close`.
    Raises OSError if it cannot be written; the next step tries again.
    """

    def __init__(self, path: Path):
        self.path, self.file, self.pending = pathlib.Path(path), None, []

    def write(self, state: Any) -> None:
        """Append the step of a `TrainState`."""
        self.pending.append(state)
        if state.seen:
            self.flush()

    def flush(self) -> None:
        """Write what has not been, and wait for a GPU if need be."""
        rows = [state.metrics() for state in self.pending]
        if rows and self.file is None:
            self.file = self._begin(rows[0])
        for row in rows:
            self.file.write(",".join(map(str, row.values())) + "\n")
        self.pending.clear()
        if self.file:
            self.file.flush()

    def _begin(self, row: dict[str, float]) -> TextIO:
        """Open the file, with the lines in it that are whole and of steps before that of `row`."""
        header = ",".join(row) + "\n"
        text = self.path.read_text(errors="replace") if self.path.exists() else ""
        lines = re.findall(r"^\d+(?:,[^,\n]+)+\n", text, re.MULTILINE) if text.startswith(header) else []
        whole = [line for line in lines if line.count(",") == header.count(",")]
        with replacing(self.path) as (unfinished,):
            unfinished.write_text(header + "".join(line for line in whole if int(line.split(",")[0]) < row["step"]))
        return self.path.open("a")

    def losses(self) -> tuple[np.ndarray, np.ndarray]:
        """The losses of all steps in the file, and the steps."""
        self.flush()
        return np.loadtxt(self.path, delimiter=",", skiprows=1, usecols=(1, 0), ndmin=2, unpack=True)

    def close(self) -> None:
        """Write what has not been, and end."""
        self.flush()
        if self.file:
            self.file.close()
