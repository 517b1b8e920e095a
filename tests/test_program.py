"""A training as a program: its options, and those of a run that goes on; data, which may have a name of two meanings;
the model whose weights it starts from; and several processes, which are made up here. What comes of it all together is
tested in tests/examples.
"""

import contextlib
import json
import pathlib
import pickle
import signal
import sys
import time
import types
import warnings

import numpy as np
import pytest
from PIL import Image
from tiny_training import DIFFUSION, TINY, step_in, training

from tinyddpm import UNet, load_digits, load_model, program, save_model
from tinyddpm.files import run_folder
from tinyddpm.files.checkpoint import OtherRun
from tinyddpm.files.model import configuration
from tinyddpm.files.replacing import previous
from tinyddpm.program import TrainingRun, steps_within


class TestOptions:
    COUNTS = {  # how many there may be at most, of which there has to be one
        "steps": 10**9, "batch": 10**5, "patch": 1000, "blocks": 100, "timesteps": 10**5, "sampling-steps": 10**5,
        "samples": 10**4, "sample-every": 10**9, "save-every": 10**9, "workers": 1024, "size": 4096,
    }  # fmt: skip
    MEASURES = {"minutes": (1e-9, 10**6), "lr": (1e-9, 10**9), "guidance": (-1000, 1000)}

    @pytest.mark.parametrize("name", [*COUNTS, *MEASURES, "channels", "seed"])
    def test_each_number_has_its_limits(self, said, name):
        parser = program.training_options(None, prog="program.py")
        least, most = self.MEASURES.get(name, (1, self.COUNTS.get(name, 8192)))
        refused = lambda value: said(parser, f"--{name}={value}").removeprefix(f"program.py: error: --{name} must be ")
        for right in (least, most):
            assert vars(parser.parse_args([f"--{name}={right}"]))[name.replace("-", "_")] in (right, [right])
        if name in self.MEASURES:
            a_number = "a number" if name == "guidance" else "a number greater than 0"
            for wrong in ["nan", "inf", "-inf", *([] if name == "guidance" else ["0", "-1e-9"])]:
                assert refused(wrong) == f"{a_number}, got {float(wrong)}"
            assert refused(1e300) == f"{most} at most, got 1e+300"
        elif name != "seed":  # which may be any, from 0
            assert refused(most + 1) == f"{most} at most, got {most + 1}"
        if name in self.COUNTS:
            assert refused(0) == "1 or greater, got 0" and refused(-1) == "1 or greater, got -1"


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """The folder where one is: in it are folders of four pictures that are called as data sets are, and one that is
    not."""
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "mnist", "fashion", "mine"):
        for i in range(4):
            (tmp_path / name / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (60 * i, 0, 90)).save(tmp_path / name / "ab"[i % 2] / f"{i}.png")
    return tmp_path


def arguments(*options):
    return program.training_arguments(program.training_options(None, prog="program.py"), list(options))


class TestArguments:
    @pytest.fixture
    def refusal(self, capsys):
        def run(*options):
            with pytest.raises(SystemExit) as error:
                arguments(*options)
            assert error.value.code == 2
            return capsys.readouterr().err.splitlines()[-1].removeprefix("program.py: error: ")

        return run

    @pytest.mark.parametrize("name", ["digits", "mnist", "fashion"])
    def test_a_name_that_is_known_is_no_folder(self, pictures, monkeypatch, capsys, name):
        for load in ("load_digits", "load_mnist", "load_fashion_mnist"):
            monkeypatch.setattr(program, load, lambda **_: load_digits())
        lines = {"digits": "the digits that come along", "mnist": "MNIST", "fashion": "Fashion-MNIST"}
        for given, count, where in (
            (name, 10_000, lines[name]),
            (f"./{name}", 4, str(pictures / name)),
            (f"{name}/", 4, str(pictures / name)),
            (f"../{pictures.name}/{name}", 4, str(pictures / name)),
        ):
            run = TrainingRun(arguments(f"--data={given}", "--size=8"), OfRanks())
            images, _ = run.load_data()
            run.prepare(types.SimpleNamespace(size=1, to=lambda *_, **__: None), images)
            assert len(images) == count
            assert f"data     {count:,} images of {images.shape[1]} x {images.shape[2]} pixels, {where}\n" in (
                capsys.readouterr().out
            )

    def test_a_home_may_be_meant(self, pictures, monkeypatch):
        monkeypatch.setenv("HOME", str(pictures)), monkeypatch.setenv("USERPROFILE", str(pictures))
        args = arguments("--data=~/mine", "--out=~/runs/one", "--size=8")
        assert args.data == str(pictures / "mine") and args.out == pictures / "runs" / "one"

    @pytest.mark.parametrize("out", ["mine", "mine/", "mine/run", "mine/a/../b", "link", "./link/run"])
    def test_results_do_not_go_where_pictures_are_learned_from(self, pictures, refusal, out):
        (pictures / "link").symlink_to("mine")
        assert refusal("--data=mine", f"--out={out}", "--size=8") == (
            f"--out: {pathlib.Path(out)} is in the folder of --data, whose pictures are what is learned from"
        )
        for beside in ("mine2", "runs/mine", "."):
            assert arguments("--data=mine", f"--out={beside}", "--size=8").out == pathlib.Path(beside)

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            (["--channels", "16", "12"], "--channels must be multiples of 8, got 12"),
            (["--channels", "8", "-8"], "--channels must be multiples of 8, got -8"),
            (["--channels", "8", "8", "8", "8"], "--size, --patch, --channels: 4 levels and squares of 2 x 2 pixels "
             "need a height and a width that are multiples of 16, and images have 28"),
            (["--patch=3"], "--size, --patch, --channels: 2 levels and squares of 3 x 3 pixels need a height and a "
             "width that are multiples of 6, and images have 28"),
            (["--data=mine", "--size=30"], "--size, --patch, --channels: 2 levels and squares of 2 x 2 pixels need a "
             "height and a width that are multiples of 4, and images have 30"),
            *(([f"--start={model}", "--out=./runs/a/"], "--out: runs/a holds the model that --start names, and keeps "
               "it; take a new folder") for model in ("runs/a", "runs/b/../a/model.safetensors")),
            (["--minutes=nan"], "--minutes must be a number greater than 0, got nan"),
            (["--guidance=inf"], "--guidance must be a number, got inf"),
            (["--steps=9999999999"], "--steps must be 1000000000 at most, got 9999999999"),
            (["--steps=3", "--minutes=1"], "--steps, --minutes: each says how long to train, so give one of them"),
            (["--digits=1", "--start=runs/a"], "--digits, --start: digits are drawn by the model in --out, so leave "
             "out one of them"),
            (["--step=3"], "unrecognized arguments: --step=3"),
            (["--out="], "argument --out: expected a path, got none"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_known_before_any_work(self, pictures, refusal, options, says):
        (pictures / "runs" / "a").mkdir(parents=True)
        assert refusal(*options) == says

    BEGAN = ["--steps=40", "--seed=3", "--data=mine", "--size=8", "--channels", "8", "16", "--guidance=2"]
    KEPT = {
        "steps": "7", "seed": "4", "size": "12", "channels": "8", "batch": "9", "lr": "0.1", "patch": "1",
        "blocks": "2", "timesteps": "9", "objective": "v", "precision": "bf16", "grey": None, "flip": None,
        "no-labels": None,
    }  # fmt: skip
    MAY = {"guidance": 3.0, "sampling-steps": 5, "samples": 9, "sample-every": 7, "save-every": 8}
    ONCE = {
        "device": "cuda",
        "workers": "2",
        "mpi": None,
        "digits": "1",
        "resume": None,
        "out": "runs/one",
        "help": None,
    }

    @pytest.fixture
    def begun(self, pictures):
        """The folder of a run that has a checkpoint, and knows what it began with."""
        run = TrainingRun(arguments(*self.BEGAN, "--out=runs/one"), OfRanks())
        run.open_folder()
        (pictures / "runs/one/checkpoint.safetensors").touch()
        return pictures / "runs" / "one"

    def test_each_option_is_of_one_kind(self):
        """It is kept, or may change and is remembered, or is said anew each time; or it is one of the few below."""
        names = {a.option_strings[-1].removeprefix("--") for a in program.training_options(None)._actions}
        assert names == {*self.KEPT, *self.MAY, *self.ONCE, "data", "start", "minutes"}

    @pytest.mark.parametrize("name", KEPT)
    def test_what_decides_about_the_outcome_is_kept(self, begun, refusal, name):
        value = self.KEPT[name]
        options = [f"--{name}"] if value is None else [f"--{name}", *value.split()]
        says = refusal("--resume", "--out=runs/one", *options)
        kept = {"steps": "40", "seed": "3", "size": "8", "channels": "8 16"}
        began = f"without --{name}" if value is None else f"with --{name} {kept.get(name, '')}"
        assert says.startswith(f"--{name}: a run goes on as it began, {began}")
        another = "--start runs/one with a new --out begins another from its weights"
        assert says.endswith(f"; {another}")
        same = ["--channels", "8", "16"] if name == "channels" else [f"--{name}={kept[name]}"] if name in kept else []
        assert arguments("--resume", "--out=runs/one", *same).steps == 40

    def test_the_others_are_remembered_once_the_training_has_accepted_them(self, begun, pictures):
        (pictures / "mine").rename(pictures / "moved")
        options = [f"--{name}={value}" for name, value in self.MAY.items()]
        run = TrainingRun(arguments("--resume", "--out=runs/one", "--data=moved", "--workers=2", *options), OfRanks())
        before = json.loads((begun / "options.json").read_text())
        run.open_folder()
        assert json.loads((begun / "options.json").read_text()) == before  # it may be refused yet

        def refused(**differing):
            error = OtherRun("it is of another run: ...")
            error.differing = {"T": (20, 10)} | differing  # whatever else differs
            raise error
            yield

        then, now, fewer = [[1200, 8, 8, 3], "1"], [[1200, 8, 8, 3], "2"], [[11, 8, 8, 3], "2"]
        for differing, says in (
            ({"images": (then, now)}, "--data: not the images of before, with which alone a run goes on; it is"),
            ({"labels": ("1", "2")}, "--data: not the images of before, with which alone a run goes on; it is"),
            ({"images": (then, fewer)}, "--data: 11 pictures, the run had 1,200; it is of another"),
            ({}, "it is of another run"),
        ):
            with pytest.raises(ValueError, match=f"^{says}"):
                list(run.followed(refused(**differing), None))
        assert json.loads((begun / "options.json").read_text()) == before
        for _ in run.followed(training(None, 1)[1], lambda state: None):
            pass
        after = json.loads((begun / "options.json").read_text())
        changed = {name.replace("-", "_"): value for name, value in self.MAY.items()}
        assert after == before | changed | {"data": str(pictures / "moved")}
        args = arguments("--resume", "--out=runs/one")
        assert args.data == str(pictures / "moved") and args.samples == 9 and args.workers is None

    def test_where_the_images_were(self, begun, pictures):
        (pictures / "mine").rename(pictures / "moved")
        with pytest.raises(ValueError, match="no folder .*mine; if it was moved, --data says where it is now$"):
            TrainingRun(arguments("--resume", "--out=runs/one"), OfRanks()).load_data()


class TestStart:
    """A run that begins with the weights of a model."""

    @pytest.fixture
    def models(self, pictures):
        """Of grey images and of coloured ones, with classes and without."""
        for name, more in {
            "plain": {}, "told": {"classes": 3, "label_dropout": 0.2}, "ten": {"classes": 10}, "rgb": {"in_channels": 3,
            "out_channels": 3}, "two": {"classes": 2, "label_dropout": 0.1},
        }.items():  # fmt: skip
            unet = UNet(**TINY | {"groups": 4} | more, image_size=28, patch=2, rng=len(name))
            for p in unet.parameters():
                p.data = p.data + np.float32(0.05) * np.cos(np.arange(p.data.size, dtype=np.float32)).reshape(p.shape)
            save_model(pictures / f"{name}.safetensors", unet, DIFFUSION)
        return pictures

    def started(self, *options):
        ranks = OfRanks()
        ranks.gathered = lambda value: [pickle.loads(pickle.dumps(value))]  # as MPI sends it
        run = TrainingRun(arguments("--size=8", *options), ranks)
        return run, run.start_model(*run.load_data())

    def test_the_network_and_the_process_are_those_of_the_model(self, models, capsys):
        run, (diffusion, unet) = self.started("--start=told.safetensors", "--data=digits", "--no-labels")
        assert configuration(unet, diffusion) == configuration(unet, DIFFUSION)
        np.testing.assert_array_equal(diffusion.schedule.beta, DIFFUSION.schedule.beta)
        assert f"start    from {models / 'told.safetensors'}\n" in capsys.readouterr().out
        args = run.args
        assert (args.channels, args.blocks, args.patch, args.timesteps, args.objective) == ([4, 8], 1, 2, 20, "eps")
        run.open_folder()
        kept = json.loads((models / "runs/mnist/options.json").read_text())
        assert kept["channels"] == [4, 8] and kept["start"] == str(models / "told.safetensors")

    @pytest.mark.parametrize(
        ("model", "data", "classes", "says"),
        [
            ("plain", "mine", 2, "it has learned of no classes; learning of the 2 here begins anew"),
            ("told", "mine", 2, "it has learned of 3 classes; learning of the 2 here begins anew"),
            ("told", "mine/a", None, "it has learned of 3 classes, and is told of none here"),
            ("ten", "mine/a", None, "it has learned of 10 classes, and is told of none here"),
            ("ten", "digits", 10, "it has learned of 10 classes, and takes those here for them: 0 for its 0, ..."),
            ("two", "mine", 2, "it has learned of 2 classes, and takes those here for them"),
            ("plain", "mine/a", None, None),
        ],
    )  # fmt: skip
    def test_what_it_knew_is_kept(self, models, capsys, model, data, classes, says):
        """It predicts what the model did: of as many classes, whatever they are, to the bit; else what it did without
        a label, or with the mean of the vectors of classes."""
        _, (_, unet) = self.started(f"--start={model}.safetensors", f"--data={data}", "--grey")
        known, _ = load_model(models / f"{model}.safetensors")
        size = (28, 28) if data == "digits" else (8, 8)
        printed = capsys.readouterr().out
        assert unet.config["classes"] == classes and unet.config["image_size"] == size
        assert (says in printed) if says else ("learned" not in printed)
        rng = np.random.default_rng(0)
        x, t = rng.standard_normal((4, 8, 8, 1)).astype(np.float32), np.arange(4)
        if classes == known.config["classes"]:
            for name, w in known.state_dict().items():
                np.testing.assert_array_equal(unet.state_dict()[name], w)
            return
        if known.config["classes"] and not known.config["label_dropout"]:
            w = known.class_embedding.w
            w.data = np.broadcast_to(w.data.mean(axis=0), w.shape)
        untold = np.zeros(4, int) if known.config["classes"] and not known.config["label_dropout"] else None
        expected = known(x, t, labels=untold).data
        for labels in (None, np.arange(4) % 2) if classes else (None,):
            np.testing.assert_allclose(unet(x, t, labels=labels).data, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ("plain.safetensors --channels 8 16", "--channels: the model of --start has 4 8, which stays, got 8 16"),
            ("plain.safetensors --objective=x0", "--objective: the model of --start has eps, which stays, got x0"),
            ("plain.safetensors --timesteps=1000", "--timesteps: the model of --start has 20, which stays, got 1000"),
            ("plain.safetensors --patch=1", "--patch: the model of --start has 2, which stays, got 1"),
            ("plain.safetensors --blocks=2", "--blocks: the model of --start has 1, which stays, got 2"),
            ("plain.safetensors --data=mine", "--data: its images have 3 channels, and the model of --start has 1; "
             "--grey makes them grey"),
            ("rgb.safetensors --data=mine --grey", "--data: its images have 1 channel, and the model of --start has "
             "3$"),
            ("plain.safetensors --data=mine --size=10", "--size: of the model of --start, 2 levels and squares of 2 x "
             "2 pixels need a height and a width that are multiples of 4, and images have 10"),
            ("nowhere.safetensors", "--start: .*there is no file .*nowhere.safetensors"),
            ("mine/a/0.png", "--start: .*0.png is not a readable safetensors file"),
        ],
    )  # fmt: skip
    def test_what_does_not_fit_is_refused_by_name(self, models, options, says):
        with pytest.raises(ValueError, match=f"^{says}"):
            self.started(*f"--start={options}".split())

    def test_a_checkpoint_that_is_damaged_is_named(self, models):
        (models / "runs/mnist").mkdir(parents=True)
        checkpoint, before = (models / "runs/mnist" / f"checkpoint{kind}.safetensors" for kind in ("", ".previous"))
        checkpoint.write_bytes(b"")
        options = "--resume", "--start=plain.safetensors", "--no-labels"
        with pytest.raises(ValueError, match="checkpoint.safetensors is not a readable safetensors file: it is empty"):
            self.started(*options)
        (models / "plain.safetensors").rename(before)
        assert self.started(*options)[1][1].config["channels"] == (4, 8)

    def test_the_same_as_the_model_has_may_be_said(self, models):
        options = ["--channels", "4", "8", "--blocks=1", "--patch=2", "--objective=eps", "--timesteps=20"]
        assert self.started("--start=plain.safetensors", *options, "--no-labels")[1]


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
    args = program.training_options(None).parse_args([*options, f"--out={tmp_path}"])
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

    @pytest.mark.filterwarnings("ignore:.* files are left out")
    def test_results_of_a_run_are_not_learned_from(self, tmp_path):
        """Its pictures are pages of many; but a run that began with them goes on."""
        (folder := tmp_path / "in" / "runs" / "mnist").mkdir(parents=True)
        Image.new("RGB", (9, 8)).save(folder / "samples.png")
        for name in ("checkpoint.safetensors", "options.json"):
            assert len(a_run(tmp_path, f"--data={tmp_path / 'in'}").load_data()[0]) == 1
            (folder / name).touch()
        for data in (tmp_path / "in", folder):
            with pytest.raises(ValueError, match=f"^--data: in {folder} are the results of a run, which are not to be"):
                a_run(tmp_path, f"--data={data}").load_data()
        assert len(a_run(folder, "--resume", f"--data={tmp_path / 'in'}").load_data()[0]) == 1

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
        for words in (
            says,
            "network  U-Net 32-64, 12,345 parameters, T = 1000\n",
            "data     1,500 images of 7 x 9 pixels, the digits that come along\n",
        ):
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

        monkeypatch.setattr(program, "steps_within", within)
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
        monkeypatch.setattr(program, "steps_within", lambda *_: steps)
        run = a_run(tmp_path, *options)
        run.rehearse(None, None)
        printed = capsys.readouterr().out
        assert run.steps == steps and ("so few learn little" in printed) == told
        assert ("pace " in printed) == ("about" in printed) == (options == [])

    def test_all_ranks_take_the_steps_of_the_first(self, tmp_path, monkeypatch):
        monkeypatch.setattr(program, "steps_within", lambda *_: 700)
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
        return program.trained_model(program.training_options(None).parse_args([f"--out={folder}", *options]))

    def test_it_comes_with_the_labels_that_are_asked_for(self, folder, monkeypatch):
        moved, to = [], UNet.to
        monkeypatch.setattr(UNet, "to", lambda self, *x, **y: moved.append((x, y)) or to(self, "cpu"))
        unet, diffusion, labels = self.asked(folder, "--digits=2021", "--device=cuda:1", "--precision=fp16")
        assert unet.config["channels"] == TINY["channels"] and diffusion.T == DIFFUSION.T and labels == [2, 0, 2, 1]
        assert moved == [(("cuda:1",), {"precision": "fp16"})]

    def test_that_of_the_checkpoint_which_is_never_older(self, folder):
        save_model(folder / "checkpoint.safetensors", UNet(**TINY, classes=9), DIFFUSION)
        assert self.asked(folder, "--digits=8")[0].config["classes"] == 9
        (folder / "model.safetensors").unlink()
        assert self.asked(folder, "--digits=8")[0].config["classes"] == 9

    def test_digits_that_it_does_not_know(self, folder):
        with pytest.raises(ValueError, match="^--digits: this model knows 0 to 2, got 103$"):
            self.asked(folder, "--digits=103")
        save_model(folder / "model.safetensors", UNet(**TINY), DIFFUSION)
        with pytest.raises(ValueError, match="^--digits: the model in .* was trained without labels, so it does not"):
            self.asked(folder, "--digits=1")


class TestRunTraining:
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
        monkeypatch.setattr(program, "Ranks", lambda mpi: made)
        return made

    def test_the_first_has_found_the_options_of_before(self, ranks, tmp_path):
        """Which may be on its disk alone."""
        ranks.others, seen = program.training_options(None).parse_args(["--seed=9"]), []
        program.run_training(seen.append, None, [f"--out={tmp_path}"])
        assert seen[0].args.seed == 9 and seen[0].ranks is ranks

    @pytest.mark.parametrize(
        ("options", "rank", "runs"), [([], 0, 1), ([], 1, 1), (["--digits=1"], 0, 1), (["--digits=1"], 1, 0)]
    )
    def test_digits_are_drawn_by_the_first_alone(self, ranks, tmp_path, options, rank, runs):
        (tmp_path / "model.safetensors").write_text("")
        ranks.rank, seen = rank, []
        with warnings.catch_warnings():
            program.run_training(seen.append, None, [*options, f"--out={tmp_path}"])
        assert len(seen) == runs

    def test_an_error_in_one_ends_all_in_a_line(self, ranks, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["program.py"])
        (tmp_path / "model.safetensors").write_text("")

        shown, before = [], warnings.formatwarning

        def fails(run):
            shown.append(warnings.formatwarning("odd", UserWarning, "file.py", 3))
            raise FloatingPointError("step 3: the loss is nan")

        for settings, name in (({}, "program.py"), ({"prog": "python -m that"}, "python -m that")):
            for more in ([], ["--digits=1"]):
                with pytest.raises(SystemExit) as ended:
                    program.run_training(fails, None, [f"--out={tmp_path}", *more], **settings)
                assert ended.value.code == f"{name}: step 3: the loss is nan"
                assert ranks.ended == ([] if more else [ended.value.code])  # nobody waits for who draws digits
                ranks.ended.clear()
            assert shown.pop() == f"\n{name}: odd\n" and warnings.formatwarning is before

    def test_what_is_wrong_before_there_are_ranks_is_said_in_a_line_too(self, monkeypatch, tmp_path):
        def none(mpi):
            raise RuntimeError("mpi: there is none")

        monkeypatch.setattr(program, "Ranks", none)
        with pytest.raises(SystemExit) as ended:
            program.run_training(pytest.fail, None, ["--mpi", f"--out={tmp_path}"], prog="it")
        assert ended.value.code == "it: mpi: there is none"
