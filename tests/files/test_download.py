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
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc

import numpy as np
import platformdirs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from tiny_training import on_linux

import tinyddpm.files.data
import tinyddpm.files.download
from tinyddpm import load_digits, load_fashion_mnist, load_mnist
from tinyddpm.files.data import MIRRORS, SHA256, read_idx
from tinyddpm.files.download import download, fetch, unpack
from tinyddpm.files.lock import LOCK
from tinyddpm.files.pictures import to_uint8

MNIST = pathlib.Path(__file__).parents[3] / "shared" / "data" / "mnist"
NAME = "noise.gz"
CONTENT = random.Random(0).randbytes(200_000)
FILE = gzip.compress(CONTENT)
SAME = {"sha256": hashlib.sha256(CONTENT).hexdigest(), "size": len(CONTENT)}
SOME = len(FILE) // 4


class Mirror(http.server.ThreadingHTTPServer):
    """A server of some files that answers each request by the next of `behaviours`, and by the last ever after."""

    daemon_threads = True

    def __init__(self, *behaviours, files):
        super().__init__(("127.0.0.1", 0), Answer)
        self.behaviours, self.files = list(behaviours), files
        self.asked = []  # the first byte each request asked for; None: all of them
        self.sent = []  # how many bytes were sent in answer
        self.closing = threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}/"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.start = start and int(start[1])
        self.server.asked.append(self.start)
        self.server.sent.append(0)
        behaviours = self.server.behaviours
        behave = behaviours.pop(0) if len(behaviours) > 1 else behaviours[0]
        with contextlib.suppress(ConnectionError):  # it may hang up
            behave(self, self.server.files[self.path[1:]])

    def head(self, code, **headers):
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()

    def send(self, data):
        self.wfile.write(data)
        self.server.sent[-1] += len(data)

    def log_message(self, *args):
        pass


def head(answer, file):
    """Begin an answer as a good server does; return what is to be sent."""
    start = answer.start
    if start is None:
        answer.head(200, Content_Length=len(file))
    elif start >= len(file):
        answer.head(416, Content_Range=f"bytes */{len(file)}")
    else:
        answer.head(206, Content_Length=len(file) - start, Content_Range=f"bytes {start}-{len(file) - 1}/{len(file)}")
    return file[start or 0 :]


def good(answer, file):
    answer.send(head(answer, file))


def truncated(answer, file):
    answer.send(head(answer, file)[:SOME])


def stalled(answer, file):
    truncated(answer, file)
    answer.server.closing.wait()


def lingering(answer, file):
    good(answer, file)
    answer.server.closing.wait()


def silent(answer, file):
    answer.server.closing.wait()


def slow(answer, file):
    rest = head(answer, file)
    for i in range(0, len(rest), len(rest) // 8):
        time.sleep(0.1)
        answer.send(rest[i : i + len(rest) // 8])


def corrupted(answer, file):
    good(answer, file[:SOME] + bytes([file[SOME] ^ 1]) + file[SOME + 1 :])


def ignoring_range(answer, file):
    answer.start = None
    good(answer, file)


def other_range(answer, file):
    if answer.start is not None:
        answer.start = 0
    good(answer, file)


def no_range(answer, file):
    if answer.start is None:
        good(answer, file)
    else:
        answer.head(416)


def without_length(answer, file):
    answer.head(200)
    answer.send(file)


def endless(answer, file):
    answer.head(200)
    while not answer.server.closing.is_set():
        answer.send(bytes(1 << 16))


def too_long(answer, file):
    answer.head(200, Content_Length=10**12)
    answer.send(file)
    answer.server.closing.wait()


def chunks_cut_short(answer, file):
    answer.protocol_version = "HTTP/1.1"
    answer.head(200, Transfer_Encoding="chunked")
    answer.wfile.write(b"%x\r\n" % len(file))
    answer.send(file[:SOME])


def refusing(code):
    return lambda answer, file: answer.send_error(code)


def serving(content):
    """What a server does that has this instead."""
    return lambda answer, file: good(answer, content)


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


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@on_linux
def test_of_processes_that_want_it_at_a_time_one_fetches_it_for_all(mirror, tmp_path):
    server = mirror(lambda answer, file: (time.sleep(0.3), good(answer, file)))
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=lambda: os._exit(get(tmp_path, server) != CONTENT)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(server.asked) == 1 and names(tmp_path) == [NAME]


def assert_whole(cache, *mirrors):
    """It is fetched, kept as it came, and had from the cache from then on."""
    assert get(cache, *mirrors) == CONTENT
    assert names(cache) == [NAME] and (cache / NAME).read_bytes() == FILE
    assert get(cache) == CONTENT


class TestOneMirror:
    def test_a_file_is_fetched_once_and_kept(self, mirror, tmp_path):
        server = mirror(good)
        assert_whole(tmp_path / "not" / "yet" / "there", server)
        assert server.asked == [None]

    def test_a_truncated_answer_is_resumed_and_nothing_sent_twice(self, mirror, tmp_path):
        server = mirror(truncated, good)
        assert_whole(tmp_path, server)
        assert server.asked == [None, SOME] and server.sent == [SOME, len(FILE) - SOME]

    def test_what_came_stays_for_the_next_call(self, mirror, tmp_path):
        with pytest.raises(ConnectionError, match=f": ended after {2 * SOME} of {len(FILE)} bytes"):
            get(tmp_path, mirror(truncated))
        assert names(tmp_path) == [f"{NAME}.0.part"]
        assert (tmp_path / f"{NAME}.0.part").read_bytes() == FILE[: 2 * SOME]
        assert_whole(tmp_path, server := mirror(good))
        assert server.asked == [2 * SOME]

    def test_slow_but_steady_wins(self, mirror, tmp_path, monkeypatch):
        monkeypatch.setattr(tinyddpm.files.download, "TIMEOUT", 0.5)
        assert_whole(tmp_path, server := mirror(slow))
        assert server.asked == [None]  # in 0.8 s

    def test_chunks_cut_short_are_resumed(self, mirror, tmp_path):
        assert_whole(tmp_path, server := mirror(chunks_cut_short, good))
        assert server.asked == [None, SOME]

    def test_an_answer_that_does_not_tell_its_length(self, mirror, tmp_path):
        assert_whole(tmp_path, mirror(without_length))

    @pytest.mark.parametrize("behave", [ignoring_range, other_range, no_range])
    def test_a_server_that_cannot_resume_sends_it_all(self, behave, mirror, tmp_path):
        (tmp_path / f"{NAME}.0.part").write_bytes(FILE[:SOME])
        assert_whole(tmp_path, server := mirror(behave))
        assert server.asked == [SOME] if behave is ignoring_range else [SOME, None]

    def test_other_bytes_than_were_asked_for_are_not_added(self, mirror, tmp_path):
        part = tmp_path / "part"
        part.write_bytes(FILE[:SOME])
        with pytest.raises(ValueError, match=f"asked for bytes from {SOME}, got bytes 0-{len(FILE) - 1}/{len(FILE)}"):
            download(mirror(other_range).address + NAME, part, 10**6, NAME)
        assert part.read_bytes() == FILE[:SOME]

    def test_a_part_outlives_a_refusal(self, mirror, tmp_path):
        (tmp_path / f"{NAME}.0.part").write_bytes(FILE[:SOME])
        with pytest.raises(ConnectionError, match="HTTP Error 503"):
            get(tmp_path, mirror(refusing(503)))
        assert_whole(tmp_path, server := mirror(good))
        assert server.asked == [SOME]

    def test_a_server_that_does_not_hang_up(self, mirror, tmp_path):
        began = time.monotonic()
        assert_whole(tmp_path, mirror(lingering))
        assert time.monotonic() - began < tinyddpm.files.download.TIMEOUT / 2

    def test_another_file_meanwhile(self, mirror, tmp_path):
        (tmp_path / f"{NAME}.0.part").write_bytes(gzip.compress(CONTENT[::-1])[:SOME])
        assert_whole(tmp_path, server := mirror(good))
        assert server.asked == [SOME, None]

    def test_a_shorter_file_meanwhile(self, mirror, tmp_path):
        (tmp_path / f"{NAME}.0.part").write_bytes(FILE + b"more")
        assert_whole(tmp_path, server := mirror(good))
        assert server.asked == [len(FILE) + 4, None]

    def test_a_mirror_that_refuses_is_not_asked_again(self, mirror, tmp_path):
        for code in (403, 404, 416, 500):
            server = mirror(refusing(code))
            with pytest.raises(ConnectionError, match=f"HTTP Error {code}"):
                get(tmp_path, server)
            assert server.asked == [None] and names(tmp_path) == []


class TestTheNextMirror:
    @pytest.mark.parametrize(
        "behave, kept",
        [
            (refusing(403), False),
            (refusing(404), False),
            (refusing(500), False),
            (stalled, True),
            (silent, False),
            (truncated, True),
            (chunks_cut_short, True),
            (corrupted, False),
            (endless, False),
            (too_long, False),
            (serving(b""), False),
            (serving(b"<html>Please log in to use this network"), False),
            (serving(gzip.compress(CONTENT[:-1])), False),
            (serving(gzip.compress(CONTENT + b"!")), False),
            (serving(gzip.compress(CONTENT[::-1])), False),
            (serving(FILE + b"!"), False),
        ],
    )
    def test_it_is_asked_and_nothing_wrong_is_kept(self, behave, kept, mirror, tmp_path, monkeypatch):
        if behave in (stalled, silent):
            monkeypatch.setattr(tinyddpm.files.download, "TIMEOUT", 0.2)

        def look(answer, file):  # how things are when it is asked
            seen.extend(name for name in names(tmp_path) if name != LOCK)
            good(answer, file)

        seen = []
        bad, other = mirror(behave), mirror(look)
        assert_whole(tmp_path, bad, other)
        assert bad.asked == other.asked == [None]
        assert seen == [f"{NAME}.0.part"] * kept

    def test_none_is_there(self, unreachable, mirror, tmp_path):
        assert_whole(tmp_path, unreachable, mirror(good))

    def test_each_has_a_part_of_its_own(self, mirror, tmp_path):
        """For they may have compressed the content in different ways."""
        another = gzip.compress(CONTENT, 1, mtime=1)
        assert another[:SOME] != FILE[:SOME]
        first, second = mirror(truncated, good), mirror(truncated, files={NAME: another})
        assert_whole(tmp_path, first, second)
        assert first.asked == [None, SOME] and second.asked == [None]

    def test_the_error_names_every_mirror_and_its_reason_in_one_line(self, unreachable, mirror, tmp_path, monkeypatch):
        monkeypatch.setattr(tinyddpm.files.download, "TIMEOUT", 0.2)
        bad = [mirror(refusing(404)), mirror(stalled), mirror(corrupted)]
        with pytest.raises(ConnectionError) as error:
            get(tmp_path, unreachable, *bad)
        first, *lines, last = str(error.value).splitlines()
        assert first == f"{NAME}: no mirror gave it:" and last == f"If you have the file, put it into {tmp_path}"
        reasons = ["refused", "HTTP Error 404: Not Found", "timed out", "not a whole gzip file|SHA-256|bytes"]
        assert len(lines) == len(reasons)
        for line, address, reason in zip(lines, [unreachable, *(m.address for m in bad)], reasons):
            assert re.fullmatch(rf"  {re.escape(address + NAME)}: .*({reason}).*", line)


def test_a_page_to_log_in_to_a_network(mirror, tmp_path):
    """However long it is; and what came before it stays."""

    def page(answer, file):
        answer.head(200, Content_Type="text/html; charset=utf-8", Content_Length=2 * len(FILE))
        answer.send(b"<html>" + bytes(2 * len(FILE) - 6))

    with pytest.raises(ConnectionError, match=f"{NAME}: the answer is a web page and not the file"):
        get(tmp_path, mirror(truncated, page))
    server = mirror(good)
    assert_whole(tmp_path, server)
    assert server.asked == [SOME]


def test_a_bomb_is_not_unpacked(mirror, tmp_path):
    bomb = gzip.compress(bytes(50_000_000))
    assert len(bomb) < len(FILE)
    server = mirror(serving(bomb))
    tracemalloc.start()
    with pytest.raises(ConnectionError, match="expected a content of 200000 bytes, got more than 200000"):
        get(tmp_path, server)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


class TestTheCache:
    @pytest.mark.parametrize(
        "damage", [lambda f: f[:SOME], lambda f: f[:-9] + b"!" + f[-8:], lambda f: b"", lambda f: gzip.compress(b"no")]
    )
    def test_a_damaged_file_is_fetched_anew(self, damage, mirror, tmp_path):
        (tmp_path / NAME).write_bytes(damage(FILE))
        assert_whole(tmp_path, server := mirror(good))
        assert server.asked == [None]

    def test_a_file_put_there_by_hand_will_do(self, tmp_path):
        (tmp_path / NAME).write_bytes(gzip.compress(CONTENT, 1))
        assert get(tmp_path) == CONTENT

    def test_a_folder_that_cannot_be_made(self, mirror, tmp_path):
        (tmp_path / "file").write_text("in the way")
        server = mirror(good)
        for cache in (tmp_path / "file", tmp_path / "file" / "folder"):
            with pytest.raises(
                OSError, match=f"cache: cannot write to the folder {re.escape(str(cache))}: .+; give another"
            ):
                get(cache, server)
        assert server.asked == []

    @pytest.mark.skipif(not hasattr(os, "geteuid"), reason="read-only is something else here")
    def test_a_read_only_folder(self, mirror):
        with tempfile.TemporaryDirectory() as cache:
            cache, server = pathlib.Path(cache), mirror(good)
            (cache / "another.gz").write_bytes(FILE)
            cache.chmod(0o555)
            if root := os.geteuid() == 0:
                os.seteuid(65534)  # since root may write anywhere
            try:
                with pytest.raises(
                    OSError, match="cache: cannot write to the folder .*: Permission denied; give another"
                ):
                    get(cache, server)
                assert server.asked == []
                assert fetch("another.gz", [], cache, **SAME) == CONTENT  # reading needs no more
            finally:
                if root:
                    os.seteuid(0)
                cache.chmod(0o700)

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
    def test_a_full_disk_is_no_fault_of_the_mirrors(self, code, mirror, tmp_path, monkeypatch):
        server, open_file = mirror(good), pathlib.Path.open

        def full(path, mode="r"):
            file = open_file(path, mode)
            if path.suffix != ".part":
                return file
            file.close()
            return open("/dev/full", "wb", buffering=0) if code == errno.ENOSPC else Full()

        class Full:
            __enter__ = lambda self: self
            __exit__ = lambda self, *_: None
            seek = lambda self, _: None

            def write(self, _):
                raise OSError(code, os.strerror(code))

        monkeypatch.setattr(pathlib.Path, "open", full)
        with pytest.raises(
            OSError, match=f"cache: cannot write to the folder {tmp_path}: {os.strerror(code)}"
        ) as error:
            get(tmp_path, server)
        assert not isinstance(error.value, ConnectionError) and server.asked == [None]


class TestHalfAFileIsNeverThere:
    def test_while_it_comes(self, mirror, tmp_path):
        seen = []

        def watched(answer, file):
            rest = head(answer, file)
            for i in range(0, len(rest), 10_000):
                answer.send(rest[i : i + 10_000])
                time.sleep(0.002)
                seen.append((tmp_path / NAME).exists())

        assert_whole(tmp_path, mirror(watched))
        assert len(seen) > 10 and not any(seen[:-1])

    def test_it_is_on_the_disk_before_it_has_its_name(self, mirror, tmp_path, monkeypatch):
        calls, fsync, replace = [], os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
        monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
        assert_whole(tmp_path, mirror(good))
        assert calls == ["fsync", "replace"]

    def test_interrupted_just_before_the_end(self, mirror, tmp_path, monkeypatch):
        def interrupt(*paths):
            raise KeyboardInterrupt

        server = mirror(good)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", interrupt)
            get(tmp_path, server)
        assert names(tmp_path) == [f"{NAME}.0.part"]
        assert_whole(tmp_path, server)
        assert server.sent == [len(FILE), 0]

    def test_killed_in_the_middle(self, mirror, tmp_path):
        server = mirror(stalled, good)
        part = tmp_path / f"{NAME}.0.part"
        code = f"""
            import pathlib
            from tinyddpm.files.download import fetch
            fetch({NAME!r}, [{server.address!r}], pathlib.Path({str(tmp_path)!r}), "", {len(CONTENT)})
        """
        child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stderr=subprocess.DEVNULL)
        try:
            until = time.monotonic() + 60
            while not (part.exists() and part.stat().st_size > SOME // 2):
                assert time.monotonic() < until and child.poll() is None
                time.sleep(0.01)
        finally:
            child.kill()
            child.wait()
        have = part.stat().st_size
        assert names(tmp_path) == [part.name, LOCK] and have <= SOME
        assert_whole(tmp_path, server)
        assert server.asked == [None, have] and server.sent[1] == len(FILE) - have


def test_the_bar_shows_bytes(mirror, tmp_path, capfd):
    get(tmp_path, mirror(truncated, good))
    _, first, again, second = capfd.readouterr().err.splitlines()  # two answers, a line when each begins and ends
    assert f"{NAME}:  25%" in first and "50.0k/200k" in first and f"{NAME}:  25%" in again
    assert f"{NAME}: 100%" in second and "200k/200k" in second
    assert "B/s" in first and "B/s" in second


def test_unpack_says_what_is_wrong(tmp_path):
    path = tmp_path / "file.gz"
    for content, message in [
        (FILE[:-1], "not a whole gzip file"),
        (FILE[:5], "not a whole gzip file"),
        (FILE[1:], "not a whole gzip file"),
        (b"<!DOCTYPE html><html>", "not a whole gzip file: it is a web page and not the file: download it again"),
        (b"Entry not found", "not a whole gzip file: it is text, which begins with 'Entry not found'"),
        (b"version https://git-lfs.github.com/spec/v1", "not a whole gzip file: it is a pointer of git-lfs"),
        (gzip.compress(CONTENT[1:]), "expected a content of 200000 bytes, got 199999"),
        (gzip.compress(CONTENT[::-1]), f"expected a content with SHA-256 {SAME['sha256']}, got [0-9a-f]{{64}}"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            unpack(path, **SAME)


# ------------------------------------------------------------------------------------------------ the data sets


def idx(x):
    return bytes([0, 0, 8, x.ndim]) + np.array(x.shape, ">u4").tobytes() + x.tobytes()


bytes_arrays = arrays(np.uint8, array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4))


@given(x=bytes_arrays)
def test_idx_there_and_back(x):
    y = read_idx(idx(x), x.shape)
    assert y.dtype == np.uint8
    np.testing.assert_array_equal(y, x)


@given(x=bytes_arrays, data=st.data())
def test_an_idx_file_of_another_length_is_refused(x, data):
    whole = idx(x)
    cut = data.draw(st.integers(0, len(whole) - 1))
    for content in (whole[:cut], whole + b"!"):
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


@pytest.fixture
def small(monkeypatch):
    """Data sets of five and three images, without mirrors: {name: {file: what is in it}}."""
    rng = np.random.default_rng(0)
    contents = {
        name: {
            f"{kind}-{what}-ubyte": idx(rng.integers(0, 10, shape, np.uint8))
            for kind, n in (("train", 5), ("t10k", 3))
            for what, shape in (("images-idx3", (n, 28, 28)), ("labels-idx1", (n,)))
        }
        for name in LOADERS
    }
    monkeypatch.setattr(tinyddpm.files.data, "COUNTS", {"train": 5, "t10k": 3})
    for name, files in contents.items():
        monkeypatch.setitem(MIRRORS, name, ())
        monkeypatch.setitem(SHA256, name, {key: hashlib.sha256(content).hexdigest() for key, content in files.items()})
    return contents


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("kind, n", [("train", 5), ("t10k", 3)])
def test_the_data_sets_come_from_their_mirrors(name, kind, n, small, mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda app: str(tmp_path / app))
    server = mirror(good, files={f"{key}.gz": gzip.compress(content) for key, content in small[name].items()})
    monkeypatch.setitem(MIRRORS, name, (server.address,))
    pixels = np.frombuffer(small[name][f"{kind}-images-idx3-ubyte"], np.uint8, offset=16)
    for _ in range(2):  # from the network, then from the cache
        images, labels = LOADERS[name](train=kind == "train")
        assert images.shape == (n, 28, 28, 1) and images.dtype == np.float32
        np.testing.assert_array_equal(images.ravel(), pixels / np.float32(127.5) - 1)
        assert (
            labels.tolist() == list(small[name][f"{kind}-labels-idx1-ubyte"][8:])
            and labels.dtype == load_digits()[1].dtype
        )
    assert server.asked == [None, None]
    assert names(tmp_path / "tinyddpm") == [name]
    assert names(tmp_path / "tinyddpm" / name) == [f"{kind}-images-idx3-ubyte.gz", f"{kind}-labels-idx1-ubyte.gz"]


@pytest.mark.parametrize("name", LOADERS)
def test_without_a_network_it_says_what_to_do(name, small, unreachable, tmp_path, monkeypatch):
    monkeypatch.setitem(MIRRORS, name, (unreachable + "a/", unreachable + "b/"))
    with pytest.raises(OSError) as error:
        LOADERS[name](cache=str(tmp_path))
    for part in (
        "train-images-idx3-ubyte.gz: no mirror gave it:\n",
        f"\n  {unreachable}a/train-images-idx3-ubyte.gz: <urlopen error [Errno ",
        f"\n  {unreachable}b/train-images-idx3-ubyte.gz: <urlopen error [Errno ",
        f"\nIf you have the file, put it into {tmp_path / name}.",
        "the bundled 10,000 digits, load_digits() or the example without --data, ",
        "images of your own, --data FOLDER",
    ):
        assert part in str(error.value)
    for key, content in small[name].items():  # which is then done
        (tmp_path / name / f"{key}.gz").write_bytes(gzip.compress(content))
    assert len(LOADERS[name](cache=tmp_path)[0]) == 5


def test_every_mirror_speaks_https_and_every_file_has_its_hash():
    assert set(MIRRORS) == set(SHA256) == set(LOADERS)
    for mirrors in MIRRORS.values():
        assert len(mirrors) == 2 and all(re.fullmatch("https://[^ ]+/", mirror) for mirror in mirrors)
    hashes = [sha256 for files in SHA256.values() for sha256 in files.values()]
    assert len(set(hashes)) == 8 and all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in hashes)


@pytest.mark.parametrize("train", [True, False])
def test_mnist_is_the_bundled_digits_unless_all_of_it_is_asked_for(train):
    for got, expected in zip(load_mnist(train=train), load_digits(train)):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.skipif(not MNIST.exists(), reason="the full MNIST is not at hand")
@pytest.mark.parametrize("train, kind, n", [(True, "train", 60_000), (False, "t10k", 10_000)])
def test_the_real_mnist(train, kind, n, monkeypatch):
    monkeypatch.setitem(MIRRORS, "mnist", ())  # it is in the cache
    images, labels = load_mnist(full=True, train=train, cache=MNIST.parent)
    assert images.shape == (n, 28, 28, 1) and labels.shape == (n,)
    with gzip.open(MNIST / f"{kind}-images-idx3-ubyte.gz") as file:
        np.testing.assert_array_equal(to_uint8(images).ravel(), np.frombuffer(file.read(), np.uint8, offset=16))
    with gzip.open(MNIST / f"{kind}-labels-idx1-ubyte.gz") as file:
        np.testing.assert_array_equal(labels, np.frombuffer(file.read(), np.uint8, offset=8))
