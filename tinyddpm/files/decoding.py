"""One picture: from a file to bytes of grey or RGB, turned, cropped and shrunk to the size that is asked for.

Pillow reads it. A few kinds come out wrong from Pillow and are put right here, or are refused with the reason, as are
those of which nobody can tell what they show: which numbers of 32 bits are white is not said anywhere.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator

import numpy as np

from .layout import READ_BY
from .mistaken import what_it_is

# what Pillow recognises, but cannot show without help: Ghostscript, Windows, or a handler that somebody has to write
_NEED_HELP = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
# tags of TIFF
_BITS, _PHOTOMETRIC, _PLANES, _COLORMAP, _EXTRA, _NUMBERS = 258, 262, 284, 320, 338, 339
_WHITE_IS_ZERO, _YCBCR, _SEPARATE, _PREMULTIPLIED, _UNSIGNED = 0, 6, 2, 1, 1  # values of these
# formats that Pillow knows nothing of unless it is taught, by how a file begins
_UNKNOWN = {
    rb"(?s).{4}ftyp(hei|hev|(mif1|msf1).{4,40}hei)": ("HEIF", f"HEIC, as phones save photos: {READ_BY['.heic']}"),
    rb"(?s).{4}ftypavi": ("AVIF", f"AVIF: {READ_BY['.avif']}"),
    rb"(?is)(\xef\xbb\xbf)?\s*(<\?xml.*|<!--.*|<!doctype svg.*)?<svg": ("SVG", "SVG, a drawing, which has no pixels"),
}
# of these, written by a program that knows no alpha, all pixels say that they are transparent
_OFTEN_WITHOUT_ALPHA = {"TGA", "BMP", "DIB", "ICO", "CUR"}


def readable_suffixes() -> set[str]:
    """The suffixes of the formats that Pillow reads by itself, or with what has been registered with it."""
    from PIL import Image

    formats = _formats()
    formats.append("MPO")  # of several photos, which is known by its suffix, and read as the JPEG that it begins with
    return {suffix for suffix, name in Image.registered_extensions().items() if name in formats}


def _formats() -> list[str]:
    from PIL import Image

    Image.init()
    return [name for name in Image.ID if name not in _NEED_HELP]


@contextlib.contextmanager
def opened(path: str) -> Iterator:
    """A picture whose header alone is read as yet. Raises whatever Pillow does, ValueError if it is refused."""
    from PIL import Image, UnidentifiedImageError

    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")  # opening a pipe would wait for ever
    if status.st_size == 0:
        raise ValueError("empty")
    # given the file, and not its path, Pillow leaves it to us to close it, and maps none into memory, which would
    # end the process if the file were cut short meanwhile
    with open(path, "rb") as stream:
        try:
            picture = Image.open(stream, formats=_formats())
        except UnidentifiedImageError:
            stream.seek(0)
            raise ValueError(_no_picture(stream.read(1000))) from None
        with picture:
            count, limit = picture.width * picture.height, Image.MAX_IMAGE_PIXELS
            if limit is not None and count > limit:  # up to twice as many, Pillow itself merely warns
                raise ValueError(f"{count} pixels, more than the {limit} of PIL.Image.MAX_IMAGE_PIXELS")
            if why := _unclear(picture):
                raise ValueError(why)
            yield picture


def _no_picture(start: bytes) -> str:
    """What a file is that begins so, and of which Pillow makes no picture."""
    from PIL import Image

    for pattern, (name, words) in _UNKNOWN.items():
        if name not in Image.OPEN and re.match(pattern, start):
            return words
    for name, (_, accepts) in Image.OPEN.items():
        with contextlib.suppress(Exception):  # it is too short
            if accepts and accepts(start[:16]) is True:
                return f"{name}, damaged or of a kind that Pillow does not read"
    return what_it_is(start) or "in no format that Pillow reads"


def reason(error: Exception) -> str:
    """What is wrong with a file. Raises the error again if it is no fault of the file's: too many are open, or there is
    no memory left."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise error
    if getattr(error, "errno", None) == errno.EINVAL:  # it is shorter than it says
        return "damaged"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def has_more(picture) -> bool:
    """Whether an opened picture is the first of several frames or pages."""
    if picture.format in ("MPO", "PSD"):  # a photo and what belongs to it; layers, which Pillow has put together
        return False
    try:
        return bool(getattr(picture, "is_animated", False))
    except Exception:  # there is a second one, a damaged one, which is no harm to the first
        return True


def pixels(picture, height: int, width: int, channels: int) -> np.ndarray:
    """The centre of an open picture, bytes (height, width, channels), as large as fits: that of PIL.ImageOps.fit.

    Bicubic, over all the pixels that fall on one: sharper than their mean, and with less of a halo along edges than
    Lanczos, for a model would learn to draw halos; see Parmar, Zhang & Zhu 2022, "On aliased resizing".
    """
    from PIL import Image

    mode = "L" if channels == 1 else "RGB"
    if picture.format == "PNG" and picture.mode == "L" and "transparency" in picture.info:
        levels = {"L;2": 3, "L;4": 15}.get(_raw_mode(picture), 255)  # to be stretched to 8 bits as pixels are
        if picture.info["transparency"] <= levels:
            picture.info["transparency"] *= 255 // levels
    # a JPEG can be decoded at 1/2, 1/4 or 1/8 of its size in a fraction of the time; twice what is needed, so that
    # the better filter has the last word. What it then shows of the whole may end within a pixel, hence its own size.
    side = 2 * max(height, width)
    draft = picture.draft(mode, (side, side))
    picture.load()
    full_width, full_height = draft[1][2:] if draft else picture.size

    # the picture is shrunk before it is turned, which is less work
    orientation = _orientation(picture)
    if orientation >= 5:
        height, width = width, height
    scale = min(full_width / width, full_height / height)
    left, top = max(0, full_width - scale * width) / 2, max(0, full_height - scale * height) / 2
    box = (left, top, full_width - left, full_height - top)
    picture = _flat(picture, mode).resize((width, height), Image.Resampling.BICUBIC, box)
    if orientation > 1:
        picture = picture.transpose(Image.Transpose[_TURNS[orientation]])
    return np.asarray(picture).reshape(*picture.size[::-1], channels)


# what undoes each EXIF orientation, among PIL.Image.Transpose
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
    8: "ROTATE_90",
}  # fmt: skip


def _orientation(picture) -> int:
    """The EXIF orientation of a loaded picture, 1 ... 8; 1, as it stands, if there is none or none that makes sense."""
    if picture.format == "TIFF":  # Pillow has turned it, and depending on its version says so or not
        return 1
    try:
        orientation = picture.getexif().get(0x0112, 1)
    except Exception:  # a picture is not lost with what is said about it
        return 1
    return orientation if orientation in _TURNS else 1


def _unclear(picture) -> str | None:
    """Why nobody can tell from an opened picture what it shows, or Pillow cannot; None if that is clear."""
    known = picture.format in ("PNG", "PPM", "JPEG2000", "ICO") or (picture.format == "TIFF" and picture.mode != "I")
    if picture.mode == "F" or (picture.mode.startswith("I") and not known):
        return "numbers of more than 8 bits, and it is not known which of them are white"
    if picture.format == "PNG" and "transparency" in picture.info and _raw_mode(picture) == "RGB;16B":
        return "a transparent colour of 16 bits, of which Pillow reads 8"
    if picture.format == "GIF" and "transparency" not in picture.info and picture.tile[0][1] != (0, 0, *picture.size):
        return "a first frame that is a part of the picture, without a colour for the rest"
    if picture.format == "JPEG2000":
        picture.fp.seek(0)
        depth = re.search(rb"(?s)\xff\x4f\xff\x51.{38}(.)", picture.fp.read(2**16))  # in the marker SIZ, less 1
        if depth and depth[1][0] & 127 < 7:
            return "numbers of fewer than 8 bits, of which Pillow makes none that reach white"
    if picture.format != "TIFF":
        return None
    tags, raw = picture.tag_v2, picture.info["compression"] == "raw"
    if set(tags.get(_NUMBERS, ())) - {_UNSIGNED}:
        return "numbers with a sign, and it is not known which of them are white"
    plain = set(tags.get(_BITS, ())) == {8} and tags.get(_PHOTOMETRIC) and _PREMULTIPLIED not in tags.get(_EXTRA, ())
    if tags.get(_PLANES) == _SEPARATE and (picture.mode in ("LA", "La", "PA") or raw and not plain):
        return "planes one after the other, which Pillow mistakes in this kind of TIFF"
    if raw and tags.get(_PHOTOMETRIC) == _YCBCR:
        return "YCbCr without compression, which Pillow mistakes"
    if picture.mode in ("P", "PA") and max(tags[_COLORMAP]) < 256:
        return "a palette of 8 bits where TIFF has 16"
    return None


def _raw_mode(picture) -> str:
    """How the pixels of an opened PNG are stored."""
    return picture.tile[0][3] if picture.tile else ""


def _flat(picture, mode: str):
    """A loaded picture as bytes of grey ("L") or "RGB", over white where it is transparent."""
    from PIL import Image, ImageOps

    if picture.mode.startswith("I"):
        return _eight_bits(picture).convert(mode)
    if picture.mode == "1" and picture.format in ("XBM", "PSD"):  # in these, 1 is black
        picture = ImageOps.invert(picture.convert("L"))
    if picture.mode in _VIA:
        picture = picture.convert(_VIA[picture.mode])
    palette = getattr(picture.palette, "mode", "")
    if picture.mode in ("RGBA", "RGBa", "LA", "PA") or palette == "RGBA" or "transparency" in picture.info:
        colours = picture.convert("RGBA")
        if picture.format not in _OFTEN_WITHOUT_ALPHA or colours.getextrema()[3] != (0, 0):
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), colours)
    return picture.convert(mode)


# modes from which Pillow knows no direct way to both grey and RGB
_VIA = {"La": "LA", "LAB": "RGB"}


def _eight_bits(picture):
    """A picture of 16 bits or 12, called I;16 or I by different versions of Pillow, which would clip them to 255."""
    from PIL import Image

    tags = picture.tag_v2 if picture.format == "TIFF" else {_BITS: (16,), _PHOTOMETRIC: None}
    levels = np.clip(np.asarray(picture).astype(np.int32), 0, 65535)
    white = 2 ** tags[_BITS][0] - 1
    pixels = (255 * levels + white // 2) // white
    if tags.get(_PHOTOMETRIC, _WHITE_IS_ZERO) == _WHITE_IS_ZERO:
        pixels = 255 - pixels
    pixels[levels == picture.info.get("transparency", -1)] = 255
    return Image.fromarray(pixels.astype(np.uint8))
