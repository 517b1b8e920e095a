"""Pictures to learn from in colour that most computers have: emoji. `python examples/measure/draw_emoji.py`

It draws those of this computer's font, 32x32, into a folder for each kind; then
`python examples/mnist_ddpm.py --data runs/emoji/pictures --out runs/emoji --minutes 10` learns from them.
"""

import pathlib
import unicodedata

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tinyddpm import cli

FONTS = (
    "/usr/share/fonts/**/NotoColorEmoji*.ttf",  # Linux: the package fonts-noto-color-emoji or alike
    "~/.local/share/fonts/**/NotoColorEmoji*.ttf",
    "/System/Library/Fonts/Apple Color Emoji.ttc",  # macOS
    "C:/Windows/Fonts/seguiemj.ttf",
)
SIZES = (109, 160, 128, 96, 64)  # Noto's, Apple's; what is made of outlines comes in any
KINDS = {  # code points, the first and the last of each range
    "animals": [(0x1F400, 0x1F43F), (0x1F980, 0x1F9AE)],
    "faces": [(0x1F600, 0x1F644), (0x1F910, 0x1F917), (0x1F920, 0x1F92F), (0x1F970, 0x1F97A)],
    "food": [(0x1F32D, 0x1F32F), (0x1F344, 0x1F37F), (0x1F950, 0x1F96F)],
    "hearts": [(0x2764, 0x2764), (0x1F493, 0x1F49F), (0x1F5A4, 0x1F5A4), (0x1F90D, 0x1F90E), (0x1F9E1, 0x1F9E1)],
    "plants": [
        (0x1F331, 0x1F335),
        (0x1F337, 0x1F33C),
        (0x1F33F, 0x1F343),
        (0x1F490, 0x1F490),
        (0x1FAB4, 0x1FAB4),
        (0x1FAB7, 0x1FABB),
    ],
    "vehicles": [(0x1F680, 0x1F6A4), (0x1F6B2, 0x1F6B2), (0x1F6F3, 0x1F6FC)],
}


def find_font(given=None):
    """Return the emoji font, in a size that it has. Raises OSError if there is none."""
    patterns = [pathlib.Path(pattern).expanduser() for pattern in FONTS]
    found = [file for path in patterns for file in pathlib.Path(path.anchor).glob(str(path.relative_to(path.anchor)))]
    reason = "there is no font with emoji here; install one, such as Noto Color Emoji, or say where one is with --font"
    for file in [given] if given else sorted(found):
        for size in SIZES:
            try:
                return ImageFont.truetype(str(file), size)
            except OSError as error:
                reason = f"{file}: {error}"
    raise OSError(reason)


def draw(character, font, size):
    """Return the picture of a character on white, cut out and made size x size, or None if the font has none.

    What is not in colour, as letters and the box for what is missing, Pillow draws in white, so that nothing is seen.
    """
    page = Image.new("RGB", (2 * int(font.size), 2 * int(font.size)), "white")
    ImageDraw.Draw(page).text((font.size // 2, font.size // 2), character, font=font, embedded_color=True)
    away = np.asarray(page).min(axis=2) < 250
    if not away.any():
        return None
    rows, columns = (np.flatnonzero(away.any(axis=axis)) for axis in (1, 0))
    center, half = (columns[[0, -1]].mean(), rows[[0, -1]].mean()), 0.53 * max(np.ptp(rows), np.ptp(columns))
    box = [round(c + sign * half) for sign in (-1, 1) for c in center]
    return page.crop(box).resize((size, size), Image.Resampling.LANCZOS)


def main():
    parser = cli.Options(__doc__)
    add = parser.add
    add("--font", type=cli.any_path, help="a font file with emoji in colour [that of this computer]")
    add("--size", type=int, default=32, least=8, help="pixels, high and wide [%(default)s]")
    add("--out", type=cli.any_path, default="runs/emoji/pictures", help="folder for the pictures [%(default)s]")
    args = parser.parse_args()
    font, count = find_font(args.font), 0
    for kind, ranges in KINDS.items():
        (args.out / kind).mkdir(parents=True, exist_ok=True)
        for code in [code for first, last in ranges for code in range(first, last + 1)]:
            if picture := draw(chr(code), font, args.size):
                picture.save(args.out / kind / f"{unicodedata.name(chr(code), f'{code:x}').lower()}.png")
                count += 1
    if not count:
        raise OSError(f"{font.path} has no emoji in colour")
    print(f"{count} pictures of {len(KINDS)} kinds are in {args.out}, by {' '.join(font.getname())}")


if __name__ == "__main__":
    cli.run(main)
