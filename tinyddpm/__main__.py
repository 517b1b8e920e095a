"""`python -m tinyddpm COMMAND`: train a model, sample from one, evaluate one, without a line of code.

    train       on digits, or on a folder of pictures; like examples/mnist_ddpm.py, which shows how
    sample      images from a model: the one that comes along, one that was trained, or one from diffusers
    evaluate    how good generated digits are (from a checkout, where the classifier is)

Each tells with --help what it takes.
"""

from __future__ import annotations

import pathlib
import runpy
import sys
import time

import numpy as np

from . import Diffusion, UNet, make_schedule, sample, save_model, train
from .cli import GUIDANCE, SAMPLES, Options, any_path, errors_in_a_line
from .diffusion.sample import SAMPLERS
from .exchange.opening import opened
from .files.model import DIGITS_MODEL
from .files.pictures import grid, page, save_picture
from .files.run_folder import MODEL
from .options import wrong_side
from .program import TrainingRun, run_training, trained_model

EVALUATION = pathlib.Path(__file__).parents[1] / "examples" / "measure" / "evaluate_digits.py"


def draw(unet: UNet, diffusion: Diffusion, n: int, labels: list[int] | None, guidance: float | None, **settings):
    """Draw n images of the size that the model knows, of the given classes or of all in turn."""
    config = unet.config
    if config["classes"]:
        settings["labels"] = np.resize(range(config["classes"]) if labels is None else labels, n)
        settings["guidance"] = (GUIDANCE if guidance is None else guidance) if config["label_dropout"] else None
    return sample(diffusion, unet, shape=(n, *config["image_size"], config["in_channels"]), **settings)


def train_on_images(run: TrainingRun) -> None:
    """Train as examples/mnist_ddpm.py does, to the same model, and draw samples; or only --digits."""
    args = run.args
    if args.digits is not None:
        unet, diffusion, digits = trained_model(args)
        how = {"steps": min(args.sampling_steps, diffusion.T), "rng": args.seed, "workers": args.workers}
        drawn = draw(unet, diffusion, len(digits), digits, args.guidance, progress=True, **how)
        run.save(grid(drawn, columns=len(digits), scale=4), "digits.png")
        print(f"look at {args.out / 'digits.png'}")
        return
    images, labels = run.load_data()
    (_, H, W, C), attention = images.shape, [False] * len(args.channels)
    told = {} if labels is None else {"classes": int(labels.max()) + 1, "label_dropout": 0.1}
    shape = {"image_size": (H, W), "patch": args.patch}
    diffusion, unet = run.start_model(images, labels) or (
        Diffusion(make_schedule("cosine", args.timesteps, input_scale=0.5), args.objective),
        UNet(C, C, args.channels, args.blocks, attention, rng=args.seed, **shape, **told),
    )
    run.prepare(unet, images)

    def training(unet: UNet, steps: int, **settings):
        settings |= {"labels": labels, "flip": args.flip, "seed": args.seed, "workers": run.workers, "ranks": run.ranks}
        return train(unet, diffusion, images, steps, args.batch, lr=args.lr, decay_steps=steps // 2, **settings)

    def draw_grid(unet: UNet, n: int, name: str, **settings) -> None:
        settings |= {"steps": min(args.sampling_steps, diffusion.T), "rng": args.seed, "workers": run.workers}
        run.save(page(draw(unet, diffusion, n, None, args.guidance, **settings), unet.config["classes"]), name)

    run.rehearse(training, unet)
    run.open_folder()
    draw_some = lambda state: draw_grid(state.ema.model, 20, f"step_{state.step:05d}.png")
    for state in run.followed(training(unet, run.steps, stop=run.stop, resume=run.resume), draw_some):
        last = state
    if run.first:
        save_model(args.out / MODEL, last.ema.model, diffusion)
        draw_grid(last.ema.model, args.samples, "samples.png", progress=True)
        print(f"done in {run.minutes():.1f} minutes: {MODEL} and samples.png are in {args.out}")


def sample_from_model(argv: list[str], prog: str) -> None:
    """Draw images from a model in a file or a folder."""
    parser = Options("Draw images from a model, in a grid.", prog=prog)
    add = parser.add
    kinds = "save_model's file, a training's checkpoint or folder, diffusers' folder, or a file with Ho et al.'s names"
    add("model", nargs="?", type=any_path, default=DIGITS_MODEL, help=f"{kinds} [the model that comes along]")
    add("--samples", type=int, default=40, least=1, most=SAMPLES, help="how many images [%(default)s]")
    add("--labels", type=int, nargs="+", help="their classes, repeated to fill --samples [each in turn]")
    clearly = f"how clearly they are to be those; 1, as in the data [{GUIDANCE}, if it can]"
    add("--guidance", type=float, least=-1000, most=1000, help=clearly)
    add("--method", default="ddpm", choices=SAMPLERS, help="the sampler [%(default)s]")
    add("--steps", type=int, default=25, least=1, most=10**5, help="of the sampler [%(default)s]")
    add("--size", type=int, least=1, most=4096, help="height and width of the images [those of the model]")
    add("--variant", help="of a folder of diffusers, another file of weights, such as fp16")
    add("--device", default="cpu", help="cpu, cuda or cuda:N [%(default)s]")
    add("--precision", default="float32", help="of products on a GPU: float32, tf32, bf16 or fp16 [%(default)s]")
    parser.add_usual(out="samples.png", gives="other images")
    args, began = parser.parse_args(argv), time.monotonic()

    unet, diffusion = opened(args.model, args.variant)
    unet.to(args.device, precision=args.precision)
    if args.size:
        if wrong := wrong_side(args.size, unet.config["patch"], len(unet.config["channels"])):
            raise ValueError(f"--size: {wrong}")
        unet.config["image_size"] = (args.size, args.size)
    if unet.config["image_size"] is None:
        raise ValueError("--size: this model does not say how large its images are, so it has to be given")
    classes, labels = unet.config["classes"] or 0, args.labels or []
    if labels and not classes:
        raise ValueError("--labels: this model knows no classes, so leave it out")
    if not all(0 <= label < classes for label in labels):
        raise ValueError(f"--labels: this model knows 0 to {classes - 1}, got {' '.join(map(str, labels))}")
    if args.guidance is not None and not unet.config["label_dropout"]:
        raise ValueError("--guidance: this model cannot be guided, for it did not learn to do without labels")
    how = {"method": args.method, "steps": min(args.steps, diffusion.T), "rng": args.seed, "workers": args.workers}
    images = draw(unet, diffusion, args.samples, args.labels, args.guidance, progress=True, **how)
    save_picture(args.out, page(images, unet.config["classes"]))
    print(f"{args.samples} images in {time.monotonic() - began:.1f} seconds: look at {args.out}")


def evaluate(argv: list[str], prog: str) -> None:
    """Run examples/measure/evaluate_digits.py."""
    if not EVALUATION.exists():
        raise FileNotFoundError("the classifier is not in the package, but in a checkout of its repository")
    runpy.run_path(str(EVALUATION))["main"](argv, prog=prog)


def main(argv: list[str]) -> None:
    command, *rest = argv or ["--help"]
    prog = f"python -m tinyddpm {command}"
    if command == "train":
        run_training(train_on_images, "Train a model, and draw samples from it.", rest, prog=prog)
    elif command == "sample":
        with errors_in_a_line(prog):
            sample_from_model(rest, prog)
    elif command == "evaluate":
        with errors_in_a_line(prog):
            evaluate(rest, prog)
    elif command in ("-h", "--help"):
        with errors_in_a_line(prog):
            print(__doc__)
    else:
        sys.exit(f"python -m tinyddpm: unknown command {command!r}; known: train, sample, evaluate")


if __name__ == "__main__":
    main(sys.argv[1:])
