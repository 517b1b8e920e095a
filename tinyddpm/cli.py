"""The command line: what every example and command of `python -m tinyddpm` has in common, and is not about diffusion.

Options and what is wrong with them, errors in a line, words that no terminal can refuse, Ctrl-C. What a training has
besides is in program.py.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import math
import os
import pathlib
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO

GUIDANCE = 1.5  # unless another is asked for
SAMPLES = 10**4  # at most, in a picture
MOST = 10**9  # of whatever is counted, unless that has a limit of its own


class Options(argparse.ArgumentParser):
    """A parser that shows `text` as it stands, takes no shortened names, which may be of two options, and refuses
    numbers that are out of the range that an option has."""

    def __init__(self, text: str | None, **settings: Any):
        shown = argparse.RawDescriptionHelpFormatter
        super().__init__(description=text, formatter_class=shown, allow_abbrev=False, **settings)
        self.limits: dict[str, tuple[float, float, float]] = {}
        self.within = ""  # what is parsed, if it is not the command line

    def add(self, name: str, least: float = -MOST, most: float = MOST, above: float = -math.inf, **settings: Any):
        """`add_argument`; if it is a number, it must be from `least` to `most`, and greater than `above`."""
        self.limits[self.add_argument(name, **settings).dest] = least, most, above

    def error(self, message: str) -> NoReturn:
        super().error(self.within + message)

    def add_usual(self, out: str, seed: int = 0, gives: str = "other digits") -> None:
        """What every example has that draws a picture: --seed, another of which gives others, --workers and --out."""
        self.add("--seed", type=int, default=seed, least=0, help=f"another one gives {gives} [%(default)s]")
        self.add("--workers", type=int, least=1, most=1024, help="how many work side by side [one per CPU]")
        self.add("--out", type=picture_path, default=out, help="the picture [%(default)s]")

    def parse_args(self, *args: Any, **settings: Any) -> argparse.Namespace:  # type: ignore[override]
        parsed = super().parse_args(*args, **settings)
        for name, value in vars(parsed).items():
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, (int, float)) and (must := self._must(name, number)):
                    self.error(f"--{name.replace('_', '-')} must be {must}, got {number}")
        return parsed

    def _must(self, name: str, number: float) -> str:
        """What the number that an option has is not, and must be."""
        least, most, above = self.limits.get(name, (-MOST, MOST, -math.inf))
        if isinstance(number, float) and not math.isfinite(number) or number <= above:
            return "a number" if above == -math.inf else f"a number greater than {above}"
        return (
            f"{least} or greater" if number < least else f"{most} at most" if number > most and name != "seed" else ""
        )

    def given(self, argv: list[str] | None) -> dict[str, Any]:
        """What the command line itself says, without defaults."""
        none = argparse.Namespace(**dict.fromkeys(vars(self.parse_args(argv))))
        return {name: value for name, value in vars(self.parse_args(argv, none)).items() if value is not None}

    def check_digits(self, digits: str) -> None:
        """Refuse --digits that are not such."""
        if not (digits.isascii() and digits.isdecimal()):
            self.error(f"--digits must be digits such as 2026, got {digits!r}")


def any_path(path: str) -> pathlib.Path:
    """`path`, for argparse, with the user's home for a ~ at its beginning, which not every shell puts there.

    Raises ArgumentTypeError if it is empty, as a variable of the shell may be: it would be the folder where one is.
    """
    if not path:
        raise argparse.ArgumentTypeError("expected a path, got none")
    return pathlib.Path(os.path.expanduser(path))


def picture_path(path: str) -> pathlib.Path:
    """`path`, if a picture can be written there, for argparse: better to know that before the work than after.

    Raises ArgumentTypeError if its folder does not exist or its suffix is none that pictures are written with.
    """
    from .files.pictures import format_of

    picture = any_path(path)
    if not picture.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {picture.parent}")
    if picture.is_dir() or format_of(picture) is None:
        raise argparse.ArgumentTypeError(f"expected a picture such as digits.png, got {picture}")
    return picture


class _Words:
    """A stream for what a program says, which never ends it: what has no letter in the terminal's encoding is shown by
    its number, and what nobody reads any more, or finds no place on the disk, goes nowhere."""

    def __init__(self, stream: TextIO | None):
        self.stream = stream or open(os.devnull, "w")  # None: it is closed
        self.terminal = self.stream.isatty()  # which it is no more once it has gone
        self.lost: OSError | None = None  # what came in between, but for a reader who has gone
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        self._unless_lost(self.stream.write, text)

    def flush(self) -> None:
        self._unless_lost(self.stream.flush)

    def _unless_lost(self, action: Callable, *arguments: Any) -> None:
        try:
            action(*arguments)
        except OSError as error:
            gone = (errno.EPIPE, errno.EINVAL, errno.EIO if self.terminal else None)  # EINVAL: a pipe, to Windows
            self.lost = self.lost if error.errno in gone else error
            with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())


@contextlib.contextmanager
def words_get_through() -> Iterator[None]:
    """Within this block, nothing that is printed ends the program. Raises OSError in the end if it was to be printed
    into a file, and that could not be written."""
    before = sys.stdout, sys.stderr
    if isinstance(sys.stdout, _Words):
        yield
        return
    sys.stdout, sys.stderr = words = _Words(before[0]), _Words(before[1])
    try:
        yield
    finally:
        for stream in words:
            stream.flush()
        sys.stdout, sys.stderr = before
    if words[0].lost:
        raise OSError(f"not all that was to be printed could be: {words[0].lost.strerror}")


@contextlib.contextmanager
def errors_in_a_line(name: str | None = None, needs: str = "") -> Iterator[None]:
    """Of an error or a warning that says what was wrong, no more is shown than that, after the `name` of the program,
    and what it `needs` that is not there. Ctrl-C ends it as a shell expects. Words get through, or are left out."""
    name, before = name or pathlib.Path(sys.argv[0]).name, warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"\n{name}: {message}\n"
    try:
        with words_get_through():
            yield
    except ImportError as error:
        if not needs:
            raise  # a fault of ours
        sys.exit(f"{name}: {error}; that needs {needs}")
    except (ValueError, TypeError, ArithmeticError, RuntimeError, OSError) as error:
        sys.exit(f"{name}: {error}")
    except MemoryError as error:
        sys.exit(f"{name}: out of memory, of which fewer --workers or a smaller --batch need less: {error}")
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        sys.exit(130)  # what a shell says of a program that Ctrl-C ended
    finally:
        warnings.formatwarning = before


def run(main: Callable[[], Any], **settings: str) -> None:
    """Call `main` within `errors_in_a_line`."""
    with errors_in_a_line(**settings):
        main()


@contextlib.contextmanager
def stop_signals(notice: str = "") -> Iterator[Callable[[], bool]]:
    """Within this block, Ctrl-C and SIGTERM ask for an end instead of making one; yields a function that says whether
    they have. The second one ends the program at once. `notice` is printed on stderr at the first.

    In another thread than the first, nothing changes, for signals are for the first.
    """
    asked, before = [], {}

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        for either in before:
            signal.signal(either, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # nobody may be reading any more
            os.write(2, f"\n{notice}\n".encode() if notice else b"")  # print may be at work where this breaks in

    with contextlib.suppress(ValueError):  # in another thread
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
