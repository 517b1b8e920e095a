"""How far a long work has come: a bar on a terminal, lines in a file."""

import io
import pathlib
import sys

from tinyddpm import Diffusion, UNet, bar, make_schedule, sample


class Screen(io.StringIO):
    isatty = lambda self: True


def shown(monkeypatch, stream, count=500):
    monkeypatch.setattr(sys, "stderr", stream)
    with bar.progress_bar(total=count, desc="work", unit="step") as progress:
        for _ in range(count):
            progress.update()
            progress.write("a message", file=stream) if progress.n == 7 else None
    return stream.getvalue()


def test_in_a_file_it_is_a_line_now_and_then(monkeypatch):
    text = shown(monkeypatch, io.StringIO())
    first, message, last = text.splitlines()
    assert "\r" not in text and first.startswith("work:   0%") and last.startswith("work: 100%") and "500/500" in last
    assert message == "a message" and text.isascii()
    monkeypatch.setattr(bar, "SECONDS", 0)
    assert len(shown(monkeypatch, io.StringIO()).splitlines()) == 503  # whenever it is time


def test_on_a_terminal_and_in_a_notebook_it_is_a_bar(monkeypatch):
    assert shown(monkeypatch, Screen()).count("\r") > 2
    monkeypatch.setitem(sys.modules, "ipykernel", None)
    assert shown(monkeypatch, io.StringIO()).count("\r") > 2


def test_where_there_is_no_stderr_there_is_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    diffusion = Diffusion(make_schedule("cosine", 4))
    sample(diffusion, UNet(channels=(8,), attention=(False,)), (1, 8, 8, 1), workers=1, progress=True)


def test_examples_have_no_other_bar():
    """Those of the package have none either: test_structure.py."""
    examples = list((pathlib.Path(__file__).parents[1] / "examples").rglob("*.py"))
    assert examples and not [path for path in examples if "tqdm" in path.read_text(encoding="utf-8")]
