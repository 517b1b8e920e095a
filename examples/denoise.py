"""Take noise out of pictures: `python examples/denoise.py`.

A diffusion model has learned to tell noise from digits at every strength. So of a picture with noise of known strength
it can be asked what the digit was: the noisy picture is x_t, at the t where the noise is as strong (see
`tinyddpm.diffusion.editing.denoise`), and the way back starts there. The rows of the picture, for each strength:

    digit       as it was
    noisy       what the model is given
    mean        one step: what it was on average. No guess has a smaller error, but where the picture cannot be known
                it is blurred
    a digit     all steps (`ddpm`): a digit that may have been it. Sharp, and sometimes wrong
    another     the same from other random numbers
    told        the same again, and the model is told which digit it is

The digits are among those that the model was trained on; the noise is not.
"""

import time

import numpy as np

from tinyddpm import cli, load_digits, load_model
from tinyddpm.diffusion.editing import denoise
from tinyddpm.files.pictures import rows, save_picture


def parse_arguments():
    parser = cli.Options(__doc__)
    add = parser.add
    add(
        "--sigma",
        above=0,
        type=float,
        nargs="+",
        default=[1.0, 2.0],
        help="strengths of the noise; from black to white it is 2 [1 2]",
    )
    add("--steps", type=int, default=50, least=1, help="of the way back, at most [%(default)s]")
    add("--samples", type=int, default=10, least=1, help="how many digits [%(default)s]")
    parser.add_usual(out="denoise.png", gives="other digits and noise")
    return parser.parse_args()


def main():
    args, began = parse_arguments(), time.monotonic()
    unet, diffusion = load_model()
    images, labels = load_digits()
    rng = np.random.default_rng(args.seed)
    chosen = rng.choice(len(images), args.samples, replace=False)
    digits, labels = images[chosen], labels[chosen]
    noise = rng.standard_normal(digits.shape, dtype=digits.dtype)
    for sigma in args.sigma:
        denoise(diffusion, unet, digits[:1], sigma, steps=1)  # raises if that is too much noise: better to know now

    page = {"digit": digits}
    for sigma in args.sigma:
        noisy = digits + sigma * noise
        back = dict(sigma=sigma, rng=args.seed, workers=args.workers)
        many = dict(method="ddpm", steps=args.steps)
        outcomes = {
            "noisy": noisy,
            "mean": denoise(diffusion, unet, noisy, **back, steps=1),
            "a digit": denoise(diffusion, unet, noisy, **back, **many),
            "another": denoise(diffusion, unet, noisy, **back | {"rng": args.seed + 1}, **many),
            "told": denoise(diffusion, unet, noisy, **back, **many, labels=labels),
        }
        for name, outcome in outcomes.items():
            error = float(np.sqrt(np.mean((outcome - digits) ** 2)))
            print(f"sigma {sigma:g}  {name:8} error {error:.3f}", flush=True)
            page[f"sigma {sigma:g}: {name}"] = outcome
    save_picture(args.out, rows(page))
    print(f"done in {time.monotonic() - began:.0f} seconds: look at {args.out}")


if __name__ == "__main__":
    cli.run(main)
