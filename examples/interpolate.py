"""Turn one picture into another by way of their noise: `python examples/interpolate.py`.

`ddim` makes of noise a picture, without chance on the way, so it can be run backwards: of a picture it makes the noise
of which it would make it (see `tinyddpm.diffusion.editing.invert`). Between the noise of two pictures lies other noise, and of
that it makes other pictures. The rows of the picture, for each pair: what lies between them pixel by pixel, two digits
at once; and what lies between their noise, mostly one digit, if not always a good one. Leftmost and rightmost of the
latter are what `ddim` remakes of the two.
"""

import argparse
import sys
import time

import numpy as np

from tinyddpm import load_digits, load_model
from tinyddpm.diffusion.editing import interpolate
from tinyddpm.files.pictures import picture_path, rows


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pairs", nargs="+", default=["03", "16", "28", "47", "95"], help="of digits [03 16 28 47 95]")
    add("--count", type=int, default=9, help="pictures from one to the other, with both [%(default)s]")
    add("--steps", type=int, default=25, help="of the sampler, in either direction [%(default)s]")
    add("--seed", type=int, default=3, help="another one gives other digits [%(default)s]")
    add("--workers", type=int, help="how many work side by side [one per CPU]")
    add("--out", type=picture_path, default="interpolate.png", help="the picture [%(default)s]")
    args = parser.parse_args()
    for pair in args.pairs:
        if not (len(pair) == 2 and pair.isascii() and pair.isdecimal()):
            parser.error(f"--pairs must be of two digits each, such as 38, got {pair!r}")
    if args.seed < 0:
        parser.error(f"--seed must be 0 or greater, got {args.seed}")
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
    rows(page).save(args.out)
    print(f"done in {time.monotonic() - began:.0f} seconds: look at {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ArithmeticError, RuntimeError, OSError) as error:  # these say what was wrong
        sys.exit(f"interpolate.py: {error}")
    except KeyboardInterrupt:
        print("\ninterpolate.py: interrupted", file=sys.stderr)
        sys.exit(130)
