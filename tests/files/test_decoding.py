"""Every kind of picture that Pillow reads shows what it shows in 8 bits, or is refused with the reason.

Files are written by hand, as the standards say, for Pillow does not write all that it reads.
"""

import io
import itertools
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tinyddpm.files.decoding import opened, pixels, reason

H, W = 5, 8
NUMBERS = itertools.count()
REASONS = (
    "(in no format that Pillow reads|.*of a kind that Pillow does not read|.*not known which of them are white"
    "|planes one after the other, which Pillow mistakes in this kind of TIFF|YCbCr without compression, which Pillow "
    "mistakes|a transparent colour of 16 bits, of which Pillow reads 8|numbers of fewer than 8 bits, of which Pillow "
    "makes none that reach white|decoder error -2|-2|unknown raw mode.*)"
)


def packed(levels, bits, order=">"):
    """Levels (H, ...) as bytes, each row padded."""
    if bits >= 16:
        return levels.astype(f"{order}u{bits // 8}").tobytes()
    levels = levels.reshape(len(levels), -1)
    ones = (levels[:, :, None] >> np.arange(bits)[::-1] & 1).reshape(len(levels), -1)
    return np.packbits(ones, axis=1).tobytes()


def png(levels, bits, colour, **chunks):
    rows = packed(levels, bits)
    rows = b"".join(b"\0" + rows[i * len(rows) // H : (i + 1) * len(rows) // H] for i in range(H))
    chunks = {"IHDR": struct.pack(">IIBBBBB", W, H, bits, colour, 0, 0, 0)} | chunks
    body = [name.encode() + data for name, data in (chunks | {"IDAT": zlib.compress(rows), "IEND": b""}).items()]
    sealed = (struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data)) for data in body)
    return b"\x89PNG\r\n\x1a\n" + b"".join(sealed)


def tiff(levels, bits, photometric, order="<", deflate=False, separate=False, extra=None, numbers=1, palette=()):
    """Tags: 256 width, 257 height, 258 bits, 259 compression, 262 photometric interpretation, 273 offsets, 277 samples,
    278 rows, 279 lengths, 284 planes, 320 palette, 338 extra samples, 339 kind of numbers, 530 subsampling."""
    n = levels.shape[2]
    parts = [packed(part, bits, order) for part in (np.moveaxis(levels, 2, 0) if separate else [levels])]
    parts = [zlib.compress(part) for part in parts] if deflate else parts
    offsets = [8 + sum(map(len, parts[:i])) for i in range(len(parts))]
    tags = {256: [W], 257: [H], 258: [bits] * n, 259: [8 if deflate else 1], 262: [photometric], 273: offsets}
    tags |= {277: [n], 278: [H], 279: list(map(len, parts)), 284: [1 + separate], 320: palette}
    tags |= {338: [] if extra is None else [extra], 339: [numbers] * n, 530: [1, 1] if photometric == 6 else []}
    tags = {tag: struct.pack(f"{order}{len(values)}H", *values) for tag, values in tags.items() if len(values)}
    data = b"".join(parts) + bytes(sum(map(len, parts)) % 2)
    start = 8 + len(data)
    end, entries, beyond = start + 6 + 12 * len(tags), b"", b""
    for tag, values in tags.items():
        field = values.ljust(4, b"\0") if len(values) <= 4 else struct.pack(order + "I", end + len(beyond))
        entries += struct.pack(order + "HHI", tag, 3, len(values) // 2) + field
        beyond += values if len(values) > 4 else b""
    magic, count = {"<": b"II*\0", ">": b"MM\0*"}[order], struct.pack(order + "H", len(tags))
    return magic + struct.pack(order + "I", start) + data + count + entries + bytes(4) + beyond


def read(path, channels=3):
    with opened(path) as picture:
        return pixels(picture, H, W, channels)


def is_right(folder, data, expected, slack=1):
    """Whether a picture shows what is expected, in RGB and in grey; False if it is refused with a reason."""
    path = folder / str(next(NUMBERS))  # a new file is written faster than an old one anew
    path.write_bytes(data)
    expected = np.broadcast_to(expected, (H, W, 3))
    try:
        rgb, grey = read(path, 3), read(path, 1)
    except Exception as refused:  # Pillow raises nearly anything
        assert re.fullmatch(REASONS, reason(refused)), refused
        return False
    assert np.abs(rgb - expected).max() <= slack
    has_colours = np.ptp(expected, axis=2).any()
    assert np.abs(grey[:, :, 0] - expected @ [0.299, 0.587, 0.114]).max() <= slack + 0.5 * has_colours
    return True


KINDS = {"white is 0": 0, "black is 0": 1, "RGB": 2, "palette": 3, "CMYK": 5, "YCbCr": 6}
# the depths of which every version of Pillow reads at least the plainest files, the last ones if the low byte is first
DEPTHS = {"white is 0": (1, 2, 4, 8, 16), "black is 0": (1, 2, 4, 8, 16, 12), "RGB": (8, 16), "palette": (1, 2, 4, 8)}
DEPTHS |= {"CMYK": (8,), "YCbCr": (8,)}
SLACK = {"RGB": 1, "CMYK": 3, "YCbCr": 3}  # Pillow leaves out the low byte, and rounds as it goes; else 0.5: to the bit


def in_eight_bits(levels, kind, white, palette):
    """What levels (H, W, n) of a TIFF show, as floats (H, W, 1 or 3)."""
    shown = levels / white * 255
    if kind == "palette":
        return palette[levels[:, :, 0]]
    if kind == "CMYK":
        return (255 - shown[:, :, :3]) * (255 - shown[:, :, 3:]) / 255
    if kind == "YCbCr":
        y, cb, cr = np.moveaxis(shown - [0, 128, 128], 2, 0)
        return np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], 2).clip(0, 255)
    return 255 - shown if kind == "white is 0" else shown


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_tiff(tmp_path, kind, order, deflate):
    rng, right = np.random.default_rng(0), set()
    for bits, extra, separate in itertools.product((1, 2, 4, 8, 12, 16, 32), (None, 0, 1, 2), (False, True)):
        if kind == "palette" and bits > 8:
            continue
        white = 2**bits - 1
        palette = rng.integers(0, 256, (white + 1, 3)) if kind == "palette" else None
        levels = rng.integers(0, white + 1, (H, W, {"RGB": 3, "YCbCr": 3, "CMYK": 4}.get(kind, 1)))
        alpha = rng.choice([0, white], (H, W, 1))
        expected = in_eight_bits(levels, kind, white, palette)
        if extra:  # an extra sample that is an alpha, 1 if colours are multiplied by it already
            expected = np.where(alpha, expected, 255)
        if extra == 1:
            levels = np.where(alpha, levels, white if kind == "white is 0" else 0)
        if extra is not None:
            levels = np.concatenate([levels, alpha], 2)
        colours = () if palette is None else 257 * palette.T.ravel()
        data = tiff(levels, bits, KINDS[kind], order, deflate, separate, extra, palette=colours)
        if is_right(tmp_path, data, expected, SLACK.get(kind, 0.5)):
            right.add((bits, extra, separate))
    if kind != "YCbCr" or deflate:  # else it is refused
        at_least = DEPTHS[kind][: -1 if order == ">" and DEPTHS[kind][-1] > 8 and kind != "RGB" else None]
        assert right >= {(bits, None, False) for bits in at_least}
    if kind == "RGB":  # planes one after the other
        assert right >= {(bits, None, True) for bits in ((8, 16) if deflate else (8,))}
    assert not right & set(itertools.product((32,), (None, 0, 1, 2), (False, True)))


PNG = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # the depths of each colour type


@pytest.mark.parametrize("colour, bits", [(colour, bits) for colour, depths in PNG.items() for bits in depths])
def test_png(tmp_path, bits, colour):
    """Of each colour type, without and with a tRNS chunk, which says what is transparent."""
    rng, white = np.random.default_rng(0), 2**bits - 1
    levels = rng.integers(0, white + 1, (H, W, {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]))
    levels[0], levels[1] = white // 2, 1
    palette, alphas = rng.integers(0, 256, (white + 1, 3)), rng.integers(0, 256, (white + 1, 1))
    chunks = {"PLTE": bytes(palette.ravel().tolist())} if colour == 3 else {}
    shown = palette[levels[:, :, 0]] if colour == 3 else levels / white * 255
    if colour >= 4:
        shown, alpha = shown[:, :, :-1], shown[:, :, -1:]
        shown = (shown * alpha + 255 * (255 - alpha)) / 255
    slack = 0.5 if colour == 0 else 2.5 if colour >= 4 and bits == 16 else 1.1  # Pillow leaves out the low byte
    assert is_right(tmp_path, png(levels, bits, colour, **chunks), shown, slack)
    if colour == 3:
        chunks["tRNS"], alpha = bytes(alphas.ravel().tolist()), alphas[levels[:, :, 0]]
    elif colour < 4:
        chunks["tRNS"] = levels[0, 0].astype(">u2").tobytes()
        alpha = 255 * (levels != levels[0, 0]).any(2, keepdims=True)
    if "tRNS" in chunks:
        shown = (shown * alpha + 255 * (255 - alpha)) / 255
        right = is_right(tmp_path, png(levels, bits, colour, **chunks), shown, slack)
        assert right == ((colour, bits) != (2, 16))


@pytest.mark.parametrize("white", [1, 3, 100, 255, 256, 1023, 4095, 65535])
@pytest.mark.parametrize("samples, plain, magic", [(1, True, 2), (3, True, 3), (1, False, 5), (3, False, 6)])
def test_pnm(tmp_path, white, samples, plain, magic):
    levels = np.random.default_rng(0).integers(0, white + 1, (H, W, samples))
    body = " ".join(map(str, levels.ravel())).encode() if plain else packed(levels, 16 if white > 255 else 8)
    data = b"P%d %d %d %d\n" % (magic, W, H, white) + body + b"\n" * plain
    assert is_right(tmp_path, data, levels / white * 255, 0.5 if magic == 5 and white == 65535 else 1)


def dib(size, height=H):
    """The header of a bitmap of 32 bits: of 40 bytes, or of 108, which says where in them the alpha is."""
    header = struct.pack("<IiiHHIIIIII", size, W, height, 1, 32, 3 if size > 40 else 0, *[0] * 5)
    return (header + struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)).ljust(size, b"\0")[:size]


HEADERS = {  # of pictures of four bytes per pixel, the last one of which is an alpha
    "tga": bytes([0, 0, 2, *[0] * 9]) + struct.pack("<4H", W, H, 32 | 0x20 << 8, 0)[:6],
    "bmp": b"BM" + struct.pack("<III", 122 + 4 * H * W, 0, 122) + dib(108),
    "dib": dib(108),
    "ico": struct.pack("<HHHBBBBHHII", 0, 1, 1, W, H, 0, 0, 1, 32, 40 + 4 * H * W + 4 * H, 22) + dib(40, 2 * H),
    "cur": struct.pack("<HHHBBBBHHII", 0, 2, 1, W, H, 0, 0, 0, 0, 40 + 4 * H * W + 4 * H, 22) + dib(40, 2 * H),
}
BLACK = np.random.default_rng(0).integers(0, 2, (H, W))
XBM = "#define a_width {}\n#define a_height {}\nstatic char a_bits[] = {{\n{}}};\n".format(
    W, H, ", ".join(f"0x{row:02x}" for row in np.packbits(BLACK, axis=1, bitorder="little").ravel())
)
PSD = b"8BPS" + struct.pack(">H6xHIIHH", 1, 1, H, W, 1, 0) + bytes(14) + packed(BLACK, 1)
DEEP = np.random.default_rng(0).integers(0, 2**16, (H, W, 1))
ICON = struct.pack("<HHHBBBBHHII", 0, 1, 1, W, H, 0, 0, 1, 16, len(png(DEEP, 16, 0)), 22) + png(DEEP, 16, 0)
CLEAR = (9, 9, 9, 0)
HALF = np.where(np.arange(W) < W // 2, 50, 255)[None, :, None]


def transparent(kind, mode="P", left=50, right=9, height=H, **how):
    """A picture of two colours, saved by Pillow."""
    picture, data = Image.new(mode, (W, height), right), io.BytesIO()
    picture.paste(left, (0, 0, W // 2, H))
    if mode == "P":
        picture.putpalette([i // 3 for i in range(768)])
    picture.save(data, kind, **how)
    return data.getvalue()


def half(**how):
    """A GIF whose first frame is the upper part of it."""
    data = transparent("GIF", height=H // 2, **how)
    return data[:6] + struct.pack("<2H", W, H) + data[10:]


RED = np.broadcast_to([138, 81, 70], (H, W, 3))  # in Lab: L = 54, a = 81, b = 70
OTHERS = {  # what is in a file, what it shows, and how exactly
    # if the alpha is 0 throughout, programs that know none have written it
    **{f"{name}, {alpha}": (head + bytes([10, 100, 200, alpha]) * (H * W) + bytes(4 * H), (200, 100, 10), 0)
       for name, head in HEADERS.items() for alpha in (0, 255)},
    # elsewhere it is meant: white is behind what is transparent
    **{f"all of a {kind}": (transparent(kind, "RGBA", CLEAR, CLEAR), 255, 0) for kind in ("PNG", "TIFF", "WEBP")},
    "a colour of a PNG": (transparent("PNG", transparency=9), HALF, 0),
    "an alpha of each colour": (transparent("PNG", transparency=b"\xff" * 9 + b"\0" + b"\xff" * 41), HALF, 0),
    "a colour of a GIF": (transparent("GIF", transparency=9), HALF, 0),
    "a part of a GIF": (half(transparency=9), np.where(np.arange(H)[:, None, None] < H // 2, HALF, 255), 0),
    # bitmaps in which 1 is black, as ImageMagick shows both, Photoshop the one and the X Window System the other
    "xbm": (XBM.encode(), 255 - 255 * BLACK[:, :, None], 0),
    "psd": (PSD, 255 - 255 * BLACK[:, :, None], 0),
    "an icon of 16 bits": (ICON, DEEP / 257, 0.5),
    "Lab": (tiff(RED, 8, 8), (255, 0, 0), 6),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_others(tmp_path, name):
    if name == "Lab":
        pytest.importorskip("PIL._imagingcms")
    data, expected, slack = OTHERS[name]
    assert is_right(tmp_path, data, np.array(expected), slack)


@pytest.mark.parametrize("bits", [1, 2, 4, 7, 8, 12, 16])
@pytest.mark.parametrize("name", ["jp2", "j2k"])
def test_jpeg_2000_in_which_white_is_as_many_bits_as_it_says(tmp_path, name, bits):
    """A white picture; what Pillow writes has 8 or 16 bits, and as all is equal, only the header says how many."""
    if not Image.core.__dict__.get("jpeg2k_encoder"):
        pytest.skip("this Pillow knows no JPEG 2000")
    saved = io.BytesIO()
    picture = np.full((H, W), 0xFFFF if bits > 8 else 0xFF, np.uint16 if bits > 8 else np.uint8)
    Image.fromarray(picture).save(saved, "JPEG2000", no_jp2=name == "j2k")
    data = bytearray(saved.getvalue())
    place = data.index(b"\xff\x4f\xff\x51") + 42
    assert data[place] == (15 if bits > 8 else 7)
    data[place] = bits - 1
    if name == "jp2":
        data[data.index(b"ihdr") + 14] = bits - 1
    assert is_right(tmp_path, bytes(data), np.full(3, 255)) == (bits >= 8)


CARDS = [("SIMPLE", "T"), ("BITPIX", 16), ("NAXIS", 2), ("NAXIS1", W), ("NAXIS2", H)]
FITS = "".join(f"{name:8}= {value:>20}".ljust(80) for name, value in CARDS) + "END"
BLANK, UNKNOWN = np.zeros((H, W, 1), int), "not known which of them are white$|a kind that Pillow does not read$"
REFUSED = [
    (tiff(BLANK, 1, 3, palette=[0, 200] * 3), "^a palette of 8 bits where TIFF has 16$"),
    (half(), "^a first frame that is a part of the picture, without a colour for the rest$"),
    (FITS.ljust(2880).encode() + bytes(2 * W * H), "^numbers of more than 8 bits, and it is not known which of them"),
    (tiff(BLANK, 8, 1, numbers=2), "^numbers with a sign, and it is not known which of them are white$"),
    *((tiff(BLANK, bits, black, numbers=2), UNKNOWN) for bits in (8, 16, 32) for black in (0, 1)),  # with a sign
    *((tiff(BLANK, 16, black, numbers=3), UNKNOWN) for black in (0, 1)),  # with a point
    *((tiff(BLANK, 32, black, numbers=3), f"^numbers of more than 8 bits, and it is {UNKNOWN}") for black in (0, 1)),
]


def test_what_nobody_can_tell_is_refused_with_the_reason(tmp_path):
    for data, why in REFUSED:
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(ValueError, match=why):
            read(tmp_path / "a")
