"""Train a DDPM on handwritten digits and watch them appear: `python examples/mnist_ddpm.py`.

This is the tutorial, to be read from the top; from parse_arguments on it is about options and errors. What is not in
here is in the package, one idea to a file. The network is told which digit each image is, so that it can be asked for
digits afterwards, as often as you like: --digits 2026.

A run that ended, by Ctrl-C or by a power cut, goes on as if it had not with --resume (and --out, if it was given).
Images of your own: --data FOLDER, with a folder in it for each class if there are any. On many machines:
`mpiexec -n N python examples/mnist_ddpm.py --mpi`.
"""

import argparse
import collections
import contextlib
import copy
import functools
import itertools
import json
import math
import os
import pathlib
import sys
import tempfile
import time
import warnings

import numpy as np

from tinyddpm import Diffusion, ImageFolder, UNet, load_digits, load_model, make_schedule, sample, save_model, train
from tinyddpm.backend import to_numpy
from tinyddpm.diffusion.checks import OBJECTIVES
from tinyddpm.files.checkpoint import stop_signals
from tinyddpm.files.data import load_fashion_mnist, load_mnist
from tinyddpm.files.pictures import grid, noising_strip, save_gif
from tinyddpm.files.run_folder import CHECKPOINT, OPTIONS, begin_folder, recorded
from tinyddpm.speed.ranks import Ranks, ranks_started
from tinyddpm.speed.workers import blas_name

PICTURES = "noising.png", "step_*.png", "samples.png", "denoising.gif", "digits.png"  # in the folder, in the end


def load_data(args, ranks):
    """Return images (M, H, W, C), floats in [-1, 1], and the class of each, or None."""
    with ranks.first_alone():  # one downloads for all
        if args.data == "digits":
            return load_digits()
        if args.data == "mnist":
            return load_mnist(full=True)
        if args.data == "fashion":
            return load_fashion_mnist()
        if not os.path.isdir(args.data):
            raise ValueError(f"--data must be digits, mnist, fashion or a folder, and there is no folder {args.data}")
        images = ImageFolder(args.data, args.size, channels=1 if args.grey else 3)  # read as they are needed
        return images, images.labels


def make_model(args, images, labels):
    """Return the diffusion process, and a network that has learned nothing yet."""
    # The forward process: T steps, each adding a little noise, until nothing else is left. Images are halved (Chen
    # 2023), so that noise hides them sooner and more of the steps are those in which a digit takes shape. The network
    # predicts the image behind the noise. Ho et al.'s predicts the noise, from which the image follows; but then errors
    # in the image hardly count where there is much noise. Digits take shape there, and it would learn that later.
    diffusion = Diffusion(make_schedule("cosine", args.timesteps, input_scale=0.5), args.objective)
    # The U-Net, with attention in the middle only. It is told the class of nine images in ten: so it learns p(x |
    # digit) and p(x), and sampling can be guided away from the latter (Ho & Salimans 2022).
    (_, H, W, C), attention = images.shape, [False] * len(args.channels)
    told = {} if labels is None else {"classes": int(labels.max()) + 1, "label_dropout": 0.1}
    settings = {"image_size": (H, W), "patch": args.patch, "rng": args.seed}
    return diffusion, UNet(C, C, args.channels, args.blocks, attention, **settings, **told)


def steps_within(minutes, training):
    """How many steps take so long here, from the pace of a rehearsal of a few seconds."""
    began, ends, budget = time.monotonic(), [], 60 * minutes
    elapsed = lambda: time.monotonic() - began
    for state in training(steps=10**6, stop=lambda: len(ends) > 5 and elapsed() > min(budget / 50, 10)):
        state.look()  # a GPU runs behind
        ends.append(elapsed())
    return max(1, round((budget - elapsed()) / np.median(np.diff(ends))))


def train_and_sample(args, ranks):
    first = ranks.rank == 0  # of several processes, only the first says and writes anything
    say = print if first else lambda *words, **settings: None
    if not first:
        warnings.simplefilter("ignore")
    images, labels = load_data(args, ranks)
    labels = None if args.no_labels else labels
    diffusion, unet = make_model(args, images, labels)
    unet.to(f"cuda:{ranks.local_rank}" if args.mpi and args.device == "cuda" else args.device, precision=args.precision)
    workers, (H, W), began = args.workers or ranks.cpus, images.shape[1:3], time.monotonic()
    each = f"{ranks.size} ranks of " if args.mpi else ""
    say(f"device   {args.device}, {each}{workers} worker{'s' * (workers > 1)}, BLAS {blas_name()}")
    say(f"network  U-Net {'-'.join(map(str, args.channels))}, {unet.size:,} parameters")
    say(f"data     {len(images):,} images of {H} x {W} pixels, T = {args.timesteps}")
    if names := getattr(images, "classes", ()):
        say(f"classes  {', '.join(f'{label} {name}' for label, name in enumerate(names))}")

    def training(model, steps, **settings):
        settings |= {"lr": args.lr, "decay_steps": steps // 2, "workers": workers, "seed": args.seed, "ranks": ranks}
        return train(model, diffusion, images, steps, args.batch, labels=labels, flip=args.flip, **settings)

    steps, about = args.steps, ""
    if steps is None:
        say(f"pace     a rehearsal tells how many steps take {args.minutes:g} minutes", flush=True)
        steps = ranks.gathered(steps_within(args.minutes, functools.partial(training, copy.deepcopy(unet))))[0]
        about = f", about {args.minutes:g} minutes"
    say(f"training {steps:,} steps{about}, {args.batch} images a step; Ctrl-C ends it earlier")
    if about and steps < 200:
        say("         so few learn little; README's digits come from --steps 1454, however long these take here")
    say(f"results  {args.out.resolve()}", flush=True)
    if first:
        if args.resume and not (args.out / CHECKPOINT).exists():
            print("resumed  from the beginning, for there is no checkpoint")
        may_change = ("out", "resume", "digits", "device", "workers", "mpi")  # may be others when it goes on
        options = {name: value for name, value in vars(args).items() if name not in may_change} | {"steps": steps}
        if earlier := begin_folder(args.out, options, args.resume, PICTURES):
            print(f"earlier  the run that was there is in {earlier.name} now; --resume would have gone on from it")
        four = images[np.linspace(0, len(images) - 1, 4).astype(int)]
        noising_strip(diffusion, four, np.random.default_rng(args.seed)).save(args.out / "noising.png")

    def draw_grid(state, n, name, **settings):  # from the averaged weights, always starting from the same noise
        drawn = draw(args, diffusion, state.ema.model, n, workers, **settings)
        page(drawn, unet).save(args.out / name)

    notice = "what was trained is saved and sampled in a moment; again to quit at once"
    with stop_signals(notice if first else "") as asked:
        states = training(unet, steps, stop=asked, resume=args.out / CHECKPOINT if args.resume else None)
        if first:
            draw_some = lambda state: draw_grid(state, 20, f"step_{state.step:05d}.png")
            states = recorded(states, args.out, steps, args.save_every, args.sample_every, draw_some)
        (state,) = collections.deque(states, maxlen=1)  # all steps go by, the last is kept
    if not first:
        return
    save_model(args.out / "model.safetensors", state.ema.model, diffusion)
    print(f"trained  {state.step:,} steps in {state.seconds / 60:.1f} minutes")

    # The reverse process: from pure noise, take noise away in so many steps. Some of them are kept for the animation.
    frames, visited = [], itertools.count()

    def watch(t, x, x0):
        if next(visited) % math.ceil(args.sampling_steps / 50) == 0 or t == 0:
            frames.append(page(x / diffusion.schedule.input_scale, unet))

    draw_grid(state, args.samples, "samples.png", callback=watch, progress=True)
    save_gif(args.out / "denoising.gif", frames)
    print(f"done in {(time.monotonic() - began) / 60:.1f} minutes: look at samples.png and denoising.gif in {args.out}")


def page(images, unet):
    """A grid with a column for each class, unless that would be too few or too many."""
    classes = unet.config["classes"] or 0
    return grid(to_numpy(images), columns=classes if 5 <= classes <= len(images) else None)


def draw(args, diffusion, unet, n, workers, labels=None, **settings):
    """Draw n images, of the given classes or of all in turn."""
    config = unet.config
    if config["classes"]:
        settings["labels"] = np.arange(n) % config["classes"] if labels is None else labels
        settings["guidance"] = args.guidance if config["label_dropout"] else 1
    shape, steps = (n, *config["image_size"], config["in_channels"]), min(args.sampling_steps, diffusion.T)
    return sample(diffusion, unet, shape, "ddpm", steps, rng=args.seed, workers=workers, **settings)


def draw_digits(args):
    """Draw the digits that were asked for."""
    unet, diffusion = load_model(args.out / "model.safetensors")
    if not unet.config["classes"]:
        raise ValueError(f"--digits: the model in {args.out} was trained without labels, so it does not know digits")
    labels = [int(digit) for digit in args.digits]
    if max(labels) >= unet.config["classes"]:
        raise ValueError(f"--digits: this model knows 0 to {unet.config['classes'] - 1}, got {args.digits}")
    unet.to(args.device, precision=args.precision)
    digits = draw(args, diffusion, unet, len(labels), args.workers, labels, progress=True)
    grid(to_numpy(digits), columns=len(labels), scale=4).save(args.out / "digits.png")
    print(f"look at {args.out / 'digits.png'}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
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
    add("--objective", default="x0", choices=OBJECTIVES, help="what the network predicts [%(default)s]")
    add("--no-labels", action="store_true", help="do not tell the network what is in an image [it is told]")
    add("--digits", help="draw these, such as 2026, by the model in the folder; nothing is trained [none]")
    add("--guidance", type=float, default=1.5, help="how clearly images show what they are to be [%(default)s]")
    add("--sampling-steps", type=int, default=25, help="of T, on the way back from noise [%(default)s]")
    add("--samples", type=int, default=64, help="images in the final grid [%(default)s]")
    add("--sample-every", type=int, default=500, help="training steps between sample grids [%(default)s]")
    add("--save-every", type=int, default=250, help="training steps between checkpoints [%(default)s]")
    add("--resume", action="store_true", help="go on from the checkpoint in the folder, if there is one [off]")
    add("--device", default="cpu", help="cpu, cuda or cuda:N [%(default)s]")
    add("--precision", default="float32", help="of products on a GPU: float32, tf32, bf16 or fp16 [%(default)s]")
    add("--workers", type=int, help="how many work side by side [one per CPU]")
    add("--mpi", action="store_true", help="share the work with the other processes that mpiexec started [off]")
    add("--seed", type=int, default=0, help="the same seed and steps give the same digits here [%(default)s]")
    add("--out", type=pathlib.Path, default=pathlib.Path("runs/mnist"), help="folder for the results [%(default)s]")
    args = parser.parse_args()
    options = args.out / OPTIONS
    if args.resume and options.exists():  # as given before, unless given again
        try:
            parser.set_defaults(**(before := json.loads(options.read_text())))
        except (ValueError, TypeError) as error:
            parser.error(f"--resume: {options} is damaged: {error}")
        args = parser.parse_args()
        if args.minutes != before.get("minutes", args.minutes):
            parser.error(f"--minutes: the run that is to go on has {args.steps} steps, and keeps them")
    if os.path.isdir(args.data):
        args.data = os.path.abspath(args.data)
    above_zero = ("minutes", "steps", "batch", "lr", "patch", "blocks", "timesteps", "sampling_steps", "samples",
                  "sample_every", "save_every", "workers", "size")  # fmt: skip
    for name in above_zero:
        value = getattr(args, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            parser.error(f"--{name.replace('_', '-')} must be greater than 0, got {value}")
    if args.seed < 0:
        parser.error(f"--seed must be 0 or greater, got {args.seed}")
    if args.digits is not None and not (args.digits.isascii() and args.digits.isdecimal()):
        parser.error(f"--digits must be digits such as 2026, got {args.digits!r}")
    if not math.isfinite(args.guidance):
        parser.error(f"--guidance must be a number, got {args.guidance}")
    if args.digits and not (args.out / "model.safetensors").exists():
        parser.error(f"--digits: there is no model in {args.out.resolve()} yet; without --digits, one is trained")
    if not args.mpi and ranks_started() > 1:
        parser.error(f"--mpi is missing: mpiexec started {ranks_started()} processes, which would all do the same")
    try:  # better to know now than after the training
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        parser.error(f"--out: cannot write to {args.out}: {error.strerror}")
    return args


@contextlib.contextmanager
def errors_in_a_line():
    """Of an error that says what was wrong, no more is shown than that."""
    try:
        yield
    except (ValueError, TypeError, ArithmeticError, RuntimeError, OSError) as error:
        sys.exit(f"mnist_ddpm.py: {error}")
    except MemoryError as error:
        sys.exit(f"mnist_ddpm.py: out of memory, of which fewer --workers or a smaller --batch need less: {error}")
    except KeyboardInterrupt:
        print("\nmnist_ddpm.py: interrupted", file=sys.stderr)
        sys.exit(130)  # what a shell says of a program that Ctrl-C ended


def main():
    args = parse_arguments()
    warnings.formatwarning = lambda message, *_: f"\nmnist_ddpm.py: {message}\n"
    ranks = Ranks(args.mpi)
    args = ranks.gathered(args)[0]  # which may have found the options of before
    if args.digits is not None:
        return draw_digits(args) if ranks.rank == 0 else None
    with ranks.abort_on_error(), errors_in_a_line():
        train_and_sample(args, ranks)


if __name__ == "__main__":
    with errors_in_a_line():
        main()
