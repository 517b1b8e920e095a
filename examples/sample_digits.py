"""Draw digits with the model that comes with the package, without training: `python examples/sample_digits.py`.

python examples/sample_digits.py --digits 2026 --rows 1     # these
python examples/sample_digits.py --guidance 5               # more like what they are called, and more alike
python examples/sample_digits.py --guidance 0               # whatever comes: labels have no say
"""

import time

import numpy as np

from tinyddpm import cli, load_model, sample
from tinyddpm.diffusion.sample import SAMPLERS
from tinyddpm.files.pictures import grid, save_picture


def parse_arguments():
    parser = cli.Options(__doc__)
    add = parser.add
    add("--digits", default="0123456789", help="which to draw [%(default)s]")
    add("--rows", type=int, default=4, least=1, most=1000, help="how many times [%(default)s]")
    add(
        "--guidance",
        type=float,
        default=2.0,
        least=-1000,
        most=1000,
        help="how clearly they are to be those; 1, as in the data [%(default)s]",
    )
    add("--method", default="ddpm", choices=SAMPLERS, help="the sampler [%(default)s]")
    add("--steps", type=int, default=20, help="of the sampler [%(default)s]")
    add("--device", default="cpu", help="cpu, cuda or cuda:N [%(default)s]")
    parser.add_usual(out="digits.png")
    args = parser.parse_args()
    parser.check_digits(args.digits)
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
    save_picture(args.out, grid(digits, columns=len(args.digits), scale=2 if len(labels) > 10 else 4))
    print(f"{len(labels)} digits in {time.monotonic() - began:.1f} seconds: look at {args.out}")


if __name__ == "__main__":
    cli.run(main)
