"""What README.md says must work: its Python runs as printed or stands in the source, its commands run, its links lead
somewhere, and files are as long as it says."""

import functools
import importlib
import inspect
import pathlib
import re
import runpy
import shlex
import sys
import textwrap
import types

import numpy as np
import pytest
from PIL import Image
from test_structure import FILES, PACKAGE, lines_of_code

import tinyddpm
from tinyddpm import Diffusion, UNet, load_digits, load_model, make_schedule, save_diffusers, save_model

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
EXCERPTS = [text for text in PYTHON if text.startswith("# tinyddpm/")]
SNIPPETS = [text for text in PYTHON if text not in EXCERPTS]
LINES = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)).splitlines()
LINES += re.findall(r"^\| `(python .+?)`", README, re.MULTILINE)
COMMANDS = [part for line in LINES if line for part in line.split(" && ")]
EXAMPLES = [command for command in COMMANDS if command.startswith("python examples/")]


def test_it_is_short():
    assert len(README.splitlines()) < 400
    assert len(SNIPPETS) == 2 and len(EXCERPTS) == 8 and len(EXAMPLES) > 15


def test_files_are_as_long_as_it_says():
    """Lines of code, within a tenth."""
    told = {}
    for row in re.findall(r"^\| \[\w+\.py\].*", README, re.MULTILINE):
        _, files, lines, *_ = row.split("|")
        told |= dict(zip(re.findall(r"\[(\w+)\.py\]", files), map(int, re.findall(r"\d+", lines)), strict=True))
    assert set(told) == set(FILES)
    for name, lines in told.items():
        assert abs(lines_of_code(PACKAGE / f"{name}.py") - lines) <= max(3, 0.1 * lines), name


def test_every_terminal_takes_the_commands():
    """In zsh a # is no comment, in cmd.exe a ' is no quote."""
    assert not [line for line in LINES if "#" in line or "'" in line]


def test_mathematics_reach_the_reader():
    """Markdown takes the backslash from before punctuation, but not in a block of code."""
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    assert "$$" not in text
    assert not re.findall(r"\\[^A-Za-z\s]", "".join(re.findall(r"\$([^$]+)\$", text)))


def test_links_and_pictures_are_there():
    anchors = {"#" + heading.lower().replace(" ", "-") for heading in re.findall("^#+ (.+)$", README, re.MULTILINE)}
    for target in re.findall(r"\]\((?!http)(.+?)\)", README) + re.findall(r'src="(.+?)"', README):
        assert target in anchors or (ROOT / target).exists(), target


@pytest.mark.parametrize("excerpt", EXCERPTS, ids=lambda text: text.splitlines()[0])
def test_excerpts_stand_in_the_source(excerpt):
    """The first line names the functions; between what is of one and of the next stands '...'."""
    title, *lines = excerpt.splitlines()
    module, names = re.fullmatch(r"# tinyddpm/(\w+)\.py: (.+)", title).groups()
    parts = "\n".join(lines).split("\n...\n")
    for name, part in zip(names.split(", "), parts, strict=True):
        function = functools.reduce(getattr, name.split("."), importlib.import_module(f"tinyddpm.{module}"))
        source, n = inspect.getsource(function).splitlines(), len(part.splitlines())
        stretches = (textwrap.dedent("\n".join(source[i : i + n])) for i in range(len(source)))
        assert part in stretches, f"{name} is not as README has it"


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """A folder that has what commands and snippets find in a newcomer's, but small."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mnist").mkdir(parents=True)
    diffusion = Diffusion(make_schedule("linear", 25, beta_end=0.5))
    unet = UNet(channels=(8, 8), blocks=1, attention=(False, True), classes=10, label_dropout=0.1, image_size=28)
    save_model("runs/mnist/model.safetensors", unet, diffusion)
    pretrained = UNet(3, 3, channels=(8, 8), blocks=1, attention=(False, True), image_size=32)
    save_diffusers("ddpm-cifar10-32", pretrained, Diffusion(make_schedule("linear", 1000)))
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        Image.fromarray(np.full((40, 50, 3), 60 * i, np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    few = lambda full=False, train=True: [part[::100] for part in load_digits(train)]
    for module in (tinyddpm, sys.modules["tinyddpm.files.data"]):  # not from the network
        monkeypatch.setattr(module, "load_mnist", few)
    return tmp_path


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_python_snippets_run(snippet, newcomer, monkeypatch):
    tracked = []
    run = types.SimpleNamespace(log=lambda metrics, step: tracked.append((step, metrics)))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda project: run))
    snippet = snippet.replace("steps=10_000", "steps=2")
    names = {}
    exec(compile(snippet, "README.md", "exec"), names)
    if "tracker" in names:
        assert set(names["gradients"]) == set(names["unet"].parameters())
        assert [(step, metrics["step"]) for step, metrics in tracked] == [(1, 1), (2, 2)]
        assert tracked[0][1].keys() == {"step", "loss", "grad_norm", "lr", "images_per_second", "seconds"}
        assert load_model("digits.safetensors")[0].config["channels"] == (16, 32, 64)
    else:
        with Image.open("uses.png") as picture:
            assert picture.height == 6 * 64 and picture.width > 2 * 8 * 30


# what a command is given besides, to be small
SMALL = {
    "sample_digits": "--steps=2",
    "samplers": "--steps 2 --most=2",
    "denoise": "--steps=2 --samples=1",
    "inpaint": "--steps=2 --tries=1 --resamplings=1",
    "interpolate": "--steps=2 --count=2",
    "toy_2d": "--steps=2 --points=9",
    "figures": "--only encoding",
    "mnist_ddpm": "--steps=1 --channels 8 16 --samples=2 --sampling-steps=2 --workers=1",
    "evaluate_digits": "--samples=10 --steps=2",
    "draw_emoji": "",
    "sample_pretrained": "--steps=2 --samples=1",
}
# what is not run here, and why
ELSEWHERE = {
    "pip install": ".ci/run installs the extras, but for cuda12 and cuda13; huggingface_hub is not tried",
    "pytest": ".ci/run runs the tests",
    "hf download": "it needs the network",
    "mpiexec": "test_mpi.py runs the example on several ranks",
    "python examples/mnist_ddpm.py --device cuda": "test_cuda.py runs the example on a GPU",
    "python examples/benchmark.py": "test_benchmark.py runs it",
    "python examples/lesson.py": "test_lesson.py runs it",
}


def test_every_command_is_run():
    for command in COMMANDS:
        known = any(command.startswith(start) for start in ELSEWHERE)
        assert known or command in EXAMPLES and shlex.split(command)[1][9:-3] in SMALL, command


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in EXAMPLES if not any(c.startswith(start) for start in ELSEWHERE)])
def test_commands_run(command, newcomer, monkeypatch, capsys):
    _, script, *arguments = shlex.split(command)
    name = pathlib.Path(script).stem
    if name == "figures":
        pytest.importorskip("matplotlib")
    if "runs/emoji/pictures" in arguments:  # as drawn by the command before
        (newcomer / "runs/emoji").mkdir()
        (newcomer / "pictures").rename(newcomer / "runs/emoji/pictures")
    before = set(newcomer.rglob("*"))
    arguments = [argument.replace("~", str(newcomer)) for argument in arguments] + shlex.split(SMALL[name])
    monkeypatch.setattr(sys, "argv", [str(ROOT / script), *arguments])
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        if name == "draw_emoji" and "there is no font with emoji here" in str(end):
            pytest.skip(str(end))
        raise
    assert set(newcomer.rglob("*")) > before or "generated" in capsys.readouterr().out  # a picture, or a table
