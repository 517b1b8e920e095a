"""What a training leaves in its folder while it goes on: checkpoints, the log, the loss curve; and a bar to watch."""

from __future__ import annotations

import collections
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from .checkpoint import Path, previous, replacing
from .image import save_loss_curve
from .run import MetricsLog, set_aside

CHECKPOINT, LOG, OPTIONS, LOSS_CURVE = "checkpoint.safetensors", "metrics.csv", "options.json", "loss.png"


def begin_folder(
    folder: Path, options: dict[str, Any], resume: bool = False, others: Iterable[str] = ()
) -> pathlib.Path | None:
    """Write the options of a run, of JSON's types, to options.json in its folder; a run that goes on keeps its own. If
    there is a checkpoint that is not to be resumed, it is moved with its log, loss curve, options and model, and what
    is named like one of the `others`, such as step_*.png, to a folder in this one, earlier-1 or earlier-2 or ..., which
    is returned. Raises OSError if that cannot be done."""
    folder, earlier = pathlib.Path(folder), None
    if (folder / CHECKPOINT).exists():
        if resume and (folder / OPTIONS).exists():
            return None
        if not resume:
            ours = CHECKPOINT, previous(folder / CHECKPOINT).name, LOG, OPTIONS, LOSS_CURVE, "model.safetensors"
            earlier = set_aside(folder, (*ours, *others))
    with replacing(folder / OPTIONS) as (unfinished,):
        unfinished.write_text(json.dumps(options, indent=1) + "\n")
    return earlier


def recorded(
    states: Iterable,
    folder: Path,
    steps: int,
    save_every: int = 250,
    draw_every: int = 500,
    draw: Callable[[Any], None] = lambda state: None,
) -> Iterator:
    """Yield the states of a training (`train`) of so many steps, and leave in `folder` what is worth keeping.

    That is metrics.csv, a line for each step; every `save_every` steps and after the last checkpoint.safetensors;
    every `draw_every` steps and after the last loss.png (if matplotlib is there), and every `draw_every` steps what
    `draw` makes of the state, such as a grid of samples. What cannot be written, on a full disk perhaps, is no reason
    to lose the training: it is told, the first time and after the last step, and tried again the next time. An error in
    the training itself goes on to the caller, who is told of the last checkpoint.
    """
    folder = pathlib.Path(folder)
    log, recent, troubles, saved = MetricsLog(folder / LOG), collections.deque(maxlen=100), set(), None

    def attempt(what: str, action: Callable, *arguments: Any) -> bool:
        try:
            action(*arguments)
            return True
        except (OSError, ImportError) as error:
            if what not in troubles or state.last:
                bar.write(f"no {what} after {state.step} steps: {error}")
            troubles.add(what)
            return False

    with tqdm(total=steps, unit="step", desc="training", dynamic_ncols=True) as bar:
        try:
            for state in states:
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
                    bar.write(f"resumed  at step {state.step:,} of {steps:,}")
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
