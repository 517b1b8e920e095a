"""How many steps does a sampler need? `python examples/samplers.py` draws the same digits with each, in more and more.

All begin with the same noise, so that `ddim` and `dpm++`, which follow the same path from noise to digits with more or
fewer steps, should make the same digits, and `ddpm`, which draws lots at every step, makes others. What is printed:

    seconds     for all ten digits
    off         how far the digits are from where the path leads, dpm++'s in twice as many steps as any: the root of
                the mean squared difference. For `ddpm` it says nothing
    nearest     how far the nearest real digits are, in the same way; between real digits it is what the last line says.
                Too far: not a digit. But a blurred one is nearer than it should be, so look at the picture
"""

import time

import numpy as np

from tinyddpm import cli, load_digits, load_model, sample
from tinyddpm.diffusion.sample import SAMPLERS, timesteps
from tinyddpm.files.pictures import rows, save_picture


def parse_arguments():
    parser = cli.Options(__doc__)
    add = parser.add
    add("--methods", nargs="+", default=list(SAMPLERS), choices=SAMPLERS, help="the samplers [all]")
    add("--steps", type=int, nargs="+", default=[3, 5, 10, 20, 50], help="of each [3 5 10 20 50]")
    add("--most", type=int, default=250, help="and for ddpm so many too [%(default)s]")
    add(
        "--guidance",
        type=float,
        least=-1000,
        most=1000,
        help="how clearly digits are to be what they are called, such as 2 [as in the data]",
    )
    parser.add_usual(out="samplers.png")
    return parser.parse_args()


def distance(a, b):
    return np.sqrt(np.mean((a - b) ** 2, axis=(-3, -2, -1)))


def nearest(digits, images):
    """The distance of each digit to the nearest of the images that is another one."""
    away = (distance(digit, images) for digit in digits)
    return np.array([d[d > 0].min() for d in away])


def main():
    args = parse_arguments()
    unet, diffusion = load_model()
    for steps in [*args.steps, args.most]:
        timesteps(diffusion.T, steps)  # raises if there are not so many: better to know now
    images, labels = load_digits()
    ten = np.arange(10)

    def draw(method, steps):
        settings = dict(rng=args.seed, labels=ten, guidance=args.guidance, workers=args.workers)
        settings["progress"] = steps > max(args.steps)  # a bar while much is done for one line
        return sample(diffusion, unet, (10, 28, 28, 1), method, steps, **settings)

    limit, page = draw("dpm++", min(2 * max(args.steps), diffusion.T)), {}
    print("sampler     steps   seconds   off     nearest")
    for method in args.methods:
        for steps in args.steps + [args.most] * (method == "ddpm"):
            began = time.monotonic()
            digits = page[f"{method}, {steps} steps"] = draw(method, steps)
            off = f"{distance(digits, limit).mean():.3f}" if method != "ddpm" else "     "
            seconds, near = time.monotonic() - began, nearest(digits, images).mean()
            print(f"{method:10}  {steps:5}   {seconds:7.1f}   {off}   {near:.3f}", flush=True)
    real = images[np.searchsorted(labels, ten)]
    page["real digits"] = real
    print(f"real digits                            {nearest(real, images).mean():.3f}")
    save_picture(args.out, rows(page))
    print(f"look at {args.out}")


if __name__ == "__main__":
    cli.run(main)
