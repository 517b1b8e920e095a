"""What the READMEs say must work: their Python runs as printed or stands in the source, their commands run, their links
lead somewhere, files are as long as they say, and what they say where is found is there."""

import ast
import functools
import importlib
import importlib.util
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
import tinyddpm.cli
from tinyddpm import Diffusion, UNet, load_digits, load_model, make_schedule, save_diffusers, save_model
from tinyddpm.diffusion import schedule
from tinyddpm.training.loop import micro_batch_gradient

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "tinyddpm/README.md", "examples/README.md", "CHANGELOG.md")
}


def prose(name):
    """A page without its blocks of code."""
    return re.sub(r"```.*?```", "", PAGES[name], flags=re.DOTALL)


TOUR = PAGES["tinyddpm/README.md"]
ALL = "\n".join(PAGES.values())
PYTHON = re.findall(r"```python\n(.*?)```", ALL, re.DOTALL)
EXCERPTS = [text for text in PYTHON if text.startswith("# tinyddpm/")]
SNIPPETS = [text for text in PYTHON if text not in EXCERPTS]
INLINE = [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", "\n".join(map(prose, PAGES)))]
LINES = "\n".join(re.findall(r"```sh\n(.*?)```", ALL, re.DOTALL)).splitlines()
LINES += [text for text in INLINE if re.match(r"(python3?|py|pip|pytest|mpiexec|hf) ", text)]
COMMANDS = list(dict.fromkeys(part for line in LINES if line for part in line.split(" && ")))
EXAMPLES = [command for command in COMMANDS if command.startswith("python ")]


def rows(text):
    """The cells of each row of the tables in a text."""
    lines = (line.strip() for line in text.splitlines() if line.startswith("| "))
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


def linked(cell):
    return re.findall(r"\]\((.+?)\)", cell)


def test_it_is_short_and_nothing_is_overlooked():
    assert len(PAGES["README.md"].splitlines()) < 200
    assert len(EXCERPTS) == 13 and len(EXAMPLES) > 25
    assert {snippet_with(line) for line in OUTCOMES} == set(SNIPPETS)  # each is run


def test_files_and_rooms_are_as_long_as_it_says():
    """Lines of code, within a tenth."""
    told = {}
    for files, lines, *_ in rows(TOUR):
        if re.fullmatch(r"\d+( \+ \d+)*", lines):
            told |= dict(zip(linked(files), map(int, lines.split(" + ")), strict=True))
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert set(told) == {*FILES, *rooms, "__init__.py"}
    for name, lines in told.items():
        files = [PACKAGE / name] if name not in rooms else (PACKAGE / name).rglob("*.py")
        assert abs(sum(map(lines_of_code, files)) - lines) <= max(3, 0.1 * lines), name


def test_what_ls_shows_and_every_file_is_in_the_table_of_its_room():
    _, _, text = TOUR.partition("`ls tinyddpm` shows")
    told = [name for cells in rows(text.partition("###")[0]) for name in linked(cells[0])]
    assert sorted(told) == sorted({path.name for path in PACKAGE.iterdir()} - {"__pycache__", "README.md"})
    for room in re.split(r"^### ", TOUR, flags=re.MULTILINE)[1:]:
        told = [file for cells in rows(room.partition("\n## ")[0]) for file in linked(cells[0])]
        assert sorted(told) == [file for file in FILES if file.startswith(f"{room.split()[0]}/")]


def test_twins_are_where_it_says():
    """Each by name, and for a CPU, a GPU or both; those for a GPU are read, since it takes CuPy to import them."""
    tree = ast.parse((PACKAGE / "speed" / "cuda.py").read_text())
    (twins,) = (n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "TWINS")
    on_cpu, on_gpu = set(importlib.import_module("tinyddpm.speed.cpu").TWINS), {key.value for key in twins.keys}
    told = set()
    _, _, text = TOUR.partition("| plain | stands in ")
    for cells in rows(text.partition("\n## ")[0])[1:]:
        for name in re.findall(r"`(\w+)`", cells[0]):
            module = importlib.import_module("tinyddpm." + linked(cells[1])[0][:-3].replace("/", "."))
            function = getattr(module, name)
            assert hasattr(getattr(function, "raw", function), "plain"), name
            assert (name in on_cpu, name in on_gpu) == tuple(map(bool, cells[2:])), name
            told.add(name)
    assert told == on_cpu | on_gpu


def test_what_is_asked_for_is_where_it_says():
    """Such as: algorithm 1 is `descend` in tinyddpm/training/loop.py."""
    found = re.findall(r"(Algorithm 1|Algorithm 2|Equation 14), [\w ]+, is\s+`([\w.]+)` in\s+\[(.+?)\.py\]", ALL)
    assert [what for what, _, _ in found] == ["Algorithm 1", "Algorithm 2", "Equation 14"]
    for what, name, path in found:
        module = importlib.import_module(path.replace("/", "."))
        function = functools.reduce(getattr, name.split("."), module)
        said = function.__doc__ + module.__doc__ + (Diffusion.loss.__doc__ if "loss" in name else "")
        assert function.__module__ == module.__name__ and what.lower() in said.lower()


def test_every_terminal_takes_the_commands():
    """In zsh a # is no comment, in cmd.exe a ' is no quote."""
    assert not [line for line in LINES if "#" in line or "'" in line]


def anchors(name):
    """What links to the headings of a page name them by after #, as GitHub makes it."""
    headings = re.findall("^#+ (.+)$", prose(name), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_mathematics_links_and_pictures_reach_the_reader(name):
    """Markdown takes the backslash from before punctuation, but not in a block of code. Links are seen from the folder
    of the page; of another page, the heading is there too."""
    text = prose(name)
    assert "$$" not in text and text.count("$") % 2 == 0
    assert not re.findall(r"\\[^A-Za-z\s]", "".join(re.findall(r"\$([^$]+)\$", text)))
    for target in re.findall(r"\]\((?!http)(.+?)\)", text) + re.findall(r'src="(.+?)"', text):
        file, _, anchor = target.partition("#")
        path = ((ROOT / name).parent / file).resolve() if file else ROOT / name
        assert path.exists() and (file or anchor), target
        if anchor:
            assert anchor in anchors(path.relative_to(ROOT).as_posix()), target


def test_every_picture_is_shown_and_every_example_is_in_the_gallery():
    folder = ROOT / "examples" / "pictures"
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    assert set(re.findall(r"pictures/([\w/]+\.\w+)", ALL)) == there
    there = {path.name for path in (ROOT / "examples").rglob("*.py")}
    assert set(re.findall(r"^##+ (\w+\.py)$", PAGES["examples/README.md"], re.MULTILINE)) == there


def test_where_it_moved_to_is_there():
    _, _, text = PAGES["CHANGELOG.md"].partition("| before | now |")
    assert re.search(r"^## ([\d.]+)", PAGES["CHANGELOG.md"], re.MULTILINE)[1] == tinyddpm.__version__
    named = [re.findall(r"`(tinyddpm[\w.]+)`", cells[1]) for cells in rows(text)]
    assert sum(map(len, named)) > 30 and all(named)
    for module in sum(named, []):
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize("excerpt", EXCERPTS, ids=lambda text: text.splitlines()[0])
def test_excerpts_stand_in_the_source(excerpt):
    """The first line names the functions; between what is of one and of the next stands '...'."""
    title, *lines = excerpt.splitlines()
    path, names = re.fullmatch(r"# (tinyddpm/[\w/]+)\.py: (.+)", title).groups()
    parts = "\n".join(lines).split("\n...\n")
    for name, part in zip(names.split(", "), parts, strict=True):
        function = functools.reduce(getattr, name.split("."), importlib.import_module(path.replace("/", ".")))
        source, n = inspect.getsource(function).splitlines(), len(part.splitlines())
        stretches = (textwrap.dedent("\n".join(source[i : i + n])) for i in range(len(source)))
        assert part in stretches, f"{name} is not as it stands in the source"


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
    np.savez("pytorch_digits.npz", images=load_digits()[0][::500])
    monkeypatch.setenv("HOME", str(tmp_path))
    few = lambda full=False, train=True: [part[::100] for part in load_digits(train)]
    for name, module in list(sys.modules.items()):  # not from the network
        if name.startswith("tinyddpm") and hasattr(module, "load_mnist"):
            monkeypatch.setattr(module, "load_mnist", few)
    return tmp_path


def is_trained(names, monkeypatch):
    assert load_model("digits.safetensors")[0].config["channels"] == (8, 16, 8)
    with Image.open("digits.png") as picture:
        assert picture.size == (2 * (4 * 30 + 2), 2 * (4 * 30 + 2))


def is_the_gradient_of_training(names, monkeypatch):
    loss, gradient = micro_batch_gradient(names["unet"], names["diffusion"], names["batches"])(0, 0)
    np.testing.assert_array_equal(names["loss"].data, loss)
    np.testing.assert_allclose(names["gradient"], gradient, rtol=1e-4, atol=1e-7)
    assert np.abs(gradient).max() > 1e-3


def is_the_same_the_plain_way(names, monkeypatch):
    assert names["fast"].shape == (2, 28, 28, 1)
    np.testing.assert_allclose(names["fast"], names["slow"], atol=1e-2)


def are_schedules(names, monkeypatch):
    """As arrays and, once they are where the page says, by name; a saved model keeps what it had."""
    cubic, quarter_circle, own, other = (names[name] for name in ("cubic", "quarter_circle", "diffusion", "another"))
    np.testing.assert_allclose(other.schedule.alpha_bar[[399, 799]], [0.84**0.5, 0.6], rtol=1e-9)
    save_model("own.safetensors", UNet(channels=(8, 8), attention=(False, False)), own)
    np.testing.assert_array_equal(load_model("own.safetensors")[1].schedule.beta, cubic(1000))
    with pytest.raises(ValueError, match="unknown schedule 'cubic'"):
        make_schedule("cubic", 1000)
    monkeypatch.setitem(schedule.BETA, "cubic", cubic)
    monkeypatch.setitem(schedule.GAMMA, "quarter_circle", quarter_circle)
    monkeypatch.setattr(schedule, "SCHEDULES", (*schedule.BETA, *schedule.GAMMA))
    np.testing.assert_array_equal(make_schedule("cubic", 1000, beta_end=0.03).beta, cubic(1000, beta_end=0.03))
    np.testing.assert_array_equal(make_schedule("quarter_circle", 1000).beta, other.schedule.beta)


def is_a_test(names, monkeypatch):
    names["test_cubic"]()
    cubic = names["cubic"]
    for other in (lambda *ends: cubic(*ends) * 1.01, lambda *ends: cubic(*ends) if len(ends) > 1 else [0.001]):
        monkeypatch.setitem(names, "cubic", other)
        with pytest.raises(AssertionError):
            names["test_cubic"]()


def is_tracked(names, monkeypatch):
    tracked = names["tracker"].tracked
    assert set(names["gradients"]) == set(names["unet"].parameters())
    assert [(step, metrics["step"]) for step, metrics in tracked] == [(1, 1), (2, 2)]
    assert tracked[0][1].keys() == {"step", "loss", "grad_norm", "lr", "images_per_second", "seconds"}
    assert load_model("digits.safetensors")[0].config["channels"] == (8, 16, 8)


def is_a_page_of_uses(names, monkeypatch):
    with Image.open("uses.png") as picture:
        assert picture.height == 6 * 64 and picture.width > 2 * 8 * 30


OUTCOMES = {  # by a line that the snippet has
    "save_model(": is_trained, "flat_gradient(": is_the_gradient_of_training, "def cubic(": are_schedules,
    "with plain():": is_the_same_the_plain_way, "def test_cubic(": is_a_test, "wandb.init(": is_tracked,
    "uses.png": is_a_page_of_uses,
}  # fmt: skip
FEWER = {
    "steps=10_000": "steps=2, batch=8", "steps=2_000": "steps=2, batch=8", "steps=50": "steps=2", "steps=20": "steps=5",
    "channels=(16, 32, 64)": "channels=(8, 16, 8)", "UNet()": "UNet(channels=(8, 16, 8))",
}  # fmt: skip


def snippet_with(line):
    (snippet,) = (text for text in SNIPPETS if line in text)
    return snippet


@pytest.mark.parametrize("line", OUTCOMES)
def test_python_snippets_run(line, newcomer, monkeypatch):
    tracker = types.SimpleNamespace(tracked=[], log=lambda metrics, step: tracker.tracked.append((step, metrics)))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda project: tracker))
    snippet, names = snippet_with(line), {}
    if line == "def test_cubic(":  # which goes on from another one
        snippet = f"{snippet_with('def cubic(')}\n\n{snippet}"
    for many, few in FEWER.items():
        snippet = snippet.replace(many, few)
    exec(compile(snippet, "README.md", "exec"), names)
    OUTCOMES[line](names, monkeypatch)


# what a command is given besides, to be small
TRAINING = "--steps=1 --channels 8 16 --samples=2 --sampling-steps=2 --workers=1"
SMALL = {
    "sample_digits": "--steps=2", "samplers": "--steps 2 --most=2", "denoise": "--steps=2 --samples=1",
    "inpaint": "--steps=2 --tries=1 --resamplings=1", "interpolate": "--steps=2 --count=2",
    "toy_2d": "--steps=2 --points=9", "figures": "--only encoding", "mnist_ddpm": TRAINING,
    "evaluate_digits": "--samples=10 --steps=2", "draw_emoji": "", "sample_pretrained": "--steps=2 --samples=1",
    "tinyddpm": "", "tinyddpm train": TRAINING, "tinyddpm sample": "--steps=2 --samples=2",
    "tinyddpm evaluate": "--samples=10 --steps=2", "pydoc": "",
}  # fmt: skip
# what is not run here, and why
ELSEWHERE = {
    "pip install": ".ci/run installs the extras, but for cuda12 and cuda13; huggingface_hub is not tried",
    "python3 -m venv": ".ci/run makes them",
    ". .venv/bin/activate": ".ci/run makes virtual environments",
    "py -m venv": "it is Windows'",
    "pytest": ".ci/run runs the tests",
    "hf download": "it needs the network",
    "mpiexec": "tests/speed/test_mpi.py runs the example on several ranks",
    "python examples/mnist_ddpm.py --device cuda": "it needs a GPU; tests/speed/test_cuda.py trains on one",
    "python examples/measure/benchmark.py": "tests/examples/test_benchmark.py runs it",
    "python examples/measure/pytorch_digits.py": "tests/examples/test_pytorch_digits.py runs it",
    "python examples/lesson.py": "tests/examples/test_lesson.py runs it",
    "python tests/mutation.py": "it takes long, and packages that no extra has",
}


def program(command):
    """What SMALL knows a command by, and the arguments that come after that: `python -m tinyddpm train` is one."""
    _, script, *arguments = shlex.split(command)
    if script != "-m":
        return pathlib.Path(script).stem, arguments
    count = 2 if arguments[0] == "tinyddpm" else 1
    return " ".join(arguments[:count]), arguments[count:]


def test_every_command_is_run():
    for command in COMMANDS:
        known = [start for start in ELSEWHERE if command.startswith(start)]
        assert known or command in EXAMPLES and program(command)[0] in SMALL, command
    for start, where in ELSEWHERE.items():
        assert any(command.startswith(start) for command in COMMANDS), start
        assert all((ROOT / file).exists() for file in re.findall(r"tests/\S+\.py|\.ci/run", where)), where
    scripts = {command.split()[1] for command in EXAMPLES} - {"-m", "tests/mutation.py"}
    assert scripts == {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").rglob("*.py")}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:steps, iterations")  # of two steps
@pytest.mark.parametrize("command", [c for c in EXAMPLES if not any(c.startswith(start) for start in ELSEWHERE)])
def test_commands_run(command, newcomer, monkeypatch, capsys):
    name, arguments = program(command)
    if name == "figures":
        pytest.importorskip("matplotlib")
    if "runs/emoji/pictures" in arguments:  # as drawn by the command before
        (newcomer / "runs/emoji").mkdir()
        (newcomer / "pictures").rename(newcomer / "runs/emoji/pictures")
    before, small = set(newcomer.rglob("*")), SMALL[name]
    if "--minutes" in arguments:  # so many steps instead
        place = arguments.index("--minutes")
        arguments = arguments[:place] + arguments[place + 2 :]
    if "--start" in arguments:  # a model has channels of its own
        small = small.replace("--channels 8 16 ", "")
    arguments = [argument.replace("~", str(newcomer)) for argument in arguments] + shlex.split(small)
    script = shlex.split(command)[1]
    try:
        if script == "-m":
            module, *subcommand = name.split()
            monkeypatch.setattr(sys, "argv", [module, *subcommand, *arguments])
            monkeypatch.delitem(sys.modules, f"{module}.__main__", raising=False)  # as another test may have left it
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            monkeypatch.setattr(sys, "argv", [str(ROOT / script), *arguments])
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        if name == "draw_emoji" and "there is no font with emoji here" in str(end):
            pytest.skip(str(end))
        raise
    told = capsys.readouterr().out
    shown = {"evaluate_digits": "generated", "tinyddpm evaluate": "generated", "pydoc": "NAME", "tinyddpm": "evaluate"}
    if name in shown:
        assert shown[name] in told
    else:
        assert set(newcomer.rglob("*")) > before  # a picture
