"""A training as a program, which `python -m tinyddpm train` and examples/mnist_ddpm.py run: all that is not diffusion.

Its data; the model whose weights it starts from; how many steps take so many minutes; the folder for what comes out;
and other processes. Its options are in options.py.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import pathlib
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from .cli import Options, errors_in_a_line, stop_signals
from .diffusion.process import Diffusion
from .diffusion.schedule import Schedule
from .exchange.opening import fitted, opened
from .files.checkpoint import OtherRun
from .files.data import load_digits, load_fashion_mnist, load_mnist
from .files.folder import ImageFolder
from .files.lock import alone_in
from .files.model import configuration, load_model
from .files.pictures import save_picture
from .files.replacing import previous
from .files.run_folder import CHECKPOINT, OPTIONS, begin_folder, ended, model_in, recorded
from .network.unet import UNet
from .options import DATA, OF_ONE_TIME, OF_THE_MODEL, SIDE, shown, training_arguments, training_options, wrong_side
from .speed.ranks import Ranks
from .speed.workers import blas_name

PICTURES = "noising.png", "step_*.png", "samples.png", "denoising.gif", "digits.png"  # in the folder of a run


def run_training(main: Callable[[TrainingRun], None], text: str | None, argv: list[str] | None = None, **settings: str):
    """Call main(run) with what the command line says, in each process that mpiexec started; an error in one of them
    ends all. settings: `prog`, the name of the program, if it is no file of its own."""
    parser = training_options(text, **settings)
    with errors_in_a_line(settings.get("prog")):
        args = training_arguments(parser, argv)
        ranks = Ranks(args.mpi)
        args = ranks.gathered(args)[0]  # which may have found the options of before
        if args.digits is not None:  # which the first draws alone, so that nobody waits for it
            return main(TrainingRun(args, ranks)) if ranks.rank == 0 else None
        with ranks.abort_on_error(), errors_in_a_line(settings.get("prog")), _folder(parser, args.out):
            with alone_in(args.out) if ranks.rank == 0 else contextlib.nullcontext():
                main(TrainingRun(args, ranks))


@contextlib.contextmanager
def _folder(parser: Options, out: pathlib.Path) -> Iterator[None]:
    """Within this block there is this folder; if it is new, and nothing came into it, it goes again."""
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:  # better to know now than after the training
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        parser.error(f"--out: cannot write to {out}: {error.strerror}")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for folder in new:
                folder.rmdir()


class TrainingRun:
    """A training as a program: `args` are those of `training_options`, `ranks` the processes that share the work; of
    these, only the first says and writes anything."""

    def __init__(self, args: argparse.Namespace, ranks: Ranks):
        self.args, self.ranks, self.first = args, ranks, ranks.rank == 0
        self.say = print if self.first else lambda *words, **settings: None
        self.workers, self.steps = args.workers or ranks.cpus, args.steps
        self.began, self._asked = time.monotonic(), lambda: False
        self.goes_on = args.resume and (args.out / CHECKPOINT).exists()
        if not self.first:
            warnings.simplefilter("ignore")
        self.model = self._model() if args.start and args.digits is None else None

    def _model(self) -> tuple[UNet, Diffusion]:
        """The network and the diffusion that --start names; of a run that goes on, those that its checkpoint has. What
        options say of them is from then on what they are."""
        args, found = self.args, None
        if self.first:  # the others may be on machines that do not have the file
            unet, diffusion = self._opened()
            found = unet, diffusion.schedule.beta, configuration(unet, diffusion)
        unet, beta, parts = self.ranks.gathered(found)[0]
        diffusion = Diffusion(Schedule(beta, **parts["schedule"]), **parts["diffusion"])
        config = unet.config | {"objective": diffusion.objective, "timesteps": diffusion.T}
        for name in OF_THE_MODEL:
            value = list(config[name]) if name == "channels" else config[name]
            if name in args.given and getattr(args, name) != value:
                got = shown(getattr(args, name))
                raise ValueError(f"--{name}: the model of --start has {shown(value)}, which stays, got {got}")
            setattr(args, name, value)
        if wrong := wrong_side(SIDE if args.data in DATA else args.size, args.patch, len(args.channels)):
            raise ValueError(f"--size: of the model of --start, {wrong}")
        return unet, diffusion

    def _opened(self) -> tuple[UNet, Diffusion]:
        checkpoint = self.args.out / CHECKPOINT
        if not self.goes_on:
            try:
                return opened(pathlib.Path(self.args.start))
            except (OSError, ValueError) as error:
                raise ValueError(f"--start: {error}") from error
        if "start" in self.args.given:
            self.say("start    the checkpoint in the folder goes on, and has its own weights")
        try:
            return load_model(checkpoint)
        except (OSError, ValueError):
            if not previous(checkpoint).exists():
                raise
            # the training will say that it goes on from the one before
            return load_model(previous(checkpoint))

    def load_data(self) -> tuple[Any, np.ndarray | None]:
        """Images (M, H, W, C), floats in [-1, 1], and the class of each, or None, as --data says."""
        args = self.args
        with self.ranks.first_alone():  # one downloads for all
            if args.data == "digits":
                images, labels = load_digits()
            elif args.data == "mnist":
                images, labels = load_mnist(full=True)
            elif args.data == "fashion":
                images, labels = load_fashion_mnist()
            elif os.path.isdir(args.data):
                runs = (file.parent for file in pathlib.Path(args.data).rglob(CHECKPOINT))
                if not self.goes_on and (run := next((run for run in runs if (run / OPTIONS).exists()), None)):
                    raise ValueError(f"--data: in {run} are the results of a run, which are not to be learned from")
                images = ImageFolder(args.data, args.size, channels=1 if args.grey else 3)  # read as they are needed
                labels = images.labels
            else:
                moved = "; if it was moved, --data says where it is now" if args.resume else ""
                why = f"{args.data} is none" if os.path.exists(args.data) else f"there is no folder {args.data}{moved}"
                raise ValueError(f"--data must be {', '.join(DATA)} or a folder, and {why}")
        return images, None if args.no_labels else labels

    def start_model(self, images: Any, labels: np.ndarray | None) -> tuple[Diffusion, UNet] | None:
        """The diffusion and the network that --start names, made to fit the images; None without --start."""
        if self.model is None:
            return None
        (unet, diffusion), (_, H, W, C) = self.model, images.shape
        if (theirs := unet.config["in_channels"]) != C:
            grey = "; --grey makes them grey" if (theirs, C) == (1, 3) else ""
            has = f"{C} channel{'s' * (C > 1)}"
            raise ValueError(f"--data: its images have {has}, and the model of --start has {theirs}{grey}")
        classes, known = None if labels is None else int(labels.max()) + 1, unet.config["classes"]
        if not self.goes_on:
            self.say(f"start    from {self.args.start}")
            if classes and classes == known:
                self.say(f"         it has learned of {known} classes, and takes those here for them: 0 for its 0, ...")
            elif classes:
                self.say(
                    f"         it has learned of {known or 'no'} classes; learning of the {classes} here begins anew"
                )
            elif known:
                self.say(f"         it has learned of {known} classes, and is told of none here")
        return diffusion, fitted(unet, (H, W), classes, self.args.seed)

    def prepare(self, unet: Any, images: Any) -> None:
        """Move the network to where it is to compute, and say what there is."""
        args, ranks, (H, W) = self.args, self.ranks, images.shape[1:3]
        device = f"cuda:{ranks.local_rank}" if args.mpi and args.device == "cuda" else args.device
        unet.to(device, precision=args.precision)
        self.began = time.monotonic()
        each = f"{ranks.size} ranks of " if args.mpi else ""
        self.say(
            f"device   {args.device}, {each}{self.workers} worker{'s' * (self.workers > 1)}, BLAS {blas_name()}\n"
            f"network  U-Net {'-'.join(map(str, args.channels))}, {unet.size:,} parameters, T = {args.timesteps}\n"
            f"data     {len(images):,} images of {H} x {W} pixels, {DATA.get(args.data, args.data)}"
        )
        if names := getattr(images, "classes", ()):
            self.say(f"classes  {', '.join(f'{label} {name}' for label, name in enumerate(names))}")

    def rehearse(self, training: Callable, unet: Any) -> None:
        """Set `steps`, if --steps does not, to how many take --minutes here: training(unet, steps, stop=...) trains a
        copy for a few seconds."""
        args, about = self.args, ""
        if self.steps is None:
            self.say(f"pace     a rehearsal tells how many steps take {args.minutes:g} minutes", flush=True)
            self.steps = self.ranks.gathered(steps_within(args.minutes, training, copy.deepcopy(unet)))[0]
            about = f", about {args.minutes:g} minutes"
        self.say(f"training {self.steps:,} steps{about}, {args.batch} images a step; Ctrl-C ends it earlier")
        if about and self.steps < 200:
            self.say(
                "         so few learn little; README's digits come from --steps 3199, however long these take here"
            )
        self.say(f"results  {args.out.resolve()}", flush=True)

    def open_folder(self) -> None:
        """Have the folder hold this run, and move an earlier one in it out of the way, unless that goes on."""
        args = self.args
        if not self.first:
            return
        if args.resume and not self.goes_on:
            print("resumed  from the beginning, for there is no checkpoint")
        how = "it had had all its steps" if ended(args.out) else "--resume would have gone on from it"
        if earlier := begin_folder(args.out, self.options(), args.resume, PICTURES):
            print(f"earlier  the run that was there is in {earlier.name} now; {how}")

    def options(self) -> dict[str, Any]:
        """Those to remember."""
        return {k: v for k, v in vars(self.args).items() if k not in OF_ONE_TIME} | {"steps": self.steps}

    def save(self, picture: Any, name: str) -> None:
        """Write a picture into the folder."""
        if self.first:
            save_picture(self.args.out / name, picture)

    @property
    def resume(self) -> pathlib.Path | None:
        """The checkpoint to go on from, if --resume says so."""
        return self.args.out / CHECKPOINT if self.args.resume else None

    def minutes(self) -> float:
        """How many have passed since `prepare`."""
        return (time.monotonic() - self.began) / 60

    def stop(self) -> bool:
        """Whether Ctrl-C or SIGTERM asked for an end, within `followed`."""
        return self._asked()

    def followed(self, states: Iterable, draw: Callable[[Any], None]) -> Iterator:
        """The states of a training, which Ctrl-C ends early. On the way checkpoints, log and loss curve are written,
        and every --sample-every steps what `draw` makes of the state."""
        args, notice = self.args, "what was trained is saved and sampled in a moment; again to quit at once"
        with stop_signals(notice if self.first else "") as self._asked:
            if self.first:
                how = (self.steps, args.save_every, args.sample_every, draw, self.options())
                states = recorded(states, args.out, *how)
            try:
                yield from states
            except OtherRun as error:
                if error.differing.keys().isdisjoint(("images", "labels")):
                    raise
                (shape, _), (other, _) = error.differing.get("images", ([(0,), ""],) * 2)
                counts = f"{other[0]:,} pictures, the run had {shape[0]:,}"
                what = counts if shape[0] != other[0] else "not the images of before, with which alone a run goes on"
                raise ValueError(f"--data: {what}; {error}") from error


def steps_within(minutes: float, training: Callable, unet: Any) -> int:
    """How many steps take so long here, from the pace of a rehearsal of a few seconds."""
    began, ends, budget = time.monotonic(), [], 60 * minutes
    elapsed = lambda: time.monotonic() - began
    for state in training(unet, 10**6, stop=lambda: len(ends) > 5 and elapsed() > min(budget / 50, 10)):
        state.look()  # a GPU runs behind
        ends.append(elapsed())
    return max(1, round((budget - elapsed()) / np.median(np.diff(ends))))


# ---------------------------------------------------------------------------------------------------------- its models


def trained_model(args: argparse.Namespace) -> tuple[Any, Any, list[int]]:
    """The network and the diffusion in the folder of a run, and the labels that --digits asks for."""
    unet, diffusion = load_model(model_in(args.out))
    labels, classes = [int(digit) for digit in args.digits], unet.config["classes"]
    if not classes:
        raise ValueError(f"--digits: the model in {args.out} was trained without labels, so it does not know digits")
    if max(labels) >= classes:
        raise ValueError(f"--digits: this model knows 0 to {classes - 1}, got {args.digits}")
    return unet.to(args.device, precision=args.precision), diffusion, labels
