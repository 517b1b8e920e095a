"""`python -m tinyddpm`: what it trains is what the example trains, to the bit; it samples from a model of any kind."""

import contextlib
import json
import pathlib
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny_training import DIFFUSION as TRAINED
from tiny_training import step_in, training

import tinyddpm.__main__ as commands
from tinyddpm import (
    Diffusion,
    UNet,
    load_digits,
    load_model,
    make_schedule,
    sample,
    save_diffusers,
    save_model,
    train,
)  # fmt: skip
from tinyddpm.exchange import opening
from tinyddpm.exchange.names import laid_out, original_layout
from tinyddpm.files import run_folder
from tinyddpm.files.pictures import grid, page

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
TINY = [
    "--steps=4",
    "--batch=4",
    "--channels",
    "8",
    "--timesteps=20",
    "--sampling-steps=4",
    "--samples=2",
    "--workers=1",
]


@pytest.fixture(autouse=True, scope="module")
def undone():
    """Without the loss curve, a training takes half the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "save_loss_curve", lambda *_: None)
        yield


@pytest.fixture
def refused(capsys):
    """refused(*arguments) is the exit code of a command that has to refuse them, and all that it says about that."""

    def run(*arguments):
        with pytest.raises(SystemExit) as error:
            commands.main([*map(str, arguments)])
        code = error.value.code
        assert code not in (None, 0)
        text = capsys.readouterr().err + (code if isinstance(code, str) else "")
        return (1 if isinstance(code, str) else code), text

    return run


def by_command(out, *options):
    commands.main(["train", *options, f"--out={out}"])


def by_example(out, *options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mnist_ddpm.py", *options, f"--out={out}"])
        runpy.run_path(str(EXAMPLES / "mnist_ddpm.py"), run_name="__main__")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders of the same training, by the command and by the example."""
    both = {by: tmp_path_factory.mktemp(by.__name__) for by in (by_command, by_example)}
    for by, folder in both.items():
        by(folder, *TINY, "--save-every=3", "--sample-every=2")
    return both


def assert_same(one, other, *more):
    """The same model, the same samples, the same of whatever else is named; and the files that a training leaves."""
    for name in ("model.safetensors", "samples.png", *more):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for name in ("checkpoint.safetensors", "checkpoint.previous.safetensors"):
        if (one / name).exists() or (other / name).exists():
            theirs, ours = load_file(one / name), load_file(other / name)
            assert theirs.keys() == ours.keys()
            for key, w in theirs.items():
                np.testing.assert_array_equal(ours[key], w, err_msg=key)
    logs = (np.loadtxt(f / "metrics.csv", delimiter=",", skiprows=1, usecols=(0, 1, 2, 3)) for f in (one, other))
    np.testing.assert_array_equal(*logs)


class TestTrain:
    def test_it_makes_what_the_example_makes(self, folders):
        command, example = folders[by_command], folders[by_example]
        assert_same(command, example, "options.json", "step_00002.png")
        only_of_the_example = {"noising.png", "denoising.gif"}
        assert {p.name for p in example.iterdir()} - {p.name for p in command.iterdir()} == only_of_the_example
        assert {p.name for p in command.iterdir()} < {p.name for p in example.iterdir()}

    def test_with_other_options_and_images_of_ones_own(self, tmp_path):
        """Every option that says something about the network, the process or the samples."""
        rng, photos = np.random.default_rng(0), tmp_path / "photos"
        for i in range(6):
            (photos / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (9, 8 + i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(photos / "ab"[i % 2] / f"{i}.png")
        few = [f"--data={photos}", "--size=8", "--flip", "--sampling-steps=7", "--guidance=3", "--seed=5"]
        other = ["--grey", "--no-labels", "--objective=v", "--blocks=2", "--patch=1", "--lr=0.01", "--save-every=2"]
        for name, options in (("labels", few), ("other", [*few, *other])):
            for by in (by_command, by_example):
                by(tmp_path / by.__name__ / name, *TINY, "--steps=2", *options)
            assert_same(tmp_path / "by_command" / name, tmp_path / "by_example" / name, "options.json")
        assert load_model(tmp_path / "by_command" / "labels" / "model.safetensors")[0].config["classes"] == 2
        assert load_model(tmp_path / "by_command" / "other" / "model.safetensors")[0].config["classes"] is None

    def test_digits(self, folders, capsys):
        """They are drawn by the model that is there, which stays as it is."""
        before = (folders[by_command] / "model.safetensors").read_bytes()
        for by, folder in folders.items():
            by(folder, "--digits=2026", "--guidance=2.5", "--seed=4", "--sampling-steps=6", "--workers=1")
            assert capsys.readouterr().out == f"look at {folder / 'digits.png'}\n"
        drawn = [folder / "digits.png" for folder in folders.values()]
        assert drawn[0].read_bytes() == drawn[1].read_bytes()
        unet, diffusion = load_model(folders[by_command] / "model.safetensors")
        labels = np.array([2, 0, 2, 6])
        digits = sample(diffusion, unet, (4, 28, 28, 1), "ddpm", 6, rng=4, labels=labels, guidance=2.5)
        np.testing.assert_array_equal(np.asarray(Image.open(drawn[0])), np.asarray(grid(digits, 4, scale=4)))
        assert (folders[by_command] / "model.safetensors").read_bytes() == before

    @pytest.mark.parametrize("began", [by_command, by_example])
    def test_each_goes_on_with_a_run_of_the_other(self, folders, tmp_path, began, capsys):
        """As if there had been no break after the third step."""
        folder = shutil.copytree(folders[began], tmp_path / "run")
        (folder / "checkpoint.previous.safetensors").replace(folder / "checkpoint.safetensors")
        assert step_in(folder / "checkpoint.safetensors") == 3
        for name in ("model.safetensors", "samples.png"):
            (folder / name).unlink()
        goes_on = by_example if began is by_command else by_command
        goes_on(folder, "--resume")
        said = capsys.readouterr()
        assert "resumed  at step 4 of 4" in said.out + said.err
        assert_same(folder, folders[began], "options.json")
        before, after = ((f / "metrics.csv").read_text().splitlines() for f in (folders[began], folder))
        assert before[:4] == after[:4] and len(after) == 5  # a header, and three steps that are not done again

    @pytest.mark.parametrize("begin", [by_command, by_example])
    def test_it_begins_with_the_weights_of_a_model(self, folders, tmp_path, begin, monkeypatch, capsys):
        """As `train` does in Python with what `load_model` gives: the first loss is that of the model, and the average
        begins at its weights. It goes on with --resume when the model is gone."""
        model, few = tmp_path / "start.safetensors", ["--batch=4", "--samples=2", "--workers=1", "--seed=5"]
        shutil.copy(folders[by_command] / "model.safetensors", model)
        out, options = tmp_path / "out", ["--steps=2", "--save-every=1", f"--start={model}"]
        begin(out, *few, *options)
        assert (
            f"start    from {model}\n         it has learned of 10 classes, and takes those here for them"
            in capsys.readouterr().out
        )
        (unet, diffusion), (images, labels) = load_model(model), load_digits()
        before = unet.state_dict()
        settings = {"lr": 4e-3, "decay_steps": 1, "seed": 5, "labels": labels, "workers": 1}
        losses, average = [], None
        for state in train(unet, diffusion, images, 2, 4, **settings):
            losses.append(state.loss)
            if average is None:
                average = state.ema.model.state_dict()
        np.testing.assert_array_equal(np.loadtxt(out / "metrics.csv", delimiter=",", skiprows=1)[:, 1], losses)
        again, _ = load_model(out / "model.safetensors")
        for name, w in again.state_dict().items():
            np.testing.assert_array_equal(w, state.ema.model.state_dict()[name])
            assert np.abs(average[name] - before[name]).max() < 5e-3  # the first step's; of new weights, any distance
        options = json.loads((out / "options.json").read_text())
        assert options["start"] == str(model) and options["channels"] == [8] and options["timesteps"] == 20
        assert again.config == unet.config

        model.unlink()
        (out / "checkpoint.previous.safetensors").replace(out / "checkpoint.safetensors")
        (out / "model.safetensors").rename(tmp_path / "whole.safetensors")
        begin(out, "--resume", "--workers=1", f"--start={model}")
        said = capsys.readouterr()
        assert "start    the checkpoint in the folder goes on, and has its own weights\n" in said.out
        assert "resumed  at step 2 of 2" in said.out + said.err
        assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()

    @pytest.mark.parametrize("kind", ["diffusers", "run"])
    def test_whatever_sample_opens_can_be_begun_with(self, kinds, tmp_path, kind):
        """On other pictures, larger and of other classes."""
        for i in range(4):
            (tmp_path / "photos" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.new("L", (16, 16), 60 * i).save(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png")
        folder, unet, _ = kinds[kind]
        options = ["--steps=1", "--batch=2", "--samples=2", "--sampling-steps=2", "--workers=1", "--size=16", "--grey"]
        by_command(tmp_path / "out", *options, f"--start={folder / kind}", f"--data={tmp_path / 'photos'}")
        ours, _ = load_model(tmp_path / "out" / "model.safetensors")
        changed = {"image_size": (16, 16), "classes": 2, "label_dropout": 0.1}
        assert ours.config == unet.config | changed and pixels(tmp_path / "out" / "samples.png").shape == (40, 76)

    def test_another_run_does_not_lose_the_one_before(self, folders, tmp_path, capsys):
        folder = shutil.copytree(folders[by_command], tmp_path / "run")
        by_command(folder, *TINY, "--steps=1")
        assert "the run that was there is in earlier-1 now; it had had all its steps\n" in capsys.readouterr().out
        assert_same(folder / "earlier-1", folders[by_command], "options.json", "step_00002.png")
        assert not (folder / "step_00002.png").exists()

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["--steps=0"], 2, "error: --steps must be 1 or greater, got 0"),
            (["--seed=-1"], 2, "error: --seed must be 0 or greater, got -1"),
            (["--digits=3"], 2, "error: --digits: there is no model in "),
            (
                ["--data=nowhere"],
                1,
                "--data must be digits, mnist, fashion or a folder, and there is no folder nowhere",
            ),
            (["--device=gpu"], 1, "device: 'gpu' is unknown; use 'cpu', 'cuda' or 'cuda:N'"),
            (["--start=nowhere"], 1, "--start: path: there is no file "),
            ([f"--data={__file__}"], 1, f"--data must be digits, mnist, fashion or a folder, and {__file__} is none"),
        ],
    )
    def test_bad_input_is_refused_in_a_line(self, refused, tmp_path, arguments, code, message):
        """And leaves no folder."""
        got, text = refused("train", f"--out={tmp_path / 'new' / 'out'}", *arguments)
        assert got == code and f"python -m tinyddpm train: {message}" in text and "Traceback" not in text
        assert not list(tmp_path.iterdir())


DIFFUSION = Diffusion(make_schedule("linear", 60, beta_end=0.3), clip=0.9, spacing="leading")
SMALL = dict(channels=(8, 8), blocks=1, attention=(False, True))


def with_weights(unet):
    """Have no weight be zero, so that the images depend on all of them."""
    for p in unet.parameters():
        p.data = p.data + np.float32(0.05) * np.cos(np.arange(p.data.size, dtype=np.float32)).reshape(p.shape)
    return unet


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """A model of each kind: where it is, and what is to be found there. Of a checkpoint it is the averaged one."""
    folder = tmp_path_factory.mktemp("models")
    plain, told = with_weights(UNet(**SMALL, image_size=8)), with_weights(UNet(**SMALL, image_size=8, classes=3))
    save_model(folder / "plain.safetensors", plain, DIFFUSION)
    save_model(folder / "classes.safetensors", told, DIFFUSION)
    save_diffusers(folder / "diffusers", told, DIFFUSION)
    original = with_weights(UNet(1, 1, (32, 32), 1, (False, True), groups=32))
    tensors = laid_out(original.state_dict(), lambda name, ndim: original_layout(name, ndim, 2))
    save_file({name: np.ascontiguousarray(w) for name, w in tensors.items()}, folder / "original.safetensors")
    (folder / "run").mkdir()  # the folder of a training that has gone on since it ended: its checkpoint is to be taken
    save_model(folder / "run" / "model.safetensors", plain, DIFFUSION)
    for state in training(None, 5)[1]:
        state.save(folder / "checkpoint.safetensors")
    shutil.copy(folder / "checkpoint.safetensors", folder / "run")
    (folder / "damaged.safetensors").write_bytes(b"nothing of the kind")
    return {
        "plain.safetensors": (folder, plain, DIFFUSION),
        "classes.safetensors": (folder, told, DIFFUSION),
        "diffusers": (folder, told, DIFFUSION),
        "run": (folder, state.ema.model, TRAINED),
        "original.safetensors": (folder, original, Diffusion(make_schedule("linear", 1000), variance="large")),
        "checkpoint.safetensors": (folder, state.ema.model, TRAINED),
    }


@pytest.fixture
def models(kinds):
    """The folder that they are in."""
    return kinds["diffusers"][0]


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.mark.filterwarnings("ignore:steps")  # in so few, the first may be far from noise
class TestSample:
    def drawn(self, tmp_path, capsys, *arguments):
        """The picture that it draws, as an array."""
        commands.main(["sample", *map(str, arguments), "--workers=1", f"--out={tmp_path / 'p.png'}"])
        assert f"seconds: look at {tmp_path / 'p.png'}\n" in capsys.readouterr().out
        return pixels(tmp_path / "p.png")

    def test_the_digits_that_come_along(self, tmp_path, capsys):
        unet, diffusion = load_model()
        labels = np.arange(12) % 10
        for options, guidance in (([], 1.5), (["--guidance=1"], None)):
            how = {"labels": labels, "guidance": guidance, "workers": 1}
            expected = sample(diffusion, unet, (12, 28, 28, 1), "ddpm", 2, rng=0, **how)
            drawn = self.drawn(tmp_path, capsys, "--steps=2", "--samples=12", *options)
            np.testing.assert_array_equal(drawn, np.asarray(grid(expected, columns=10)))
        how = {"method": "dpm++", "steps": 3, "rng": 7, "guidance": 2.5, "workers": 1}
        expected = sample(diffusion, unet, (5, 28, 28, 1), labels=np.array([3, 8, 3, 8, 3]), **how)
        options = ["--samples=5", "--labels", "3", "8", "--guidance=2.5", "--method=dpm++", "--steps=3", "--seed=7"]
        np.testing.assert_array_equal(self.drawn(tmp_path, capsys, *options), np.asarray(page(expected, 10)))

    @pytest.mark.parametrize(
        ("name", "size"),
        [
            ("plain.safetensors", None),
            ("classes.safetensors", None),
            ("diffusers", None),
            ("original.safetensors", 8),
            ("checkpoint.safetensors", 4),
            ("run", 4),
        ],
    )
    def test_a_model_of_any_kind(self, kinds, tmp_path, capsys, name, size):
        folder, unet, diffusion = kinds[name]
        options = ["--steps=2", "--samples=5", "--seed=1", *([f"--size={size}"] if size else [])]
        drawn = self.drawn(tmp_path, capsys, folder / name, *options)
        size, labels = size or 8, np.arange(5) % 3 if unet.config["classes"] else None
        images = sample(diffusion, unet, (5, size, size, 1), "ddpm", 2, rng=1, labels=labels, workers=1)
        np.testing.assert_array_equal(drawn, np.asarray(grid(images)))
        assert len(np.unique(drawn)) > 20

    def test_of_few_timesteps_it_takes_no_more_steps_than_there_are(self, models, tmp_path, monkeypatch, capsys):
        asked, few = [], ["--samples=1", "--size=4"]
        monkeypatch.setattr(
            commands, "sample", lambda *x, **settings: asked.append(settings["steps"]) or sample(*x, **settings)
        )
        for steps in ([], ["--steps=20"], ["--steps=21"], ["--steps=3"]):
            self.drawn(tmp_path, capsys, models / "checkpoint.safetensors", *few, *steps)
        assert asked == [20, 20, 20, 3]

    def test_another_size_than_the_models(self, models, tmp_path, capsys):
        drawn = self.drawn(tmp_path, capsys, models / "plain.safetensors", "--size=12", "--samples=1", "--steps=1")
        assert drawn.shape == (2 * (12 + 4), 2 * (12 + 4))

    def test_device_precision_and_variant_arrive(self, models, tmp_path, monkeypatch, capsys):
        calls, to, load = [], UNet.to, opening.load_diffusers
        monkeypatch.setattr(UNet, "to", lambda self, *x, **settings: calls.append((x, settings)) or to(self, "cpu"))
        monkeypatch.setattr(opening, "load_diffusers", lambda *x: calls.append(x) or load(x[0]))
        options = ["--variant=fp16", "--device=cuda:1", "--precision=bf16", "--steps=1", "--samples=1"]
        self.drawn(tmp_path, capsys, models / "diffusers", *options)
        assert calls == [(models / "diffusers", "fp16"), (("cuda:1",), {"precision": "bf16"})]

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["nowhere.safetensors"], 1, "path: there is no file nowhere.safetensors"),
            (["{models}/damaged.safetensors"], 1, "damaged.safetensors is not a readable safetensors file"),
            (["{models}/diffusers/scheduler"], 1, "config.json, which diffusers saves in a folder with a model"),
            (
                ["{models}/plain.safetensors", "--labels", "1"],
                1,
                "--labels: this model knows no classes, so leave it out",
            ),
            (["{models}/plain.safetensors", "--guidance=2"], 1, "--guidance: this model cannot be guided"),
            (["{models}/classes.safetensors", "--guidance=2"], 1, "--guidance: this model cannot be guided"),
            (["{models}/classes.safetensors", "--labels", "3"], 1, "--labels: this model knows 0 to 2, got 3"),
            (["--labels", "3", "10"], 1, "--labels: this model knows 0 to 9, got 3 10"),
            (["--labels", "3", "-1"], 1, "--labels: this model knows 0 to 9, got 3 -1"),
            (["--guidance=nan"], 2, "error: --guidance must be a number, got nan"),
            (["{models}/original.safetensors"], 1, "--size: this model does not say how large its images are"),
            (["{models}/checkpoint.safetensors"], 1, "--size: this model does not say how large its images are"),
            (
                ["{models}/plain.safetensors", "--size=7"],
                1,
                "--size: 2 levels and squares of 1 x 1 pixels need a height and a width that are multiples of 2, and ",
            ),
            (["{models}/plain.safetensors", "--variant=fp16"], 1, "--variant: only a folder of diffusers has variants"),
            (["{models}/diffusers", "--variant=fp16"], 1, "diffusion_pytorch_model.fp16.safetensors"),
            (["--device=gpu"], 1, "device: 'gpu' is unknown; use 'cpu', 'cuda' or 'cuda:N'"),
            (["--precision=int8"], 1, "precision: unknown 'int8'"),
            (["--steps=0"], 2, "error: --steps must be 1 or greater, got 0"),
            (["--samples=0"], 2, "error: --samples must be 1 or greater, got 0"),
            (["--size=0"], 2, "error: --size must be 1 or greater, got 0"),
            (["--samples=1000000000"], 2, "error: --samples must be 10000 at most, got 1000000000"),
            (["--guidance=1e308"], 2, "error: --guidance must be 1000 at most, got 1e+308"),
            (["--workers=0"], 2, "error: --workers must be 1 or greater, got 0"),
            (["--seed=-1"], 2, "error: --seed must be 0 or greater, got -1"),
            (["--method=euler"], 2, "error: argument --method: invalid choice: 'euler'"),
            (["--out=nowhere/p.png"], 2, "error: argument --out: there is no folder nowhere"),
            (["--out=picture"], 2, "error: argument --out: expected a picture such as digits.png, got picture"),
            (["--colour=red"], 2, "error: unrecognized arguments: --colour=red"),
        ],
    )
    def test_bad_input_is_refused_in_a_line(self, refused, models, tmp_path, arguments, code, message):
        arguments = [argument.format(models=models) for argument in arguments]
        out = [] if "--out" in arguments[0] else [f"--out={tmp_path / 'p.png'}"]
        got, text = refused("sample", *out, "--samples=10", *arguments)
        assert got == code and "Traceback" not in text
        (line,) = [line for line in text.splitlines() if line.startswith("python -m tinyddpm sample: ")]
        assert message in line and not list(tmp_path.iterdir())

    def test_ctrl_c(self, monkeypatch, refused):
        def interrupted(*arguments, **settings):
            raise KeyboardInterrupt

        monkeypatch.setattr(commands, "sample", interrupted)
        assert refused("sample") == (130, "\npython -m tinyddpm sample: interrupted\n")


class TestEvaluate:
    def test_it_hands_its_arguments_on(self, monkeypatch):
        script, ran = str(EXAMPLES / "measure" / "evaluate_digits.py"), []
        main = lambda argv, prog: ran.append((argv, prog))
        monkeypatch.setattr(runpy, "run_path", lambda path: ran.append(path) or {"main": main})
        commands.main(["evaluate", "runs/mnist/model.safetensors", "--samples=50"])
        assert ran == [script, (["runs/mnist/model.safetensors", "--samples=50"], "python -m tinyddpm evaluate")]

    def test_it_is_that_script_which_answers(self, refused, tmp_path):
        code, text = refused("evaluate", tmp_path, "--samples=5")
        assert code == 2 and "python -m tinyddpm evaluate: error: --samples must be 10 or greater, got 5" in text

    def test_without_a_checkout_it_says_what_is_missing(self, monkeypatch, refused, tmp_path):
        monkeypatch.setattr(commands, "EVALUATION", tmp_path / "evaluate_digits.py")
        says = "the classifier is not in the package, but in a checkout of its repository"
        assert refused("evaluate", "runs/mnist") == (1, f"python -m tinyddpm evaluate: {says}")


class TestAll:
    @pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
    def test_it_says_what_there_is(self, capsys, arguments):
        commands.main(arguments)
        text = capsys.readouterr().out
        assert all(f"\n    {command} " in text for command in ("train", "sample", "evaluate"))

    @pytest.mark.parametrize(
        ("command", "usage", "options"),
        [
            ("train", "python -m tinyddpm train", ["data", "resume", "digits", "mpi", "out"]),
            ("sample", "python -m tinyddpm sample", ["samples", "labels", "guidance", "size", "variant", "out"]),
            ("evaluate", "python -m tinyddpm evaluate", ["samples", "classifier", "json"]),
        ],
    )
    def test_each_has_help(self, capsys, command, usage, options):
        with contextlib.suppress(SystemExit):
            commands.main([command, "--help"])
            pytest.fail("it did not end")
        said = capsys.readouterr()
        assert said.out.startswith(f"usage: {usage} ") and not said.err
        assert all(f"--{option}" in said.out for option in options)

    @pytest.mark.parametrize("command", ["Train", "--version", "sample.py"])
    def test_an_unknown_command_is_named(self, refused, command):
        says = f"python -m tinyddpm: unknown command {command!r}; known: train, sample, evaluate"
        assert refused(command) == (1, says)

    def test_as_a_user_runs_it(self, tmp_path):
        run = lambda *arguments: subprocess.run(
            [sys.executable, "-m", "tinyddpm", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        result = run("sample", "--samples=10", "--steps=1", "--workers=1")
        assert result.returncode == 0 and "10 images in " in result.stdout, result.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["samples.png"]
        result = run("draw")
        assert result.returncode == 1 and len(result.stderr.splitlines()) == 1 and "unknown command" in result.stderr
