"""The options of a training: those it begins with, and those it keeps when it goes on."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import tempfile
from typing import Any

from .cli import GUIDANCE, Options, any_path
from .diffusion.checks import OBJECTIVES
from .files.run_folder import CHECKPOINT, MODEL, OPTIONS
from .speed.ranks import ranks_started

# what --data knows by name, however a folder may be called
DATA = {"digits": "the digits that come along", "mnist": "MNIST", "fashion": "Fashion-MNIST"}
SIDE = 28  # pixels, of all of these
# Of the options, a run that goes on keeps all but these: what is drawn, how often, and where the images are now, which
# it remembers from then on; and what is said anew each time.
CHANGEABLE = ("data", "guidance", "sampling_steps", "samples", "sample_every", "save_every")
OF_ONE_TIME = ("out", "resume", "digits", "device", "workers", "mpi", "given")
OF_THE_MODEL = ("channels", "blocks", "patch", "objective", "timesteps")  # that --start names


def training_options(text: str | None, **settings: Any) -> Options:
    """The options of a training that has a folder for what comes out."""
    parser = Options(text, **settings)
    add = parser.add
    add(
        "--data", default="digits", help="digits, which come along; mnist, fashion (fetched); or a folder [%(default)s]"
    )
    add(
        "--start", type=any_path, metavar="MODEL", help="begin with the weights of this one, see `sample` [random ones]"
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
    add(
        "--resume",
        action="store_true",
        help="go on from the checkpoint in the folder, with the options of before [off]",
    )
    add("--device", default="cpu", help="cpu, cuda or cuda:N [%(default)s]")
    add("--precision", default="float32", help="of products on a GPU: float32, tf32, bf16 or fp16 [%(default)s]")
    add("--workers", type=int, help="how many work side by side [one per CPU]")
    add("--mpi", action="store_true", help="share the work with the other processes that mpiexec started [off]")
    add("--seed", type=int, default=0, least=0, help="the same seed and steps give the same digits here [%(default)s]")
    add("--out", type=any_path, default=pathlib.Path("runs/mnist"), help="folder for the results [%(default)s]")
    parser.positive += (
        "minutes", "steps", "batch", "lr", "patch", "blocks", "timesteps", "sampling_steps", "samples", "sample_every",
        "save_every", "workers", "size",
    )  # fmt: skip
    return parser


def training_arguments(parser: Options, argv: list[str] | None = None) -> argparse.Namespace:
    """What was given for `training_options`; to a run that goes on, what was given before, unless given again."""
    args, given = parser.parse_args(argv), parser.given(argv)
    options, goes_on = args.out / OPTIONS, args.resume and (args.out / CHECKPOINT).exists()
    if args.resume and options.exists():
        try:
            parser.set_defaults(**(before := json.loads(options.read_text("utf-8"))))
        except (ValueError, TypeError) as error:
            parser.error(f"--resume: {options} is damaged: {error}")
        args = parser.parse_args(argv)
        if args.minutes != before.get("minutes", args.minutes):
            parser.error(f"--minutes: the run that is to go on has {args.steps} steps, and keeps them")
        if goes_on:
            _check_kept(parser, args.out, before, given)
            args.start = before.get("start")
    args.given = tuple(given)
    if args.data not in DATA and os.path.isdir(folder := os.path.expanduser(args.data)):
        args.data = os.path.abspath(folder)
        if pathlib.Path(folder).resolve() in ((out := args.out.resolve()), *out.parents):
            parser.error(f"--out: {args.out} is in the folder of --data, whose pictures are what is learned from")
    if args.start is not None:
        args.start = os.path.abspath(args.start)
        home = args.start if os.path.isdir(args.start) else os.path.dirname(args.start)
        if os.path.realpath(home) == os.path.realpath(args.out) and not goes_on:
            parser.error(f"--out: {args.out} holds the model that --start names, and keeps it; take a new folder")
    elif wrong := [c for c in args.channels if c < 1 or c % 8]:
        parser.error(f"--channels must be multiples of 8, got {' '.join(map(str, wrong))}")
    elif wrong := wrong_side(SIDE if args.data in DATA else args.size, args.patch, len(args.channels)):
        parser.error(f"--size, --patch, --channels: {wrong}")
    if args.digits is not None:
        parser.check_digits(args.digits)
        if not (args.out / MODEL).exists():
            parser.error(f"--digits: there is no model in {args.out.resolve()} yet; without --digits, one is trained")
    if not args.mpi and ranks_started() > 1:
        parser.error(f"--mpi is missing: mpiexec started {ranks_started()} processes, which would all do the same")
    try:  # better to know now than after the training
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        parser.error(f"--out: cannot write to {args.out}: {error.strerror}")
    return args


def _check_kept(parser: Options, out: pathlib.Path, before: dict[str, Any], given: dict[str, Any]) -> None:
    """Refuse what is given otherwise than before to the run in `out`, if it decides about the outcome."""
    for name, value in given.items():
        if name in before and before[name] != value and name not in (*CHANGEABLE, *OF_ONE_TIME, "start"):
            it, model = f"--{name.replace('_', '-')}", out / (MODEL if (out / MODEL).exists() else CHECKPOINT)
            began = f"with {it} {shown(before[name])}" if before[name] else f"without {it}"
            another = f"--start {model} with a new --out begins another from its weights"
            parser.error(f"{it}: a run goes on as it began, {began}; {another}")


def shown(value: Any) -> str:
    """An option's value as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def wrong_side(side: int, patch: int, levels: int) -> str:
    """Why a network of so many levels, and patches of so many pixels, cannot have images of this height or width."""
    factor = patch * 2 ** (levels - 1)
    many = f"{levels} levels and squares of {patch} x {patch} pixels need a height and a width that are multiples of"
    return f"{many} {factor}, and images have {side}" if side % factor else ""
