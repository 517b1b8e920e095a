"""Every kind of picture that Pillow reads shows what it shows in 8 bits, or is refused with the reason.

Files are written by hand, as the standards say, for Pillow does not write all that it reads.
"""

import io
import itertools
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from tinyddpm import ImageFolder
from tinyddpm.files.pictures import to_uint8

H, W = 5, 8
REASONS = "in no format that Pillow reads|a kind that Pillow does not read|not known which of them are white"
REASONS += "|which Pillow mistakes|a palette of 8 bits|of which Pillow reads 8|a first frame that is a part"
REASONS += "|fewer than 8 bits|: (decoder error -2|-2|unknown raw mode.*)$"


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
    chunks |= {"IDAT": zlib.compress(rows), "IEND": b""}
    body = [name.encode() + data for name, data in chunks.items()]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data)) for data in body
    )


def tiff(levels, bits, photometric, order="<", deflate=False, separate=False, extra=None, numbers=1, palette=()):
    """Tags: 256 width, 257 height, 258 bits, 259 compression, 262 photometric interpretation, 273 offsets, 277 samples,
    278 rows, 279 lengths, 284 planes, 320 palette, 338 extra samples, 339 kind of numbers, 530 subsampling."""
    n = levels.shape[2]
    parts = [levels[:, :, i] for i in range(n)] if separate else [levels]
    parts = [packed(part, bits, order) for part in parts]
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
    magic = {"<": b"II*\0", ">": b"MM\0*"}[order]
    count = struct.pack(order + "H", len(tags))
    return magic + struct.pack(order + "I", start) + data + count + entries + bytes(4) + beyond


def is_right(path, data, expected, slack=1):
    """Whether a picture shows what is expected, in RGB and in grey; False if it is refused with a reason."""
    path.write_bytes(data)
    expected = np.broadcast_to(expected, (H, W, 3))
    try:
        rgb, grey = (to_uint8(ImageFolder(path.parent, (H, W), channels)[0]) for channels in (3, 1))
    except (ValueError, OSError) as refused:
        assert re.search(REASONS, str(refused)), refused
        return False
    assert np.abs(rgb - expected).max() <= slack
    assert np.abs(grey[:, :, 0] - expected @ [0.299, 0.587, 0.114]).max() <= slack + 0.5
    return True


KINDS = {"white is 0": 0, "black is 0": 1, "RGB": 2, "palette": 3, "CMYK": 5, "YCbCr": 6}
# the depths of which every version of Pillow reads at least the plainest files, the last ones if the low byte is first
DEPTHS = {
    "white is 0": (1, 2, 4, 8, 16), "black is 0": (1, 2, 4, 8, 16, 12), "RGB": (8, 16), "palette": (1, 2, 4, 8),
    "CMYK": (8,), "YCbCr": (8,),
}  # fmt: skip


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
        if is_right(tmp_path / "a.tif", data, expected, slack=3 if kind in ("CMYK", "YCbCr") else 1):
            right.add((bits, extra, separate))
    if kind != "YCbCr" or deflate:  # else it is refused
        at_least = DEPTHS[kind][: -1 if order == ">" and DEPTHS[kind][-1] > 8 and kind != "RGB" else None]
        assert right >= {(bits, None, False) for bits in at_least}
    assert not right & set(itertools.product((32,), (None, 0, 1, 2), (False, True)))


@pytest.mark.parametrize("numbers, bits", [(2, 8), (2, 16), (2, 32), (3, 16), (3, 32)])
@pytest.mark.parametrize("photometric", [0, 1])
def test_numbers_with_a_sign_or_a_point_are_refused(tmp_path, numbers, bits, photometric):
    data = tiff(np.zeros((H, W, 1), int), bits, photometric, numbers=numbers)
    assert not is_right(tmp_path / "a.tif", data, -np.ones((H, W, 3)))


def test_lab(tmp_path):
    pytest.importorskip("PIL._imagingcms")
    red = np.broadcast_to([138, 81, 70], (H, W, 3))  # L = 54, a = 81, b = 70
    assert is_right(tmp_path / "a.tif", tiff(red, 8, 8), np.array([255, 0, 0]), slack=6)


def test_a_palette_of_8_bits_is_refused(tmp_path):
    data = tiff(np.ones((H, W, 1), int), 1, 3, palette=[0, 200, 0, 200, 0, 200])
    assert not is_right(tmp_path / "a.tif", data, np.full(3, 200))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("colour", [0, 2, 3, 4, 6])
def test_png(tmp_path, bits, colour):
    """Of each colour type, without and with a tRNS chunk, which says what is transparent."""
    if bits not in {0: (1, 2, 4, 8, 16), 3: (1, 2, 4, 8)}.get(colour, (8, 16)):
        return
    rng, white = np.random.default_rng(0), 2**bits - 1
    levels = rng.integers(0, white + 1, (H, W, {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]))
    levels[0] = white // 2
    palette, alphas = rng.integers(0, 256, (white + 1, 3)), rng.integers(0, 256, (white + 1, 1))
    chunks = {"PLTE": bytes(palette.ravel().tolist())} if colour == 3 else {}
    shown = palette[levels[:, :, 0]] if colour == 3 else levels / white * 255
    if colour >= 4:
        shown, alpha = shown[:, :, :-1], shown[:, :, -1:]
        shown = (shown * alpha + 255 * (255 - alpha)) / 255
    slack = 2.5 if colour >= 4 and bits == 16 else 1.1  # Pillow leaves out the low byte, of alpha too
    assert is_right(tmp_path / "a.png", png(levels, bits, colour, **chunks), shown, slack)
    if colour == 3:
        chunks["tRNS"], alpha = bytes(alphas.ravel().tolist()), alphas[levels[:, :, 0]]
        shown = (shown * alpha + 255 * (255 - alpha)) / 255
    elif colour < 4:
        chunks["tRNS"] = levels[0, 0].astype(">u2").tobytes()
        shown = np.where((levels == levels[0, 0]).all(2, keepdims=True), 255, shown)
    right = is_right(tmp_path / "a.png", png(levels, bits, colour, **chunks), shown, slack)
    assert right == ((colour, bits) != (2, 16))


@pytest.mark.parametrize("white", [1, 3, 100, 255, 256, 1023, 4095, 65535])
@pytest.mark.parametrize("samples, plain, magic", [(1, True, 2), (3, True, 3), (1, False, 5), (3, False, 6)])
def test_pnm(tmp_path, white, samples, plain, magic):
    levels = np.random.default_rng(0).integers(0, white + 1, (H, W, samples))
    body = " ".join(map(str, levels.ravel())).encode() if plain else packed(levels, 16 if white > 255 else 8)
    data = b"P%d %d %d %d\n" % (magic, W, H, white) + body + b"\n" * plain
    assert is_right(tmp_path / "a.pnm", data, levels / white * 255)


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


@pytest.mark.parametrize("alpha", [0, 255])
@pytest.mark.parametrize("name", HEADERS)
def test_if_alpha_is_0_throughout_programs_that_know_none_have_written_it(tmp_path, name, alpha):
    data = HEADERS[name] + bytes([10, 100, 200, alpha]) * (H * W) + bytes(4 * H)
    assert is_right(tmp_path / f"a.{name}", data, np.array([200, 100, 10]))


@pytest.mark.parametrize("name", ["png", "tif", "webp"])
def test_elsewhere_it_is_meant(tmp_path, name):
    data = io.BytesIO()
    Image.new("RGBA", (W, H), (200, 100, 10, 0)).save(data, {"tif": "TIFF"}.get(name, name))
    assert is_right(tmp_path / f"a.{name}", data.getvalue(), np.array([255, 255, 255]))


@pytest.mark.parametrize("name", ["xbm", "psd"])
def test_bitmaps_in_which_1_is_black(tmp_path, name):
    """As ImageMagick shows both, and Photoshop the one and the X Window System the other."""
    black = np.random.default_rng(0).integers(0, 2, (H, W))
    if name == "xbm":
        numbers = ", ".join(f"0x{row:02x}" for row in np.packbits(black, axis=1, bitorder="little").ravel())
        data = f"#define a_width {W}\n#define a_height {H}\nstatic char a_bits[] = {{\n{numbers}}};\n".encode()
    else:
        header = b"8BPS" + struct.pack(">H6xHIIHH", 1, 1, H, W, 1, 0)
        data = header + bytes(12) + bytes(2) + packed(black, 1)
    assert is_right(tmp_path / f"a.{name}", data, 255 - 255 * black[:, :, None])


@pytest.mark.parametrize("bits", [1, 2, 4, 7, 8, 12, 16])
@pytest.mark.parametrize("name", ["jp2", "j2k"])
def test_jpeg_2000_in_which_white_is_as_many_bits_as_it_says(tmp_path, name, bits):
    """A white picture; what Pillow writes has 8 or 16 bits, and as all is equal, only the header says how many."""
    if not Image.core.__dict__.get("jpeg2k_encoder"):
        pytest.skip("this Pillow knows no JPEG 2000")
    data = io.BytesIO()
    picture = np.full((H, W), 0xFFFF if bits > 8 else 0xFF, np.uint16 if bits > 8 else np.uint8)
    Image.fromarray(picture).save(data, "JPEG2000", no_jp2=name == "j2k")
    data = bytearray(data.getvalue())
    place = data.index(b"\xff\x4f\xff\x51") + 42
    assert data[place] == (15 if bits > 8 else 7)
    data[place] = bits - 1
    if name == "jp2":
        data[data.index(b"ihdr") + 14] = bits - 1
    assert is_right(tmp_path / f"a.{name}", bytes(data), np.full(3, 255)) == (bits >= 8)


def test_an_icon_of_sixteen_bits(tmp_path):
    levels = np.random.default_rng(0).integers(0, 2**16, (H, W, 1))
    data = png(levels, 16, 0)
    data = struct.pack("<HHHBBBBHHII", 0, 1, 1, W, H, 0, 0, 1, 16, len(data), 22) + data
    assert is_right(tmp_path / "a.ico", data, levels / 257)


def test_a_gif_whose_first_frame_is_a_part_of_it(tmp_path):
    frame = io.BytesIO()
    Image.new("L", (W, H // 2), 90).save(frame, "GIF")
    data = frame.getvalue()
    assert not is_right(tmp_path / "a.gif", data[:6] + struct.pack("<2H", W, H) + data[10:], -np.ones(3))


def test_sixteen_bits_of_which_nobody_says_what_is_white(tmp_path):
    cards = [("SIMPLE", "T"), ("BITPIX", 16), ("NAXIS", 2), ("NAXIS1", W), ("NAXIS2", H)]
    header = "".join(f"{name:8}= {value:>20}".ljust(80) for name, value in cards) + "END"
    assert not is_right(tmp_path / "a.fits", header.ljust(2880).encode() + bytes(2 * W * H), -np.ones(3))


def test_what_belongs_to_one_picture_is_no_second_one(tmp_path):
    layers = struct.pack(">II", 48, 44) + struct.pack(">h", 2) + bytes(42)
    psd = b"8BPS" + struct.pack(">H6xHIIHH", 1, 1, H, W, 8, 1) + bytes(8) + layers + bytes(2) + bytes([90]) * (H * W)
    (tmp_path / "a.psd").write_bytes(psd)
    photo, other = Image.new("RGB", (W, H), (90, 90, 90)), Image.new("RGB", (W, H))
    for name in ("b.jpg", "c.mpo"):
        photo.save(tmp_path / name, "MPO", save_all=True, append_images=[other])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = ImageFolder(tmp_path, (H, W))
    assert images.files == ["a.psd", "b.jpg", "c.mpo"] and np.ptp(to_uint8(images[:])) <= 2
