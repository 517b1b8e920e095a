"""Files from the network, by way of servers on this machine that behave as badly as those out there; and IDX files."""

import contextlib
import errno
import gzip
import hashlib
import http.server
import multiprocessing
import os
import pathlib
import random
import re
import socket
import tempfile
import threading
import time
import unittest.mock

import numpy as np
import platformdirs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from tiny_training import memory_of_at_most, names, on_linux

import tinyddpm.files.data
import tinyddpm.files.download
from tinyddpm import load_digits, load_fashion_mnist, load_mnist
from tinyddpm.files.data import MIRRORS, SHA256, read_idx
from tinyddpm.files.download import download, fetch, unpack
from tinyddpm.files.lock import LOCK

NAME = "noise.gz"
CONTENT = random.Random(0).randbytes(200_000)
FILE, ANOTHER = gzip.compress(CONTENT), gzip.compress(CONTENT[::-1])
SAME = {"sha256": hashlib.sha256(CONTENT).hexdigest(), "size": len(CONTENT)}
ALL, SOME, PART = len(FILE), len(FILE) // 4, f"{NAME}.0.part"


class Mirror(http.server.ThreadingHTTPServer):
    """A server of some files that answers each request by the next of `behaviours`, and by the last ever after."""

    daemon_threads = True

    def __init__(self, *behaviours, files):
        super().__init__(("127.0.0.1", 0), Answer)
        self.behaviours, self.files = list(behaviours), files
        self.asked = []  # the first byte each request asked for; None: all of them
        self.closing = threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}/"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.start = start and int(start[1])
        self.server.asked.append(self.start)
        behaviours = self.server.behaviours
        behave = behaviours.pop(0) if len(behaviours) > 1 else behaviours[0]
        with contextlib.suppress(ConnectionError):  # it may hang up
            behave(self, self.server.files[self.path[1:]])

    def head(self, code, **headers):
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()

    def log_message(self, *args):
        pass


def head(answer, file):
    """Begin an answer as a good server does; return what is to be sent."""
    start, size = answer.start, len(file)
    if start is None:
        answer.head(200, Content_Length=size)
    elif start >= size:
        answer.head(416, Content_Range=f"bytes */{size}")
    else:
        answer.head(206, Content_Length=size - start, Content_Range=f"bytes {start}-{size - 1}/{size}")
    return file[start or 0 :]


def sends(content=None, upto=None, hangs_up=True, start=lambda asked: asked, headers=None):
    """A behaviour: to send the file or this content, all of it or so many bytes, from `start(asked)` on, with the
    headers of a good server or these."""

    def behave(answer, file):
        whole, answer.start = file if content is None else content, start(answer.start)
        rest = head(answer, whole) if headers is None else answer.head(200, **headers) or whole
        answer.wfile.write(rest[:upto])
        hangs_up or answer.server.closing.wait()

    return behave


def refusing(code):
    return lambda answer, file: answer.send_error(code)


def no_range(answer, file):
    good(answer, file) if answer.start is None else answer.head(416)


good, truncated, stalled, lingering = sends(), sends(upto=SOME), sends(upto=SOME, hangs_up=False), sends(hangs_up=False)
silent = lambda answer, file: answer.server.closing.wait()
ignoring_range, other_range = sends(start=lambda asked: None), sends(start=lambda asked: asked and 0)
corrupted = sends(FILE[:SOME] + bytes([FILE[SOME] ^ 1]) + FILE[SOME + 1 :])
chunks_cut_short = sends(b"%x\r\n" % ALL + FILE[:SOME], headers={"Transfer_Encoding": "chunked"})
without_length, too_long = sends(headers={}), sends(hangs_up=False, headers={"Content_Length": 10**12})
endless = sends(bytes(20 * ALL), hangs_up=False, headers={})
page = sends(bytes(2 * ALL), headers={"Content_Type": "text/html; charset=utf-8", "Content_Length": 2 * ALL})


@pytest.fixture
def mirror(monkeypatch):
    """Start a server: `mirror(good)`. All are shut down at the end."""
    monkeypatch.setenv("no_proxy", "*")  # whatever proxy this machine is told to use
    started = []

    def start(*behaviours, files=None):
        server = Mirror(*behaviours, files={NAME: FILE} if files is None else files)
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.closing.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def unreachable(monkeypatch):
    """The address of no server at all."""
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))  # and does not listen
        yield f"http://127.0.0.1:{port.getsockname()[1]}/"


def get(cache, *mirrors):
    return fetch(NAME, [getattr(m, "address", m) for m in mirrors], cache, **SAME)


def assert_whole(cache, *mirrors):
    """It is fetched, kept as it came, and had from the cache from then on."""
    assert get(cache, *mirrors) == CONTENT
    assert names(cache) == {NAME} and (cache / NAME).read_bytes() == FILE
    assert get(cache) == CONTENT


class TestOneMirror:
    # what it does in turn; what is there before; from which byte on it is asked
    @pytest.mark.parametrize("behaviours, there, asked", [
        ([good], {}, [None]),
        ([truncated, good], {}, [None, SOME]),
        ([chunks_cut_short, good], {}, [None, SOME]),
        ([without_length], {}, [None]),
        ([lingering], {}, [None]),
        ([ignoring_range], {PART: FILE[:SOME]}, [SOME]),
        ([other_range], {PART: FILE[:SOME]}, [SOME, None]),
        ([no_range], {PART: FILE[:SOME]}, [SOME, None]),
        ([good], {PART: ANOTHER[:SOME]}, [SOME, None]),  # a part of another file, or a longer one
        ([good], {PART: FILE + b"more"}, [ALL + 4, None]),
        ([good], {NAME: FILE[:SOME]}, [None]),  # damaged
        ([good], {NAME: FILE[:-9] + b"!" + FILE[-8:]}, [None]),
        ([good], {NAME: b""}, [None]),
        ([good], {NAME: gzip.compress(b"no")}, [None]),
    ])  # fmt: skip
    def test_it_is_fetched_and_what_has_come_is_not_asked_for_again(self, behaviours, there, asked, mirror, tmp_path):
        cache, began = tmp_path if there else tmp_path / "not" / "yet" / "there", time.monotonic()
        for name, content in there.items():
            (cache / name).write_bytes(content)
        assert_whole(cache, server := mirror(*behaviours))
        assert server.asked == asked and time.monotonic() - began < tinyddpm.files.download.TIMEOUT / 2

    @pytest.mark.parametrize("behaviours, before, asked, message, after", [
        ([truncated], b"", [None, SOME], f": ended after {2 * SOME} of {ALL} bytes", FILE[: 2 * SOME]),
        ([refusing(503)], FILE[:SOME], [SOME], "HTTP Error 503", FILE[:SOME]),
        ([truncated, page], b"", [None, SOME], f"{NAME}: the answer is a web page and not the file", FILE[:SOME]),
        *(([refusing(code)], b"", [None], f"HTTP Error {code}", b"") for code in (403, 404, 416, 500)),
    ])  # fmt: skip
    def test_what_came_stays_for_the_next_call(self, behaviours, before, asked, message, after, mirror, tmp_path):
        server = mirror(*behaviours)
        if before:
            (tmp_path / PART).write_bytes(before)
        with pytest.raises(ConnectionError, match=message):
            get(tmp_path, server)
        assert server.asked == asked and names(tmp_path) == ({PART} if after else set())
        assert not after or (tmp_path / PART).read_bytes() == after
        assert_whole(tmp_path, server := mirror(good))
        assert server.asked == [len(after) or None]

    def test_slow_but_steady_wins(self, mirror, tmp_path, monkeypatch):
        def slow(answer, file):
            rest = head(answer, file)
            for i in range(0, ALL, ALL // 8):
                time.sleep(0.05)
                answer.wfile.write(rest[i : i + ALL // 8])

        monkeypatch.setattr(tinyddpm.files.download, "TIMEOUT", 0.3)
        assert_whole(tmp_path, server := mirror(slow))
        assert server.asked == [None]

    def test_other_bytes_than_were_asked_for_are_not_added(self, mirror, tmp_path):
        part, server = tmp_path / "part", mirror(sends(start=lambda asked: 0))
        part.write_bytes(FILE[:SOME])
        with pytest.raises(ValueError, match=f"asked for bytes from {SOME}, got bytes 0-{ALL - 1}/{ALL}"):
            download(server.address + NAME, part, 10**6, NAME)
        assert part.read_bytes() == FILE[:SOME]

    def test_a_bomb_is_not_unpacked(self, mirror, tmp_path):
        server = mirror(sends(bomb := gzip.compress(bytes(10_000_000))))
        assert len(bomb) < ALL
        message = "expected a content of 200000 bytes, got more than 200000"
        with memory_of_at_most(5e6), pytest.raises(ConnectionError, match=message):
            get(tmp_path, server)

    def test_the_bar_shows_bytes(self, mirror, tmp_path, capfd):
        get(tmp_path, mirror(truncated, good))
        _, first, again, second = capfd.readouterr().err.splitlines()  # for each answer, when it begins and ends
        assert f"{NAME}:  25%" in first and "50.0k/200k" in first and f"{NAME}:  25%" in again
        assert f"{NAME}: 100%" in second and "200k/200k" in second and "B/s" in first and "B/s" in second


class TestTheNextMirror:
    @pytest.mark.parametrize("behave, keeps", [
        *((behave, True) for behave in (stalled, truncated, chunks_cut_short)),
        *((behave, False) for behave in (silent, corrupted, endless, too_long, *map(refusing, (403, 404, 500)))),
        *((sends(content), False) for content in (b"", b"<html>Please log in to use this", ANOTHER, FILE + b"!")),
        *((sends(gzip.compress(content)), False) for content in (CONTENT[:-1], CONTENT + b"!")),
    ])  # fmt: skip
    def test_it_is_asked_and_nothing_wrong_is_kept(self, behave, keeps, mirror, tmp_path, monkeypatch):
        if behave in (stalled, silent):
            monkeypatch.setattr(tinyddpm.files.download, "TIMEOUT", 0.2)

        def look(answer, file):  # how things are when it is asked
            seen.extend(name for name in names(tmp_path) if name != LOCK)
            good(answer, file)

        seen, bad, other = [], mirror(behave), mirror(look)
        assert_whole(tmp_path, bad, other)
        assert bad.asked == other.asked == [None] and seen == [PART] * keeps

    def test_each_has_a_part_of_its_own(self, unreachable, mirror, tmp_path):
        """For they may have compressed the content in different ways."""
        another = gzip.compress(CONTENT, 1, mtime=1)
        assert another[:SOME] != FILE[:SOME]
        first, second = mirror(truncated, good), mirror(truncated, files={NAME: another})
        assert_whole(tmp_path, unreachable, first, second)
        assert first.asked == [None, SOME] and second.asked == [None]

    def test_the_error_names_every_mirror_and_its_reason_in_one_line(self, unreachable, mirror, tmp_path, monkeypatch):
        monkeypatch.setattr(tinyddpm.files.download, "TIMEOUT", 0.2)
        (tmp_path / NAME).write_bytes(b"no")
        bad = [mirror(refusing(404)), mirror(truncated, silent), mirror(corrupted)]
        with pytest.raises(ConnectionError) as error:
            get(tmp_path, unreachable, *bad)
        reasons = ["not a whole gzip file.*", ".*refused.*", "HTTP Error 404: Not Found", ".*timed out.*"]
        reasons += [".*(not a whole gzip file|SHA-256|bytes).*"]
        addresses = [f"{tmp_path}/", unreachable, *(server.address for server in bad)]
        lines = [f"  {address}{NAME}: {reason}" for address, reason in zip(addresses, reasons, strict=True)]
        lines = [f"{NAME}: no mirror gave it:", *lines, f"If you have the file, put it into {tmp_path}"]
        assert re.fullmatch("\n".join(lines), str(error.value))


class TestTheCache:
    @pytest.mark.skipif(not hasattr(os, "geteuid"), reason="read-only is something else here")
    def test_a_read_only_folder_or_one_that_cannot_be_made_in_it(self, mirror):
        with tempfile.TemporaryDirectory() as cache:
            cache, server = pathlib.Path(cache), mirror(good)
            (cache / "another.gz").write_bytes(gzip.compress(CONTENT, 1))  # as somebody else has packed it
            cache.chmod(0o555)
            if root := os.geteuid() == 0:
                os.seteuid(65534)  # since root may write anywhere
            try:
                for folder in (cache, cache / "new"):
                    message = f"cache: cannot write to the folder {folder}: Permission denied; give another"
                    with pytest.raises(OSError, match=message):
                        get(folder, server)
                assert server.asked == []
                assert fetch("another.gz", [], cache, **SAME) == CONTENT  # reading needs no more
            finally:
                if root:
                    os.seteuid(0)
                cache.chmod(0o700)

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
    def test_a_full_disk_is_no_fault_of_the_mirrors(self, code, mirror, tmp_path, monkeypatch):
        server, own, full = mirror(good), pathlib.Path.open, unittest.mock.MagicMock()
        full.__enter__.return_value.write.side_effect = OSError(code, os.strerror(code))
        opened = lambda path, *how, **more: full if path.suffix == ".part" else own(path, *how, **more)
        monkeypatch.setattr(pathlib.Path, "open", opened)
        with pytest.raises(OSError, match=f"cache: cannot write to the folder {tmp_path}: {os.strerror(code)}") as said:
            get(tmp_path, server)
        assert not isinstance(said.value, ConnectionError) and server.asked == [None]

    def test_it_is_on_the_disk_before_it_has_its_name(self, mirror, tmp_path, monkeypatch):
        server, calls, fsync = mirror(good), [], os.fsync

        def interrupt(*paths):
            calls.append("replace")
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "fsync", lambda file: calls.append("fsync") or fsync(file))
            patch.setattr(os, "replace", interrupt)
            get(tmp_path, server)
        assert calls == ["fsync", "replace"] and names(tmp_path) == {PART}
        assert_whole(tmp_path, server)
        assert server.asked == [None, ALL]


def copy_of_this_process(function):
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    return process


@on_linux
def test_of_processes_that_want_it_at_a_time_one_fetches_it_for_all(mirror, tmp_path):
    server = mirror(lambda answer, file: time.sleep(0.1) or good(answer, file))
    processes = [copy_of_this_process(lambda: os._exit(get(tmp_path, server) != CONTENT)) for _ in range(3)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(server.asked) == 1 and names(tmp_path) == {NAME}


@on_linux
def test_from_one_that_is_killed_in_the_middle_the_next_one_goes_on(mirror, tmp_path):
    server, part, until = mirror(stalled, good), tmp_path / PART, time.monotonic() + 60
    process = copy_of_this_process(lambda: get(tmp_path, server))
    while not (part.exists() and part.stat().st_size > SOME // 2):
        assert time.monotonic() < until and process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    have = part.stat().st_size
    assert names(tmp_path) == {PART, LOCK} and have <= SOME
    assert_whole(tmp_path, server)
    assert server.asked == [None, have]


def test_unpack_says_what_is_wrong(tmp_path):
    for content, message in [
        *((FILE[:n], "not a whole gzip file: Compressed file ended before") for n in (-1, 5)),
        (FILE[1:], "not a whole gzip file: Not a gzipped file"),
        (b"Entry not found", "not a whole gzip file: it is text, which begins with 'Entry not found'"),
        (gzip.compress(CONTENT[1:]), "expected a content of 200000 bytes, got 199999"),
        (ANOTHER, f"expected a content with SHA-256 {SAME['sha256']}, got [0-9a-f]{{64}}"),
    ]:
        (tmp_path / "file.gz").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            unpack(tmp_path / "file.gz", **SAME)


def idx(x):
    return bytes([0, 0, 8, x.ndim]) + np.array(x.shape, ">u4").tobytes() + x.tobytes()


@given(x=arrays(np.uint8, array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4)), data=st.data())
def test_idx_there_and_back_but_not_of_another_length(x, data):
    y, whole = read_idx(idx(x), x.shape), idx(x)
    assert y.dtype == np.uint8
    np.testing.assert_array_equal(y, x)
    for content in (whole[: data.draw(st.integers(0, len(whole) - 1))], whole + b"!"):
        with pytest.raises(ValueError, match="content: expected "):
            read_idx(content, x.shape)


def test_an_idx_file_of_another_kind_or_shape_is_refused():
    x = np.arange(6, dtype=np.uint8).reshape(3, 2)
    for content, message in [
        (b"", "expected an IDX file, which begins with 00 00 08 02, got $"),
        (b"\0\0\x0d\2" + idx(x)[4:], "expected an IDX file, which begins with 00 00 08 02, got 00 00 0d 02"),  # floats
        (idx(x.ravel()), "expected an IDX file, which begins with 00 00 08 02, got 00 00 08 01"),
        (idx(x)[:11], "expected an IDX header of 12 bytes, got 11"),
        (idx(x.T), r"expected an array of shape \(3, 2\), got \(2, 3\)"),
        (idx(x) + b"!", r"expected 18 bytes for \(3, 2\), got 19"),
    ]:
        with pytest.raises(ValueError, match=f"content: {message}"):
            read_idx(content, (3, 2))


LOADERS = {"mnist": lambda **args: load_mnist(full=True, **args), "fashion-mnist": load_fashion_mnist}


@pytest.fixture(params=LOADERS)
def small(request, monkeypatch):
    """The name of a data set that is now one of five and three images, without mirrors, and {file: what is in it}."""
    rng, name, files = np.random.default_rng(0), request.param, {}
    for kind, n in (("train", 5), ("t10k", 3)):
        for what, shape in (("images-idx3", (n, 28, 28)), ("labels-idx1", (n,))):
            files[f"{kind}-{what}-ubyte"] = idx(rng.integers(0, 10, shape, np.uint8))
    monkeypatch.setattr(tinyddpm.files.data, "COUNTS", {"train": 5, "t10k": 3})
    monkeypatch.setitem(MIRRORS, name, ())
    monkeypatch.setitem(SHA256, name, {key: hashlib.sha256(content).hexdigest() for key, content in files.items()})
    return name, files


@pytest.mark.parametrize("kind, n", [("train", 5), ("t10k", 3)])
def test_the_data_sets_come_from_their_mirrors(kind, n, small, mirror, tmp_path, monkeypatch):
    name, files = small
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda app: str(tmp_path / app))
    server = mirror(good, files={f"{key}.gz": gzip.compress(content) for key, content in files.items()})
    monkeypatch.setitem(MIRRORS, name, (server.address,))
    pixels = np.frombuffer(files[f"{kind}-images-idx3-ubyte"], np.uint8, offset=16)
    for _ in range(2):  # from the network, then from the cache
        images, labels = LOADERS[name](train=kind == "train")
        assert images.shape == (n, 28, 28, 1) and images.dtype == np.float32
        np.testing.assert_array_equal(images.ravel(), pixels / np.float32(127.5) - 1)
        assert labels.tolist() == list(files[f"{kind}-labels-idx1-ubyte"][8:]) and labels.dtype == int
    assert server.asked == [None, None] and names(tmp_path / "tinyddpm") == {name}
    assert names(tmp_path / "tinyddpm" / name) == {f"{kind}-images-idx3-ubyte.gz", f"{kind}-labels-idx1-ubyte.gz"}


def test_without_a_network_it_says_what_to_do(small, unreachable, tmp_path, monkeypatch):
    name, files = small
    monkeypatch.setitem(MIRRORS, name, (unreachable + "a/", unreachable + "b/"))
    with pytest.raises(OSError) as error:
        LOADERS[name](cache=str(tmp_path))
    for part in (
        "train-images-idx3-ubyte.gz: no mirror gave it:\n",
        *(f"\n  {unreachable}{m}/train-images-idx3-ubyte.gz: <urlopen error [Errno " for m in "ab"),
        f"\nIf you have the file, put it into {tmp_path / name}.",
        "the bundled 10,000 digits, load_digits() or the example without --data, ",
        "images of your own, --data FOLDER",
    ):
        assert part in str(error.value)
    for key, content in files.items():  # which is then done
        (tmp_path / name / f"{key}.gz").write_bytes(gzip.compress(content))
    assert len(LOADERS[name](cache=tmp_path)[0]) == 5


def test_every_mirror_speaks_https_and_every_file_has_its_hash():
    assert set(MIRRORS) == set(SHA256) == set(LOADERS)
    for mirrors in MIRRORS.values():
        assert len(mirrors) == 2 and all(re.fullmatch("https://[^ ]+/", mirror) for mirror in mirrors)
    hashes = [sha256 for files in SHA256.values() for sha256 in files.values()]
    assert len(set(hashes)) == 8 and all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in hashes)


def test_mnist_is_the_bundled_digits_unless_all_of_it_is_asked_for(monkeypatch):
    assert load_digits(train=False)[1].dtype == int  # as labels are everywhere
    monkeypatch.setattr(tinyddpm.files.data, "load_digits", lambda train: ("the bundled", train))
    assert load_mnist() == ("the bundled", True) and load_mnist(train=False) == ("the bundled", False)
