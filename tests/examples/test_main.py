"""`python -m tinyddpm`: what it trains is what examples/mnist_ddpm.py trains, to the bit; it samples from models of any
kind, as examples/sample_pretrained.py does. What the three refuse is in test_refused_options.py.
"""

import json
import pathlib
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_training import assert_same_weights, step_in

import tinyddpm
import tinyddpm.__main__ as commands
from tinyddpm import UNet, load_model, sample
from tinyddpm.exchange import opening
from tinyddpm.files.pictures import grid, page

TINY = "--steps=4 --batch=4 --channels 8 --patch=7 --timesteps=20 --sampling-steps=2 --samples=2 --workers=1".split()
pytestmark = pytest.mark.usefixtures("without_matplotlib")


@pytest.fixture
def command(ended):
    """command(*arguments) is how a command ends: its exit status, and what it says on stdout and on stderr."""
    return lambda *arguments: ended(commands.main, [*map(str, arguments)])


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def by_command(out, *options):
    commands.main(["train", *options, f"--out={out}"])


def by_example(out, *options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mnist_ddpm.py", *options, f"--out={out}"])
        runpy.run_path(str(pathlib.Path(__file__).parents[2] / "examples" / "mnist_ddpm.py"), run_name="__main__")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, without_matplotlib):
    """The folders of the same training, by the command and by the example."""
    both = {by: tmp_path_factory.mktemp(by.__name__) for by in (by_command, by_example)}
    for by, folder in both.items():
        by(folder, *TINY, "--save-every=3", "--sample-every=2")
    return both


class TestTrain:
    def test_it_makes_what_the_example_makes(self, folders, assert_same):
        ours, theirs = folders.values()
        assert_same(ours, theirs, "step_00002.png")
        made, only_of_the_example = ({path.name for path in f.iterdir()} for f in (ours, theirs))
        assert only_of_the_example - made == {"noising.png", "denoising.gif"} and made < only_of_the_example

    @pytest.mark.parametrize(("options", "classes"), [
        ("", 2), ("--data={photos}/a", None),
        ("--grey --no-labels --objective=v --blocks=2 --patch=2 --lr=0.01 --save-every=2", None),
    ])  # fmt: skip
    def test_with_other_options_and_images_of_ones_own(self, photos, assert_same, tmp_path, options, classes):
        """Every option that says something about the network, the process or the samples."""
        few = f"--steps=2 --data={photos} --size=14 --flip --sampling-steps=3 --guidance=3 --seed=5".split()
        for by in (by_command, by_example):
            by(tmp_path / by.__name__, *TINY, *few, *options.format(photos=photos).split())
        assert_same(tmp_path / "by_command", tmp_path / "by_example")
        assert load_model(tmp_path / "by_command" / "model.safetensors")[0].config["classes"] == classes

    def test_a_rehearsal_changes_nothing_but_the_number_of_steps(self, tmp_path):
        """In so few minutes as these, one is taken."""
        options = "--batch=4", *TINY[2:]
        by_command(tmp_path / "count", *options, "--steps=1")
        for by in (by_command, by_example):
            by(out := tmp_path / by.__name__, *options, "--minutes=1e-9")
            assert json.loads((out / "options.json").read_text())["steps"] == 1
            assert (out / "model.safetensors").read_bytes() == (tmp_path / "count/model.safetensors").read_bytes()

    @pytest.mark.parametrize(("by", "module"), [(by_command, commands), (by_example, tinyddpm)])
    def test_digits(self, folders, recorded, capsys, by, module):
        """They are drawn by the model that is there, which stays as it is."""
        out, calls = folders[by], recorded(module, "sample")
        before = (out / "model.safetensors").read_bytes()
        by(out, "--digits=2026", "--guidance=2.5", "--seed=4", "--sampling-steps=6", "--workers=2")
        said, ((how, digits),) = capsys.readouterr(), calls
        assert said.out == f"look at {out / 'digits.png'}\n" and "6/6" in said.err
        expected = {"shape": (4, 28, 28, 1), "guidance": 2.5, "rng": 4, "workers": 2, "steps": 6, "method": "ddpm"}
        assert {name: how[name] for name in expected} == expected and list(how["labels"]) == [2, 0, 2, 6]
        assert_same_weights(how["model"], load_model(out / "model.safetensors")[0])
        np.testing.assert_array_equal(pixels(out / "digits.png"), np.asarray(grid(digits, 4, scale=4)))
        assert (out / "model.safetensors").read_bytes() == before

    @pytest.mark.parametrize(("began", "goes_on"), [(by_command, by_example), (by_example, by_command)])
    def test_each_goes_on_with_a_run_of_the_other(self, folders, assert_same, tmp_path, began, goes_on, capsys):
        """As if there had been no break after the third step."""
        folder = shutil.copytree(folders[began], tmp_path / "run")
        (folder / "checkpoint.previous.safetensors").replace(folder / "checkpoint.safetensors")
        assert step_in(folder / "checkpoint.safetensors") == 3
        for name in ("model.safetensors", "samples.png"):
            (folder / name).unlink()
        goes_on(folder, "--resume")
        assert "resumed  at step 4 of 4" in "".join(capsys.readouterr())
        assert_same(folder, folders[began])
        before, after = ((f / "metrics.csv").read_text().splitlines() for f in (folders[began], folder))
        assert before[:4] == after[:4] and len(after) == 5  # a header, and three steps that are not done again

    def test_it_begins_with_the_weights_of_a_model(self, folders, assert_same, tmp_path, capsys):
        """It is still near to them after two steps. It goes on with --resume when the model is gone."""
        model, (one, other) = tmp_path / "start.safetensors", (tmp_path / name for name in ("one", "other"))
        shutil.copy(folders[by_command] / "model.safetensors", model)
        options = "--batch=4 --samples=2 --workers=1 --seed=5 --sampling-steps=2 --steps=2 --save-every=1".split()
        for by, out in (by_command, one), (by_example, other):
            by(out, *options, f"--start={model}")
            learned = "it has learned of 10 classes, and takes those here for them"
            assert f"start    from {model}\n         {learned}" in capsys.readouterr().out
        assert_same(one, other)
        start, trained = (load_model(path)[0] for path in (model, one / "model.safetensors"))
        assert trained.config == start.config
        trained = trained.state_dict()
        for name, w in start.state_dict().items():  # of new weights, any distance
            assert np.abs(trained[name] - w).max() < 0.01, name

        model.unlink()
        for by, out in (by_command, one), (by_example, other):
            (out / "checkpoint.previous.safetensors").replace(out / "checkpoint.safetensors")
            (out / "model.safetensors").rename(out / "whole.safetensors")
            by(out, "--resume", "--workers=1", f"--start={model}")
            said = capsys.readouterr()
            assert "start    the checkpoint in the folder goes on, and has its own weights\n" in said.out
            assert "resumed  at step 2 of 2" in said.out + said.err
            assert (out / "model.safetensors").read_bytes() == (out / "whole.safetensors").read_bytes()

    def test_another_run_does_not_lose_the_one_before(self, folders, assert_same, tmp_path, capsys):
        """With another seed, it draws others."""
        folder = shutil.copytree(folders[by_command], tmp_path / "run")
        by_command(folder, *TINY, "--steps=1", "--seed=1")
        assert "the run that was there is in earlier-1 now; it had had all its steps\n" in capsys.readouterr().out
        assert_same(folder / "earlier-1", folders[by_command], "step_00002.png")
        assert not (folder / "step_00002.png").exists()
        assert (folder / "samples.png").read_bytes() != (folder / "earlier-1" / "samples.png").read_bytes()


@pytest.mark.filterwarnings("ignore:steps")  # in so few, the first may be far from noise
class TestSample:
    @pytest.fixture
    def drawn(self, command, tmp_path):
        """drawn(*arguments) is the picture that `sample` draws, as an array."""

        def draw(*arguments):
            code, out, err = command("sample", *arguments, "--workers=1", f"--out={tmp_path / 'p.png'}")
            assert code == 0 and f"seconds: look at {tmp_path / 'p.png'}\n" in out, err
            return pixels(tmp_path / "p.png")

        return draw

    @pytest.mark.parametrize(("options", "n", "labels", "expected"), [
        ("--steps=1", 11, np.arange(11) % 10, {"method": "ddpm", "steps": 1, "guidance": 1.5, "rng": 0}),
        ("--labels 3 8 --guidance=2.5 --method=dpm++ --steps=1 --seed=7", 3, [3, 8, 3],
         {"method": "dpm++", "steps": 1, "guidance": 2.5, "rng": 7}),
    ])  # fmt: skip
    def test_the_digits_that_come_along(self, drawn, recorded, options, n, labels, expected):
        calls = recorded(commands, "sample")
        picture = drawn(f"--samples={n}", *options.split())
        ((how, images),) = calls
        assert {name: how[name] for name in expected} == expected and how["shape"] == (n, 28, 28, 1)
        np.testing.assert_array_equal(how["labels"], labels)
        assert_same_weights(how["model"], load_model()[0])
        np.testing.assert_array_equal(picture, np.asarray(page(images, 10)))

    @pytest.mark.parametrize(("name", "sides", "size"), [
        ("plain.safetensors", (8, 8), ""), ("classes.safetensors", (8, 8), ""), ("diffusers", (8, 8), ""),
        ("rgb", (8, 12), ""), ("original.safetensors", (8, 8), "--size=8"),
        ("checkpoint.safetensors", (4, 4), "--size=4"), ("run", (4, 4), "--size=4"), ("plain", (12, 12), "--size=12"),
    ])  # fmt: skip
    def test_a_model_of_any_kind(self, models, drawn, name, sides, size):
        folder, (unet, diffusion) = models[0], models[1][name]
        picture = drawn(folder / name, "--steps=2", "--samples=5", "--seed=1", *size.split())
        labels, shape = np.arange(5) % 3 if unet.config["classes"] else None, (5, *sides, unet.config["in_channels"])
        images = sample(diffusion, unet, shape, "ddpm", 2, rng=1, labels=labels, workers=1)
        np.testing.assert_array_equal(picture, np.asarray(grid(images)))
        assert len(np.unique(picture)) > 20

    @pytest.mark.parametrize(("options", "shape", "labels", "expected"), [
        ("diffusers", (16, 8, 8, 1), [0, 1, 2] * 5 + [0], dict(method="ddim", steps=50, rng=0, workers=None)),
        ("rgb --method=dpm++ --samples=5", (5, 8, 12, 3), None, dict(method="dpm++", steps=50)),
        ("diffusers --label=2 --method=ddpm --workers=2", (16, 8, 8, 1), [2] * 16, dict(steps=60, workers=2)),
        ("original.safetensors --steps=2 --size=8 --seed=3", (16, 8, 8, 1), None, dict(steps=2, rng=3)),
    ])  # fmt: skip
    def test_sample_pretrained(
        self, models, example, recorded, monkeypatch, tmp_path, options, shape, labels, expected
    ):
        """It asks for what it should, of which two steps are enough here."""

        def in_two(diffusion, model, shape, method, steps, **how):
            return sample(diffusion, model, shape, method, 2, **how)

        monkeypatch.setattr(tinyddpm, "sample", in_two)
        (name, *options), calls = options.split(), recorded(tinyddpm, "sample")
        folder, (unet, diffusion) = models[0], models[1][name]
        _, out, err = example("sample_pretrained", folder / name, f"--out={tmp_path / 'p.png'}", *options)
        ((how, images),) = calls
        how |= how.pop("how")
        assert "2/2" in err and how["shape"] == shape
        assert {name: how[name] for name in expected} == expected
        np.testing.assert_array_equal(how["labels"], labels)
        assert (how["diffusion"].T, how["diffusion"].clip) == (diffusion.T, diffusion.clip)
        channels, n = "-".join(map(str, unet.config["channels"])), how["steps"]
        size = f"{shape[0]} of {shape[1]} x {shape[2]} pixels"
        assert all(words in out for words in (f"U-Net {channels}, {unet.size:,} parameters", size, f"in {n} steps"))
        np.testing.assert_array_equal(pixels(tmp_path / "p.png"), np.asarray(grid(images)))

    def test_of_few_timesteps_it_takes_no_more_steps_than_there_are(self, models, drawn, monkeypatch):
        asked, nothing = [], np.zeros((1, 4, 4, 1), np.float32)
        monkeypatch.setattr(commands, "sample", lambda *_, steps, **how: asked.append(steps) or nothing)
        for steps in ([], ["--steps=20"], ["--steps=21"], ["--steps=3"]):
            drawn(models[0] / "checkpoint.safetensors", "--samples=1", "--size=4", *steps)
        assert asked == [20, 20, 20, 3]

    def test_device_precision_and_variant_arrive(self, models, drawn, monkeypatch):
        calls, to, load = [], UNet.to, opening.load_diffusers
        monkeypatch.setattr(UNet, "to", lambda self, *x, **settings: calls.append((x, settings)) or to(self, "cpu"))
        monkeypatch.setattr(opening, "load_diffusers", lambda *x: calls.append(x) or load(x[0]))
        options = "--variant=fp16 --device=cuda:1 --precision=bf16 --steps=1 --samples=1"
        drawn(models[0] / "diffusers", *options.split())
        assert calls == [(models[0] / "diffusers", "fp16"), (("cuda:1",), {"precision": "bf16"})]


class TestAll:
    def test_an_unknown_command_is_named(self, command):
        for name in ("Train", "--version", "sample.py"):
            says = f"python -m tinyddpm: unknown command {name!r}; known: train, sample, evaluate"
            assert command(name) == (1, "", says)

    def test_evaluate_hands_its_arguments_on(self, command, script, monkeypatch, tmp_path):
        path, ran = str(script("evaluate_digits")), []
        main = lambda argv, prog: ran.append((argv, prog))
        monkeypatch.setattr(runpy, "run_path", lambda path: ran.append(path) or {"main": main})
        assert command("evaluate", "runs/mnist/model.safetensors", "--samples=50") == (0, "", "")
        assert ran == [path, (["runs/mnist/model.safetensors", "--samples=50"], "python -m tinyddpm evaluate")]
        monkeypatch.setattr(commands, "EVALUATION", tmp_path / "evaluate_digits.py")  # as without a checkout
        says = "the classifier is not in the package, but in a checkout of its repository"
        assert command("evaluate", "runs/mnist") == (1, "", f"python -m tinyddpm evaluate: {says}")

    @pytest.mark.parametrize(("arguments", "said"), [
        *((none, ["\n    train ", "\n    sample ", "\n    evaluate "]) for none in ("", "--help", "-h")),
        ("train --help", ["usage: python -m tinyddpm train ", "--data", "--resume", "--digits", "--mpi", "--out"]),
        ("sample -h", ["usage: python -m tinyddpm sample ", "--labels", "--guidance", "--size", "--variant"]),
        ("evaluate --help", ["usage: python -m tinyddpm evaluate ", "--samples", "--classifier", "--json"]),
    ])  # fmt: skip
    def test_help(self, command, arguments, said):
        code, out, err = command(*arguments.split())
        assert (code, err) == (0, "") and all(words in out for words in said)

    def test_as_a_user_runs_it(self, tmp_path):
        line = [sys.executable, "-m", "tinyddpm", "sample", "--samples=2", "--steps=1", "--workers=1"]
        result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0 and "2 images in " in result.stdout, result.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["samples.png"]
