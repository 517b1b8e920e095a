"""What README.md says must work: its Python runs as printed, its links lead somewhere."""

import pathlib
import re

import pytest
from PIL import Image

from tinyddpm import Diffusion, UNet, make_schedule, save_diffusers, save_model

README = pathlib.Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_there_are_snippets():
    assert len(SNIPPETS) == 6


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_python_snippets_run(snippet, tmp_path, monkeypatch):
    if '"cuda"' in snippet:
        pytest.skip("test_cuda.py runs it")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mnist").mkdir(parents=True)  # as the example leaves it, but small
    diffusion = Diffusion(make_schedule("linear", 25, beta_end=0.5))
    save_model("runs/mnist/model.safetensors", UNet(channels=(8, 8), blocks=1, attention=(False, True)), diffusion)
    pretrained = UNet(3, 3, channels=(8, 8), blocks=1, attention=(False, True), image_size=32)
    save_diffusers(
        "ddpm-cifar10-32", pretrained, Diffusion(make_schedule("linear", 1000))
    )  # as it is fetched, but small
    names = {}
    exec(compile(snippet, "README.md", "exec"), names)
    if "load_diffusers" in names:
        with Image.open("pretrained.png") as picture:
            assert picture.size == (2 * (4 * 34 + 2), 2 * (4 * 34 + 2)) and picture.mode == "RGB"
    elif "rows" in names:
        with Image.open("uses.png") as picture:
            assert picture.height == 6 * 64 and picture.width > 2 * 8 * 30
    elif "grid" in names:
        with Image.open("digits.png") as picture:
            assert picture.size == (2 * (4 * 30 + 2), 2 * (4 * 30 + 2))
    elif "bits" in names:
        bits = names["bits"]
        assert 0 < bits.total == bits.prior + bits.terms.sum() and names["images"].shape == (4, 28, 28, 1)
    else:
        assert set(names["gradients"]) == set(names["unet"].parameters())


def test_links_and_pictures_are_there():
    for target in re.findall(r"\]\((?!http)(.+?)\)", README.read_text()):
        assert (README.parent / target).exists(), target
