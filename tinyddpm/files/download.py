"""A file from the network, whole or not at all: from one mirror or the next, resumed, checked, and kept.

What is kept is the .gz as it came; what is checked, at every load, is the SHA-256 of its content, since mirrors may
have compressed the same content each in its own way. How a download is resumed is in RFC 9110, section 14 (Range).
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import http.client
import os
import pathlib
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Sequence

from ..bar import progress_bar
from .lock import alone_in
from .mistaken import what_it_is

TIMEOUT = 20  # seconds without a byte after which a server counts as gone
WAIT = 600  # seconds, for another process that fetches something
_CHUNK = 1 << 16  # bytes
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # no mirror is to blame


def fetch(name: str, mirrors: Sequence[str], cache: pathlib.Path, sha256: str, size: int) -> bytes:
    """Return the content of the gzip file `name`, from the folder `cache`, or else from a mirror, to be kept there.

    Args:
        mirrors: the addresses to which `name` is appended, asked in turn, and once more if they gave but a part
        cache: is made if there is none; holds `name` once it is whole, until then `name.0.part` of mirror 0 and so on,
            from which the next call goes on. One process at a time: others wait, and then find it there
        sha256, size: of the content, unpacked
    Raises:
        ConnectionError: if no mirror gave the file; it tells why, for each
        OSError: if `cache` cannot be read or written to
    """
    if (path := cache / name).exists():
        with contextlib.suppress(ValueError):  # it stays until it is replaced
            return unpack(path, sha256, size)
    try:  # better to know before the download than after
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        raise OSError(f"cache: cannot write to the folder {cache}: {error.strerror}; give another") from error
    with alone_in(cache, WAIT):
        return _from_mirrors(path, mirrors, sha256, size)


def _from_mirrors(path: pathlib.Path, mirrors: Sequence[str], sha256: str, size: int) -> bytes:
    """`fetch`, where nobody else is at it."""
    (cache, name), failures = (path.parent, path.name), {}
    if path.exists():
        try:
            return unpack(path, sha256, size)  # of another process, while this one waited
        except ValueError as error:
            failures[path] = error
    limit = size + size // 1000 + 1000  # what gzip makes of bytes that cannot be compressed, and a header
    sources = [(mirror + name, cache / f"{name}.{i}.part") for i, mirror in enumerate(mirrors)]
    for url, part in 2 * sources:
        if isinstance(failures.get(url), urllib.error.URLError):
            continue  # it could not be reached or refused, and would again
        try:
            download(url, part, limit, name)
            content = unpack(part, sha256, size)
        except ValueError as error:  # wrong bytes: nothing to go on from
            part.unlink(missing_ok=True)
            failures[url] = error
        except (OSError, http.client.HTTPException) as error:  # too few: what came stays
            if getattr(error, "errno", None) in _FULL:
                raise OSError(error.errno, f"cache: cannot write to the folder {cache}: {error.strerror}") from error
            failures[url] = error
        else:
            with part.open("r+b") as file:
                os.fsync(file.fileno())  # on the disk before it has its name, so that a crash leaves no half file
            os.replace(part, path)
            for _, other in sources:
                other.unlink(missing_ok=True)
            return content
    reasons = "".join(f"\n  {url}: {error}" for url, error in failures.items())
    raise ConnectionError(f"{name}: no mirror gave it:{reasons}\nIf you have the file, put it into {cache}")


def download(url: str, part: pathlib.Path, limit: int, name: str) -> None:
    """Add to the file `part` what it lacks of the one at `url`, with a bar called `name`; what came stays in any case.

    Raises:
        ValueError: if there are more than `limit` bytes, or others than were asked for
        OSError, http.client.HTTPException: if the server cannot be reached, refuses, stalls, or ends too early
    """
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # range not satisfiable: nothing comes after what we have
            return
        raise
    with answer:
        if answer.status != 206:  # all of it, asked for or not
            have = 0
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise ValueError(f"asked for bytes from {have}, got {answer.headers.get('Content-Range')}")
        if answer.headers.get_content_type() == "text/html":  # of a network that wants a login first
            raise ConnectionError("the answer is a web page and not the file")
        length = answer.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        bar = progress_bar(desc=name, initial=have, total=total, unit="B", unit_scale=True)
        with bar, part.open("r+b" if have else "wb") as file:
            file.seek(have)
            while total is None or have < total:
                if have > limit or (total or 0) > limit:
                    raise ValueError(f"got {max(have, total or 0)} bytes or more, the file has {limit} at most")
                chunk = answer.read1(_CHUNK)  # whatever is there, where `read` would wait for all of it
                if not chunk:
                    break
                have += file.write(chunk)
                bar.update(len(chunk))
    if total is not None and have < total:
        raise ConnectionError(f"ended after {have} of {total} bytes")


def unpack(path: pathlib.Path, sha256: str, size: int) -> bytes:
    """Return the content of a gzip file.

    Raises ValueError if it is damaged, or its content has another size or SHA-256.
    """
    try:
        with gzip.open(path) as file:
            content = file.read(size + 1)  # and no more: a gzip of some kilobytes can unpack to gigabytes
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        with path.open("rb") as file:
            start = file.read(1000)
        known = start[:2] != b"\x1f\x8b" and what_it_is(start)
        raise ValueError(f"not a whole gzip file: {known or error}") from error
    if len(content) != size:
        got = f"{len(content)}" if len(content) < size else f"more than {size}"
        raise ValueError(f"expected a content of {size} bytes, got {got}")
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"expected a content with SHA-256 {sha256}, got {found}")
    return content
