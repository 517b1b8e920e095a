"""What every command has in common: where a picture may go, and Ctrl-C, which ends a training once its step is done;
options and what is wrong with them; errors in a line; and what there is around a training, as one of several processes
too, which are made up here. What comes of it all together is tested in tests/examples.
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types
import warnings

import numpy as np
import pytest
from PIL import Image
from tiny_training import DIFFUSION, TINY, in_a_copy, on_linux, step_in, training

from tinyddpm import UNet, cli, load_digits, save_model
from tinyddpm.cli import Options, TrainingRun, errors_in_a_line, picture_path, steps_within, stop_signals
from tinyddpm.files import run_folder
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
    @pytest.fixture
    def said(self, capsys):
        """said(parser, *arguments) is the line in which the parser refuses them."""

        def run(parser, *arguments):
            with pytest.raises(SystemExit) as error:
                parser.parse_args(arguments)
            assert error.value.code == 2
            return capsys.readouterr().err.splitlines()[-1]

        return run

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

    POSITIVE = {
        "minutes": float, "steps": int, "batch": int, "lr": float, "patch": int, "blocks": int, "timesteps": int,
        "sampling-steps": int, "samples": int, "sample-every": int, "save-every": int, "workers": int, "size": int,
    }  # fmt: skip

    @pytest.mark.parametrize("name", POSITIVE)
    def test_what_must_be_positive_in_a_training(self, said, name):
        parser, kind = cli.training_options(None, prog="program.py"), self.POSITIVE[name]
        for wrong in ["0", "-1", *(["nan", "inf", "-inf", "-1e-9"] if kind is float else [])]:
            line = f"program.py: error: --{name} must be greater than 0, got {kind(wrong)}"
            assert said(parser, f"--{name}={wrong}") == line
        for right in ["1", "7", *(["1e-9", "1e9"] if kind is float else [])]:
            assert vars(parser.parse_args([f"--{name}={right}"]))[name.replace("-", "_")] == kind(right)

    def test_the_others_of_a_training_need_not_be(self):
        parser = cli.training_options(None)
        assert {name.replace("_", "-") for name in parser.positive} == set(self.POSITIVE) and parser.least == {
            "seed": 0
        }
        args = parser.parse_args(["--seed=0", "--guidance=-1", "--channels", "8"])
        assert (args.seed, args.guidance, args.channels) == (0, -1, [8])
        assert args.steps is None and args.workers is None

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
        assert text in Options(text).format_help() and text in cli.training_options(text).format_help()

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


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes only where it is told to."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


class TestStepsWithin:
    def rehearsal(self, clock, seconds, minutes, look=0.0):
        """How many steps take so many minutes, if these are the times of those of a rehearsal, and how many it had."""
        seen = []

        def look_at():
            clock[0] += look

        def pretended(unet, steps, stop):
            assert unet == "a network" and steps > 1000
            for took in seconds:
                clock[0] += took
                last = stop()
                seen.append(took)
                yield types.SimpleNamespace(look=look_at)
                if last:
                    return

        return steps_within(minutes, pretended, "a network"), len(seen)

    def test_it_takes_a_fiftieth_of_the_time_but_ten_seconds_at_most(self, clock):
        assert self.rehearsal(clock, [1.0] * 1000, 5) == (300 - 7, 7)  # seven steps at least
        assert self.rehearsal(clock, [0.5] * 1000, 5) == (round((300 - 6.5) / 0.5), 13)
        assert self.rehearsal(clock, [0.5] * 1000, 500) == (round((30000 - 10.5) / 0.5), 21)

    def test_neither_a_slow_first_step_nor_one_interrupted_count_for_the_pace(self, clock):
        times = [4.0, 1, 1, 9, 1, 1, 1, 1]
        assert self.rehearsal(clock, times, 5) == (300 - sum(times[:7]), 7)

    def test_what_a_gpu_is_waited_for_counts(self, clock):
        """It runs behind, so that a step takes as long as it takes to look at its loss."""
        assert self.rehearsal(clock, [0.25] * 1000, 5, look=0.75) == (300 - 7, 7)

    def test_one_at_least(self, clock):
        assert self.rehearsal(clock, [2.0] * 1000, 0.01) == (1, 7)


class OfRanks(types.SimpleNamespace):
    """One of several processes, as `Ranks` shows them, but made up."""

    def __init__(self, rank=0, size=1, others=None, **more):
        super().__init__(rank=rank, size=size, local_rank=rank, cpus=3, others=others, alone=[], **more)

    @contextlib.contextmanager
    def first_alone(self):
        self.alone.append("begins")
        yield
        self.alone.append("ends")

    def gathered(self, value):
        return [value if self.others is None else self.others]


def a_run(tmp_path, *options, ranks=None):
    args = cli.training_options(None).parse_args([*options, f"--out={tmp_path}"])
    return TrainingRun(args, ranks or OfRanks())


class TestTrainingRun:
    def test_as_many_workers_as_there_are_cpus_for_this_rank(self, tmp_path):
        assert a_run(tmp_path).workers == 3 and a_run(tmp_path, "--workers=5").workers == 5

    def test_data(self, tmp_path):
        ranks = OfRanks()
        for (images, labels), expected in (
            (a_run(tmp_path, ranks=ranks).load_data(), load_digits()[1]),
            (a_run(tmp_path, "--no-labels").load_data(), None),
        ):
            np.testing.assert_array_equal(images, load_digits()[0])
            np.testing.assert_array_equal(labels, expected)
        assert ranks.alone == ["begins", "ends"]  # one fetches it for all
        with pytest.raises(
            ValueError, match="^--data must be digits, mnist, fashion or a folder, and there is no fold"
        ):
            a_run(tmp_path, "--data=nowhere").load_data()

    def test_a_folder(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / "in" / name).mkdir(parents=True)
            Image.new("RGB", (9, 8)).save(tmp_path / "in" / name / "p.png")
        options = [f"--data={tmp_path / 'in'}", "--size=6"]
        for more, channels, labels in (([], 3, [0, 1]), (["--grey"], 1, [0, 1]), (["--no-labels"], 3, None)):
            images, found = a_run(tmp_path, *options, *more).load_data()
            assert images.shape == (2, 6, 6, channels)
            assert (found is None) if labels is None else found.tolist() == labels

    @pytest.mark.parametrize(
        ("options", "device", "says"),
        [
            ([], "cpu", "device   cpu, 3 workers, BLAS"),
            (["--workers=1"], "cpu", "device   cpu, 1 worker, BLAS"),
            (["--device=cuda"], "cuda", "device   cuda, 3 workers, BLAS"),
            (
                ["--device=cuda", "--mpi"],
                "cuda:1",
                "device   cuda, 2 ranks of 3 workers, BLAS",
            ),  # each has one of its own
            (["--device=cuda:7", "--mpi"], "cuda:7", "device   cuda:7, 2 ranks of 3 workers, BLAS"),
        ],
    )
    def test_where_it_computes(self, tmp_path, capsys, options, device, says):
        moved = []
        unet = types.SimpleNamespace(size=12345, to=lambda *where, **how: moved.append((where, how)))
        run = a_run(tmp_path, *options, "--precision=bf16", ranks=OfRanks(0, 2))
        run.ranks.local_rank = 1
        run.prepare(unet, np.zeros((1500, 7, 9, 1)))
        assert moved == [((device,), {"precision": "bf16"})]
        printed = capsys.readouterr().out
        for words in (says, "network  U-Net 32-64, 12,345 param", "data     1,500 images of 7 x 9 pixels, T = 1000\n"):
            assert words in printed
        assert "classes" not in printed

    def test_the_clock_starts_when_the_network_is_there(self, tmp_path, clock, capsys):
        def to(*where, **how):
            clock[0] += 1000

        run = a_run(tmp_path)
        run.prepare(types.SimpleNamespace(size=1, to=to), np.zeros((1, 8, 8, 1)))
        clock[0] += 90
        assert run.minutes() == 1.5

    def test_a_rehearsal_is_for_a_copy(self, tmp_path, monkeypatch, capsys):
        """The network that is trained afterwards is as it was."""
        seen, unet = [], {"weights": [1]}

        def within(minutes, training, copied):
            copied["weights"].append(2)
            seen.append((minutes, training))
            return 1234

        monkeypatch.setattr(cli, "steps_within", within)
        run = a_run(tmp_path, "--minutes=2.5", "--batch=9")
        run.rehearse("a training", unet)
        assert unet == {"weights": [1]} and seen == [(2.5, "a training")] and run.steps == 1234
        assert run.args.steps is None
        printed = capsys.readouterr().out
        assert printed.startswith("pace     a rehearsal tells how many steps take 2.5 minutes\n")
        assert "training 1,234 steps, about 2.5 minutes, 9 images a step; Ctrl-C ends it earlier\n" in printed
        assert "so few learn little" not in printed and f"results  {tmp_path.resolve()}\n" in printed

    @pytest.mark.parametrize(
        ("options", "steps", "told"), [([], 199, True), ([], 200, False), (["--steps=3"], 3, False)]
    )
    def test_so_few_steps_learn_little(self, tmp_path, monkeypatch, capsys, options, steps, told):
        """But who asked for so few knows."""
        monkeypatch.setattr(cli, "steps_within", lambda *_: steps)
        run = a_run(tmp_path, *options)
        run.rehearse(None, None)
        printed = capsys.readouterr().out
        assert run.steps == steps and ("so few learn little" in printed) == told
        assert ("pace " in printed) == ("about" in printed) == (options == [])

    def test_all_ranks_take_the_steps_of_the_first(self, tmp_path, monkeypatch):
        monkeypatch.setattr(cli, "steps_within", lambda *_: 700)
        run = a_run(tmp_path, ranks=OfRanks(1, 2, others=800))
        run.rehearse(None, None)
        assert run.steps == 800

    def test_the_options_that_a_run_keeps(self, tmp_path, capsys):
        """Where and with whom it computes may be others when it goes on, what it computes may not."""
        run = a_run(tmp_path, "--device=cuda", "--workers=2", "--mpi", "--resume", "--seed=3")
        run.steps = 77
        run.open_folder()
        assert capsys.readouterr().out == "resumed  from the beginning, for there is no checkpoint\n"
        kept = json.loads((tmp_path / "options.json").read_text())
        assert kept["steps"] == 77 and kept["seed"] == 3 and kept["minutes"] == 5 and kept["channels"] == [32, 64]
        assert set(vars(run.args)) - set(kept) == {"out", "resume", "digits", "device", "workers", "mpi"}

    def test_an_earlier_run_is_moved_with_its_pictures(self, tmp_path, capsys):
        names = {"noising.png", "step_00500.png", "samples.png", "denoising.gif", "digits.png", "model.safetensors"}
        for name in {*names, "checkpoint.safetensors", "mine.png"}:
            (tmp_path / name).write_text("")
        run = a_run(tmp_path)
        run.open_folder()
        says = "earlier  the run that was there is in earlier-1 now; --resume would have gone on from it\n"
        assert capsys.readouterr().out == says
        assert {p.name for p in (tmp_path / "earlier-1").iterdir()} == {*names, "checkpoint.safetensors"}
        assert {p.name for p in tmp_path.iterdir()} == {"earlier-1", "mine.png", "options.json"}
        assert run.resume is None and a_run(tmp_path, "--resume").resume == tmp_path / "checkpoint.safetensors"

    def test_followed(self, tmp_path, capfd, monkeypatch):
        """Checkpoints, log and loss curve are those of `recorded`; a signal asks for an end."""
        curves = []
        monkeypatch.setattr(run_folder, "save_loss_curve", lambda path, *_: curves.append(path.name))
        run = a_run(tmp_path, "--steps=4", "--save-every=3", "--sample-every=2")
        drawn, asked = [], []
        _, states = training(None, 4)
        for state in run.followed(states, lambda state: drawn.append(state.step)):
            asked.append(run.stop())
            if state.step == 2:
                signal.raise_signal(signal.SIGTERM)
        assert drawn == [2] and curves == ["loss.png"] * 2 and asked == [False, False, True, True]
        assert step_in(tmp_path / "checkpoint.safetensors") == 4
        assert step_in(tmp_path / previous(tmp_path / "checkpoint.safetensors").name) == 3
        assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 5
        assert "what was trained is saved and sampled in a moment; again to quit at once" in capfd.readouterr().err
        assert not a_run(tmp_path).stop()

    def test_another_rank_than_the_first_says_and_writes_nothing(self, tmp_path, capfd):
        with warnings.catch_warnings():
            run = a_run(tmp_path, "--steps=2", "--resume", "--save-every=1", ranks=OfRanks(1, 2))
            warnings.warn("a warning", UserWarning, stacklevel=1)  # which would be an error in these tests
        run.prepare(types.SimpleNamespace(size=1, to=lambda *_, **__: None), load_digits()[0])
        run.rehearse(None, None)
        run.open_folder()
        run.save(Image.new("L", (1, 1)), "samples.png")
        steps = []
        for state in run.followed(training(None, 2)[1], lambda state: pytest.fail("it draws")):
            if not steps:
                signal.raise_signal(signal.SIGTERM)
            steps.append((state.step, run.stop()))
        assert steps == [(1, True), (2, True)] and not list(tmp_path.iterdir())
        assert capfd.readouterr() == ("", "")

    def test_the_first_saves(self, tmp_path):
        a_run(tmp_path).save(Image.new("L", (3, 2)), "samples.png")
        with Image.open(tmp_path / "samples.png") as picture:
            assert picture.size == (3, 2)


class TestTrainedModel:
    @pytest.fixture
    def folder(self, tmp_path):
        save_model(tmp_path / "model.safetensors", UNet(**TINY, classes=3), DIFFUSION)
        return tmp_path

    def asked(self, folder, *options):
        return cli.trained_model(cli.training_options(None).parse_args([f"--out={folder}", *options]))

    def test_it_comes_with_the_labels_that_are_asked_for(self, folder, monkeypatch):
        moved, to = [], UNet.to
        monkeypatch.setattr(UNet, "to", lambda self, *x, **y: moved.append((x, y)) or to(self, "cpu"))
        unet, diffusion, labels = self.asked(folder, "--digits=2021", "--device=cuda:1", "--precision=fp16")
        assert unet.config["channels"] == TINY["channels"] and diffusion.T == DIFFUSION.T and labels == [2, 0, 2, 1]
        assert moved == [(("cuda:1",), {"precision": "fp16"})]

    def test_digits_that_it_does_not_know(self, folder):
        with pytest.raises(ValueError, match="^--digits: this model knows 0 to 2, got 103$"):
            self.asked(folder, "--digits=103")
        save_model(folder / "model.safetensors", UNet(**TINY), DIFFUSION)
        with pytest.raises(ValueError, match="^--digits: the model in .* was trained without labels, so it does not"):
            self.asked(folder, "--digits=1")


class TestRunTraining:
    @pytest.fixture(autouse=True)
    def undone(self, monkeypatch):
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)

    @pytest.fixture
    def ranks(self, monkeypatch):
        """What the processes are to be; whether they ran within `abort_on_error` is noted."""
        made = OfRanks(ended=[])

        @contextlib.contextmanager
        def abort_on_error():
            try:
                yield
            except BaseException as error:
                made.ended.append(error.code)
                raise

        made.abort_on_error = abort_on_error
        monkeypatch.setattr(cli, "Ranks", lambda mpi: made)
        return made

    def test_the_first_has_found_the_options_of_before(self, ranks, tmp_path):
        """Which may be on its disk alone."""
        ranks.others, seen = cli.training_options(None).parse_args(["--seed=9"]), []
        cli.run_training(seen.append, None, [f"--out={tmp_path}"])
        assert seen[0].args.seed == 9 and seen[0].ranks is ranks

    @pytest.mark.parametrize(
        ("options", "rank", "runs"), [([], 0, 1), ([], 1, 1), (["--digits=1"], 0, 1), (["--digits=1"], 1, 0)]
    )
    def test_digits_are_drawn_by_the_first_alone(self, ranks, tmp_path, options, rank, runs):
        (tmp_path / "model.safetensors").write_text("")
        ranks.rank, seen = rank, []
        with warnings.catch_warnings():
            cli.run_training(seen.append, None, [*options, f"--out={tmp_path}"])
        assert len(seen) == runs

    def test_an_error_in_one_ends_all_in_a_line(self, ranks, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["program.py"])
        (tmp_path / "model.safetensors").write_text("")

        def fails(run):
            warnings.warn("nearly", UserWarning, stacklevel=1)
            raise FloatingPointError("step 3: the loss is nan")

        for settings, name in (({}, "program.py"), ({"prog": "python -m that"}, "python -m that")):
            for more in ([], ["--digits=1"]):
                with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    cli.run_training(fails, None, [f"--out={tmp_path}", *more], **settings)
                assert ended.value.code == f"{name}: step 3: the loss is nan"
                assert ranks.ended == ([] if more else [ended.value.code])  # nobody waits for who draws digits
                ranks.ended.clear()
            assert warnings.formatwarning("odd", UserWarning, "file.py", 3) == f"\n{name}: odd\n"

    def test_what_is_wrong_before_there_are_ranks_is_said_in_a_line_too(self, monkeypatch, tmp_path):
        def none(mpi):
            raise RuntimeError("mpi: there is none")

        monkeypatch.setattr(cli, "Ranks", none)
        with pytest.raises(SystemExit) as ended:
            cli.run_training(pytest.fail, None, ["--mpi", f"--out={tmp_path}"], prog="it")
        assert ended.value.code == "it: mpi: there is none"
