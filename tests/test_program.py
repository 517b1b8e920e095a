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
from tiny_training import DIFFUSION, TINY, training

from tinyddpm import UNet, load_model, program, save_model
from tinyddpm.files.checkpoint import OtherRun
from tinyddpm.files.model import configuration
from tinyddpm.program import TrainingRun, steps_within

pytestmark = pytest.mark.usefixtures("without_matplotlib")


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
        return [pickle.loads(pickle.dumps(value)) if self.others is None else self.others]  # as MPI sends it


def arguments(*options):
    return program.training_arguments(program.training_options(None, prog="program.py"), list(options))


def a_run(tmp_path, *options, ranks=None):
    args = program.training_options(None).parse_args([*options, f"--out={tmp_path}"])
    return TrainingRun(args, ranks or OfRanks())


def nowhere(size=1, to=lambda *_, **__: None):
    """What is no network, but may be moved like one."""
    return types.SimpleNamespace(size=size, to=to)


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


@pytest.fixture
def refusal(ended):
    """refusal(*options) is the line that refuses them."""
    return lambda *options: ended(arguments, *options)[2].splitlines()[-1].removeprefix("program.py: error: ")


class TestArguments:
    COUNTS = {  # how many there may be at most, of which there has to be one
        "steps": 10**9, "batch": 10**5, "patch": 1000, "blocks": 100, "timesteps": 10**5, "sampling-steps": 10**5,
        "samples": 10**4, "sample-every": 10**9, "save-every": 10**9, "workers": 1024, "size": 4096,
    }  # fmt: skip
    MEASURES = {"minutes": (1e-9, 10**6), "lr": (1e-9, 10**9), "guidance": (-1000, 1000)}

    @pytest.mark.parametrize("name", [*COUNTS, *MEASURES, "channels", "seed"])
    def test_each_number_has_its_limits(self, said, name):
        """How these are told is in test_cli.py."""
        parser = program.training_options(None, prog="program.py")
        least, most = self.MEASURES.get(name, (1, self.COUNTS.get(name, 8192)))
        refused = lambda value: said(parser, f"--{name}={value}").removeprefix(f"program.py: error: --{name} must be ")
        for right in (least, most):
            assert vars(parser.parse_args([f"--{name}={right}"]))[name.replace("-", "_")] in (right, [right])
        if name != "seed":  # which may be any, from 0
            assert refused(f"{most + 1}").startswith(f"{most} at most, got {most + 1}")
        if name in self.COUNTS:
            assert refused(0) == "1 or greater, got 0"
        elif name in ("minutes", "lr"):
            assert refused(0) == "a number greater than 0, got 0.0"
        if name in self.MEASURES:
            assert refused("nan").endswith("got nan") and refused("inf").endswith("got inf")

    @pytest.mark.parametrize(
        ("name", "load", "how", "line"),
        [("digits", "load_digits", {}, "the digits that come along"), ("mnist", "load_mnist", {"full": True}, "MNIST"),
         ("fashion", "load_fashion_mnist", {}, "Fashion-MNIST")],
    )  # fmt: skip
    def test_a_name_that_is_known_is_no_folder(self, pictures, monkeypatch, capsys, name, load, how, line):
        monkeypatch.setenv("HOME", str(pictures)), monkeypatch.setenv("USERPROFILE", str(pictures))
        asked, images = [], np.zeros((1200, 28, 28, 1))
        monkeypatch.setattr(program, load, lambda **how: asked.append(how) or (images, None))
        for given, says in (
            (name, f"1,200 images of 28 x 28 pixels, {line}\n"),
            *((folder, f"4 images of 8 x 8 pixels, {pictures / name}\nclasses  0 a, 1 b\n")
              for folder in (f"./{name}", f"{name}/", f"../{pictures.name}/{name}", f"~/{name}")),
        ):  # fmt: skip
            run = TrainingRun(arguments(f"--data={given}", "--size=8"), OfRanks())
            run.prepare(nowhere(), run.load_data()[0])
            assert capsys.readouterr().out.endswith(f"data     {says}") and asked == [how]

    @pytest.mark.parametrize("out", ["mine", "mine/", "mine/run", "mine/a/../b", "link", "./link/run"])
    def test_results_do_not_go_where_pictures_are_learned_from(self, pictures, refusal, out):
        (pictures / "link").symlink_to("mine")
        assert refusal("--data=mine", f"--out={out}", "--size=8") == (
            f"--out: {pathlib.Path(out)} is in the folder of --data, whose pictures are what is learned from"
        )
        for beside in ("mine2", "runs/mine", "."):
            assert arguments("--data=mine", f"--out={beside}", "--size=8").out == pathlib.Path(beside)

    @pytest.mark.parametrize(("options", "says"), [
        ("--channels 16 12", "--channels must be multiples of 8, got 12"),
        ("--channels 8 -8", "--channels must be multiples of 8, got -8"),
        *((options, f"--size, --patch, --channels: {levels} levels and squares of {patch} x {patch} pixels need a "
           f"height and a width that are multiples of {factor}, and images have {side}") for options, levels, patch,
          factor, side in [("--channels 8 8 8 8", 4, 2, 16, 28), ("--patch=3", 2, 3, 6, 28),
                           ("--data=mine --size=30", 2, 2, 4, 30)]),
        *((f"--start={model} --out=./runs/a/", "--out: runs/a holds the model that --start names, and keeps it; "
           "take a new folder") for model in ("runs/a", "runs/b/../a/model.safetensors")),
        ("--steps=3 --minutes=1", "--steps, --minutes: each says how long to train, so give one of them"),
        ("--digits=1 --start=runs/a", "--digits, --start: digits are drawn by the model in --out, so leave out one "
         "of them"),
        ("--digits=", "--digits must be digits such as 2026, got ''"),
    ])  # fmt: skip
    def test_what_is_wrong_is_known_before_any_work(self, pictures, refusal, options, says):
        (pictures / "runs" / "a").mkdir(parents=True)
        assert refusal(*options.split()) == says

    def test_several_processes_share_the_work_or_are_refused(self, monkeypatch, refusal):
        monkeypatch.setattr("tinyddpm.options.ranks_started", lambda: 3)
        says = "--mpi is missing: mpiexec started 3 processes, which would all do the same"
        assert refusal() == says and arguments("--mpi").mpi


class TestGoingOn:
    """The options of a run that goes on."""

    BEGAN = "--steps=40 --seed=3 --data=mine --size=8 --channels 8 16 --guidance=2".split()
    KEPT = {
        "steps": "7", "seed": "4", "size": "12", "channels": "8", "batch": "9", "lr": "0.1", "patch": "1",
        "blocks": "2", "timesteps": "9", "objective": "v", "precision": "bf16", "grey": None, "flip": None,
        "no-labels": None,
    }  # fmt: skip
    MAY = {"guidance": 3.0, "sampling-steps": 5, "samples": 9, "sample-every": 7, "save-every": 8}
    ONCE = "device", "workers", "mpi", "digits", "resume", "out", "help"

    @pytest.fixture
    def begun(self, pictures):
        """The folder of a run that has a checkpoint, and knows what it began with."""
        run = TrainingRun(arguments(*self.BEGAN, "--out=runs/one"), OfRanks())
        run.open_folder()
        (pictures / "runs/one/checkpoint.safetensors").touch()
        return pictures / "runs" / "one"

    def test_each_option_is_of_one_kind(self, begun):
        """It is kept, or may change and is remembered, or is said anew each time; or it is one of the few below."""
        names = {a.option_strings[-1].removeprefix("--") for a in program.training_options(None)._actions}
        assert names == {*self.KEPT, *self.MAY, *self.ONCE, "data", "start", "minutes"}
        kept = json.loads((begun / "options.json").read_text())
        assert {name.replace("_", "-") for name in kept} == names - {*self.ONCE}
        assert kept["steps"] == 40 and kept["channels"] == [8, 16] and kept["minutes"] == 5  # that by default

    @pytest.mark.parametrize("name", KEPT)
    def test_what_decides_about_the_outcome_is_kept(self, begun, refusal, name):
        value = self.KEPT[name]
        says = refusal("--resume", "--out=runs/one", f"--{name}", *([value] if value else []))
        kept = {"steps": "40", "seed": "3", "size": "8", "channels": "8 16"}
        began = f"with --{name} {kept.get(name, '')}" if value else f"without --{name}"
        assert says.startswith(f"--{name}: a run goes on as it began, {began}")
        assert says.endswith("; --start runs/one with a new --out begins another from its weights")
        same = [f"--{name}", *kept[name].split()] if name in kept else []
        assert arguments("--resume", "--out=runs/one", *same).steps == 40

    @pytest.mark.parametrize(("options", "says"), [
        ("{", "Expecting property name"),
        *((value, f"expected an object of options, got {value}") for value in ("[1]", "3")),
        ('{"steps": "many"}', "argument --steps: invalid int value: 'many'"),
        ('{"channels": 5.5}', "argument --channels: invalid int value: '5.5'"),
        ('{"flip": "yes"}', "argument --flip: ignored explicit argument 'yes'"),
        ('{"lr": true}', "argument --lr: expected one argument"),
        ('{"objective": 3}', "argument --objective: invalid choice: '3'"),
        ('{"batch": 0}', "--batch must be 1 or greater, got 0"),
    ])  # fmt: skip
    def test_damage_is_named(self, begun, refusal, options, says):
        (begun / "options.json").write_text(options)
        assert refusal("--resume", "--out=runs/one").startswith(f"--resume: runs/one/options.json is damaged: {says}")

    def test_the_others_are_remembered_once_the_training_has_accepted_them(self, begun, pictures):
        (pictures / "mine").rename(pictures / "moved")
        options = [f"--{name}={value}" for name, value in self.MAY.items()]
        run = TrainingRun(arguments("--resume", "--out=runs/one", "--data=moved", "--workers=2", *options), OfRanks())
        kept = lambda: json.loads((begun / "options.json").read_text())
        before = kept()
        run.open_folder()
        assert kept() == before  # it may be refused yet

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
        assert kept() == before
        for _ in run.followed(training(None, 1)[1], lambda state: None):
            pass
        changed = {name.replace("-", "_"): value for name, value in self.MAY.items()}
        assert kept() == before | changed | {"data": str(pictures / "moved")}
        args = arguments("--resume", "--out=runs/one")
        assert args.data == str(pictures / "moved") and args.samples == 9 and args.workers is None

    def test_how_it_began_is_not_asked_again(self, begun, pictures, refusal):
        assert arguments("--resume", "--out=runs/one", "--start=runs/other").start is None
        says = "--minutes: the run that is to go on has 40 steps, and keeps them"
        assert refusal("--resume", "--out=runs/one", "--minutes=9") == says
        (pictures / "mine").rename(pictures / "moved")
        with pytest.raises(ValueError, match="no folder .*mine; if it was moved, --data says where it is now$"):
            TrainingRun(arguments("--resume", "--out=runs/one"), OfRanks()).load_data()


class TestStart:
    """A run that begins with the weights of a model."""

    @pytest.fixture
    def models(self, pictures):
        """Of grey images and of coloured ones, with classes and without."""
        rgb, dropout = {"in_channels": 3, "out_channels": 3}, {"label_dropout": 0.2}
        for name, more in {"plain": {}, "rgb": rgb, "told": {"classes": 3} | dropout, "ten": {"classes": 10},
                           "two": {"classes": 2} | dropout}.items():  # fmt: skip
            unet = UNet(**TINY | {"groups": 4} | more, image_size=28, patch=2, rng=len(name))
            for p in unet.parameters():
                p.data = p.data + np.float32(0.05) * np.cos(np.arange(p.data.size, dtype=np.float32)).reshape(p.shape)
            save_model(pictures / f"{name}.safetensors", unet, DIFFUSION)
        return pictures

    def started(self, *options):
        run = TrainingRun(arguments("--size=8", *options), OfRanks())
        return run, run.start_model(*run.load_data())

    def test_the_network_and_the_process_are_those_of_the_model(self, models, capsys):
        same = "--channels 4 8 --blocks=1 --patch=2 --objective=eps --timesteps=20".split()  # that may be said
        run, (diffusion, unet) = self.started("--start=told.safetensors", "--data=mine", "--grey", *same)
        assert configuration(unet, diffusion) == configuration(unet, DIFFUSION)
        np.testing.assert_array_equal(diffusion.schedule.beta, DIFFUSION.schedule.beta)
        assert f"start    from {models / 'told.safetensors'}\n" in capsys.readouterr().out
        args = run.args
        assert (args.channels, args.blocks, args.patch, args.timesteps, args.objective) == ([4, 8], 1, 2, 20, "eps")
        run.open_folder()
        kept = json.loads((models / "runs/mnist/options.json").read_text())
        assert kept["channels"] == [4, 8] and kept["start"] == str(models / "told.safetensors")

    @pytest.mark.parametrize(("model", "data", "classes", "says"), [
        ("plain", "mine", 2, "it has learned of no classes; learning of the 2 here begins anew"),
        ("told", "mine", 2, "it has learned of 3 classes; learning of the 2 here begins anew"),
        ("told", "mine/a", None, "it has learned of 3 classes, and is told of none here"),
        ("ten", "mine/a", None, "it has learned of 10 classes, and is told of none here"),
        ("ten", "digits", 10, "it has learned of 10 classes, and takes those here for them: 0 for its 0, ..."),
        ("two", "mine", 2, "it has learned of 2 classes, and takes those here for them"),
        ("plain", "mine/a", None, None),
    ])  # fmt: skip
    def test_what_it_knew_is_kept(self, models, capsys, model, data, classes, says):
        """It predicts what the model did: of as many classes, whatever they are, to the bit; else what it did without
        a label, or with the mean of the vectors of classes."""
        _, (_, unet) = self.started(f"--start={model}.safetensors", f"--data={data}", "--grey")
        known, _ = load_model(models / f"{model}.safetensors")
        dropout = known.config["label_dropout"] if classes == known.config["classes"] else 0.1 if classes else 0
        printed = capsys.readouterr().out
        assert unet.config["classes"] == classes and unet.config["label_dropout"] == dropout
        assert unet.config["image_size"] == ((28, 28) if data == "digits" else (8, 8))
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

    @pytest.mark.parametrize(("options", "says"), [
        ("--channels 8 16", "--channels: the model of --start has 4 8, which stays, got 8 16"),
        ("--objective=x0", "--objective: the model of --start has eps, which stays, got x0"),
        ("--timesteps=1000", "--timesteps: the model of --start has 20, which stays, got 1000"),
        ("--patch=1", "--patch: the model of --start has 2, which stays, got 1"),
        ("--blocks=2", "--blocks: the model of --start has 1, which stays, got 2"),
        ("--data=mine", "--data: its images have 3 channels, and the model of --start has 1; --grey makes"),
        ("--start=rgb.safetensors --grey --data=mine", "--data: its images have 1 channel, and the model of --start "
         "has 3$"),
        ("--data=mine --size=10", "--size: of the model of --start, 2 levels and squares of 2 x 2 pixels need a height "
         "and a width that are multiples of 4, and images have 10"),
        ("--start=nowhere.safetensors", "--start: .*there is no file .*nowhere.safetensors"),
        ("--start=mine/a/0.png", "--start: .*0.png is not a readable safetensors file"),
    ])  # fmt: skip
    def test_what_does_not_fit_is_refused_by_name(self, models, options, says):
        with pytest.raises(ValueError, match=f"^{says}"):
            self.started("--start=plain.safetensors", *options.split())

    def test_a_checkpoint_that_is_damaged_is_named(self, models):
        (models / "runs/mnist").mkdir(parents=True)
        checkpoint, before = (models / "runs/mnist" / f"checkpoint{kind}.safetensors" for kind in ("", ".previous"))
        checkpoint.write_bytes(b"")
        options = "--resume", "--start=plain.safetensors", "--data=mine", "--grey"
        with pytest.raises(ValueError, match="checkpoint.safetensors is not a readable safetensors file: it is empty"):
            self.started(*options)
        (models / "plain.safetensors").rename(before)
        assert self.started(*options)[1][1].config["channels"] == (4, 8)


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes only where it is told to."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(("seconds", "minutes", "look", "steps", "taken"), [
    ([1.0] * 1000, 5, 0, 300 - 7, 7),  # seven steps at least
    ([0.5] * 1000, 5, 0, (300 - 6.5) / 0.5, 13),  # a fiftieth of the time
    ([0.5] * 1000, 500, 0, (30000 - 10.5) / 0.5, 21),  # but ten seconds at most
    ([4.0, 1, 1, 9, 1, 1, 1, 1], 5, 0, 300 - 18, 7),  # neither a slow first step nor one interrupted says the pace
    ([0.25] * 1000, 5, 0.75, 300 - 7, 7),  # a GPU runs behind: a step takes as long as to look at its loss
    ([2.0] * 1000, 0.01, 0, 1, 7),  # one at least
])  # fmt: skip
def test_how_many_steps_take_so_many_minutes(clock, seconds, minutes, look, steps, taken):
    """By these times of the steps of a rehearsal, of which so many are taken."""
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

    assert (steps_within(minutes, pretended, "a network"), len(seen)) == (steps, taken)


class TestTrainingRun:
    def test_data(self, pictures, tmp_path):
        ranks, folder, labels = OfRanks(), "--data=mine --size=6", np.repeat(range(10), 1000)
        for options, shape, expected in (
            ("", (10_000, 28, 28, 1), labels), ("--no-labels", (10_000, 28, 28, 1), None),
            (folder, (4, 6, 6, 3), [0, 0, 1, 1]), (f"{folder} --grey", (4, 6, 6, 1), [0, 0, 1, 1]),
            (f"{folder} --no-labels", (4, 6, 6, 3), None),
        ):  # fmt: skip
            images, found = a_run(tmp_path, *options.split(), ranks=ranks).load_data()
            assert images.shape == shape and (found is None) == (expected is None)
            np.testing.assert_array_equal(found, expected)
        assert ranks.alone == ["begins", "ends"] * 5  # one fetches it for all

    def test_results_of_a_run_are_not_learned_from(self, pictures, tmp_path):
        """Its pictures are pages of many; but a run that began with them goes on."""
        for name in ("checkpoint.safetensors", "options.json"):
            assert len(a_run(tmp_path, "--data=mine").load_data()[0]) == 4
            (pictures / "mine" / "a" / name).touch()
        for data in ("mine", "mine/a"):
            with pytest.raises(ValueError, match="^--data: in mine/a are the results of a run, which are not to be"):
                a_run(tmp_path, f"--data={data}").load_data()
        assert len(a_run(pictures / "mine" / "a", "--resume", "--data=mine").load_data()[0]) == 4

    @pytest.mark.parametrize(("options", "device", "says"), [
        ([], "cpu", "device   cpu, 3 workers, BLAS"),  # one per CPU
        (["--workers=1"], "cpu", "device   cpu, 1 worker, BLAS"),
        (["--device=cuda"], "cuda", "device   cuda, 3 workers, BLAS"),
        (["--device=cuda", "--mpi"], "cuda:1", "device   cuda, 2 ranks of 3 workers, BLAS"),  # each has its own
        (["--device=cuda:7", "--mpi"], "cuda:7", "device   cuda:7, 2 ranks of 3 workers, BLAS"),
    ])  # fmt: skip
    def test_where_it_computes(self, tmp_path, capsys, clock, options, device, says):
        """The clock starts when the network is there."""
        moved = []

        def to(*where, **how):
            moved.append((where, how))
            clock[0] += 1000

        run = a_run(tmp_path, *options, "--precision=bf16", ranks=OfRanks(0, 2))
        run.ranks.local_rank = 1
        run.prepare(nowhere(12345, to), np.zeros((1500, 7, 9, 1)))
        clock[0] += 90
        assert moved == [((device,), {"precision": "bf16"})] and run.minutes() == 1.5
        assert run.workers == (1 if "--workers=1" in options else 3)
        printed, network = capsys.readouterr().out, "network  U-Net 32-64, 12,345 parameters, T = 1000\n"
        for words in (says, network, "data     1,500 images of 7 x 9 pixels, the digits that come along\n"):
            assert words in printed
        assert "classes" not in printed

    @pytest.mark.parametrize(("ranks", "within", "steps", "says"), [
        (OfRanks(), 1234, 1234, "{pace}training 1,234 steps, about 2.5 minutes{one}{results}"),
        (OfRanks(), 200, 200, "{pace}training 200 steps, about 2.5 minutes{one}{results}"),
        (OfRanks(), 199, 199, "{pace}training 199 steps, about 2.5 minutes{one}{few}{results}"),
        (OfRanks(), None, 3, "training 3 steps{one}{results}"),  # who asks for so few knows
        (OfRanks(1, 2, others=800), 700, 800, ""),  # all ranks take the steps of the first
    ])  # fmt: skip
    def test_a_rehearsal_is_for_a_copy(self, tmp_path, monkeypatch, capsys, ranks, within, steps, says):
        """The network that is trained afterwards is as it was."""
        seen, unet = [], {"weights": [1]}

        def pretended(minutes, training, copied):
            copied["weights"].append(2)
            seen.append((minutes, training))
            return within

        monkeypatch.setattr(program, "steps_within", pretended)
        with warnings.catch_warnings():
            run = a_run(tmp_path, "--minutes=2.5" if within else "--steps=3", "--batch=9", ranks=ranks)
        run.rehearse("a training", unet)
        assert unet == {"weights": [1]} and run.steps == steps and run.args.steps == (None if within else 3)
        assert seen == ([(2.5, "a training")] if within else [])
        few = "so few learn little; README's digits come from --steps 3199, however long these take here"
        assert capsys.readouterr().out == says.format(
            pace="pace     a rehearsal tells how many steps take 2.5 minutes\n", few=f"{9 * ' '}{few}\n",
            one=", 9 images a step; Ctrl-C ends it earlier\n", results=f"results  {tmp_path.resolve()}\n",
        )  # fmt: skip

    def test_an_earlier_run_is_moved_with_its_pictures(self, tmp_path, capsys):
        names = {"noising.png", "step_00500.png", "samples.png", "denoising.gif", "digits.png", "model.safetensors"}
        a_run(tmp_path, "--resume").open_folder()
        assert capsys.readouterr().out == "resumed  from the beginning, for there is no checkpoint\n"
        for name in (names := {*names, "checkpoint.safetensors", "options.json"}) | {"mine.png"}:
            (tmp_path / name).write_text("")
        a_run(tmp_path).open_folder()
        says = "earlier  the run that was there is in earlier-1 now; --resume would have gone on from it\n"
        assert capsys.readouterr().out == says and {p.name for p in (tmp_path / "earlier-1").iterdir()} == names
        assert {p.name for p in tmp_path.iterdir()} == {"earlier-1", "mine.png", "options.json"}
        assert a_run(tmp_path).resume is None
        assert a_run(tmp_path, "--resume").resume == tmp_path / "checkpoint.safetensors"

    def test_a_signal_asks_for_an_end(self, tmp_path, capfd):
        run, asked = a_run(tmp_path, "--steps=4"), []
        for state in run.followed(training(None, 4)[1], None):
            asked.append(run.stop())
            if state.step == 2:
                signal.raise_signal(signal.SIGTERM)
        assert asked == [False, False, True, True] and not a_run(tmp_path).stop()
        assert "what was trained is saved and sampled in a moment; again to quit at once" in capfd.readouterr().err

    def test_another_rank_than_the_first_says_and_writes_nothing(self, tmp_path, capfd):
        with warnings.catch_warnings():
            run = a_run(tmp_path, "--steps=2", "--resume", "--save-every=1", ranks=OfRanks(1, 2))
            warnings.warn("a warning", UserWarning, stacklevel=1)  # which would be an error in these tests
        run.prepare(nowhere(), np.zeros((9, 28, 28, 1)))
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
        a_run(tmp_path).save(Image.new("L", (3, 2)), "samples.png")  # but the first does
        assert Image.open(tmp_path / "samples.png").size == (3, 2)


def test_digits_are_drawn_by_the_model_in_the_folder(tmp_path, monkeypatch):
    """That of the checkpoint, which is never older; and only those that it knows."""

    def asked(*options):
        return program.trained_model(program.training_options(None).parse_args([f"--out={tmp_path}", *options]))

    moved, to = [], UNet.to
    monkeypatch.setattr(UNet, "to", lambda self, *x, **y: moved.append((x, y)) or to(self, "cpu"))
    save_model(tmp_path / "model.safetensors", UNet(**TINY, classes=3), DIFFUSION)
    unet, diffusion, labels = asked("--digits=2021", "--device=cuda:1", "--precision=fp16")
    assert unet.config["channels"] == TINY["channels"] and diffusion.T == DIFFUSION.T and labels == [2, 0, 2, 1]
    assert moved == [(("cuda:1",), {"precision": "fp16"})]
    with pytest.raises(ValueError, match="^--digits: this model knows 0 to 2, got 103$"):
        asked("--digits=103")
    save_model(tmp_path / "checkpoint.safetensors", UNet(**TINY, classes=9), DIFFUSION)
    assert asked("--digits=8")[0].config["classes"] == 9
    save_model(tmp_path / "checkpoint.safetensors", UNet(**TINY), DIFFUSION)
    with pytest.raises(ValueError, match="^--digits: the model in .* was trained without labels, so it does not know"):
        asked("--digits=1")


class TestRunTraining:
    @pytest.fixture
    def ranks(self, monkeypatch, tmp_path):
        """What the processes are to be; whether they ran within `abort_on_error` is noted."""
        made = OfRanks(failed=[])

        @contextlib.contextmanager
        def abort_on_error():
            try:
                yield
            except BaseException as error:
                made.failed.append(error.code)
                raise

        made.abort_on_error = abort_on_error
        monkeypatch.setattr(program, "Ranks", lambda mpi: made)
        (tmp_path / "model.safetensors").write_text("")
        return made

    @pytest.mark.parametrize("options", [[], ["--digits=1"]])
    @pytest.mark.parametrize("rank", [0, 1])
    def test_digits_are_drawn_by_the_first_alone(self, ranks, tmp_path, rank, options):
        """Which has found the options of before, perhaps on its disk alone."""
        ranks.others = program.training_options(None).parse_args(["--seed=9", *options, f"--out={tmp_path}"])
        ranks.rank, seen = rank, []
        with warnings.catch_warnings():
            program.run_training(seen.append, None, [*options, f"--out={tmp_path}"])
        assert [(run.args.seed, run.ranks) for run in seen] == [(9, ranks)] * (rank == 0 or not options)

    @pytest.mark.parametrize(("settings", "name"), [({}, "program.py"), ({"prog": "python -m that"}, "python -m that")])
    def test_an_error_in_one_ends_all_in_a_line(self, ranks, ended, tmp_path, monkeypatch, settings, name):
        monkeypatch.setattr(sys, "argv", ["program.py"])
        shown, before = [], warnings.formatwarning

        def fails(run):
            shown.append(warnings.formatwarning("odd", UserWarning, "file.py", 3))
            raise FloatingPointError("step 3: the loss is nan")

        run = lambda *options: program.run_training(fails, None, [*options, f"--out={tmp_path}"], **settings)
        says = f"{name}: step 3: the loss is nan"
        assert ended(run) == (1, "", says) and ranks.failed == [says]
        assert ended(run, "--digits=1") == (1, "", says) and ranks.failed == [says]  # for these nobody waits
        assert shown == [f"\n{name}: odd\n"] * 2 and warnings.formatwarning is before

        def none(mpi):
            raise RuntimeError("mpi: there is none")

        monkeypatch.setattr(program, "Ranks", none)
        assert ended(run, "--mpi") == (1, "", f"{name}: mpi: there is none")
