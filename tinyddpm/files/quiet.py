"""No warnings for a while: which are shown is a matter of the whole process, so one thread at a time changes it."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator

_lock = threading.Lock()


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """None is shown within, in any thread; afterwards they are shown as before."""
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
