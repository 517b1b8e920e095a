"""How far a long work has come: a bar on a terminal; in a file, where a bar would be drawn over and over, lines."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

SECONDS = 10  # between two lines


def progress_bar(*arguments: Any, **settings: Any) -> tqdm:
    """tqdm's bar on stderr. If that is no terminal but a file or a pipe, a line at first, now and then, and at last."""
    from tqdm import tqdm  # not before: that takes 30 ms, and many programs draw no bar

    if sys.stderr is None:  # closed
        settings["disable"] = True
    elif sys.stderr.isatty() or "ipykernel" in sys.modules:  # a notebook draws bars too
        settings["dynamic_ncols"] = True
    else:
        settings |= {"file": _Lines(sys.stderr), "mininterval": SECONDS, "ascii": True}
    return tqdm(*arguments, **settings)


class _Lines:
    """A stream in which each state of a bar is a line; what would rub it out is left out."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self.stream.write(f"{text.strip()}\n")

    def flush(self) -> None:
        self.stream.flush()
