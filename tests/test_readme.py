"""What README.md says must work: its Python runs as printed, its links lead somewhere."""

import pathlib
import re
import sys
import types

import pytest
from PIL import Image

import tinyddpm
from tinyddpm import Diffusion, UNet, load_digits, load_model, make_schedule, save_diffusers, save_model

README = pathlib.Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_there_are_snippets():
    assert len(SNIPPETS) == 7


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_python_snippets_run(snippet, tmp_path, monkeypatch):
    if '"cuda"' in snippet:
        pytest.skip("test_cuda.py runs it")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mnist").mkdir(parents=True)  # as the example leaves it, but small
    diffusion = Diffusion(make_schedule("linear", 25, beta_end=0.5))
    unet = UNet(channels=(8, 8), blocks=1, attention=(False, True), classes=10, label_dropout=0.1)
    save_model("runs/mnist/model.safetensors", unet, diffusion)
    pretrained = UNet(3, 3, channels=(8, 8), blocks=1, attention=(False, True), image_size=32)
    save_diffusers(
        "ddpm-cifar10-32", pretrained, Diffusion(make_schedule("linear", 1000))
    )  # as it is fetched, but small
    tracked = []
    run = types.SimpleNamespace(log=lambda metrics, step: tracked.append((step, metrics)))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda project: run))
    if "wandb" in snippet:  # but not for as long, nor from the network
        snippet = snippet.replace("steps=10_000", "steps=2").replace("UNet()", "UNet(channels=(8, 8, 8))")
        monkeypatch.setattr(tinyddpm, "load_mnist", lambda full: [part[:64] for part in load_digits()])
    names = {}
    exec(compile(snippet, "README.md", "exec"), names)
    if "tracker" in names:
        assert [(step, metrics["step"]) for step, metrics in tracked] == [(1, 1), (2, 2)]
        assert tracked[0][1].keys() == {"step", "loss", "grad_norm", "lr", "images_per_second", "seconds"}
        assert load_model("digits.safetensors")[0].config["channels"] == (8, 8, 8)
    elif "load_diffusers" in names:
        with Image.open("pretrained.png") as picture:
            assert picture.size == (2 * (4 * 34 + 2), 2 * (4 * 34 + 2)) and picture.mode == "RGB"
    elif "rows" in names:
        with Image.open("uses.png") as picture:
            assert picture.height == 6 * 64 and picture.width > 2 * 8 * 30
    elif "grid" in names:
        with Image.open("digits.png") as picture:
            assert picture.size == (2 * (2 * 30 + 2), 2 * (2 * 30 + 2))
    elif "bits" in names:
        bits = names["bits"]
        assert 0 < bits.total == bits.prior + bits.terms.sum() and names["images"].shape == (4, 28, 28, 1)
    else:
        assert set(names["gradients"]) == set(names["unet"].parameters())


def test_links_and_pictures_are_there():
    headings = re.findall("^#+ (.+)$", README.read_text(), re.MULTILINE)
    anchors = {"#" + heading.lower().replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\((?!http)(.+?)\)", README.read_text()):
        assert target in anchors or (README.parent / target).exists(), target
