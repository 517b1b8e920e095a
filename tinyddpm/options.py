"""The options of a training: those it begins with, and those it keeps when it goes on."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from .cli import GUIDANCE, SAMPLES, Options, any_path
from .diffusion.checks import OBJECTIVES
from .files.run_folder import CHECKPOINT, OPTIONS, model_in
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
    add("--data", default="digits", help="digits, which come along; mnist, fashion (fetched); a folder [%(default)s]")
    add("--start", type=any_path, metavar="MODEL", help="begin with the weights of this one, or of a run [random ones]")
    add("--size", type=int, default=32, least=1, most=4096, help="height and width of images of a folder [%(default)s]")
    add("--grey", action="store_true", help="make images of a folder grey [RGB]")
    add("--flip", action="store_true", help="mirror half of the images (not for digits) [off]")
    add("--minutes", type=float, default=5, above=0, most=10**6, help="train for about so long here [%(default)s]")
    add("--steps", type=int, least=1, help="train so many steps, however long they take [as --minutes allows]")
    add("--batch", type=int, default=32, least=1, most=10**5, help="images per step [%(default)s]")
    add("--lr", type=float, default=4e-3, above=0, help="Adam's learning rate, later falling [%(default)s]")
    add("--patch", type=int, default=2, least=1, most=1000, help="the U-Net's positions are N x N pixels [%(default)s]")
    add("--channels", type=int, nargs="+", default=[32, 64], most=8192, help="of the U-Net's levels [32 64]")
    add("--blocks", type=int, default=1, least=1, most=100, help="residual blocks per level [%(default)s]")
    add("--timesteps", type=int, default=1000, least=1, most=10**5, help="T, of diffusion [%(default)s]")
    add("--objective", default="x0", choices=OBJECTIVES, help="noise, image or a blend is predicted [%(default)s]")
    add("--no-labels", action="store_true", help="do not tell the network what is in an image [it is told]")
    add("--digits", help="draw these, such as 2026, by the model in the folder; nothing is trained [none]")
    clearly = "how clearly images show what they are to be [%(default)s]"
    add("--guidance", type=float, default=GUIDANCE, least=-1000, most=1000, help=clearly)
    back = "of T, on the way back from noise [%(default)s]"
    add("--sampling-steps", type=int, default=25, least=1, most=10**5, help=back)
    add("--samples", type=int, default=64, least=1, most=SAMPLES, help="images in the final grid [%(default)s]")
    add("--sample-every", type=int, default=500, least=1, help="training steps between sample grids [%(default)s]")
    add("--save-every", type=int, default=250, least=1, help="training steps between checkpoints [%(default)s]")
    add("--resume", action="store_true", help="go on from the checkpoint, with the options of before [off]")
    add("--device", default="cpu", help="cpu, cuda or cuda:N [%(default)s]")
    add("--precision", default="float32", help="of products on a GPU: float32, tf32, bf16 or fp16 [%(default)s]")
    add("--workers", type=int, least=1, most=1024, help="how many work side by side [one per CPU]")
    add("--mpi", action="store_true", help="share the work with the other processes that mpiexec started [off]")
    add("--seed", type=int, default=0, least=0, help="the same seed and steps give the same digits here [%(default)s]")
    add("--out", type=any_path, default=pathlib.Path("runs/mnist"), help="folder for the results [%(default)s]")
    return parser


def training_arguments(parser: Options, argv: list[str] | None = None) -> argparse.Namespace:
    """What was given for `training_options`; to a run that goes on, what was given before, unless given again."""
    args, given = parser.parse_args(argv), parser.given(argv)
    goes_on = args.resume and (args.out / CHECKPOINT).exists()
    if args.resume and (args.out / OPTIONS).exists():
        args = _as_before(parser, argv, args.out, given, goes_on)
    elif {"steps", "minutes"} <= given.keys():
        parser.error("--steps, --minutes: each says how long to train, so give one of them")
    args.given = tuple(given)
    if args.digits is not None:
        parser.check_digits(args.digits)
        if "start" in given:
            parser.error("--digits, --start: digits are drawn by the model in --out, so leave out one of them")
        if not model_in(args.out).is_file():
            parser.error(f"--digits: there is no model in {args.out.resolve()} yet; without --digits, one is trained")
    _check_places(parser, args, goes_on)
    if args.start is None:
        if wrong := [c for c in args.channels if c < 1 or c % 8]:
            parser.error(f"--channels must be multiples of 8, got {shown(wrong)}")
        if wrong := wrong_side(SIDE if args.data in DATA else args.size, args.patch, len(args.channels)):
            parser.error(f"--size, --patch, --channels: {wrong}")
    if not args.mpi and ranks_started() > 1:
        parser.error(f"--mpi is missing: mpiexec started {ranks_started()} processes, which would all do the same")
    return args


def _check_places(parser: Options, args: argparse.Namespace, goes_on: bool) -> None:
    """Make --data and --start absolute, and refuse an --out in which results would mix with these."""
    if args.data not in DATA and os.path.isdir(folder := os.path.expanduser(args.data)):
        args.data = os.path.abspath(folder)
        if pathlib.Path(folder).resolve() in ((out := args.out.resolve()), *out.parents):
            parser.error(f"--out: {args.out} is in the folder of --data, whose pictures are what is learned from")
    if args.start is not None:
        args.start = os.path.abspath(args.start)
        home = args.start if os.path.isdir(args.start) else os.path.dirname(args.start)
        if os.path.realpath(home) == os.path.realpath(args.out) and not goes_on:
            parser.error(f"--out: {args.out} holds the model that --start names, and keeps it; take a new folder")


def _as_before(
    parser: Options, argv: list[str] | None, out: pathlib.Path, given: dict[str, Any], goes_on: bool
) -> argparse.Namespace:
    """What is given now, and else what the run in `out` began with; refuse what it has to keep, or what is damaged."""
    parser.within = f"--resume: {out / OPTIONS} is damaged: "
    try:
        before = json.loads((out / OPTIONS).read_text("utf-8"))
    except ValueError as error:
        parser.error(str(error))
    if not isinstance(before, dict):
        parser.error(f"expected an object of options, got {before!r}")
    parser.parse_args([*_typed({name: value for name, value in before.items() if name in parser.limits})])
    parser.within = ""
    parser.set_defaults(**before)
    args = parser.parse_args(argv)
    if args.minutes != before.get("minutes", args.minutes):
        parser.error(f"--minutes: the run that is to go on has {args.steps} steps, and keeps them")
    if goes_on:
        _check_kept(parser, out, before, given)
        args.start = before.get("start")
    return args


def _typed(options: dict[str, Any]) -> Iterator[str]:
    """The words that would be typed for these options; those that are off or None need none."""
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, list):
            yield from (option, *map(str, value))
        elif value is not None and value is not False:
            yield option if value is True else f"{option}={value}"


def _check_kept(parser: Options, out: pathlib.Path, before: dict[str, Any], given: dict[str, Any]) -> None:
    """Refuse what is given otherwise than before to the run in `out`, if it decides about the outcome."""
    for name, value in given.items():
        if name in before and before[name] != value and name not in (*CHANGEABLE, *OF_ONE_TIME, "start"):
            it = f"--{name.replace('_', '-')}"
            began = f"with {it} {shown(before[name])}" if before[name] else f"without {it}"
            another = f"--start {out} with a new --out begins another from its weights"
            parser.error(f"{it}: a run goes on as it began, {began}; {another}")


def shown(value: Any) -> str:
    """An option's value as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def wrong_side(side: int, patch: int, levels: int) -> str:
    """Why a network of so many levels, and patches of so many pixels, cannot have images of this height or width."""
    factor = patch * 2 ** (levels - 1)
    many = f"{levels} levels and squares of {patch} x {patch} pixels need a height and a width that are multiples of"
    return f"{many} {factor}, and images have {side}" if side % factor else ""
