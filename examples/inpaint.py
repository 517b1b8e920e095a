"""Make up the part of a picture that is missing: `python examples/inpaint.py`.

The model never learned to complete digits, only what digits look like. RePaint (Lugmayr et al. 2022) makes a painter of
it: at every step on the way from noise to a digit, the pixels that are known are put back, as noisy as the rest (see
`tinyddpm.diffusion.editing.repaint`). The rows of the picture: the digits, what is known of them, and several tries of
the model; the known pixels are the same in all, to the bit.

The digits are among those that the model was trained on, but only what is known of them is shown to it.
"""

import time

import numpy as np

from tinyddpm import cli, load_digits, load_model
from tinyddpm.diffusion.editing import inpaint
from tinyddpm.files.pictures import rows, save_picture

row, column = np.mgrid[:28, :28]
MASKS = {  # True where pixels are known
    "left": column < 14,
    "top": row < 14,
    "frame": (abs(row - 13.5) > 6) | (abs(column - 13.5) > 6),
    "dots": (row % 2 == 0) & (column % 2 == 0),
}


def parse_arguments():
    parser = cli.Options(__doc__)
    add = parser.add
    add("--known", nargs="+", default=["left", "dots"], choices=MASKS, help="which pixels [left dots]")
    add("--tries", type=int, default=3, least=1, help="how often each is completed [%(default)s]")
    add("--steps", type=int, default=50, help="of the sampler [%(default)s]")
    add("--resamplings", type=int, default=4, help="how often each step is taken [%(default)s]")
    add("--told", action="store_true", help="tell the model which digits they are [off]")
    parser.add_usual(out="inpaint.png", seed=1)
    return parser.parse_args()


def main():
    args, began = parse_arguments(), time.monotonic()
    unet, diffusion = load_model()
    images, labels = load_digits()
    rng = np.random.default_rng(args.seed)
    chosen = np.array([rng.choice(np.flatnonzero(labels == digit)) for digit in range(10)])
    digits, labels = images[chosen], labels[chosen]

    page = {"digit": digits}
    for name in args.known:
        mask = MASKS[name]
        page[f"{name} known"] = np.where(mask[..., None], digits, -0.5)  # what is not, dark grey
        again = np.tile(np.arange(10), args.tries)  # each digit so many times, in one batch
        settings = dict(
            steps=args.steps, resamplings=args.resamplings, rng=args.seed, workers=args.workers, progress=True
        )
        if args.told:
            settings |= dict(labels=labels[again], guidance=2.0)
        completed = inpaint(diffusion, unet, digits[again], mask, **settings).reshape(args.tries, *digits.shape)
        for i, attempt in enumerate(completed):
            page[f"{name}, try {i + 1}"] = attempt
    save_picture(args.out, rows(page))
    print(f"done in {time.monotonic() - began:.0f} seconds: look at {args.out}")


if __name__ == "__main__":
    cli.run(main)
