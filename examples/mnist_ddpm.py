"""Train a DDPM on handwritten digits and watch them appear: `python examples/mnist_ddpm.py`.

Read from top to bottom, this is the tutorial. What is not in here is in the package, one idea to a file. A network that
was trained with --labels draws the digits it is asked for, as often as you like: --digits 2026 --guidance 2.

A run that ended, by Ctrl-C or by a power cut, goes on as if it had not when the same command is given with --resume.
Images of your own: --data FOLDER, with a folder in it for each class if there are any. On many machines:
`mpiexec -n N python examples/mnist_ddpm.py --mpi`.
"""

import argparse
import collections
import contextlib
import math
import os
import pathlib
import sys
import tempfile
import time
import warnings

import numpy as np
from tqdm import tqdm

from tinyddpm import Diffusion, ImageFolder, UNet, load_digits, load_model, make_schedule, sample, save_model, train
from tinyddpm.backend import to_numpy
from tinyddpm.checkpoint import previous
from tinyddpm.data import load_fashion_mnist, load_mnist
from tinyddpm.diffusion import OBJECTIVES
from tinyddpm.image import grid, noising_strip, save_gif, save_loss_curve
from tinyddpm.parallel import Ranks, blas_name, ranks_started
from tinyddpm.run import MetricsLog, set_aside, stop_signals


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add(
        "--data",
        default="digits",
        help="digits (10,000 that come along), mnist or fashion (fetched), or a folder of images [%(default)s]",
    )
    add("--size", type=int, default=32, help="pixels that images of a folder are made high and wide [%(default)s]")
    add("--grey", action="store_true", help="make images of a folder grey [RGB]")
    add("--flip", action="store_true", help="mirror half of the images, which is not for digits [off]")
    add("--steps", type=int, help="training steps [2400, or as many as --minutes allows]")
    add("--minutes", type=float, help="stop training after so many minutes [8.5, or no limit if --steps is given]")
    add("--batch", type=int, default=32, help="images per step [%(default)s]")
    add("--lr", type=float, default=4e-3, help="Adam's learning rate [%(default)s]")
    add("--channels", type=int, nargs="+", default=[16, 32, 64], help="of the U-Net's levels [16 32 64]")
    add("--blocks", type=int, default=1, help="residual blocks per level [%(default)s]")
    add("--timesteps", type=int, default=300, help="T, the number of diffusion steps [%(default)s]")
    add("--labels", action="store_true", help="tell the network which digit each is, to ask for digits later [off]")
    add("--digits", help="draw these, such as 2026; by the model in the folder, unless it is told to train [none]")
    add("--guidance", type=float, default=2.0, help="how clearly they are to be those; 1, as in the data [%(default)s]")
    add("--objective", default="eps", choices=OBJECTIVES, help="what the network predicts [%(default)s]")
    add("--samples", type=int, default=64, help="digits in the final grid [%(default)s]")
    add("--sample-every", type=int, default=1000, help="training steps between sample grids [%(default)s]")
    add("--save-every", type=int, default=250, help="training steps between checkpoints [%(default)s]")
    add("--resume", action="store_true", help="go on from the checkpoint in the folder, if there is one [off]")
    add("--device", default="cpu", help="cpu, cuda or cuda:N [%(default)s]")
    add("--precision", default="float32", help="of products on a GPU: float32, tf32, bf16 or fp16 [%(default)s]")
    add("--workers", type=int, help="how many work side by side [one per CPU]")
    add("--mpi", action="store_true", help="share the work with the other processes that mpiexec started [off]")
    add("--seed", type=int, default=0, help="the same seed and steps give the same digits [%(default)s]")
    add("--out", type=pathlib.Path, default=pathlib.Path("runs/mnist"), help="folder for the results [%(default)s]")
    args = parser.parse_args()
    if args.steps is None and args.minutes is None:
        args.steps, args.minutes = 2400, 8.5
    above_zero = ("steps", "minutes", "batch", "lr", "blocks", "timesteps", "samples", "sample_every", "save_every",
                  "workers", "size")  # fmt: skip
    for name in above_zero:
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be greater than 0, got {value}")
    if args.timesteps <= 20:
        parser.error(f"--timesteps must be greater than 20 to get from an image to noise, got {args.timesteps}")
    if args.seed < 0:
        parser.error(f"--seed must be 0 or greater, got {args.seed}")
    if args.digits is not None and not (args.digits.isascii() and args.digits.isdecimal()):
        parser.error(f"--digits must be digits such as 2026, got {args.digits!r}")
    if not math.isfinite(args.guidance):
        parser.error(f"--guidance must be a number, got {args.guidance}")
    if args.digits and not (args.labels or (args.out / "model.safetensors").exists()):
        parser.error(f"--digits: there is no model in {args.out.resolve()} yet; to train one, give --labels")
    if not args.mpi and ranks_started() > 1:
        parser.error(f"--mpi is missing: mpiexec started {ranks_started()} processes, which would all do the same")
    try:  # better to know now than after the training
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        parser.error(f"--out: cannot write to {args.out}: {error.strerror}")
    return args


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
            raise ValueError(f"--data must be digits, mnist, fashion or a folder, got {args.data}")
        images = ImageFolder(args.data, args.size, channels=1 if args.grey else 3)  # read as they are needed
        return images, images.labels


def train_and_sample(args, ranks):
    first = ranks.rank == 0  # of several processes, only the first says and writes anything
    say = print if first else lambda *words, **settings: None
    if not first:
        warnings.simplefilter("ignore")
    images, labels = load_data(args, ranks)
    if args.labels and labels is None:
        raise ValueError(f"--labels: the images in {args.data} are not in folders, all of them, one for each class")

    # The forward process: T steps, each adding a little noise. Ho et al. take T = 1000 and beta from 1e-4 to 0.02; with
    # fewer steps each has to add more, so that the last image is, as it must be, pure noise.
    stretch = 1000 / args.timesteps
    schedule = make_schedule("linear", args.timesteps, beta_start=1e-4 * stretch, beta_end=0.02 * stretch)
    diffusion = Diffusion(schedule, args.objective)

    # The network that predicts the noise in an image, with attention at the lowest resolution.
    attention, (_, H, W, C) = [False] * (len(args.channels) - 1) + [True], images.shape
    # With --labels it is also told which digit it is, but for one in five: so it learns both p(x | digit) and p(x), and
    # can be guided away from the latter when it is asked for a digit.
    classes = {"classes": int(labels.max()) + 1, "label_dropout": 0.2} if args.labels else {}
    unet = UNet(C, C, args.channels, args.blocks, attention, rng=args.seed, image_size=(H, W), **classes)
    unet.to(f"cuda:{ranks.local_rank}" if args.mpi and args.device == "cuda" else args.device, precision=args.precision)
    workers = args.workers or ranks.cpus
    several = f"{ranks.size} ranks with each " if args.mpi else ""
    say(f"device   {args.device}, {several}{workers} workers, BLAS {blas_name()}")
    say(f"network  U-Net {'-'.join(map(str, args.channels))}, {unet.size:,} parameters")
    say(f"data     {len(images):,} images of {H} x {W} pixels, T = {args.timesteps}")
    if names := getattr(images, "classes", ()):
        say(f"classes  {', '.join(f'{label} {name}' for label, name in enumerate(names))}")
    limits = [(args.steps, "steps"), (args.minutes, "minutes")]
    until = " or ".join(f"{limit:,} {unit}" for limit, unit in limits if limit is not None)
    say(f"training {until}, {args.batch} images a step; Ctrl-C ends it earlier")
    say(f"results  {args.out.resolve()}", flush=True)

    columns = classes.get("classes")  # of the grids: one for each class, or about a square
    if first:
        some = images[np.linspace(0, len(images) - 1, 4).astype(int)]
        noising_strip(diffusion, some, np.random.default_rng(args.seed)).save(args.out / "noising.png")
    checkpoint, saved = args.out / "checkpoint.safetensors", None
    if first and checkpoint.exists() and not args.resume:  # nothing of another run is lost
        earlier = set_aside(args.out, (checkpoint.name, previous(checkpoint).name, "metrics.csv", "model.safetensors"))
        print(f"earlier  the run that was in this folder is in {earlier.name} now; --resume would have gone on from it")

    def draw_grid(n, name, callback=None):  # from the averaged weights, always starting from the same noise
        settings = {"rng": args.seed, "workers": workers, "callback": callback, "progress": callback is not None}
        if args.labels:
            settings["labels"] = np.arange(n) % columns
        drawn = sample(diffusion, state.ema.model, (n, H, W, C), **settings)
        grid(to_numpy(drawn), columns).save(args.out / name)

    def attempt(what, action, *arguments):  # a full disk, perhaps: no reason to lose the training
        try:
            action(*arguments)
            return True
        except (OSError, ImportError) as error:
            if what not in troubles or state.last:
                bar.write(f"no {what} after {state.step} steps: {error}")
            troubles.add(what)
            return False

    steps, seconds, began = args.steps or sys.maxsize, 60 * (args.minutes or float("inf")), time.monotonic()
    settings = {"lr": args.lr, "decay_steps": (args.steps or 0) // 2, "workers": workers, "seed": args.seed}
    settings |= {"labels": labels if args.labels else None, "flip": args.flip, "ranks": ranks}
    settings["resume"] = checkpoint if args.resume else None
    log, states, troubles = MetricsLog(args.out / "metrics.csv"), collections.deque(maxlen=100), set()
    bar = tqdm(unit="step", desc="training", dynamic_ncols=True, disable=not first)
    notice = "what was trained is saved and sampled in a moment; again to quit at once"
    with bar, stop_signals(notice if first else "") as asked:
        settings["stop"] = lambda: asked() or time.monotonic() - began > seconds
        try:
            for state in train(unet, diffusion, images, steps, args.batch, **settings):
                if not first:
                    continue
                attempt("line in metrics.csv", log.write, state)
                if state.last or state.step % args.save_every == 0:
                    attempt("line in metrics.csv", log.flush)
                    saved = state.step if attempt("checkpoint", state.save, checkpoint) else saved
                if state.last or state.step % args.sample_every == 0:
                    attempt("loss curve", lambda: save_loss_curve(args.out / "loss.png", *log.losses()))
                if not state.last and state.step % args.sample_every == 0:
                    attempt("grid", draw_grid, 16, f"step_{state.step:05d}.png")
                if bar.n == 0:
                    bar.n = bar.initial = state.step - 1
                    if args.resume and state.step == 1:
                        bar.write("resumed  from the beginning, for there is no checkpoint")
                    elif args.resume:
                        bar.write(f"resumed  at step {state.step:,}")
                states.append(state)
                if state.seen:  # a GPU runs behind, and who looked at each of its losses would have to wait for it
                    loss = np.mean([s.loss for s in states])
                    shown = f"loss {loss:.4f}, {state.images_per_second:.0f} images/s"
                    bar.set_postfix_str(shown, refresh=False)
                gone = time.monotonic() - began
                bar.total = int(min(steps, max(state.step, bar.initial + (state.step - bar.initial) * seconds / gone)))
                bar.update()
        except Exception:
            if saved:
                bar.write(f"the checkpoint after {saved:,} steps is kept: --resume goes on from it")
            raise
    if not first:
        return
    attempt("line in metrics.csv", log.close)
    save_model(args.out / "model.safetensors", state.ema.model, diffusion)
    print(f"trained  {state.step:,} steps in {state.seconds / 60:.1f} minutes")

    # The reverse process: from pure noise, take a little noise away T times. Some of the way is kept for the animation.
    frames, every = [], max(1, args.timesteps // 30)

    def watch(t, x, x0):
        if t % every == 0:
            frames.append(grid(to_numpy(x), columns))

    draw_grid(args.samples, "samples.png", watch)
    save_gif(args.out / "denoising.gif", frames)
    print(f"done in {(time.monotonic() - began) / 60:.1f} minutes: look at samples.png and denoising.gif in {args.out}")


def draw_digits(args):
    """Draw the digits that were asked for, with classifier-free guidance."""
    unet, diffusion = load_model(args.out / "model.safetensors")
    if not unet.config["label_dropout"]:
        raise ValueError(f"--digits: the model in {args.out} was trained without --labels, so it does not know digits")
    unet.to(args.device, precision=args.precision)
    labels = [int(digit) for digit in args.digits]
    settings = {"rng": args.seed, "workers": args.workers, "progress": True}
    shape = (len(labels), *unet.config["image_size"], unet.config["in_channels"])
    digits = sample(diffusion, unet, shape, labels=labels, guidance=args.guidance, **settings)
    grid(to_numpy(digits), columns=len(labels), scale=4).save(args.out / "digits.png")
    print(f"look at {args.out / 'digits.png'}")


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
    if args.labels or args.digits is None:
        with ranks.abort_on_error(), errors_in_a_line():
            train_and_sample(args, ranks)
    if args.digits is not None and ranks.rank == 0:
        draw_digits(args)


if __name__ == "__main__":
    with errors_in_a_line():
        main()
