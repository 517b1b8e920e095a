"""A folder of pictures: which files are taken, what of a picture is shown, and what becomes of damaged ones."""

import concurrent.futures
import copy
import errno
import gc
import os
import pathlib
import re
import struct
import threading
import time
import unittest.mock
import warnings

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

import tinyddpm.files.decoding
import tinyddpm.files.folder
from tinyddpm import ImageFolder, load_digits
from tinyddpm.files.decoding import readable_suffixes
from tinyddpm.files.pictures import to_uint8


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The seconds that are waited for a folder that is away: none, but those that a test puts into the list."""
    seconds = []
    monkeypatch.setattr(tinyddpm.files.folder, "_WAITS", seconds)
    return seconds


GREY = Image.new("L", (6, 5), 100)


def put(path, picture=GREY, **how):
    """Save a picture, or an array as one, and make the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(path, **how)
    return path


def put_all(folder, *files):
    for file in files:
        put(folder / file)
    return folder


def cut_short(path):
    """Leave of a file its header, and half of the rest."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 + 20])


TEXT = "it is text, which begins with {!r}; if it was downloaded, that is what the server had to say"


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def told(folder, size=4):
    """The folder's images, and what is said about it, without its name."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        images = ImageFolder(folder, size)
    assert all(warning.category is UserWarning and warning.filename == __file__ for warning in seen)
    return images, [str(warning.message).removeprefix(f"{folder}: ") for warning in seen]


def shown(path, size, channels=3):
    """The bytes that the folder of a single picture gives."""
    return to_uint8(ImageFolder(path.parent, size, channels)[0])


def which(pictures, among):
    """The number among the others of each picture."""
    return [int(np.flatnonzero((among == picture).all((1, 2, 3)))[0]) for picture in pictures]


class TestWhichFiles:
    def test_all_in_an_order_that_is_the_same_everywhere(self, tmp_path):
        # by the parts of the path: as whole strings, "a b/1.png" and "a.png" would stand before "a/..."
        in_order = ["a/10.gif", "a/9.png", "a/B.png", "a/c/d/1.JPG", "a/z.png", "a b/1.png", "a.png", "b/x.png"]
        images, said = told(put_all(tmp_path, *reversed(in_order)))
        assert images.files == sorted(in_order, key=lambda file: pathlib.PurePosixPath(file).parts)
        assert images.shape == (8, 4, 4, 3) and len(images) == 8 and images.ndim == 4 and images.dtype == np.float32
        assert images.labels is None and images.classes == () and images.skipped == {}
        assert said == [
            "there are no classes, since 1 of 8 pictures lie beside the folders a, a b, b: a.png; to have classes, "
            "move them away, or into a folder"
        ]

    def test_every_format_that_pillow_writes_and_reads_by_itself_by_its_header_alone(self, tmp_path, monkeypatch):
        put_all(tmp_path, *"1.bmp 1.gif 1.jpeg 1.jpg 1.pgm 1.png 1.tga 1.tif 1.tiff 1.webp".split())
        with monkeypatch.context() as here:
            here.chdir(tmp_path)
            here.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
            images = ImageFolder(".", 4)
        assert images[:].shape == (10, 4, 4, 3)  # from elsewhere too
        put(tmp_path / "1.ico", Image.new("L", (16, 16)))  # which Pillow decodes at once
        assert len(ImageFolder(tmp_path, 4)) == 11
        of_what_needs_help = {".eps", ".wmf", ".bufr", ".grib", ".h5", ".mpg"}
        assert of_what_needs_help <= Image.registered_extensions().keys() - readable_suffixes()

    def test_not_what_is_hidden_nor_other_files(self, tmp_path):
        of_systems = ("__MACOSX/a.png", "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", "d/@eaDir/b.jpg", "lost+found/a.png")
        of_systems += ("__pycache__/a.png", "#recycle/a.png", "$RECYCLE.BIN/a.png")
        put_all(tmp_path, "a.png", ".b.png", ".cache/c.png", "d/.e/f.png", *of_systems)
        put_all(tmp_path, "g.eps", "h.pdf")  # the one needs Ghostscript, the other is only written
        beside = "i.txt LICENSE README x/README x/y.py x/y.ipynb y.sh y.pdf z.zip zz.zip z.npy z.mp4 Thumbs.db"
        for file in (*beside.split(), "1.a", "2.a", "3.a", "4.b", "5.b", "j.jpg_", "k", "png", "l/m.HEIC"):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).write_bytes(b"text")
        images, said = told(tmp_path)
        assert images.files == ["a.png"] and not images.skipped
        assert said == [
            "10 files left out for the suffix, with which Pillow reads none: 1 .heic (l/m.HEIC), 3 .a (1.a), 2 .b "
            "(4.b), 2 without one (k), 1 .eps (g.eps), 1 .jpg_ (j.jpg_); if they are pictures, pip install "
            "pillow-heif, and call pillow_heif.register_heif_opener() first, or convert them"
        ]
        (tmp_path / "a.png").unlink()  # then what is beside may be what is meant
        with pytest.raises(ValueError, match=r"in it, but there is none; 24 files left out .* 2 .zip \(z.zip\)"):
            ImageFolder(tmp_path, 4)

    def test_a_format_that_has_been_registered_with_pillow(self, tmp_path, monkeypatch):
        put(tmp_path / "a.png").rename(tmp_path / "a.HEIC")
        for table in ("ID", "OPEN", "EXTENSION"):
            monkeypatch.setattr(Image, table, getattr(Image, table).copy())
        Image.register_open("HEIF", type("Heif", (PngImagePlugin.PngImageFile,), {"format": "HEIF"}))
        Image.register_extension("HEIF", ".heic")
        monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "PNG"])
        assert ImageFolder(tmp_path, 4)[0].max() < 0

    def test_links_are_followed_but_not_in_circles(self, tmp_path):
        put_all(tmp_path, "folder/a/1.png", "elsewhere/2.png")
        links = {
            "folder/a/up": tmp_path / "folder", "folder/a/here": ".", "folder/b": tmp_path / "elsewhere",
            "elsewhere/back": tmp_path / "folder", "folder/c.png": "c.png", "folder/d.png": "gone.png",
            "folder/e.png": "/dev/null",
        }  # fmt: skip
        for name, to in links.items():
            (tmp_path / name).symlink_to(to)
        with pytest.warns(UserWarning, match="3 of 5 files"):
            images = ImageFolder(tmp_path / "folder", 4)
        assert images.files == ["a/1.png", "b/2.png"] and images.classes == ("a", "b")
        assert "symbolic links" in images.skipped["c.png"] and images.skipped["d.png"] == "No such file or directory"
        assert images.skipped["e.png"] == "not a regular file"

    def test_folders_are_classes_where_a_picture_can_be_read(self, tmp_path):
        put_all(tmp_path, "dogs/b/1.png", "cats/3.png", "cats/1.png", "dogs/a.png", "dogs/b.png")
        for name in ("apes", "bats", ".bees", "labels"):
            (tmp_path / name).mkdir()
        for file in ("read me.txt", "above.png", "labels/1.txt", "apes/1.png"):
            (tmp_path / file).touch()
        images, said = told(tmp_path)
        assert images.classes == ("cats", "dogs") and images.labels.tolist() == [0, 0, 1, 1, 1]
        assert images.labels.dtype == load_digits(train=False)[1].dtype
        assert said == [
            "2 of 7 files are left out: above.png and 1 more: empty",
            "no classes, for want of a picture that can be read: apes, bats",
        ]

    @pytest.mark.parametrize("files, classes, inside", [
        ("train/cats/1 train/dogs/2 train/dogs/3 test/cats/4", "test, train", "train"),
        ("Train/1 val/2 val/3", "Train, val", "Train"),
        ("seg_train/seg_train/x/1 seg_test/seg_test/y/2", "seg_test, seg_train", "seg_train/seg_train"),
        ("train/a/1 test/a/2 samples/3", "samples, test, train", "train"),
        ("train/cat/in/1 train/cat/out/2 train/dog/in/3 test/cat/in/4", "test, train", "train"),
        ("train/a/1 unsup/2 unsup/3", "train, unsup", "train"),
        ("archive/dataset/cats/1 archive/dataset/dogs/2", "archive", "archive/dataset"),
        ("a/b/train/x/1 a/b/test/x/2 a/b/test/y/3", "a", "a/b/train"),
        ("train/cats/1 validation_set/cats/2", "train, validation_set", "train"),
        ("train2017/1 val2017/2", "train2017, val2017", "train2017"),
        ("pets/cats/1 pets/dogs/2", "pets", "pets"),
        ("2019/cats/1 2020/cats/2 2020/dogs/3 2021/x/y/4", "2019, 2020, 2021", "2020"),
        ("2019/cats/1 2019/dogs/2 2020/cats/3 2020/cats/4 2020/dogs/5", "2019, 2020", "2020"),
        *((files, "", None) for files in (
            "cat/indoor/1 dog/indoor/2", "bullet_train/1 steam_train/2 train_station/3", "archive/dataset/1",
            "cats/1 dogs/a/2", "cats/a/1 dogs/b/2", "cats/a/1 cats/2 dogs/a/3 dogs/b/4", "cow/1 train/1", "cats/1",
            "cats/a/1",
        )),
    ])  # fmt: skip
    def test_folders_that_may_be_parts_of_a_data_set_are_said_to_be_classes(self, tmp_path, files, classes, inside):
        put_all(tmp_path, *(f"{file}.png" for file in files.split()))
        expected = [
            f"the classes are the folders {classes}; if these are parts of a data set, and the classes are the folders "
            f"in them, give {tmp_path}/{inside}"
        ]
        assert told(tmp_path)[1] == expected * bool(classes)

    def test_the_fingerprint_is_that_of_names_order_and_shape(self, tmp_path):
        def made(folder, *files, size=4, channels=3):
            return ImageFolder(put_all(tmp_path / folder, *files), size, channels).fingerprint

        first = made("one", "a.png", "b.png")
        put(tmp_path / "two/a.png", noise(9, 9))
        assert made("two", "b.png") == first == made("two", size=(4, 4))
        others = [made("one", size=5), made("one", size=(4, 5)), made("one", size=(5, 4)), made("one", channels=1)]
        others += [made("three", "a.png", "c.png"), made("four", "a.pngb.png"), made("one", "c.png")]
        assert len({first, *others}) == 8 and first == "b66a331b9f4bb33f"  # in whatever version: checkpoints hold it

    def test_a_bar_if_there_are_many(self, tmp_path, capsys, monkeypatch):
        put(tmp_path / "a.png")
        ImageFolder(tmp_path, 4)
        monkeypatch.setattr(tinyddpm.files.folder, "find", lambda folder: ["a.png"] * 1000)
        ImageFolder(tmp_path, 4, progress=False)
        assert capsys.readouterr().err == ""
        ImageFolder(tmp_path, 4)
        assert re.search(r"looking at files: 100%.* 1000/1000 .*\dfile/s", capsys.readouterr().err)


def test_it_is_indexed_as_numpy_does_and_keeps_nothing_but_names(tmp_path):
    array = np.stack([noise(5, 6, 3, seed=i) for i in range(7)])
    for i in range(7):
        put(tmp_path / f"{i}.png", array[i])
    images = ImageFolder(tmp_path, (5, 6))
    before, by_number = dict(vars(images)), [[], [3], [6, 0, 6, -7], np.array([[1, 2], [3, 4]]), np.arange(7) % 2 == 0]
    for indices in (0, -1, np.int64(3), slice(2, 5), slice(None, None, -2), ..., *by_number):
        taken = images[indices]
        assert taken.dtype == np.float32 and taken.flags.writeable
        np.testing.assert_array_equal(taken, array[indices].astype(np.float32) / np.float32(127.5) - 1)
    for indices in (7, -8, [0, 7], np.array([-8])):
        with pytest.raises(IndexError, match="out of bounds for axis 0 with size 7"):
            images[indices]
    assert len(list(images)) == 7  # which is where a loop ends
    assert vars(images) == before and all(type(file) is str for file in images.files)


TURNED = {  # stored with this orientation -> as it is to be seen (the EXIF standard, tag 274)
    1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1), 7: lambda x: x[::-1, ::-1].swapaxes(0, 1), 8: np.rot90,
    9: lambda x: x,
}  # fmt: skip


class TestWhatIsShown:
    """Of a single picture of its own size, in every format: test_decoding.py."""

    SIZES = st.tuples(st.integers(1, 60), st.integers(1, 60))

    @staticmethod
    def difference(path, picture, out, channels):
        """From Pillow's own picture of that size, at most."""
        fitted = ImageOps.fit(picture.convert("L" if channels == 1 else "RGB"), out[::-1], Image.Resampling.BICUBIC)
        got = shown(path, out, channels).astype(int)
        return np.abs(got - np.asarray(fitted).reshape(got.shape)).max()

    @example(mode="RGB", size=(7, 14), out=(25, 25), channels=1)  # 25 * (7 / 25) > 7 in floats
    @given(
        mode=st.sampled_from(["1", "L", "P", "RGB", "LA", "RGBA", "CMYK"]),
        size=SIZES, out=SIZES, channels=st.sampled_from([1, 3]),
    )  # fmt: skip
    def test_the_centre_fills_the_size_without_distortion(self, tmp_path_factory, mode, size, out, channels):
        picture = Image.fromarray(noise(*size[::-1], 4)).convert("RGBA" if mode.endswith("A") else "RGB").convert(mode)
        flat = Image.alpha_composite(Image.new("RGBA", size, "white"), picture.convert("RGBA"))
        path = put(tmp_path_factory.mktemp("a") / ("a.tif" if mode == "CMYK" else "a.png"), picture)
        assert self.difference(path, flat, out, channels) <= 1

    @pytest.mark.parametrize("size, out", [((33, 33), (2, 2)), ((1003, 701), (24, 32)), ((300, 999), (32, 16)),
                                           ((70, 70), (40, 40))])  # fmt: skip
    @pytest.mark.parametrize("channels", [1, 3])
    def test_a_photo_decoded_small_shows_the_same(self, tmp_path, size, out, channels):
        y, x = np.mgrid[: size[1], : size[0]]
        ramps = np.stack([255 * x / size[0], 255 * y / size[1], 128 + 0 * x], -1).astype(np.uint8)
        path = put(tmp_path / "a.jpg", ramps, quality=98, subsampling=0)
        with Image.open(path) as picture:
            assert self.difference(path, picture, out, channels) <= (10 if out == (2, 2) else 2)

    def test_a_photo_is_decoded_small_and_not_too_small(self, tmp_path, monkeypatch):
        seen, resize = [], Image.Image.resize
        monkeypatch.setattr(Image.Image, "resize", lambda self, *args: seen.append(self.size) or resize(self, *args))
        images = put(tmp_path / "a.jpg", Image.new("RGB", (800, 600))).parent
        for size in (30, 38, (10, 60), 400):
            ImageFolder(images, size)[0]
        assert seen == [(100, 75), (200, 150), (200, 150), (800, 600)]

    def test_a_picture_is_turned_as_it_says(self, tmp_path):
        for orientation, turned in TURNED.items():
            exif, expected = Image.Exif(), turned(noise(5, 8, 3))
            exif[274] = orientation
            for name in ("png/a.png", "tif/a.tif"):
                path = put(tmp_path / name, noise(5, 8, 3), exif=exif)
                np.testing.assert_array_equal(shown(path, expected.shape[:2]), expected, f"{orientation}")
        path = put(tmp_path / "png/a.png", noise(5, 8, 3), exif=b"Exif\0\0" + b"nonsense" * 4)  # costs no picture
        np.testing.assert_array_equal(shown(path, (5, 8)), noise(5, 8, 3))

    def test_of_several_frames_the_first_but_what_belongs_to_one_picture_is_no_second_one(self, tmp_path):
        frames = [Image.new("L", (8, 8), value) for value in (30, 90, 200)]
        for name in ("a.gif", "a.png", "a.tif", "a.webp"):
            how = {"lossless": True} if name == "a.webp" else {}
            put(tmp_path / "frames" / name, frames[0], save_all=True, append_images=frames[1:], **how)
        (tmp_path / "frames/b.png").touch()
        damaged = put(tmp_path / "frames/c.gif", frames[0], save_all=True, append_images=frames[1:2])
        damaged.write_bytes(damaged.read_bytes()[:-25])  # in the second frame, which is no harm to the first
        images, said = told(tmp_path / "frames")
        assert (to_uint8(images[:]) == 30).all() and said == [
            "1 of 6 files are left out: b.png: empty",
            "of 5 files with several frames or pages, the first is taken: a.gif, a.png, a.tif, ...",
        ]
        for name in ("b.jpg", "c.mpo"):
            put(tmp_path / "one" / name, frames[1], format="MPO", save_all=True, append_images=frames[2:])
        layers = struct.pack(">II", 48, 44) + struct.pack(">h", 2) + bytes(42)
        psd = b"8BPS" + struct.pack(">H6xHIIHH", 1, 1, 8, 8, 8, 1) + bytes(8) + layers + bytes(2) + bytes([90]) * 64
        (tmp_path / "one/a.psd").write_bytes(psd)
        images, said = told(tmp_path / "one")
        assert images.files == ["a.psd", "b.jpg", "c.mpo"] and said == [] and np.ptp(to_uint8(images[:])) <= 2


@pytest.fixture
def damaged(tmp_path):
    """Two classes of four; in each, one is cut short, one becomes something else, and one is gone."""
    for i in range(8):
        put(tmp_path / f"{'ab'[i // 4]}/{i}.{'jpg' if i == 4 else 'png'}", noise(20, 20, 3, seed=i))
    images = ImageFolder(tmp_path, 20)
    whole = images[:]
    for name in ("a/1.png", "b/4.jpg"):
        cut_short(tmp_path / name)
    for name in ("a/2.png", "b/7.png"):
        (tmp_path / name).write_text("something else")
    for name in ("a/3.png", "b/5.png"):
        (tmp_path / name).unlink()
    return images, whole


class TestDamage:
    @pytest.mark.parametrize("start, why", [
        (b"no picture", re.escape(TEXT.format("no picture"))),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC, as phones save photos: pip install pillow-heif"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'>", "SVG, a drawing"),
        (b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg>', "SVG"),
        (b"II*\0\x08\0\0\0" + bytes(6), "TIFF, damaged or of a kind that Pillow does not read"),
        (b"\x89PNG\r\n\x1a\n", "PNG, damaged"),
        (b"GIF89a", "GIF, damaged or of a kind that Pillow does not read$"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 5\n%%EndComments\n", "EPS, damaged"),  # not for Ghostscript
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x08", ""),
        (b"RIFF\0\0\0\0WEBPVP8 ", ""),
        (b"\xfe\xfe\xfe", "in no format that Pillow reads"),
    ])  # fmt: skip
    def test_the_reason_is_given_once_and_the_commonest_first(self, tmp_path, start, why):
        put(tmp_path / "z.png"), (tmp_path / "a.png").touch()
        for name in ("b.jpg", "c.jpg", "d.jpg"):
            (tmp_path / name).write_bytes(start)
        images, (said,) = told(tmp_path)
        assert images.files == ["z.png"] and list(images.skipped) == ["a.png", "b.jpg", "c.jpg", "d.jpg"]
        assert re.search(f"^{why}", images.skipped["d.jpg"]) and "_io" not in said
        assert said == f"4 of 5 files are left out: b.jpg and 2 more: {images.skipped['b.jpg']}; a.png: empty"

    def test_bombs_are_refused(self, tmp_path, monkeypatch):
        """Those too that a picture is replaced by."""
        for name in "abc":
            put(tmp_path / f"{name}.png", Image.new("L", (10, 10)))
        images = ImageFolder(tmp_path, 4)
        (tmp_path / "a.png").write_bytes(b"P5 100000 100000 255\n")
        put(tmp_path / "b.png", Image.new("L", (10, 11)))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.warns() as seen:
            np.testing.assert_array_equal(images[:2], images[[2, 2]])
        assert {warning.category for warning in seen} - {Image.DecompressionBombWarning} == {UserWarning}
        fresh, said = told(tmp_path)
        assert fresh.files == ["c.png"] and len(said) == 1
        for skipped in (fresh.skipped, images.skipped):
            assert skipped.keys() == {"a.png", "b.png"} and "10000000000 pixels" in skipped["a.png"]
            assert skipped["b.png"] == "110 pixels, more than the 100 of PIL.Image.MAX_IMAGE_PIXELS"
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        assert len(ImageFolder(tmp_path, 4)) == 3

    def test_another_one_of_its_class_stands_in(self, damaged, tmp_path):
        images, whole = damaged
        fresh = copy.deepcopy(images)
        with pytest.warns(UserWarning) as seen:
            got = images[:]
        np.testing.assert_array_equal(got, whole[[0, 0, 0, 0, 6, 6, 6, 6]])
        assert images.skipped.keys() == {"a/1.png", "a/2.png", "a/3.png", "b/4.jpg", "b/5.png", "b/7.png"}
        assert "truncated" in images.skipped["a/1.png"] and images.skipped["b/5.png"] == "No such file or directory"
        assert images.skipped["a/2.png"] == TEXT.format("something else")
        assert len(seen) == 6 and all(warning.filename == __file__ for warning in seen)
        said = {str(warning.message).removeprefix(f"{tmp_path}: ") for warning in seen}
        assert f"a/2.png is replaced by another picture from now on: {TEXT.format('something else')}" in said
        assert "a/3.png is replaced by another picture this time: No such file or directory" in said
        np.testing.assert_array_equal(images[:], got)  # and is not warned of again
        with pytest.warns(UserWarning):  # nor does it matter in which order they are asked for
            np.testing.assert_array_equal([fresh[i] for i in (7, 3, 5, 1, 2, 4)], whole[[6, 0, 6, 0, 0, 6]])
        for i in (5, 7):  # what is gone may come back, what is damaged stays so
            put(tmp_path / f"b/{i}.png", noise(20, 20, 3, seed=i))
        np.testing.assert_array_equal(images[[5, 6]], whole[[5, 6]])
        assert which([images[7]], whole)[0] in (5, 6)

    def test_a_class_or_a_folder_of_which_nothing_is_left(self, damaged, tmp_path):
        images, whole = damaged
        (tmp_path / "a/0.png").unlink()
        for _ in range(2):
            with pytest.raises(OSError, match="no picture of class 'a' of .* can be read now; a/2.png: it is text"):
                images[2]
        with pytest.warns(UserWarning):
            np.testing.assert_array_equal(images[7], whole[6])
        images = ImageFolder(put(tmp_path / "other/a.png").parent, 4)
        (tmp_path / "other/a.png").write_text("something else")
        with pytest.raises(OSError, match=f"no picture of {tmp_path}/other can be read any more; a.png: it is text"):
            images[0]

    def test_threads_read_the_same_and_one_of_them_warns(self, damaged, monkeypatch):
        class Slow(dict):
            def __contains__(self, file):
                found = super().__contains__(file)
                time.sleep(0.02)
                return found

        images, whole = damaged
        images.skipped, together, reason = Slow(), threading.Barrier(4, timeout=5), tinyddpm.files.folder.reason
        chosen = np.random.default_rng(0).integers(0, 8, (60, 4))
        with concurrent.futures.ThreadPoolExecutor(8) as pool, pytest.warns(UserWarning) as seen:
            with monkeypatch.context() as at_first:
                at_first.setattr(tinyddpm.files.folder, "reason", lambda error: (together.wait(), reason(error))[1])
                np.testing.assert_array_equal(list(pool.map(images.__getitem__, [5] * 4)), whole[[6] * 4])
            images.skipped = dict(images.skipped)
            batches = list(pool.map(images.__getitem__, chosen))
        assert len(seen) == len(images.skipped)
        np.testing.assert_array_equal(batches, images[:][chosen])


def test_two_that_are_opened_at_a_time_leave_warnings_as_they_were(tmp_path, monkeypatch):
    """Which of them are shown is a matter of the whole process."""
    own, before = tinyddpm.files.decoding.opened, list(warnings.filters)
    arrived, both, first_ends = [], threading.Event(), threading.Event()

    def slowly(path):
        arrived.append(path)
        if len(arrived) == 1:
            both.wait(0.1)
        else:
            both.set(), first_ends.wait(0.1)
        return own(path)

    monkeypatch.setattr(tinyddpm.files.folder, "opened", slowly)
    folders = [put(tmp_path / name / "1.png").parent for name in ("one", "other")]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda folder: ImageFolder(folder, 4) and first_ends.set(), folders))
    assert warnings.filters == before


class TestFaultsOfTheMedium:
    """Of a drive or a network, and not of the pictures."""

    @pytest.fixture
    def folder(self, tmp_path):
        """Two classes of thirty pictures."""
        for i in range(60):
            put(tmp_path / f"{'ab'[i // 30]}/{i}.png", noise(4, 4, seed=i))
        return tmp_path

    @pytest.fixture
    def fail(self, monkeypatch):
        """fail(names, code, times): so often the pictures of these names cannot be opened."""
        away = {}

        def failing(path, mode):
            code, times = away.get(name := pathlib.Path(path).name, (None, 0))
            if times == 0:
                return open(path, mode)
            away[name] = (code, times - 1)
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(tinyddpm.files.decoding, "open", failing, raising=False)
        return lambda names, code=errno.EIO, times=1: away.update({f"{name}.png": (code, times) for name in names})

    @pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOENT, errno.EACCES])
    def test_they_pass_and_the_pictures_come_back(self, folder, fail, code):
        images = ImageFolder(folder, 4)
        whole = images[:]
        names = [pathlib.Path(file).stem for file in images.files[5:25]]
        fail(names, code)
        with pytest.warns(UserWarning, match=f"a/.* is replaced by another picture this time: {os.strerror(code)}"):
            chosen = which(images[5:25], whole)
        assert max(chosen) < 30 and len(set(chosen)) > 8  # and not one for all twenty
        fail(names, code)
        assert which(images[5:25], whole) == chosen  # always the same, and with no second warning
        np.testing.assert_array_equal(images[:], whole)

    def test_nine_in_a_row_are_no_fault_of_the_folder(self, folder, fail):
        for i in range(9, 30):
            (folder / f"a/{i}.png").unlink()
        images = ImageFolder(folder, 4)
        whole = images[:]
        fail(range(8), times=99)
        with pytest.warns(UserWarning):
            np.testing.assert_array_equal(images[:9], whole[[8] * 9])

    def test_of_many_not_all_are_told(self, folder, fail):
        images = ImageFolder(folder, 4)
        fail([pathlib.Path(file).stem for file in images.files[::2]])
        with pytest.warns(UserWarning) as seen:
            images[::2]
        ends = [str(warning.message).endswith("; further ones are in `skipped`, and not shown") for warning in seen]
        assert ends == [False] * 19 + [True] and len(images.skipped) >= 25

    def test_at_the_start_they_cost_no_picture(self, folder, fail):
        fail([3, 40]), fail([50], errno.EACCES)
        images, said = told(folder)
        assert said == [
            "1 of 60 files are left out: b/50.png: Permission denied",
            "2 of 60 files cannot be read now, and are tried again later: a/3.png and 1 more: Input/output error",
        ]
        assert images.skipped.keys() == {"a/3.png", "b/40.png", "b/50.png"}
        assert len(images) == len(images[:]) == 59  # without a warning
        fail([0, 1, *range(10, 17)], errno.ENOENT)  # the first nine: the folder goes away while it is looked at
        images, said = told(folder)
        assert len(images) == 60 and "9 of 60 files cannot be read now, and are tried again later: a/0.p" in said[0]
        for names, code, last in (
            (range(60), errno.ESTALE, "a/.*: Stale"),
            (range(20, 30), errno.ENOENT, "a/29.*: No"),
        ):
            fail(range(60), times=0), fail(names, code)
            with pytest.raises(OSError, match=f"^{folder}: 10 pictures in a row cannot be read, the last one {last}"):
                ImageFolder(folder, 4)

    @pytest.mark.parametrize("wrong", ["cut short", "empty", "text"])
    def test_ten_damaged_ones_in_a_row_are_no_fault_of_the_drive(self, folder, fail, tmp_path_factory, wrong):
        """Nor are nine faults, twelve damaged ones and nine faults. To read one that is cut short, Pillow may go to a
        place before its start, which is an error of the system's."""
        cut = put(tmp_path_factory.mktemp("a") / "a.pcx").read_bytes()[:200]
        bad = {"cut short": cut, "empty": b"", "text": b"no picture"}[wrong]
        images = ImageFolder(folder, 4)
        whole = images[:]
        for i in range(31, 60):
            (folder / f"b/{i}.png").write_bytes(bad)
        with pytest.warns(UserWarning):
            np.testing.assert_array_equal(images[31:], whole[[30] * 29])
        assert set(images.skipped.values()) <= {"damaged", "empty", TEXT.format("no picture")}
        put_all(folder, *(f"b/{i}.png" for i in range(31, 39)))
        for i in range(12):
            (folder / f"a/z{i}.png").write_bytes(bad)
        fail([28, 29, *range(3, 10), *range(30, 39)])
        assert len(told(folder)[0]) == 39

    def test_at_the_start_it_is_waited_for_too(self, folder, fail, waits):
        waits += [0, 0]
        fail(range(20, 30))
        images, said = told(folder)
        what = "10 pictures in a row cannot be read, the last one a/29.png: Input/output error; it is tried again for 0"
        assert len(images) == 60 and not images.skipped and said == [f"{what} seconds"]
        fail(range(30), times=2)
        with pytest.warns(UserWarning, match="10 pictures in a row .*; it is tried again"):  # each time that it is away
            images[1]

    def test_of_threads_that_wait_one_warns(self, folder, waits, monkeypatch):
        images, waiting = ImageFolder(folder, 4), threading.Barrier(4, lambda: folder.with_name("x").rename(folder), 5)
        whole, waits[:] = images[:], [1]
        monkeypatch.setattr(tinyddpm.files.folder.time, "sleep", lambda seconds: waiting.wait())
        folder.rename(folder.with_name("x"))
        with concurrent.futures.ThreadPoolExecutor(4) as pool, pytest.warns(UserWarning) as seen:
            np.testing.assert_array_equal(list(pool.map(images.__getitem__, range(4))), whole[:4])
        assert len(seen) == 1

    @pytest.mark.parametrize("pictures, lasts", [(60, 2), (60, 3), (6, 2), (6, 3)])
    def test_it_is_waited_for_with_one_warning(self, folder, waits, monkeypatch, pictures, lasts):
        """Of a class of few pictures too."""
        for i in range(pictures // 2, 30):
            (folder / f"a/{i}.png").unlink(), (folder / f"b/{i + 30}.png").unlink()
        waits += [1, 4]
        images, slept = ImageFolder(folder, 4), []
        whole, hidden = images[:], folder.with_name(f"{folder.name} hidden")

        def sleep(seconds):
            slept.append(seconds)
            if len(slept) == lasts:
                hidden.rename(folder)

        monkeypatch.setattr(tinyddpm.files.folder.time, "sleep", sleep)
        folder.rename(hidden)
        words = f"^{folder}: 10 pictures in a row cannot be read, the last one a/.*: No such"
        words = words if pictures > 6 else f"^no picture of class 'a' of {folder} can be read now"
        with pytest.warns(UserWarning, match=f"{words}.*; it is tried again for 5 seconds$") as seen:
            if lasts > 2:
                with pytest.raises(OSError, match=words):
                    images[:]
                hidden.rename(folder)
            np.testing.assert_array_equal(images[:], whole)
        assert len(seen) == 1 and seen[0].filename == __file__ and slept == [1, 4] and not images.skipped

    def test_too_many_open_files_are_no_fault_of_a_picture(self, tmp_path, monkeypatch):
        images = ImageFolder(put(tmp_path / "a.png").parent, 4)
        for wrong in (OSError(errno.EMFILE, "Too many open files"), OSError(errno.ENOMEM, "none"), MemoryError("none")):
            opening = unittest.mock.Mock(side_effect=wrong)
            monkeypatch.setattr(tinyddpm.files.decoding, "open", opening, raising=False)
            for read in (lambda: images[0], lambda: ImageFolder(tmp_path, 4)):
                with pytest.raises(type(wrong), match="Too many open files|none"):
                    read()
        assert not images.skipped


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="open files are not listed here")
def test_files_are_closed_at_once(tmp_path):
    for suffix in ("png", "jpg", "tif", "gif", "webp", "bmp", "ico"):
        for i in range(3):
            put(tmp_path / f"{suffix}/{i}.{suffix}", noise(32, 32, 3), compression="tiff_lzw")
        (tmp_path / suffix / f"none.{suffix}").write_text("no picture")
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.warns() as seen:
        images = ImageFolder(tmp_path, 4)
        for suffix in images.classes:
            cut_short(tmp_path / f"{suffix}/1.{suffix}")
        for _ in range(3):
            images[:]
    assert len(os.listdir("/proc/self/fd")) == before
    assert {warning.category for warning in seen} == {UserWarning} and len(images.skipped) >= 13


def test_bad_input(tmp_path):
    put(tmp_path / "a.png"), (tmp_path / "empty").mkdir(), (tmp_path / "bad").mkdir(), (tmp_path / "bad/a.png").touch()
    size = "size: expected a positive integer, or two: .height, width., got "
    none = f"folder: expected pictures .* in {tmp_path}/{{}} or in folders in it, but "
    for arguments, message, error in [
        *((("", bad), size, ValueError) for bad in (0, -3, 4.0, None, (4, 0), (4,), (4, 4, 3), (4.0, 4), [2, "a"])),
        *((("", 4, bad), r"channels: expected 1 \(grey\) or 3 \(RGB\), got ", ValueError) for bad in (0, 2, 4, "RGB")),
        (("none", 4), f"folder: there is no {tmp_path}/none", FileNotFoundError),
        (("a.png", 4), "folder: expected a folder of pictures, got the file .*a.png", NotADirectoryError),
        (("empty", 4), none.format("empty") + "there is none$", ValueError),
        (("bad", 4), none.format("bad") + "none of 1 file can be read: a.png: empty$", ValueError),
    ]:
        with pytest.raises(error, match=message):
            ImageFolder(tmp_path / arguments[0], *arguments[1:])
