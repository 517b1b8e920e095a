"""What an example or a command cannot do is said in a line, before anything is begun or written. What they have in
common is refused in test_cli.py, and what trainings have, in test_program.py."""

import importlib.util
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from tinyddpm import Diffusion, UNet, make_schedule, save_model
from tinyddpm.__main__ import main
from tinyddpm.files.pictures import to_uint8

WITH_THE_MODEL = "sample_digits", "samplers", "denoise", "inpaint", "interpolate"
OUT = dict.fromkeys((*WITH_THE_MODEL, "tinyddpm sample", "sample_pretrained"), "p.png")
OUT |= dict.fromkeys(("tinyddpm train", "mnist_ddpm", "toy_2d", "lesson"), "new/out")
# an example or `python -m tinyddpm ...`, its arguments, and what it says of these; the fixture `folder` has the files
TABLE = """
sample_digits --digits=2x -> --digits must be digits such as 2026, got '2x'
sample_digits --steps=1001 -> steps: expected an integer from 1 to 1000
sample_digits --steps=0 -> steps: expected an integer from 1 to 1000
sample_digits --method=euler -> invalid choice: 'euler'
sample_digits --device=gpu -> device: 'gpu' is unknown
samplers --steps 0 -> steps: expected an integer from 1 to 1000
samplers --methods euler -> invalid choice: 'euler'
denoise --sigma 1 -1 -> --sigma must be a number greater than 0, got -1.0
denoise --sigma nan -> --sigma must be a number greater than 0, got nan
denoise --sigma 1 1000 -> sigma: 1000.0 is more noise than this schedule knows
denoise --steps=-1 -> --steps must be 1 or greater, got -1
inpaint --known right -> invalid choice: 'right'
inpaint --resamplings=0 -> resamplings: expected an integer >= 1, got 0
interpolate --pairs 3 -> --pairs must be of two digits each, such as 38, got '3'
interpolate --count=1 -> count: expected an integer >= 2, got 1
lesson --seed=-1 -> --seed must be 0 or greater, got -1
toy_2d --data=cube -> argument --data: invalid choice: 'cube'
toy_2d --out=empty.npz/out -> empty.npz/out
toy_2d --seed=-1 -> --seed must be 0 or greater, got -1
figures --only x -> invalid choice: 'x'
draw_emoji --font=a.ttf -> a.ttf:
draw_emoji --size=7 -> --size must be 8 or greater, got 7
pytorch_digits --seed=-1 -> --seed must be 0 or greater, got -1
pytorch_digits --minutes=0 -> --minutes must be a number greater than 0, got 0.0
pytorch_digits --lr=0 -> --lr must be a number greater than 0, got 0.0
evaluate_digits -> expected what to evaluate, or --train FILE
evaluate_digits nowhere -> there is no nowhere
evaluate_digits uint8.npz --samples=5 -> --samples must be 10 or greater, got 5
evaluate_digits uint8.npz --workers=0 -> --workers must be 1 or greater, got 0
evaluate_digits uint8.npz --seed=-1 -> --seed must be 0 or greater, got -1
evaluate_digits uint8.npz --json=nowhere/r.json -> --json: cannot write nowhere/r.json
evaluate_digits uint8.npz --classifier=uint8.npz -> --classifier:
evaluate_digits uint8.npz --classifier=flipped.safetensors -> flipped.safetensors has been damaged
evaluate_digits two.npz -> expected an array 'images', or only one, got a, b
evaluate_digits few.npz -> expected at least 10 images, got 3
evaluate_digits large.npz -> expected images (N, 28, 28), uint8 or floats in [-1, 1], got float64 (12, 32, 32, 1)
evaluate_digits bright.npz -> expected floats in [-1, 1], got 0 ... 255
evaluate_digits nan.npz -> expected floats in [-1, 1], got nan
evaluate_digits text.npz -> uint8 or floats in [-1, 1], got <U3 (12,)
evaluate_digits from_0_to_1.npz -> expected floats in [-1, 1], got 0 ... 1
evaluate_digits one.npz -> one.npz: expected arrays in a file as np.savez writes it
evaluate_digits empty.npz -> empty.npz: expected arrays in a file as np.savez writes it
evaluate_digits pickled.npz -> pickled.npz
evaluate_digits broken.npz -> broken.npz
evaluate_digits broken.safetensors -> broken.safetensors
evaluate_digits colour.safetensors -> expected a model of grey digits of 28 x 28 pixels, got one of 3 channels
evaluate_digits large.safetensors -> for images of (32, 32)
evaluate_digits trained -> for images of (32, 32)
evaluate_digits killed -> for images of (32, 32)
evaluate_digits --train=c --json=r -> --json: with --train nothing is evaluated, so leave it out
evaluate_digits few.npz --json=few.npz -> few.npz is what is to be evaluated
tinyddpm train --digits=3 -> error: --digits: there is no model in
tinyddpm train --data=nowhere -> --data must be digits, mnist, fashion or a folder, and there is no folder nowhere
tinyddpm train --data=damaged.safetensors -> --data must be digits, mnist, fashion or a folder, and damaged
tinyddpm train --device=gpu -> device: 'gpu' is unknown; use 'cpu', 'cuda' or 'cuda:N'
mnist_ddpm --out=damaged.safetensors/out -> error: --out: cannot write to damaged.safetensors/out: Not a directory
mnist_ddpm --out=damaged.safetensors -> error: --out: cannot write to damaged.safetensors: File exists
tinyddpm sample nowhere.safetensors -> path: there is no file nowhere.safetensors
tinyddpm sample damaged.safetensors -> path: damaged.safetensors is not a readable safetensors file
tinyddpm sample diffusers/scheduler -> config.json, which diffusers saves in a folder with a model
tinyddpm sample plain.safetensors --labels 1 -> --labels: this model knows no classes, so leave it out
tinyddpm sample plain.safetensors --guidance=0 -> --guidance: this model cannot be guided
tinyddpm sample classes.safetensors --guidance=2 -> --guidance: this model cannot be guided
tinyddpm sample classes.safetensors --labels 3 -> --labels: this model knows 0 to 2, got 3
tinyddpm sample --labels 3 10 -> --labels: this model knows 0 to 9, got 3 10
tinyddpm sample --labels 3 -1 -> --labels: this model knows 0 to 9, got 3 -1
tinyddpm sample original.safetensors -> --size: this model does not say how large its images are
tinyddpm sample checkpoint.safetensors -> --size: this model does not say how large its images are
tinyddpm sample plain.safetensors --size=7 -> --size: 2 levels and squares of 1 x 1 pixels need a height
tinyddpm sample plain.safetensors --variant=fp16 -> --variant: only a folder of diffusers has variants
tinyddpm sample diffusers --variant=fp16 -> diffusion_pytorch_model.fp16.safetensors
tinyddpm sample --samples=1000000000 -> error: --samples must be 10000 at most, got 1000000000
tinyddpm sample --guidance=nan -> error: --guidance must be a number, got nan
tinyddpm sample --guidance=1e308 -> error: --guidance must be 1000 at most, got 1e+308
sample_pretrained nowhere -> error: FOLDER: there is no nowhere. To fetch Ho et al.'s model for CIFAR-10: hf download go
sample_pretrained run -> there is no file run/config.json
sample_pretrained original.safetensors -> --size: this model does not say how large its images are, so it has
sample_pretrained diffusers --label=-1 -> --label: this model knows 0 to 2, got -1
sample_pretrained diffusers --label=3 -> --label: this model knows 0 to 2, got 3
sample_pretrained rgb --label=1 -> --label: this model knows no classes, so leave it out
sample_pretrained rgb --out=picture -> error: argument --out: expected a picture such as digits.png, got picture
sample_pretrained rgb --variant=fp16 -> diffusion_pytorch_model.fp16.safetensors
tinyddpm evaluate run --samples=5 -> error: --samples must be 10 or greater, got 5
"""
AT_LEAST_1 = {
    "sample_digits": "rows", "denoise": "samples", "inpaint": "tries", "lesson": "steps workers",
    "toy_2d": "steps workers points", "pytorch_digits": "samples threads", "tinyddpm sample": "steps samples size",
    "sample_pretrained rgb": "steps samples size", "benchmark": "threads",
}  # fmt: skip
ZERO = [(command, f"--{it}") for command, names in AT_LEAST_1.items() for it in names.split()]
REFUSED = [
    *(line.split(" -> ") for line in TABLE.strip().splitlines()),
    *((f"{command} {option}=0", f"{option} must be 1 or greater, got 0") for command, option in ZERO),
    *((f"{name} --out=picture", "--out: expected a picture such as") for name in (*WITH_THE_MODEL, "tinyddpm sample")),
]


@pytest.fixture(scope="module")
def folder(models, script, digits):
    """Models of each kind, and images and models that evaluate_digits.py cannot take, each named for what is wrong, but
    for uint8.npz."""
    folder, images = models[0], np.zeros((12, 28, 28))
    rising = np.arange(12)[:, None, None] / 11
    for wrong, array in {
        "uint8": to_uint8(digits()[0][::250])[..., 0], "few": images[:3] - 1, "large": np.zeros((12, 32, 32)),
        "bright": images + 255 * rising, "nan": images * np.nan, "text": np.array(["abc"] * 12),
        "from_0_to_1": images + rising, "pickled": np.array([{}, []], object),
    }.items():  # fmt: skip
        np.savez(folder / f"{wrong}.npz", array)
    np.savez(folder / "two.npz", a=images, b=images)
    np.save(folder / "one.npy", images)
    (folder / "one.npy").rename(folder / "one.npz")
    for nothing in ("empty.npz", "a.ttf"):
        (folder / nothing).write_bytes(b"")
    for suffix in ("npz", "safetensors"):
        (folder / f"broken.{suffix}").write_bytes(b"PK nothing of the kind")
    diffusion = Diffusion(make_schedule("linear", 1000))
    save_model(folder / "colour.safetensors", UNet(3, 3, (8, 8), 1, (False, True)), diffusion)
    save_model(folder / "large.safetensors", UNet(image_size=32), diffusion)
    for run, file in (("trained", "model"), ("killed", "checkpoint")):  # which is to be taken, and not the picture
        (folder / run).mkdir()
        shutil.copy(folder / "large.safetensors", folder / run / f"{file}.safetensors")
        Image.new("L", (28, 28)).save(folder / run / "0.png")
    content = bytearray(script("evaluate_digits").with_name("digit_classifier.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "flipped.safetensors").write_bytes(content)
    return folder


@pytest.mark.parametrize(("command", "says"), REFUSED)
def test_it_is_refused_in_a_line(ended, example, folder, monkeypatch, tmp_path, command, says):
    """And leaves no folder."""
    monkeypatch.chdir(folder)
    name, *given = command.split()
    if name == "pytorch_digits" and not importlib.util.find_spec("torch"):
        pytest.skip("needs PyTorch")
    program = f"{name} {given.pop(0)}" if name == "tinyddpm" else name
    if program in OUT:
        given.insert(0, f"--out={tmp_path / OUT[program]}")
    if name == "tinyddpm":
        code, _, said = ended(main, [program.split()[1], *given])
    else:
        code, _, said = example(name, *given, code=None)
    program = f"python -m {program}" if name == "tinyddpm" else f"{name}.py"
    (line,) = [line for line in said.splitlines() if line.startswith(f"{program}: ")]
    assert says in line and code == (2 if line.startswith(f"{program}: error: ") else 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["torch", "diffusers"])
def test_what_is_missing_for_a_comparison_is_said(example, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    said = example("benchmark", code=1).err
    assert missing in said and "pip install -e '.[peers]'" in said


@pytest.mark.parametrize("device, says", [("cuda", "needs CuPy"), ("cuda:1", "needs CuPy"), ("gpu", "is unknown")])
@pytest.mark.parametrize("more", [[], ["--profile"]])
def test_a_gpu_that_is_not_there_is_said(example, monkeypatch, device, says, more):
    monkeypatch.setitem(sys.modules, "cupy", None)
    said = example("benchmark", "--device", device, *more, code=1).err
    assert said.startswith(f"benchmark.py: device: '{device}' {says}")
