"""Train a DDPM on handwritten digits and watch them appear: `python examples/mnist_ddpm.py`.

Read from top to bottom, this is the tutorial. What is not in here is in the package, one idea to a file. A network that
was trained with --labels draws the digits it is asked for, as often as you like: --digits 2026 --guidance 2.
"""

import argparse
import math
import pathlib
import signal
import sys
import tempfile
import time

import numpy as np
from tqdm import tqdm

from tinyddpm import Diffusion, UNet, load_digits, load_model, make_schedule, sample, save_model, train
from tinyddpm.backend import to_numpy
from tinyddpm.diffusion import OBJECTIVES
from tinyddpm.image import grid, noising_strip, save_gif, save_loss_curve
from tinyddpm.parallel import blas_name, cpu_count


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
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
    add("--device", default="cpu", help="cpu, cuda or cuda:N [%(default)s]")
    add("--precision", default="float32", help="of products on a GPU: float32, tf32, bf16 or fp16 [%(default)s]")
    add("--workers", type=int, default=cpu_count(), help="how many work side by side [one per CPU: %(default)s]")
    add("--seed", type=int, default=0, help="the same seed and steps give the same digits [%(default)s]")
    add("--out", type=pathlib.Path, default=pathlib.Path("runs/mnist"), help="folder for the results [%(default)s]")
    args = parser.parse_args()
    if args.steps is None and args.minutes is None:
        args.steps, args.minutes = 2400, 8.5
    for name in ("steps", "minutes", "batch", "lr", "blocks", "timesteps", "samples", "sample_every", "workers"):
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
    try:  # better to know now than after the training
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        parser.error(f"--out: cannot write to {args.out}: {error.strerror}")
    return args


def train_and_sample(args):
    images, labels = load_digits()  # (10000, 28, 28, 1) floats in [-1, 1]

    # The forward process: T steps, each adding a little noise. Ho et al. take T = 1000 and beta from 1e-4 to 0.02; with
    # fewer steps each has to add more, so that the last image is, as it must be, pure noise.
    stretch = 1000 / args.timesteps
    schedule = make_schedule("linear", args.timesteps, beta_start=1e-4 * stretch, beta_end=0.02 * stretch)
    diffusion = Diffusion(schedule, args.objective)

    # The network that predicts the noise in an image, with attention at the lowest resolution.
    attention = [False] * (len(args.channels) - 1) + [True]
    # With --labels it is also told which digit it is, but for one in five: so it learns both p(x | digit) and p(x), and
    # can be guided away from the latter when it is asked for a digit.
    classes = {"classes": 10, "label_dropout": 0.2} if args.labels else {}
    unet = UNet(1, 1, args.channels, args.blocks, attention, rng=args.seed, image_size=images.shape[1:3], **classes)
    unet.to(args.device, precision=args.precision)
    print(f"device   {args.device}, {args.workers} workers, BLAS {blas_name()}")
    print(f"network  U-Net {'-'.join(map(str, args.channels))}, {unet.size:,} parameters")
    print(f"data     {len(images):,} digits of {images.shape[1]} x {images.shape[2]} pixels, T = {args.timesteps}")
    limits = [(args.steps, "steps"), (args.minutes, "minutes")]
    until = " or ".join(f"{limit:,} {unit}" for limit, unit in limits if limit is not None)
    print(f"training {until}, {args.batch} images a step; Ctrl-C ends it earlier")
    print(f"results  {args.out.resolve()}", flush=True)

    some_digits = images[np.searchsorted(labels, [2, 3, 5, 8])]  # the first of each
    noising_strip(diffusion, some_digits, np.random.default_rng(args.seed)).save(args.out / "noising.png")

    # Ctrl-C asks the training to stop after the step at hand; pressed again, it ends the program at once.
    interrupted = []

    def stop_politely(signum, frame):
        interrupted.append(signum)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        print("\nCtrl-C: what was trained is saved and sampled in a moment; again to quit at once", flush=True)

    signal.signal(signal.SIGINT, stop_politely)

    steps, seconds = args.steps or sys.maxsize, 60 * (args.minutes or float("inf"))
    settings = {"lr": args.lr, "decay_steps": (args.steps or 0) // 2, "workers": args.workers, "seed": args.seed}
    settings["labels"] = labels if args.labels else None
    training = train(unet, diffusion, images, steps, args.batch, **settings)
    columns = 10 if args.labels else None  # of the grids: one for each digit, or about a square
    states, began, busy = [], time.monotonic(), 0.0  # `busy`: seconds of training, without those of drawing

    def draw(n, callback=None):  # from the averaged weights, always starting from the same noise
        settings = {"rng": args.seed, "workers": args.workers, "callback": callback, "progress": callback is not None}
        if args.labels:
            settings["labels"] = np.arange(n) % 10
        return to_numpy(sample(diffusion, state.ema.model, (n, *images.shape[1:]), **settings))

    with tqdm(unit="step", desc="training", dynamic_ncols=True) as bar:
        resumed = began
        for state in training:
            states.append(state)
            if args.device == "cpu" or state.step % 50 == 1:  # who looks at a loss waits for it, and a GPU runs behind
                loss = np.mean([s.loss for s in states[-100:]])
            busy, gone = busy + time.monotonic() - resumed, time.monotonic() - began
            bar.total = int(min(steps, max(state.step, state.step * seconds / gone)))
            bar.set_postfix_str(f"loss {loss:.4f}, {state.step * args.batch / busy:.0f} images/s", refresh=False)
            bar.update()
            if interrupted or gone > seconds:
                break
            if state.step % args.sample_every == 0 and state.step < steps:
                try:
                    grid(draw(16), columns).save(args.out / f"step_{state.step:05d}.png")
                except OSError as error:  # a full disk, perhaps: no reason to lose the training
                    bar.write(f"no grid after {state.step} steps: {error}")
            resumed = time.monotonic()
    training.close()
    save_model(args.out / "model.safetensors", state.ema.model, diffusion)
    print(f"trained  {state.step:,} steps in {(time.monotonic() - began) / 60:.1f} minutes")
    try:
        save_loss_curve(args.out / "loss.png", [s.loss for s in states])
    except ImportError:
        print("no loss curve: that needs matplotlib, pip install 'tinyddpm[plots]'")
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    # The reverse process: from pure noise, take a little noise away T times. Some of the way is kept for the animation.
    frames, every = [], max(1, args.timesteps // 30)

    def watch(t, x, x0):
        if t % every == 0:
            frames.append(grid(to_numpy(x), columns))

    grid(draw(args.samples, watch), columns).save(args.out / "samples.png")
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


def main():
    args = parse_arguments()
    if args.labels or args.digits is None:
        train_and_sample(args)
    if args.digits is not None:
        draw_digits(args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, TypeError, ArithmeticError, RuntimeError, OSError) as error:  # these say what was wrong
        sys.exit(f"mnist_ddpm.py: {error}")
