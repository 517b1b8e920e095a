"""Turn one picture into another by way of their noise: `python examples/interpolate.py`.

`ddim` makes of noise a picture, without chance on the way, so it can be run backwards: of a picture it makes the noise
of which it would make it (see `tinyddpm.diffusion.editing.invert`). Between the noise of two pictures lies other noise,
and of that it makes other pictures. The rows of the picture, for each pair: what lies between them pixel by pixel, two
digits at once; and what lies between their noise, mostly one digit, if not always a good one. Leftmost and rightmost of
the latter are what `ddim` remakes of the two.
"""

import time

import numpy as np

from tinyddpm import cli, load_digits, load_model
from tinyddpm.diffusion.editing import interpolate
from tinyddpm.files.pictures import rows, save_picture


def parse_arguments():
    parser = cli.Options(__doc__)
    add = parser.add
    add("--pairs", nargs="+", default=["03", "16", "28", "47", "95"], help="of digits [03 16 28 47 95]")
    add("--count", type=int, default=9, help="pictures from one to the other, with both [%(default)s]")
    add("--steps", type=int, default=25, help="of the sampler, in either direction [%(default)s]")
    parser.add_usual(out="interpolate.png", seed=3)
    args = parser.parse_args()
    for pair in args.pairs:
        if not (len(pair) == 2 and pair.isascii() and pair.isdecimal()):
            parser.error(f"--pairs must be of two digits each, such as 38, got {pair!r}")
    return args


def main():
    args, began = parse_arguments(), time.monotonic()
    unet, diffusion = load_model()
    images, labels = load_digits()
    rng = np.random.default_rng(args.seed)
    some = lambda digits: images[[rng.choice(np.flatnonzero(labels == int(digit))) for digit in digits]]
    a, b = (some(pair[i] for pair in args.pairs) for i in (0, 1))
    settings = dict(rng=args.seed, workers=args.workers, progress=True)
    between = interpolate(diffusion, unet, a, b, args.count, args.steps, **settings)

    fractions = np.linspace(0, 1, args.count, dtype=a.dtype).reshape(-1, 1, 1, 1)
    page = {}
    for i, (first, last) in enumerate(args.pairs):
        page[f"{first} to {last}: pixels"] = (1 - fractions) * a[i] + fractions * b[i]
        page[f"{first} to {last}: noise"] = between[i]
    save_picture(args.out, rows(page))
    print(f"done in {time.monotonic() - began:.0f} seconds: look at {args.out}")


if __name__ == "__main__":
    cli.run(main)
