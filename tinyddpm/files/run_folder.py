"""What a training leaves in its folder while it goes on: checkpoints, the log, the loss curve; and a bar to watch."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

import numpy as np

from ..bar import progress_bar
from .pictures import save_loss_curve
from .replacing import previous, replacing
from .tensors import Path, stored_tensors

CHECKPOINT, LOG, OPTIONS, LOSS_CURVE = "checkpoint.safetensors", "metrics.csv", "options.json", "loss.png"
MODEL = "model.safetensors"  # what the training is for, written by whoever runs it


def model_in(path: Path) -> pathlib.Path:
    """The file with what a run has learned so far, if `path` is its folder, else `path`. That is the checkpoint, which
    has the same averaged weights as the model, and is never older: the model may be of before the run went on."""
    files = (pathlib.Path(path, name) for name in (CHECKPOINT, MODEL))
    return next((file for file in files if file.is_file()), pathlib.Path(path))


def ended(folder: Path) -> bool:
    """Whether the run in a folder has had all its steps, as far as can be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        with stored_tensors(pathlib.Path(folder, CHECKPOINT)) as (_, metadata):
            taken = json.loads(metadata["training"])["step"]
        return taken >= json.loads(pathlib.Path(folder, OPTIONS).read_text("utf-8"))["steps"]
    return False


def begin_folder(
    folder: Path, options: dict[str, Any], resume: bool = False, others: Iterable[str] = ()
) -> pathlib.Path | None:
    """Write the options of a run, of JSON's types, to options.json in its folder, which is made if there is none; a run
    that goes on keeps its own, or has none until `recorded` knows that the training accepts these. If there is a
    checkpoint that is not to be resumed, it is moved with its log, loss curve, options and model, and what
    is named like one of the `others`, such as step_*.png, to a folder in this one, earlier-1 or earlier-2 or ..., which
    is returned. Only one run may be in a folder, see `alone_in`. Raises OSError if that cannot be done."""
    folder, earlier = pathlib.Path(folder), None
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / CHECKPOINT).exists():
        if resume:
            return None
        ours = CHECKPOINT, previous(folder / CHECKPOINT).name, LOG, OPTIONS, LOSS_CURVE, MODEL
        earlier = set_aside(folder, (*ours, *others))
    write_options(folder, options)
    return earlier


def write_options(folder: Path, options: dict[str, Any]) -> None:
    """Write options.json. Raises OSError if it cannot be written."""
    with replacing(pathlib.Path(folder, OPTIONS)) as (unfinished,):
        unfinished.write_text(json.dumps(options, indent=1) + "\n", "utf-8")


def recorded(
    states: Iterable,
    folder: Path,
    steps: int,
    save_every: int = 250,
    draw_every: int = 500,
    draw: Callable[[Any], None] = lambda state: None,
    options: dict[str, Any] | None = None,
) -> Iterator:
    """Yield the states of a training (`train`) of so many steps, and leave in `folder` what is worth keeping.

    That is metrics.csv, a line for each step; every `save_every` steps and after the last checkpoint.safetensors;
    every `draw_every` steps and after the last loss.png (if matplotlib is there), and every `draw_every` steps what
    `draw` makes of the state, such as a grid of samples. `options` are written to options.json once there is a state,
    so that they are such as the training has accepted. What cannot be written, on a full disk perhaps, is no reason
    to lose the training: it is told, the first time and after the last step, and tried again the next time. An error in
    the training itself goes on to the caller, who is told of the last checkpoint.
    """
    folder = pathlib.Path(folder)
    log, recent, troubles, saved = MetricsLog(folder / LOG), collections.deque(maxlen=100), set(), None
    had_ended = ended(folder)

    def attempt(what: str, action: Callable, *arguments: Any) -> bool:
        try:
            action(*arguments)
            return True
        except (OSError, ImportError) as error:
            if what not in troubles or state.last:
                bar.write(f"no {what} after {state.step} steps: {error}")
            troubles.add(what)
            return False

    with progress_bar(total=steps, unit="step", desc="training") as bar:
        try:
            for state in states:
                if options is not None:
                    attempt(OPTIONS, write_options, folder, options)
                    options = None
                line = f"line in {LOG}"
                attempt(line, log.write, state)
                if state.last or state.step % save_every == 0:
                    attempt(line, log.flush)
                    saved = state.step if attempt("checkpoint", state.save, folder / CHECKPOINT) else saved
                if state.last or state.step % draw_every == 0:
                    attempt("loss curve", lambda: save_loss_curve(folder / LOSS_CURVE, *log.losses()))
                if not state.last and state.step % draw_every == 0:
                    attempt("grid", draw, state)
                if bar.n == 0 and state.step > 1:
                    bar.n = bar.initial = saved = state.step - 1
                    another = f"--start {folder} with a new --out learns on from it"
                    resumed = f"resumed  at step {state.step:,} of {steps:,}"
                    bar.write(f"ended    this run has had its {steps:,} steps; {another}" if had_ended else resumed)
                recent.append(state)
                if state.seen:  # a GPU runs behind, and who looked at each of its losses would have to wait for it
                    loss = np.mean([s.loss for s in recent])
                    bar.set_postfix_str(f"loss {loss:.4f}, {state.images_per_second:.0f} images/s", refresh=False)
                bar.update()
                if state.last:
                    attempt(line, log.close)
                yield state
        except Exception:
            if saved:
                bar.write(f"the checkpoint after {saved:,} steps is kept: --resume goes on from it")
            raise


def set_aside(folder: Path, names: Iterable[str]) -> pathlib.Path:
    """Move the files of these names, which may be patterns such as step_*.png, as far as they are in `folder`, to a new
    folder in it, earlier-1 or earlier-2 or ..., and return that."""
    numbered = (pathlib.Path(folder, f"earlier-{n}") for n in itertools.count(1))
    earlier = next(candidate for candidate in numbered if not candidate.exists())
    earlier.mkdir()
    for path in [path for name in names for path in pathlib.Path(folder).glob(name)]:
        os.replace(path, earlier / path.name)
    return earlier


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
        text = self.path.read_text("utf-8", "replace") if self.path.exists() else ""
        header, *lines = text.splitlines(keepends=True) or [""]
        if header not in ("", names := ",".join(row) + "\n"):
            raise FileExistsError(f"path: {self.path} is another file, it begins with {header[:60]!r}")
        with replacing(self.path) as (unfinished,):
            unfinished.write_text(
                names + "".join(line for line in lines if _step(line, len(row)) < row["step"]), "utf-8"
            )
        return self.path.open("a", encoding="utf-8")


def _step(line: str, count: int) -> float:
    """The first number of a line with so many of them; infinity if it is no such line, or not the whole of it."""
    try:
        numbers = list(map(float, line.split(",")))
    except ValueError:
        return math.inf
    return numbers[0] if len(numbers) == count and line.endswith("\n") else math.inf
