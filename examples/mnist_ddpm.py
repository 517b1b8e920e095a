"""Train a DDPM on handwritten digits and watch them appear: `python examples/mnist_ddpm.py`.

This is the tutorial, to be read from the top. What is not in here is in the package, one idea to a file; what is not
about diffusion is in tinyddpm/program.py, and the options are in tinyddpm/options.py. The network is told which digit
each image is, so that it can be asked for digits afterwards, as often as you like: --digits 2026.

A run that ended, by Ctrl-C or by a power cut, goes on as if it had not with --resume (and --out, if it was given).
--start RUN, with a new --out, begins another with what that one has learned. Images of your own: --data FOLDER, with a
folder in it for each class, if any. On many machines: `mpiexec -n N python examples/mnist_ddpm.py --mpi`.
"""

import itertools
import math

import numpy as np

from tinyddpm import Diffusion, UNet, make_schedule, program, sample, save_model, train
from tinyddpm.files.pictures import grid, noising_strip, page, save_gif
from tinyddpm.files.run_folder import MODEL


def make_model(args, images, labels):
    """Return the diffusion process, and a network that has learned nothing yet."""
    # The forward process: T steps, each adding a little noise, until nothing else is left. Pixels are multiplied by 0.5
    # (Chen 2023), so that noise hides them sooner and more of the steps are those in which a digit takes shape. The
    # network predicts the image behind the noise. Ho et al.'s predicts the noise, from which the image follows; but
    # then errors in the image hardly count where there is much noise. Digits take shape there, and it would learn that
    # later.
    diffusion = Diffusion(make_schedule("cosine", args.timesteps, input_scale=0.5), args.objective)
    # The U-Net, with attention in the middle only. It is told the class of nine images in ten: so it learns p(x |
    # digit) and p(x), and sampling can be guided away from the latter (Ho & Salimans 2022).
    (_, H, W, C), attention = images.shape, [False] * len(args.channels)
    told = {} if labels is None else {"classes": int(labels.max()) + 1, "label_dropout": 0.1}
    settings = {"image_size": (H, W), "patch": args.patch, "rng": args.seed}
    return diffusion, UNet(C, C, args.channels, args.blocks, attention, **settings, **told)


def draw(args, diffusion, unet, n, workers, labels=None, **settings):
    """The reverse process: from pure noise, take noise away in so many steps (Ho et al. 2020, algorithm 2). Draws n
    images, of the given classes or of all in turn."""
    config = unet.config
    if config["classes"]:
        settings["labels"] = np.arange(n) % config["classes"] if labels is None else labels
        settings["guidance"] = args.guidance if config["label_dropout"] else 1
    shape, steps = (n, *config["image_size"], config["in_channels"]), min(args.sampling_steps, diffusion.T)
    return sample(diffusion, unet, shape, "ddpm", steps, rng=args.seed, workers=workers, **settings)


def train_and_sample(run):
    """run, a `program.TrainingRun`, has the options, the data and the folder, and does what is not about diffusion."""
    args = run.args
    images, labels = run.load_data()  # (M, H, W, C) floats in [-1, 1], and (M,) integers or None
    diffusion, unet = run.start_model(images, labels) or make_model(args, images, labels)  # that of --start, if any
    run.prepare(unet, images)

    def training(unet, steps, **settings):  # algorithm 1: a generator that yields its state after every step
        settings |= {"labels": labels, "flip": args.flip, "seed": args.seed, "workers": run.workers, "ranks": run.ranks}
        return train(unet, diffusion, images, steps, args.batch, lr=args.lr, decay_steps=steps // 2, **settings)

    run.rehearse(training, unet)  # how many steps --minutes are
    run.open_folder()
    if run.first:  # of several processes
        four = images[np.linspace(0, len(images) - 1, 4).astype(int)]
        run.save(noising_strip(diffusion, four, np.random.default_rng(args.seed)), "noising.png")

    def draw_some(state):  # now and then, from the averaged weights, always starting from the same noise
        drawn = draw(args, diffusion, state.ema.model, 20, run.workers)
        run.save(page(drawn, unet.config["classes"]), f"step_{state.step:05d}.png")

    for state in run.followed(training(unet, run.steps, stop=run.stop, resume=run.resume), draw_some):
        last = state  # its .loss, .grad_norm and so on are in metrics.csv, it is in a checkpoint now and then
    if not run.first:
        return
    save_model(args.out / MODEL, last.ema.model, diffusion)
    print(f"trained  {last.step:,} steps in {last.seconds / 60:.1f} minutes")

    frames, visited = [], itertools.count()

    def watch(t, x, x0):  # x_t at some of the steps back
        if next(visited) % math.ceil(args.sampling_steps / 50) == 0 or t == 0:
            frames.append(page(x / diffusion.schedule.input_scale, unet.config["classes"]))

    drawn = draw(args, diffusion, last.ema.model, args.samples, run.workers, callback=watch, progress=True)
    run.save(page(drawn, unet.config["classes"]), "samples.png")
    save_gif(args.out / "denoising.gif", frames)
    print(f"done in {run.minutes():.1f} minutes: look at samples.png and denoising.gif in {args.out}")


def main(run):
    if run.args.digits is None:
        return train_and_sample(run)
    unet, diffusion, labels = program.trained_model(run.args)
    digits = draw(run.args, diffusion, unet, len(labels), run.args.workers, labels, progress=True)
    run.save(grid(digits, columns=len(labels), scale=4), "digits.png")
    print(f"look at {run.args.out / 'digits.png'}")


if __name__ == "__main__":
    program.run_training(main, __doc__)
