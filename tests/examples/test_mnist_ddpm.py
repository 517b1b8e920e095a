"""The example mnist_ddpm.py as users run it, on tiny settings.

That it makes what `python -m tinyddpm train` makes is in test_main.py; what is behind both, in test_program.py.
"""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from tiny_training import files_of_at_most, in_a_copy, on_linux

import tinyddpm
from tinyddpm import load_model, sample
from tinyddpm.files.pictures import grid

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "mnist_ddpm.py"
LITTLE = "--batch=4 --channels 8 --patch=7 --timesteps=4 --sampling-steps=2 --samples=2 --workers=1".split()
FEW = [*LITTLE, "--steps=3"]
on_posix = pytest.mark.skipif(os.name != "posix", reason="signals and limits of a process are POSIX's")
pytestmark = pytest.mark.usefixtures("without_matplotlib")


def run(*options, **settings):
    """The example in a process of its own."""
    settings = {"capture_output": True, "text": True, "timeout": 120} | settings
    return subprocess.run([sys.executable, EXAMPLE, *options], **settings)


@contextlib.contextmanager
def started(out, *options, **settings):
    """The same, while it is at work, which it is not for longer than this block. Ctrl-C does not pass it by, as what a
    shell runs in the background."""
    heeded = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": heeded} | settings
    with subprocess.Popen([sys.executable, EXAMPLE, *LITTLE, *options, f"--out={out}"], **settings) as process:
        try:
            yield process
        finally:
            process.kill()


def assert_has(arguments, **expected):
    """Among the arguments of a call, or the settings of a network, are these."""
    assert {name: arguments[name] for name in expected} == expected


class TestTraining:
    def test_it_trains_and_draws_and_leaves_what_it_promises(self, example, tmp_path):
        out = tmp_path / "new" / "folder"
        options = "--timesteps=5 --sampling-steps=5 --sample-every=2 --save-every=2 --samples=6 --workers=2"
        _, said, progress = example("mnist_ddpm", *FEW, *options.split(), f"--out={out}")
        for words in (
            "device   cpu, 2 workers, BLAS", "10,000 images of 28 x 28 pixels, the digits that come along", str(out),
            "parameters, T = 5", "training 3 steps, 4 images a step",
        ):  # fmt: skip
            assert words in said
        assert "images/s" in progress and "loss" in progress
        assert "\r" not in progress and len(progress.splitlines()) == 4  # in a file, of each bar two lines
        without = "no loss curve after {} steps: that needs matplotlib, pip install 'tinyddpm[plots]'"
        assert re.findall("no loss curve .*", said) == [without.format(2), without.format(3)]  # first and last
        assert {path.name for path in out.iterdir()} == {
            "options.json", "noising.png", "step_00002.png", "samples.png", "denoising.gif", "model.safetensors",
            "metrics.csv", "checkpoint.safetensors", "checkpoint.previous.safetensors",
        }  # fmt: skip
        with Image.open(out / "denoising.gif") as gif:
            assert gif.n_frames == 5
        unet, diffusion = load_model(out / "model.safetensors")
        assert_has(unet.config, channels=(8,), image_size=(28, 28))
        again = sample(diffusion, unet, (6, 28, 28, 1), rng=0, labels=np.arange(6), guidance=1.5)
        with Image.open(out / "samples.png") as picture:  # the file is the model that drew the samples
            np.testing.assert_array_equal(np.asarray(picture), np.asarray(grid(again)))

    def test_every_option_arrives_where_it_belongs(self, example, recorded, digits, tmp_path):
        calls = {name: recorded(tinyddpm, name) for name in ("UNet", "Diffusion", "train", "sample", "save_model")}
        options = "--batch=6 --lr=0.003 --blocks=2 --seed=7 --steps=4 --timesteps=30 --objective=v --sample-every=2 "
        options += "--samples=12 --flip --patch=14 --sampling-steps=3 --guidance=3 --workers=2 --channels 8"
        example("mnist_ddpm", *options.split(), f"--out={tmp_path}")
        (network, unet), diffusion = calls["UNet"][0], calls["Diffusion"][0][1]
        assert_has(network, channels=[8], blocks=2, rng=7, attention=[False], patch=14, classes=10, label_dropout=0.1)
        assert diffusion.objective == "v" and diffusion.T == 30
        assert diffusion.schedule.alpha_bar[-1] < 1e-4  # as noisy at the end as with 1000 steps
        ((training, _),) = calls["train"]
        settings = {"steps": 4, "decay_steps": 2, "batch": 6, "lr": 0.003, "workers": 2, "seed": 7, "flip": True}
        assert_has(training, model=unet, diffusion=diffusion, resume=None, **settings)
        for given, expected in zip((training["images"], training["labels"]), digits()):
            np.testing.assert_array_equal(given, expected)
        averages = [how["model"] for how, _ in calls["sample"]] + [calls["save_model"][0][0]["unet"]]
        assert len(averages) == 3 and all(model is averages[0] is not unet for model in averages)
        for (how, _), n in zip(calls["sample"], (20, 12)):  # after step 2, and after the last
            assert_has(how, shape=(n, 28, 28, 1), rng=7, workers=2, steps=3, guidance=3)
            assert how["labels"].tolist() == [label % 10 for label in range(n)]
        with Image.open(tmp_path / "denoising.gif") as gif, Image.open(tmp_path / "samples.png") as samples:
            assert gif.n_frames == 3 and samples.size == (2 * (10 * 30 + 2), 2 * (2 * 30 + 2))  # a column for a digit
            gif.seek(2)  # its last frame is the result
            assert np.abs(np.asarray(gif.convert("L")).astype(int) - np.asarray(samples)).max() <= 24  # it has 16 greys

    def test_help_documents_every_option(self, example):
        text = " ".join(example("mnist_ddpm", "--help").out.split())
        options = set(re.findall(r" --([a-z-]+)", text.partition("options:")[2])) - {"help"}
        assert len(options) == 28
        for option in options:  # its meaning, and its default in brackets
            assert re.search(rf"--{option}( \{{\S+\}}| [A-Z_ \[\].]+)? [^-]+\[[^\]]+\]", text), option

    @pytest.mark.slow
    def test_a_rehearsal_tells_how_many_steps_take_so_many_minutes(self, tmp_path):
        """And the same many give the same digits, so that nothing but their number depends on the clock."""
        options = "--batch=4 --channels 8 16 --timesteps=25 --samples=2 --workers=2".split()
        result = run(*options, "--minutes=0.1", f"--out={tmp_path / 'clock'}")
        assert result.returncode == 0, result.stderr
        (steps,) = re.findall(r"training ([\d,]+) steps, about 0.1 minutes", result.stdout)
        assert ("so few learn little" in result.stdout) == (int(steps.replace(",", "")) < 200)
        seconds = np.loadtxt(tmp_path / "clock" / "metrics.csv", delimiter=",", skiprows=1)[-1, 5]
        assert 2 < seconds < 18, (steps, seconds)  # of 6, for others may be at work here
        assert run(*options, f"--steps={steps.replace(',', '')}", f"--out={tmp_path / 'count'}").returncode == 0
        assert (tmp_path / "clock" / "samples.png").read_bytes() == (tmp_path / "count" / "samples.png").read_bytes()

    @pytest.mark.slow
    def test_two_minutes_of_training_learn_digits(self, script, tmp_path):
        """The default recipe, cut short, draws digits of which a classifier recognises most as what they were to be."""
        result = run("--steps=400", "--samples=60", "--sample-every=1000", f"--out={tmp_path}", timeout=900)
        assert result.returncode == 0, result.stderr
        unet, diffusion = load_model(tmp_path / "model.safetensors")
        labels = np.arange(60) % 10
        images = sample(diffusion, unet, (60, 28, 28, 1), steps=25, rng=0, labels=labels, guidance=1.5)
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "samples.png")), np.asarray(grid(images, 10)))
        evaluation = script.loaded("evaluate_digits")
        _, p = evaluation.load_classifier(evaluation.CLASSIFIER).look(images)
        assert (p.argmax(axis=1) == labels).mean() > 0.8


@on_posix
class TestPhotos:
    @pytest.mark.filterwarnings("ignore:.* files are left out")
    def test_images_of_ones_own_with_names_that_a_terminal_cannot_show(self, photos, example, tmp_path):
        """Classes in Japanese, and bytes that are no text: on a machine of another encoding, where the output is piped,
        it goes on as well. It learns of them in colour, and reports what cannot be read."""
        (photos / "a" / "broken.png").write_bytes(b"nothing")
        (photos / "b").rename(photos / "\u732b")
        os.rename(photos / "a", os.fsencode(photos) + b"/\xff")
        out, encoding = tmp_path / "out", {"PYTHONIOENCODING": "cp1252", "LC_ALL": "C", "PYTHONUTF8": "0"}
        options = f"--data={photos}", "--size=14", "--flip", "--samples=4", "--save-every=1", f"--out={out}"
        assert "\nclasses  0 \u732b, 1 \\udcff\n" in example("mnist_ddpm", *FEW, *options).out
        (out / "checkpoint.previous.safetensors").replace(out / "checkpoint.safetensors")
        result = run("--resume", f"--out={out}", env=os.environ | encoding)
        assert result.returncode == 0 and "resumed  at step 3 of 3" in result.stdout, result.stderr
        assert "6 images of 14 x 14 pixels" in result.stdout and "\nclasses  0 \\ud" in result.stdout
        assert "1 of 7 files are left out: \\udcff/broken.png: " in result.stderr
        unet, _ = load_model(out / "model.safetensors")
        assert_has(unet.config, in_channels=3, out_channels=3, image_size=(14, 14), classes=2)
        with Image.open(out / "samples.png") as picture:
            assert picture.mode == "RGB" and picture.size == (2 * (2 * 16 + 2), 2 * (2 * 16 + 2))

    @pytest.mark.parametrize("workers", [1, 2])
    @pytest.mark.slow
    def test_too_little_memory_is_said(self, photos, tmp_path, workers):
        import resource

        def little_memory():
            resource.setrlimit(resource.RLIMIT_AS, (3 * 2**29, 3 * 2**29))

        options = ["--patch=2", "--size=4096", "--batch=2", f"--workers={workers}", f"--data={photos}"]
        one_thread = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # each of BLAS's would want some of it
        result = run(*FEW, *options, f"--out={tmp_path / 'out'}", preexec_fn=little_memory, env=one_thread)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        says = "mnist_ddpm.py: out of memory, of which fewer --workers or a smaller --batch need less: "
        assert says in result.stderr


class TestTrouble:
    def test_what_cannot_be_drawn_does_not_lose_the_training(self, example, tmp_path):
        for name in ("step_00002.png", "samples.png"):
            (tmp_path / name).mkdir()  # in the way
        _, out, err = example("mnist_ddpm", *FEW, "--sample-every=2", f"--out={tmp_path}", code=1)
        assert "no grid after 2 steps: " in out
        assert re.search("^mnist_ddpm.py: .*samples.png", err, re.M) and (tmp_path / "model.safetensors").exists()

    @on_posix
    def test_a_disk_that_is_full_is_told_once_and_does_not_end_the_training(self, example, tmp_path):
        """Then the model cannot be written at last either, and it is named."""
        (tmp_path / "metrics.csv").mkdir()  # in the way
        options = [*LITTLE, "--steps=15", "--save-every=5", "--resume", f"--out={tmp_path}"]
        with files_of_at_most(50_000):
            _, out, err = example("mnist_ddpm", *options, code=1)
        assert re.findall(r"no checkpoint after (\d+) steps: ", out) == ["5", "15"]  # the first time, and the last
        assert re.findall(r"no line in metrics.csv after (\d+) steps: ", out) == ["1", *["15"] * 3]
        assert re.search("^mnist_ddpm.py: .*cannot write .*model.safetensors: File too large", err, re.M)
        assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob("*.safetensors"))


class TestStopping:
    def in_step(self, number, action, monkeypatch, train=tinyddpm.train):
        """Have the training call `action` in the step of this number."""

        def trained(*args, **settings):
            for state in train(*args, **settings):
                if state.step == number:
                    action()
                yield state

        monkeypatch.setattr(tinyddpm, "train", trained)

    @on_linux
    def test_it_goes_on_as_if_it_had_not_been_stopped(self, example, assert_same, monkeypatch, tmp_path):
        """The same model, pictures and log, but for the times in it."""
        options = [*LITTLE, "--steps=5", "--save-every=1"]
        example("mnist_ddpm", *options, f"--out={tmp_path / 'whole'}")
        for number, code, steps in (signal.SIGINT, 0, 4), (signal.SIGKILL, -9, 2):
            parts = tmp_path / number.name

            def stopped(number=number, parts=parts):
                self.in_step(3, lambda: signal.raise_signal(number), monkeypatch)
                os._exit(example("mnist_ddpm", *options, f"--out={parts}", code=None).code)

            assert in_a_copy(stopped) == code and sum(1 for _ in open(parts / "metrics.csv")) - 1 == steps
            assert (parts / "samples.png").exists() == (code == 0) == (not (parts / "running.lock").exists())
            said = "".join(example("mnist_ddpm", "--resume", f"--out={parts}")[1:])
            assert f"resumed  at step {steps + 1} of 5" in said and "trained  5 steps" in said
            assert_same(parts, tmp_path / "whole")
            assert not (parts / "running.lock").exists()

    @on_linux
    def test_a_second_run_in_the_folder_is_refused_and_changes_nothing(self, example, monkeypatch, tmp_path):
        here, codes = os.getpid(), []

        def others():
            before = {path: path.read_bytes() for path in tmp_path.iterdir()}
            for more in ([], ["--resume"]):
                said = example("mnist_ddpm", *FEW, *more, f"--out={tmp_path}", code=1).err
                assert f"{tmp_path} is in use by process {here} on " in said
            assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
            os._exit(0)

        self.in_step(2, lambda: codes.append(in_a_copy(others)), monkeypatch)
        example("mnist_ddpm", *FEW, "--save-every=1", f"--out={tmp_path}")
        assert codes == [0]

    @on_posix
    def test_ctrl_c_that_ends_who_reads_along_too_loses_nothing(self, tmp_path):
        """As of `python examples/mnist_ddpm.py 2>&1 | tee log`."""
        with started(tmp_path, "--steps=1000000", stderr=subprocess.STDOUT) as process:
            while not (tmp_path / "metrics.csv").exists() and process.poll() is None:
                time.sleep(0.02)
            process.stdout.close()
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        assert all((tmp_path / name).exists() for name in ("model.safetensors", "samples.png", "denoising.gif"))

    @on_posix
    def test_ctrl_c_again_ends_at_once(self, tmp_path):
        many = "--steps=1 --patch=2 --samples=1000 --timesteps=100 --sampling-steps=100"
        with started(tmp_path, *many.split()) as process:
            seen = ""
            while "sampling:" not in seen and process.poll() is None:
                seen += process.stderr.read(1)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert process.returncode == 130 and "mnist_ddpm.py: interrupted" in err and "Traceback" not in err
        assert (tmp_path / "model.safetensors").exists() and not (tmp_path / "samples.png").exists()
