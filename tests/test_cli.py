"""What every command has in common: where a picture may go, and Ctrl-C, which ends a training once its step is done;
options and what is wrong with them; words that get through; errors in a line. Those of a training are in
test_program.py.
"""

import argparse
import contextlib
import errno
import io
import os
import pathlib
import signal
import subprocess
import sys
import threading
import warnings

import pytest
from tiny_training import in_a_copy, on_linux, step_in, training

from tinyddpm import cli
from tinyddpm.cli import Options, any_path, errors_in_a_line, picture_path, stop_signals
from tinyddpm.files.replacing import previous


class TestPicturePath:
    @pytest.mark.parametrize("name", ["p.png", "P.PNG", "p.jpg", "p.gif"])
    def test_a_picture_may_go_into_any_folder_that_is_there(self, tmp_path, name):
        assert picture_path(str(tmp_path / name)) == tmp_path / name
        assert picture_path(name) == pathlib.Path(name)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("name", ["picture", "p.txt", "folder.png", "."])
    def test_it_needs_the_name_of_one(self, tmp_path, name):
        (tmp_path / "folder.png").mkdir()
        with pytest.raises(argparse.ArgumentTypeError, match="^expected a picture such as digits.png, got "):
            picture_path(str(tmp_path / name))

    def test_its_folder_has_to_be_there(self, tmp_path):
        with pytest.raises(argparse.ArgumentTypeError, match="^there is no folder .*nowhere$"):
            picture_path(str(tmp_path / "nowhere" / "p.png"))


def signals_of_a_run(path, *numbers):
    """Train in a copy of this process that gets these signals in its third step; return how it ended, and the steps."""

    def trains():
        with stop_signals("in a moment") as asked:
            _, states = training(path, 100, workers=2, stop=lambda: send(asked))
            for state in states:
                state.save(path)
        os._exit(0 if state.last else 1)

    def send(asked):
        if path.exists() and path.with_name(previous(path).name).exists():
            for number in numbers:
                os.kill(os.getpid(), number)
        return asked()

    return in_a_copy(trains), step_in(path)


@on_linux
class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_once_the_step_is_finished_and_nothing_more(self, tmp_path, number, capfd):
        assert signals_of_a_run(tmp_path / "run", number) == (0, 3)
        assert capfd.readouterr().err.count("in a moment") == 1

    @pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
    def test_twice_it_ends_at_once(self, tmp_path, first, second):
        assert signals_of_a_run(tmp_path / "run", first, second) == (-second, 2)

    def test_a_signal_for_the_whole_group_does_not_end_the_workers(self, tmp_path):
        """As a job scheduler or a shutdown sends it."""

        def trains():
            os.setpgid(0, 0)
            with stop_signals() as asked:
                _, states = training(None, 100, workers=2, stop=asked)
                for state in states:
                    if state.step == 2:
                        script = f"import os, signal; os.killpg({os.getpid()}, signal.SIGTERM)"
                        subprocess.run([sys.executable, "-c", script], start_new_session=True, check=True)
            os._exit(0 if state.last and state.step in (3, 4) else 1)

        assert in_a_copy(trains) == 0

    def test_afterwards_signals_are_what_they_were(self):
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        with stop_signals() as asked:
            assert not asked() and signal.getsignal(signal.SIGTERM) is not before[1]
            signal.raise_signal(signal.SIGTERM)
            assert asked()
            assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

    def test_nobody_may_be_reading_any_more(self):
        """Ctrl-C ends `tee` too, for instance."""

        def trains():
            reader, writer = os.pipe()
            os.dup2(writer, 2)
            os.close(reader), os.close(writer)
            with stop_signals("in a moment") as asked:
                signal.raise_signal(signal.SIGINT)
                os._exit(0 if asked() else 1)

        assert in_a_copy(trains) == 0

    def test_another_thread_may_train_too(self):
        seen = []

        def trains():
            with stop_signals() as asked:
                seen.append(asked())

        thread = threading.Thread(target=trains)
        thread.start()
        thread.join()
        assert seen == [False]


class TestOptions:
    @pytest.mark.parametrize("least", [0, 1, 8])
    def test_least(self, said, least):
        parser = Options(None, prog="program.py")
        parser.add("--train-steps", type=int, least=least)
        parser.add("--others", type=int)
        for below in (least - 1, -100):
            line = f"program.py: error: --train-steps must be {least} or greater, got {below}"
            assert said(parser, f"--train-steps={below}") == line
        for value in (least, least + 1):
            assert parser.parse_args([f"--train-steps={value}", "--others=-5"]).train_steps == value
        assert parser.parse_args([]).train_steps is None

    def test_of_a_default_too(self, said):
        """Such as one that was in a file."""
        parser = Options(None, prog="program.py")
        parser.add("--count", type=int, default=1, least=1)
        parser.set_defaults(count=0)
        assert said(parser) == "program.py: error: --count must be 1 or greater, got 0"

    def test_what_every_picture_has(self, said, tmp_path):
        parser = Options(None, prog="program.py")
        parser.add_usual(out="one.png", seed=3, gives="other flowers")
        assert vars(parser.parse_args([])) == {"seed": 3, "workers": None, "out": pathlib.Path("one.png")}
        args = parser.parse_args(["--seed=0", "--workers=1", f"--out={tmp_path / 'p.gif'}"])
        assert vars(args) == {"seed": 0, "workers": 1, "out": tmp_path / "p.gif"}
        assert said(parser, "--seed=-1") == "program.py: error: --seed must be 0 or greater, got -1"
        assert said(parser, "--workers=0") == "program.py: error: --workers must be 1 or greater, got 0"
        assert said(parser, "--out=one.txt").startswith("program.py: error: argument --out: expected a picture")
        for words in ("another one gives other flowers [3]", "[one per CPU]", "[one.png]"):
            assert words in " ".join(parser.format_help().split())

    def test_the_text_is_shown_as_it_stands(self):
        text = "A title\n\n    and    a\n      table"
        assert text in Options(text).format_help()

    @pytest.mark.parametrize(
        "wrong", ["", "2x", "1.5", "-1", " 1", "\u0663", "\u00b2"]
    )  # the last: 3 in Arabic, a square
    def test_digits(self, capsys, wrong):
        parser = Options(None, prog="program.py")
        parser.check_digits("0123456789")
        with pytest.raises(SystemExit):
            parser.check_digits(wrong)
        line = f"program.py: error: --digits must be digits such as 2026, got {wrong!r}"
        assert capsys.readouterr().err.splitlines()[-1] == line

    @pytest.mark.parametrize("kind", [int, float])
    @pytest.mark.parametrize("nargs", [None, "+"])
    def test_numbers_that_are_none_and_counts_beyond_all_measure(self, said, kind, nargs):
        """Of any option, alone or in a list."""
        parser = Options(None, prog="program.py")
        parser.add("--how-much", type=kind, nargs=nargs)
        parser.add("--seed", type=int)
        wrong = ["1000000001", "-9" + 99 * "0"] if kind is int else ["nan", "inf", "-inf", "1e999"]
        for value in wrong:
            must = (
                "a number" if kind is float else f"1{9 * '0'} at most" if int(value) > 0 else f"-1{9 * '0'} or greater"
            )
            assert said(parser, f"--how-much={value}") == (
                f"program.py: error: --how-much must be {must}, got {kind(value)}"
            )
        assert parser.parse_args(["--how-much=-5", f"--seed={10**30}"]).seed == 10**30

    @pytest.mark.parametrize("short", ["--sample", "--sample-e", "--st", "--lab"])
    def test_a_shortened_name_is_no_name(self, said, short):
        """It may be of two options, or of another one in the next version."""
        parser = Options(None, prog="program.py")
        for name in ("--samples", "--sample-every", "--steps", "--labels"):
            parser.add(name, type=int)
        assert said(parser, short, "3") == f"program.py: error: unrecognized arguments: {short} 3"

    def test_paths(self, said, monkeypatch, tmp_path):
        """~ is home, whatever the shell makes of --out=~/here; and a variable of it that is not set is no path."""
        monkeypatch.setenv("HOME", str(tmp_path)), monkeypatch.setenv("USERPROFILE", str(tmp_path))
        parser = Options(None, prog="program.py")
        parser.add("--to", type=any_path)
        parser.add("--picture", type=picture_path)
        args = parser.parse_args(["--to=~/a/b", "--picture=~/p.png"])
        assert (args.to, args.picture) == (tmp_path / "a" / "b", tmp_path / "p.png")
        assert parser.parse_args(["--to=a~"]).to == pathlib.Path("a~")
        for name in ("to", "picture"):
            assert said(parser, f"--{name}=") == f"program.py: error: argument --{name}: expected a path, got none"

    def test_what_is_given_is_known_from_what_is_there_by_default(self):
        parser = Options(None)
        parser.add("--steps", type=int, default=5)
        parser.add("--flip", action="store_true")
        parser.add("--channels", nargs="+", type=int, default=[1, 2])
        assert parser.given([]) == {}
        assert parser.given(["--steps=5", "--channels", "1", "2"]) == {"steps": 5, "channels": [1, 2]}
        assert parser.given(["--flip"]) == {"flip": True}


class TestWords:
    """What a program says never ends it, in whatever encoding, and whoever listens."""

    def said(self, monkeypatch, stream, text):
        monkeypatch.setattr(sys, "argv", ["program.py"])
        monkeypatch.setattr(sys, "stdout", stream)
        with errors_in_a_line(), errors_in_a_line():
            print(text)
            done = True
        assert done and sys.stdout is stream

    @pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "latin-1", "utf-8", "utf-16"])
    def test_what_an_encoding_does_not_have_is_shown_by_its_number(self, monkeypatch, encoding):
        """A class in Japanese, or a file whose name is no text at all."""
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        self.said(monkeypatch, stream, "0 \u732b, 1 caf\xe9, 2 b\udcffd")
        text = stream.buffer.getvalue().decode(encoding)
        cat, cafe = "\u732b".encode(encoding, "backslashreplace"), "caf\xe9".encode(encoding, "backslashreplace")
        assert text == f"0 {cat.decode(encoding)}, 1 {cafe.decode(encoding)}, 2 b\\udcffd\n"

    def test_nobody_has_to_listen(self, monkeypatch):
        """As in `| head`, and when Ctrl-C ends `tee` too; all that is said later goes nowhere as well."""
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w") as stream:
            self.said(monkeypatch, stream, "a word " * 10_000)
            self.said(monkeypatch, stream, "a word " * 10_000)

    def test_there_need_not_be_a_stream(self, monkeypatch):
        self.said(monkeypatch, None, "a word")

    @on_linux
    def test_a_full_disk_is_told_once_the_work_is_done(self, monkeypatch):
        with open("/dev/full", "w") as stream, pytest.raises(SystemExit) as ended:
            self.said(monkeypatch, stream, "a word")
        assert ended.value.code == "program.py: not all that was to be printed could be: No space left on device"

    @pytest.mark.parametrize("terminal", [True, False])
    def test_of_a_disk_that_breaks_is_told_but_not_of_a_terminal_that_goes(self, monkeypatch, terminal):
        class Gone(io.StringIO):
            isatty = lambda self: terminal and not self.tried
            tried = False

            def write(self, text):
                self.tried = True
                raise OSError(errno.EIO, "Input/output error")

        with contextlib.nullcontext() if terminal else pytest.raises(SystemExit, match="could be: Input/output error"):
            self.said(monkeypatch, Gone(), "a word")

    def test_an_error_is_told_all_the_same(self, monkeypatch):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
        with pytest.raises(SystemExit) as ended, errors_in_a_line("program.py"):
            print("\u732b")
            raise ValueError("\u732b")
        assert ended.value.code == "program.py: \u732b"


class TestErrorsInALine:
    @pytest.fixture(autouse=True)
    def program(self, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["some/where/program.py", "--option"])

    def left_by(self, error, *arguments, **settings):
        """The code with which the program ends."""
        with pytest.raises(SystemExit) as ended, errors_in_a_line(*arguments, **settings):
            raise error
        return ended.value.code

    @pytest.mark.parametrize(
        "kind",
        [ValueError, TypeError, ArithmeticError, FloatingPointError, ZeroDivisionError, RuntimeError, OSError,
         FileNotFoundError],
    )  # fmt: skip
    def test_an_error_that_says_what_was_wrong(self, kind):
        assert self.left_by(kind("steps: too many")) == "program.py: steps: too many"
        assert self.left_by(kind("steps: too many"), "python -m that") == "python -m that: steps: too many"

    @pytest.mark.parametrize("kind", [ImportError, ModuleNotFoundError])
    def test_what_is_not_installed(self, kind):
        error = kind("No module named 'that'")
        assert self.left_by(error, needs="that, pip install that") == (
            "program.py: No module named 'that'; that needs that, pip install that"
        )
        with pytest.raises(kind), errors_in_a_line("it"):  # a fault of ours, of which all is to be seen
            raise error

    def test_too_little_memory(self):
        advice = "out of memory, of which fewer --workers or a smaller --batch need less: "
        assert self.left_by(MemoryError("Unable to allocate 9 TiB")) == f"program.py: {advice}Unable to allocate 9 TiB"

    def test_a_warning_has_the_same_form_and_only_here(self):
        shown = lambda: warnings.formatwarning("odd", UserWarning, "file.py", 3)
        before = shown()
        for name in ("program.py", "it"):
            with errors_in_a_line(None if name == "program.py" else name):
                assert shown() == f"\n{name}: odd\n"
            self.left_by(ValueError("no"), "another")
            assert shown() == before

    def test_ctrl_c(self, capsys):
        """130 is what a shell says of a program that Ctrl-C ended."""
        assert self.left_by(KeyboardInterrupt()) == 130
        assert capsys.readouterr().err == "\nprogram.py: interrupted\n"
        assert self.left_by(KeyboardInterrupt(), "it") == 130
        assert capsys.readouterr().err == "\nit: interrupted\n"

    @pytest.mark.parametrize("error", [KeyError("a"), AttributeError("a"), AssertionError("a"), IndexError("a")])
    def test_a_mistake_of_the_program_is_shown_in_full(self, error):
        with pytest.raises(type(error)), errors_in_a_line():
            raise error

    def test_what_ends_by_itself_keeps_its_code(self):
        assert self.left_by(SystemExit(2)) == 2 and self.left_by(SystemExit("that is all")) == "that is all"

    def test_run(self, capsys):
        """It calls the program; and nothing is said where nothing is wrong."""
        done = []
        cli.run(lambda: done.append(1), needs="this")
        assert done == [1] and capsys.readouterr() == ("", "")

        def fails():
            raise ImportError("no")

        with pytest.raises(SystemExit) as ended:
            cli.run(fails, needs="this")
        assert ended.value.code == "program.py: no; that needs this"
