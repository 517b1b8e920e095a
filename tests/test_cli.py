"""What every command has in common: options and what is wrong with them; Ctrl-C, which ends a training once its step is
done; words that get through; errors in a line. The options of a training are in test_program.py.
"""

import contextlib
import errno
import io
import os
import pathlib
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny_training import in_a_copy, on_linux, step_in, training

from tinyddpm import cli
from tinyddpm.cli import Options, any_path, errors_in_a_line, stop_signals
from tinyddpm.files.replacing import previous


class TestOptions:
    @pytest.fixture
    def parser(self, tmp_path, monkeypatch):
        """Where one is, and at home, there is a folder whose name is like that of a picture."""
        monkeypatch.setenv("HOME", str(tmp_path)), monkeypatch.setenv("USERPROFILE", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        (tmp_path / "folder.png").mkdir()
        parser = Options("A title\n\n    and    a\n      table", prog="program.py")
        parser.add("--steps", type=int, default=5)
        parser.add("--sample-steps", type=int, least=8)
        parser.add("--counts", type=int, nargs="+", default=[1, 2])
        parser.add("--rate", type=float, above=0)
        parser.add("--scales", type=float, nargs="+")
        parser.add("--flip", action="store_true")
        parser.add("--to", type=any_path)
        parser.add_usual(out="one.png", seed=3, gives="other flowers")
        return parser

    @pytest.mark.parametrize(("options", "message"), [
        ("--sample-steps=7", "--sample-steps must be 8 or greater, got 7"),
        ("--steps=1000000001", "--steps must be 1000000000 at most, got 1000000001"),
        (f"--steps=-9{99 * '0'}", f"--steps must be -1000000000 or greater, got -9{99 * '0'}"),
        ("--counts 3 1000000001", "--counts must be 1000000000 at most, got 1000000001"),
        ("--rate=0", "--rate must be a number greater than 0, got 0.0"),
        ("--rate=nan", "--rate must be a number greater than 0, got nan"),
        *((f"--scales 1 {x}", f"--scales must be a number, got {float(x)}") for x in ("nan", "inf", "1e999")),
        ("--scales=-inf", "--scales must be a number, got -inf"),
        ("--seed=-1", "--seed must be 0 or greater, got -1"),
        ("--workers=0", "--workers must be 1 or greater, got 0"),
        ("--workers=1025", "--workers must be 1024 at most, got 1025"),
        # a shortened name may be of two options, or of another one in the next version
        *((f"{short} 3", f"unrecognized arguments: {short} 3") for short in ("--s", "--step", "--sample")),
        *((f"--{name}=", f"argument --{name}: expected a path, got none") for name in ("to", "out")),
        *((f"--out={name}", f"argument --out: expected a picture such as digits.png, got {name}")
          for name in ("picture", "p.txt", "folder.png", ".")),
        ("--out=nowhere/p.png", "argument --out: there is no folder nowhere"),
    ])  # fmt: skip
    def test_what_is_wrong_is_refused_by_name(self, said, parser, options, message):
        assert said(parser, *options.split()) == f"program.py: error: {message}"

    @pytest.mark.parametrize(
        "option",
        ["--steps=1000000000", "--steps=-1000000000", "--sample-steps=8", "--seed=0", f"--seed={10**30}", "--workers=1",
         "--workers=1024", "--rate=0.001", "--to=a~", "--to=~/a/b", "--out=~/p.png", "--out=p.png", "--out=P.PNG",
         "--out=p.jpg", "--out=p.gif"],
    )  # fmt: skip
    def test_what_is_right_is_taken_as_it_is(self, parser, tmp_path, option):
        """But ~ is home, whatever the shell makes of --out=~/here."""
        name, _, text = option.removeprefix("--").partition("=")
        assert str(vars(parser.parse_args([option]))[name.replace("-", "_")]) == text.replace("~/", f"{tmp_path}/")
        assert os.listdir() == ["folder.png"]

    def test_what_is_there_by_default_and_what_is_given(self, said, parser):
        usual = {"seed": 3, "workers": None, "out": pathlib.Path("one.png"), "to": None, "flip": False, "rate": None}
        numbers = {"steps": 5, "sample_steps": None, "counts": [1, 2], "scales": None}
        assert vars(parser.parse_args([])) == usual | numbers and parser.given([]) == {}
        assert parser.given(["--steps=5", "--counts", "1", "2"]) == {"steps": 5, "counts": [1, 2]}
        assert parser.given(["--flip"]) == {"flip": True}
        parser.set_defaults(sample_steps=0)  # such as was in a file
        assert said(parser) == "program.py: error: --sample-steps must be 8 or greater, got 0"

    def test_help(self, parser):
        """The text is shown as it stands."""
        said = parser.format_help()
        assert "A title\n\n    and    a\n      table" in said
        for words in ("another one gives other flowers [3]", "[one per CPU]", "[one.png]"):
            assert words in " ".join(said.split())

    # the last: 3 in Arabic, a square
    @pytest.mark.parametrize("wrong", ["", "2x", "1.5", "-1", " 1", "\u0663", "\u00b2"])
    def test_digits(self, capsys, parser, wrong):
        parser.check_digits("0123456789")
        with pytest.raises(SystemExit):
            parser.check_digits(wrong)
        line = f"program.py: error: --digits must be digits such as 2026, got {wrong!r}"
        assert capsys.readouterr().err.splitlines()[-1] == line


@on_linux
class TestSignals:
    @pytest.mark.parametrize(("signals", "code", "steps"), [
        ([signal.SIGINT], 0, 3), ([signal.SIGTERM], 0, 3),  # once: the step is finished and nothing more
        *(([first, second], -second, 2) for first in (signal.SIGINT, signal.SIGTERM)  # twice: it ends at once
          for second in (signal.SIGINT, signal.SIGTERM)),
    ])  # fmt: skip
    def test_in_the_third_step_of_a_run(self, tmp_path, capfd, signals, code, steps):
        path = tmp_path / "run"

        def trains():
            with stop_signals("in a moment") as asked:
                for state in training(path, 100, workers=2, stop=lambda: send(asked))[1]:
                    state.save(path)
            os._exit(0 if state.last else 1)

        def send(asked):
            if path.exists() and path.with_name(previous(path).name).exists():
                for number in signals:
                    os.kill(os.getpid(), number)
            return asked()

        assert (in_a_copy(trains), step_in(path)) == (code, steps)
        assert capfd.readouterr().err.count("in a moment") == 1

    def test_a_signal_for_the_whole_group_does_not_end_the_workers(self):
        """As a job scheduler or a shutdown sends it."""

        def trains():
            os.setpgid(0, 0)
            with stop_signals() as asked:
                for state in training(None, 100, workers=2, stop=asked)[1]:
                    if state.step == 2:
                        script = f"import os, signal; os.killpg({os.getpid()}, signal.SIGTERM)"
                        subprocess.run([sys.executable, "-c", script], start_new_session=True, check=True)
            os._exit(0 if state.last and state.step in (3, 4) else 1)

        assert in_a_copy(trains) == 0

    def test_afterwards_signals_are_what_they_were(self):
        now = lambda: (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
        before = now()
        with stop_signals() as asked:
            assert not asked() and now()[1] is not before[1]
            signal.raise_signal(signal.SIGTERM)
            assert asked() and now() == (signal.SIG_DFL, signal.SIG_DFL)
        assert now() == before

    def test_another_thread_may_train_too(self):
        def trains():
            with stop_signals() as asked:
                return asked()

        with ThreadPoolExecutor() as threads:
            assert threads.submit(trains).result() is False


class TestWords:
    """What a program says never ends it, in whatever encoding, and whoever listens."""

    def said(self, monkeypatch, stream, text="a word " * 10_000):
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
        cat, cafe = (word.encode(encoding, "backslashreplace").decode(encoding) for word in ("\u732b", "caf\xe9"))
        assert stream.buffer.getvalue().decode(encoding) == f"0 {cat}, 1 {cafe}, 2 b\\udcffd\n"

    def test_nobody_has_to_listen(self, monkeypatch):
        """As in `| head`, and when Ctrl-C ends `tee` too; all that is said later goes nowhere as well. Nor need there
        be a stream."""
        self.said(monkeypatch, None)
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w") as stream:
            self.said(monkeypatch, stream)
            self.said(monkeypatch, stream)

    @on_linux
    def test_a_full_disk_is_told_once_the_work_is_done(self, monkeypatch):
        says = "^program.py: not all that was to be printed could be: No space left on device$"
        with open("/dev/full", "w") as stream, pytest.raises(SystemExit, match=says):
            self.said(monkeypatch, stream, "a word")

    @pytest.mark.parametrize("terminal", [True, False])
    def test_of_a_disk_that_breaks_is_told_but_not_of_a_terminal_that_goes(self, monkeypatch, terminal):
        class Gone(io.StringIO):
            isatty = lambda self: terminal and not self.tried
            tried = False

            def write(self, text):
                self.tried = True
                raise OSError(errno.EIO, "Input/output error")

        with contextlib.nullcontext() if terminal else pytest.raises(SystemExit, match="could be: Input/output error"):
            self.said(monkeypatch, Gone())

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

    def left_by(self, error, *name, **settings):
        """The code with which the program ends."""
        with pytest.raises(SystemExit) as ended, errors_in_a_line(*name, **settings):
            raise error
        return ended.value.code

    @pytest.mark.parametrize(("error", "code"), [
        *((kind("steps: too many"), "{}: steps: too many") for kind in (ValueError, TypeError, ArithmeticError,
          FloatingPointError, ZeroDivisionError, RuntimeError, OSError, FileNotFoundError)),
        *((kind("No module named 'that'"), "{}: No module named 'that'; that needs that, pip install that")
          for kind in (ImportError, ModuleNotFoundError)),
        (MemoryError("9 TiB"), "{}: out of memory, of which fewer --workers or a smaller --batch need less: 9 TiB"),
        (SystemExit(2), 2), (SystemExit("that is all"), "that is all"),  # what ends by itself keeps its code
    ])  # fmt: skip
    def test_what_was_wrong(self, error, code):
        for name in ("program.py", "python -m that"):
            got = self.left_by(error, *([] if name == "program.py" else [name]), needs="that, pip install that")
            assert got == (code.format(name) if isinstance(code, str) else code)

    @pytest.mark.parametrize("kind", [KeyError, AttributeError, AssertionError, IndexError, ImportError])
    def test_a_mistake_of_the_program_is_shown_in_full(self, kind):
        """Such as that something is not installed which it should not need."""
        with pytest.raises(kind), errors_in_a_line():
            raise kind("a")

    @pytest.mark.parametrize(("given", "name"), [([], "program.py"), (["it"], "it")])
    def test_a_warning_and_ctrl_c_have_the_same_form(self, capsys, given, name):
        """And a warning only here; 130 is what a shell says of a program that Ctrl-C ended."""
        shown = lambda: warnings.formatwarning("odd", UserWarning, "file.py", 3)
        before = shown()
        with errors_in_a_line(*given):
            assert shown() == f"\n{name}: odd\n"
        assert self.left_by(KeyboardInterrupt(), *given) == 130 and shown() == before
        assert capsys.readouterr().err == f"\n{name}: interrupted\n"

    def test_run(self, ended):
        """It calls the program; and nothing is said where nothing is wrong."""

        def fails():
            raise ImportError("no")

        done = []
        assert ended(lambda: cli.run(lambda: done.append(1), needs="this")) == (0, "", "") and done == [1]
        assert ended(lambda: cli.run(fails, needs="this")) == (1, "", "program.py: no; that needs this")
