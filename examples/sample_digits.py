"""Draw digits with the model that comes with the package, without training: `python examples/sample_digits.py`.

python examples/sample_digits.py --digits 2026 --rows 1     # these
python examples/sample_digits.py --guidance 5               # more like what they are called, and more alike
python examples/sample_digits.py --guidance 0               # whatever comes: labels have no say
"""

import argparse
import sys
import time

import numpy as np

from tinyddpm import load_model, sample
from tinyddpm.backend import to_numpy
from tinyddpm.diffusion.sample import SAMPLERS
from tinyddpm.files.pictures import grid, picture_path


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--digits", default="0123456789", help="which to draw [%(default)s]")
    add("--rows", type=int, default=4, help="how many times [%(default)s]")
    add("--guidance", type=float, default=2.0, help="how clearly they are to be those; 1, as in the data [%(default)s]")
    add("--method", default="ddpm", choices=SAMPLERS, help="the sampler [%(default)s]")
    add("--steps", type=int, default=20, help="of the sampler [%(default)s]")
    add("--seed", type=int, default=0, help="another one gives other digits [%(default)s]")
    add("--device", default="cpu", help="cpu, cuda or cuda:N [%(default)s]")
    add("--workers", type=int, help="how many work side by side [one per CPU]")
    add("--out", type=picture_path, default="digits.png", help="the picture [%(default)s]")
    args = parser.parse_args()
    if not (args.digits.isascii() and args.digits.isdecimal()):
        parser.error(f"--digits must be digits such as 2026, got {args.digits!r}")
    if args.rows < 1:
        parser.error(f"--rows must be at least 1, got {args.rows}")
    if args.seed < 0:
        parser.error(f"--seed must be 0 or greater, got {args.seed}")
    return args


def main():
    args, began = parse_arguments(), time.monotonic()
    unet, diffusion = load_model()
    unet.to(args.device)
    labels = np.array([int(digit) for digit in args.digits * args.rows])
    digits = sample(
        diffusion, unet, (len(labels), 28, 28, 1), args.method, args.steps, args.seed, labels=labels,
        guidance=args.guidance, workers=args.workers, progress=True,
    )  # fmt: skip
    grid(to_numpy(digits), columns=len(args.digits), scale=2 if len(labels) > 10 else 4).save(args.out)
    print(f"{len(labels)} digits in {time.monotonic() - began:.1f} seconds: look at {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ArithmeticError, RuntimeError, OSError) as error:  # these say what was wrong
        sys.exit(f"sample_digits.py: {error}")
    except KeyboardInterrupt:
        print("\nsample_digits.py: interrupted", file=sys.stderr)
        sys.exit(130)
