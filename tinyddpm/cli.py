"""The command line: what the examples and `python -m tinyddpm` have in common, and is not about diffusion.

Options and what is wrong with them, errors in a line, Ctrl-C; and around a training: data, how many steps take so many
minutes, a folder for what comes out, and other processes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import os
import pathlib
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from .diffusion.checks import OBJECTIVES
from .files.data import load_digits, load_fashion_mnist, load_mnist
from .files.folder import ImageFolder
from .files.model import load_model
from .files.run_folder import CHECKPOINT, OPTIONS, begin_folder, recorded
from .speed.ranks import Ranks, ranks_started
from .speed.workers import blas_name

GUIDANCE = 1.5  # unless another is asked for
MODEL = "model.safetensors"  # in the folder of a run
PICTURES = "noising.png", "step_*.png", "samples.png", "denoising.gif", "digits.png"  # as well, in the end

# -------------------------------------------------------------------------------------------------- of every command


class Options(argparse.ArgumentParser):
    """A parser that shows `text` as it stands, and refuses numbers that are out of the range that an option has."""

    def __init__(self, text: str | None, **settings: Any):
        super().__init__(description=text, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.least: dict[str, int] = {}
        self.positive: list[str] = []  # of these, any number above 0 that is finite

    def add(self, name: str, least: int | None = None, **settings: Any) -> None:
        """`add_argument`; if it is a number, it must be `least` or more."""
        action = self.add_argument(name, **settings)
        if least is not None:
            self.least[action.dest] = least

    def add_usual(self, out: str, seed: int = 0, gives: str = "other digits") -> None:
        """What every example has that draws a picture: --seed, another of which gives others, --workers and --out."""
        self.add("--seed", type=int, default=seed, least=0, help=f"another one gives {gives} [%(default)s]")
        self.add("--workers", type=int, least=1, help="how many work side by side [one per CPU]")
        self.add("--out", type=picture_path, default=out, help="the picture [%(default)s]")

    def parse_args(self, *args: Any, **settings: Any) -> argparse.Namespace:  # type: ignore[override]
        parsed = super().parse_args(*args, **settings)
        for name, value in vars(parsed).items():
            option, least = f"--{name.replace('_', '-')}", self.least.get(name, -math.inf)
            if value is not None and name in self.positive and not (value > 0 and math.isfinite(value)):
                self.error(f"{option} must be greater than 0, got {value}")
            if value is not None and name in self.least and value < least:
                self.error(f"{option} must be {least} or greater, got {value}")
        return parsed

    def check_digits(self, digits: str) -> None:
        """Refuse --digits that are not such."""
        if not (digits.isascii() and digits.isdecimal()):
            self.error(f"--digits must be digits such as 2026, got {digits!r}")

    def check_guidance(self, guidance: float) -> None:
        """Refuse --guidance that is infinite or no number."""
        if not math.isfinite(guidance):
            self.error(f"--guidance must be a number, got {guidance}")


def picture_path(path: str) -> pathlib.Path:
    """`path`, if a picture can be written there, for argparse: better to know that before the work than after.

    Raises ArgumentTypeError if its folder does not exist or Pillow does not know its suffix.
    """
    from PIL import Image

    path = pathlib.Path(path)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    if path.is_dir() or path.suffix.lower() not in Image.registered_extensions():
        raise argparse.ArgumentTypeError(f"expected a picture such as digits.png, got {path}")
    return path


@contextlib.contextmanager
def errors_in_a_line(name: str | None = None, needs: str = "") -> Iterator[None]:
    """Of an error that says what was wrong, no more is shown than that, after the `name` of the program, and what it
    `needs` that is not there. Ctrl-C ends it as a shell expects."""
    name = name or pathlib.Path(sys.argv[0]).name
    try:
        yield
    except ImportError as error:
        if not needs:
            raise  # a fault of ours
        sys.exit(f"{name}: {error}; that needs {needs}")
    except (ValueError, TypeError, ArithmeticError, RuntimeError, OSError) as error:
        sys.exit(f"{name}: {error}")
    except MemoryError as error:
        sys.exit(f"{name}: out of memory, of which fewer --workers or a smaller --batch need less: {error}")
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        sys.exit(130)  # what a shell says of a program that Ctrl-C ended


def run(main: Callable[[], Any], **settings: str) -> None:
    """Call `main` within `errors_in_a_line`."""
    with errors_in_a_line(**settings):
        main()


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


# -------------------------------------------------------------------------------------------------------- of training


def training_options(text: str | None, **settings: Any) -> Options:
    """The options of a training that has a folder for what comes out."""
    parser = Options(text, **settings)
    add = parser.add
    add(
        "--data", default="digits", help="digits, which come along; mnist, fashion (fetched); or a folder [%(default)s]"
    )
    add("--size", type=int, default=32, help="pixels that images of a folder are made high and wide [%(default)s]")
    add("--grey", action="store_true", help="make images of a folder grey [RGB]")
    add("--flip", action="store_true", help="mirror half of the images (not for digits) [off]")
    add("--minutes", type=float, default=5, help="train as many steps as take about so long here [%(default)s]")
    add("--steps", type=int, help="train so many steps, however long they take [as --minutes allows]")
    add("--batch", type=int, default=32, help="images per step [%(default)s]")
    add("--lr", type=float, default=4e-3, help="Adam's learning rate, falling in the second half [%(default)s]")
    add("--patch", type=int, default=2, help="the U-Net takes N x N pixels as one position, N = [%(default)s]")
    add("--channels", type=int, nargs="+", default=[32, 64], help="of the U-Net's levels [32 64]")
    add("--blocks", type=int, default=1, help="residual blocks per level [%(default)s]")
    add("--timesteps", type=int, default=1000, help="T, the number of diffusion steps [%(default)s]")
    add(
        "--objective",
        default="x0",
        choices=OBJECTIVES,
        help="what the network predicts: noise, image or a blend [%(default)s]",
    )
    add("--no-labels", action="store_true", help="do not tell the network what is in an image [it is told]")
    add("--digits", help="draw these, such as 2026, by the model in the folder; nothing is trained [none]")
    add("--guidance", type=float, default=GUIDANCE, help="how clearly images show what they are to be [%(default)s]")
    add("--sampling-steps", type=int, default=25, help="of T, on the way back from noise [%(default)s]")
    add("--samples", type=int, default=64, help="images in the final grid [%(default)s]")
    add("--sample-every", type=int, default=500, help="training steps between sample grids [%(default)s]")
    add("--save-every", type=int, default=250, help="training steps between checkpoints [%(default)s]")
    add("--resume", action="store_true", help="go on from the checkpoint in the folder, if there is one [off]")
    add("--device", default="cpu", help="cpu, cuda or cuda:N [%(default)s]")
    add("--precision", default="float32", help="of products on a GPU: float32, tf32, bf16 or fp16 [%(default)s]")
    add("--workers", type=int, help="how many work side by side [one per CPU]")
    add("--mpi", action="store_true", help="share the work with the other processes that mpiexec started [off]")
    add("--seed", type=int, default=0, least=0, help="the same seed and steps give the same digits here [%(default)s]")
    add("--out", type=pathlib.Path, default=pathlib.Path("runs/mnist"), help="folder for the results [%(default)s]")
    parser.positive += (
        "minutes", "steps", "batch", "lr", "patch", "blocks", "timesteps", "sampling_steps", "samples", "sample_every",
        "save_every", "workers", "size",
    )  # fmt: skip
    return parser


def training_arguments(parser: Options, argv: list[str] | None = None) -> argparse.Namespace:
    """What was given for `training_options`; to a run that goes on, what was given before, unless given again."""
    args = parser.parse_args(argv)
    options = args.out / OPTIONS
    if args.resume and options.exists():
        try:
            parser.set_defaults(**(before := json.loads(options.read_text())))
        except (ValueError, TypeError) as error:
            parser.error(f"--resume: {options} is damaged: {error}")
        args = parser.parse_args(argv)
        if args.minutes != before.get("minutes", args.minutes):
            parser.error(f"--minutes: the run that is to go on has {args.steps} steps, and keeps them")
    if os.path.isdir(args.data):
        args.data = os.path.abspath(args.data)
    if args.digits is not None:
        parser.check_digits(args.digits)
    parser.check_guidance(args.guidance)
    if args.digits and not (args.out / MODEL).exists():
        parser.error(f"--digits: there is no model in {args.out.resolve()} yet; without --digits, one is trained")
    if not args.mpi and ranks_started() > 1:
        parser.error(f"--mpi is missing: mpiexec started {ranks_started()} processes, which would all do the same")
    try:  # better to know now than after the training
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        parser.error(f"--out: cannot write to {args.out}: {error.strerror}")
    return args


def run_training(main: Callable[[TrainingRun], None], text: str | None, argv: list[str] | None = None, **settings: str):
    """Call main(run) with what the command line says, in each process that mpiexec started; an error in one of them
    ends all. settings: `prog`, the name of the program, if it is no file of its own."""
    parser = training_options(text, **settings)
    with errors_in_a_line(settings.get("prog")):
        args = training_arguments(parser, argv)
        warnings.formatwarning = lambda message, *_: f"\n{parser.prog}: {message}\n"
        ranks = Ranks(args.mpi)
        args = ranks.gathered(args)[0]  # which may have found the options of before
        if args.digits is not None:  # which the first draws alone, so that nobody waits for it
            return main(TrainingRun(args, ranks)) if ranks.rank == 0 else None
        with ranks.abort_on_error(), errors_in_a_line(settings.get("prog")):
            main(TrainingRun(args, ranks))


class TrainingRun:
    """A training as a program: `args` are those of `training_options`, `ranks` the processes that share the work; of
    these, only the first says and writes anything."""

    def __init__(self, args: argparse.Namespace, ranks: Ranks):
        self.args, self.ranks, self.first = args, ranks, ranks.rank == 0
        self.say = print if self.first else lambda *words, **settings: None
        self.workers, self.steps = args.workers or ranks.cpus, args.steps
        self.began, self._asked = time.monotonic(), lambda: False
        if not self.first:
            warnings.simplefilter("ignore")

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
                images = ImageFolder(args.data, args.size, channels=1 if args.grey else 3)  # read as they are needed
                labels = images.labels
            else:
                raise ValueError(
                    f"--data must be digits, mnist, fashion or a folder, and there is no folder {args.data}"
                )
        return images, None if args.no_labels else labels

    def prepare(self, unet: Any, images: Any) -> None:
        """Move the network to where it is to compute, and say what there is."""
        args, ranks, (H, W) = self.args, self.ranks, images.shape[1:3]
        device = f"cuda:{ranks.local_rank}" if args.mpi and args.device == "cuda" else args.device
        unet.to(device, precision=args.precision)
        self.began = time.monotonic()
        each = f"{ranks.size} ranks of " if args.mpi else ""
        self.say(
            f"device   {args.device}, {each}{self.workers} worker{'s' * (self.workers > 1)}, BLAS {blas_name()}\n"
            f"network  U-Net {'-'.join(map(str, args.channels))}, {unet.size:,} parameters\n"
            f"data     {len(images):,} images of {H} x {W} pixels, T = {args.timesteps}"
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
                "         so few learn little; README's digits come from --steps 1454, however long these take here"
            )
        self.say(f"results  {args.out.resolve()}", flush=True)

    def open_folder(self) -> None:
        """Have the folder hold this run, and move an earlier one in it out of the way, unless that goes on."""
        args = self.args
        if not self.first:
            return
        if args.resume and not (args.out / CHECKPOINT).exists():
            print("resumed  from the beginning, for there is no checkpoint")
        may_change = ("out", "resume", "digits", "device", "workers", "mpi")  # may be others when it goes on
        options = {name: value for name, value in vars(args).items() if name not in may_change} | {"steps": self.steps}
        if earlier := begin_folder(args.out, options, args.resume, PICTURES):
            print(f"earlier  the run that was there is in {earlier.name} now; --resume would have gone on from it")

    def save(self, picture: Any, name: str) -> None:
        """Write a picture into the folder."""
        if self.first:
            picture.save(self.args.out / name)

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
                states = recorded(states, args.out, self.steps, args.save_every, args.sample_every, draw)
            yield from states


def steps_within(minutes: float, training: Callable, unet: Any) -> int:
    """How many steps take so long here, from the pace of a rehearsal of a few seconds."""
    began, ends, budget = time.monotonic(), [], 60 * minutes
    elapsed = lambda: time.monotonic() - began
    for state in training(unet, 10**6, stop=lambda: len(ends) > 5 and elapsed() > min(budget / 50, 10)):
        state.look()  # a GPU runs behind
        ends.append(elapsed())
    return max(1, round((budget - elapsed()) / np.median(np.diff(ends))))


def trained_model(args: argparse.Namespace) -> tuple[Any, Any, list[int]]:
    """The network and the diffusion in the folder of a run, and the labels that --digits asks for."""
    unet, diffusion = load_model(args.out / MODEL)
    labels, classes = [int(digit) for digit in args.digits], unet.config["classes"]
    if not classes:
        raise ValueError(f"--digits: the model in {args.out} was trained without labels, so it does not know digits")
    if max(labels) >= classes:
        raise ValueError(f"--digits: this model knows 0 to {classes - 1}, got {args.digits}")
    return unet.to(args.device, precision=args.precision), diffusion, labels
