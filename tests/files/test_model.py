"""A model goes into one file and comes out as it was; what is no such file is refused."""

import errno
import itertools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from tinyddpm import Diffusion, Schedule, UNet, load_model, make_schedule, sample, save_diffusers, save_model
from tinyddpm.exchange.names import laid_out, original_layout
from tinyddpm.files.tensors import Stored

TINY = dict(channels=(4, 8), blocks=1, attention=(False, True), groups=2, heads=2, dropout=0.1)
DIFFUSION = Diffusion(make_schedule("linear", 25, beta_start=1e-3, beta_end=0.4), "v", variance="large")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_there_and_back(tmp_path, dtype):
    unet = UNet(**TINY, rng=7).to(dtype=dtype)
    save_model(tmp_path / "m.safetensors", unet, DIFFUSION)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    again, diffusion = load_model(tmp_path / "m.safetensors")
    assert again.config == unet.config and again.dtype == dtype
    for name, value in unet.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], value)
    np.testing.assert_array_equal(diffusion.schedule.beta, DIFFUSION.schedule.beta)
    assert (diffusion.objective, diffusion.variance) == ("v", "large")
    np.testing.assert_array_equal(sample(diffusion, again, (1, 4, 4, 1)), sample(DIFFUSION, unet, (1, 4, 4, 1)))


@pytest.mark.parametrize(
    ("schedule", "settings"),
    [
        (make_schedule("cosine", 30, input_scale=0.5, s=0.01, tau=2), {"objective": "x0", "loss_type": "weighted_mu"}),
        (make_schedule("sigmoid", 30, zero_terminal_snr=True, start=0, tau=0.5), {"objective": "v"}),
        (make_schedule("cosine_logsnr", 30, shift=-1), {"loss_type": "min_snr", "min_snr_gamma": 3.0}),
        (make_schedule("linear_gamma", 30), {"variance": "learned_range", "loss_type": "hybrid"}),
        (Schedule([0.1, 0.7, 1.0], 2.0), {"objective": "x0"}),
    ],
)
def test_every_setting_of_the_diffusion_comes_back(tmp_path, schedule, settings):
    out_channels = 2 if settings.get("variance") == "learned_range" else 1
    unet = UNet(**TINY, out_channels=out_channels, encoding="interleaved")
    save_model(tmp_path / "m.safetensors", unet, Diffusion(schedule, **settings))
    again, diffusion = load_model(tmp_path / "m.safetensors")
    assert again.config == unet.config and again.config["encoding"] == "interleaved"
    np.testing.assert_array_equal(diffusion.schedule.beta, schedule.beta)
    for name in ("name", "input_scale", "parameters"):
        assert getattr(diffusion.schedule, name) == getattr(schedule, name)
    settings = {"objective": "eps", "variance": "small", "loss_type": "simple", "min_snr_gamma": 5.0} | settings
    assert {name: getattr(diffusion, name) for name in settings} == settings


@pytest.mark.parametrize(("dtype", "digits", "size"), [("float16", 5e-4, 2), (np.float32, 0, 4), ("float64", 0, 8)])
def test_weights_of_another_precision(tmp_path, dtype, digits, size):
    unet = UNet(**TINY, rng=7, classes=3, label_dropout=0.1)
    save_model(tmp_path / "m.safetensors", unet, DIFFUSION, dtype)
    again, diffusion = load_model(tmp_path / "m.safetensors")
    assert again.config == unet.config and again.dtype == ("float64" if size == 8 else "float32")
    for name, value in unet.state_dict().items():
        np.testing.assert_allclose(again.state_dict()[name], value, rtol=digits, atol=digits and 1e-7)
    np.testing.assert_array_equal(diffusion.schedule.beta, DIFFUSION.schedule.beta)  # this is never rounded
    with safe_open(tmp_path / "m.safetensors", "numpy") as file:
        assert {file.get_tensor(name).itemsize for name in file.keys()} == {size, 8}  # noqa: SIM118


def test_equal_models_are_equal_files(tmp_path):
    """In any process, though the library that writes them keeps metadata in no order."""
    code = "import sys; from test_model import *; save_model(sys.argv[1], UNet(**TINY), DIFFUSION)"
    for name in "ab":
        subprocess.run([sys.executable, "-c", code, tmp_path / name], check=True, cwd=pathlib.Path(__file__).parent)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    header = int.from_bytes((tmp_path / "a").read_bytes()[:8], "little")
    assert header % 8 == 0  # so that numbers may be mapped


def test_a_precision_that_does_not_fit(tmp_path):
    unet = UNet(**TINY)
    for bad in ("int8", "bfloat16", "half", 16):
        with pytest.raises(ValueError, match=f"dtype: expected 'float16', 'float32' or 'float64', got {bad!r}"):
            save_model(tmp_path / "m.safetensors", unet, DIFFUSION, bad)
    unet.conv_out.b.data = np.full_like(unet.conv_out.b.data, 1e5)
    with pytest.raises(ValueError, match="dtype: conv_out.b has weights of up to 1e[+]05, too large for float16"):
        save_model(tmp_path / "m.safetensors", unet, DIFFUSION, "float16")
    assert not list(tmp_path.iterdir())


def test_an_older_file_is_replaced_or_left_whole(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_model(path, UNet(**TINY, rng=1), DIFFUSION)
    before = path.read_bytes()

    def disk_full(path, tensors, metadata):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tinyddpm.files.model.write_tensors", disk_full)
        with pytest.raises(OSError, match="path: cannot write .*m.safetensors: No space left on device"):
            save_model(path, UNet(**TINY, rng=2), DIFFUSION)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    save_model(path, UNet(**TINY, rng=2), DIFFUSION)
    assert path.read_bytes() != before


def test_a_flattened_model_saves_and_loads(tmp_path):
    from tinyddpm.training.optim import flatten

    unet = UNet(**TINY)
    theta = flatten(unet.parameters())
    theta[:] = np.arange(len(theta))
    save_model(tmp_path / "m.safetensors", unet, DIFFUSION)
    theta[:] = 0
    unet.load_state_dict(load_model(tmp_path / "m.safetensors")[0].state_dict())
    np.testing.assert_array_equal(theta, np.arange(len(theta)))  # loading writes through to the vector


PEAK = """
import pathlib, sys
from tinyddpm import load_diffusers, load_model, load_original

def memory(what):
    status = pathlib.Path("/proc/self/status").read_text().split()
    return 1024 * int(status[status.index(what) + 1])

pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = memory("VmRSS:")
unet, _ = globals()[sys.argv[1]](sys.argv[2])
print((memory("VmHWM:") - before) / sum(p.data.nbytes for p in unet.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak of memory is read from Linux's /proc")
@pytest.mark.parametrize("load", ["load_model", "load_diffusers", "load_original"])
def test_loading_takes_little_more_memory_than_the_weights(load, tmp_path):
    """ddpm-cifar10-32, 143 MB: no second copy of it, neither in arrays nor in pages of a mapped file."""
    unet = UNet(3, 3, (128, 256, 256, 256), attention=(False, True, False, False), groups=32)
    diffusion = Diffusion(make_schedule("linear", 1000))
    if load == "load_model":
        save_model(tmp_path / "m", unet, diffusion)
    elif load == "load_diffusers":
        save_diffusers(tmp_path / "m", unet, diffusion)
    else:
        state = laid_out(unet.state_dict(), lambda name, ndim: original_layout(name, ndim, 4))
        save_file({name: np.ascontiguousarray(w) for name, w in state.items()}, tmp_path / "m")
    result = subprocess.run(
        [sys.executable, "-c", PEAK, load, tmp_path / "m"], capture_output=True, text=True, check=True
    )
    assert 0.9 < float(result.stdout) < 1.2


def contents(path):
    """The tensors and the metadata of a file, without its checksum."""
    with safe_open(path, "numpy") as file:
        metadata = {name: text for name, text in file.metadata().items() if name != "sha256"}
        return {name: file.get_tensor(name) for name in file.keys()}, metadata


class TestBadInput:
    def test_where_to_save(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="path: there is no folder .*nowhere"):
            save_model(tmp_path / "nowhere" / "m.safetensors", UNet(**TINY), DIFFUSION)

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="path: there is no file .*m.safetensors"):
            load_model(tmp_path / "m.safetensors")

    @given(data=st.data())
    def test_files_cut_short_or_of_another_kind(self, data, tmp_path_factory):
        folder = tmp_path_factory.mktemp("files")
        save_model(folder / "good", UNet(**TINY), DIFFUSION)
        good = (folder / "good").read_bytes()
        length = data.draw(st.integers(0, len(good) - 1))
        junk = data.draw(st.binary(max_size=100))
        for content in (good[:length], junk):
            (folder / "bad").write_bytes(content)
            with pytest.raises(ValueError, match="path: .*bad is not a readable safetensors file"):
                load_model(folder / "bad")

    def test_a_file_of_another_program(self, tmp_path):
        save_file({"w": np.zeros(3)}, tmp_path / "other")
        with pytest.raises(ValueError, match="path: .*other was not written by save_model"):
            load_model(tmp_path / "other")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: c.pop("unet"), "'unet'"),
            (lambda c: c["unet"].update(blocks=0), "blocks: expected an integer >= 1, got 0"),
            (lambda c: c["unet"].update(colour="red"), "colour"),
            (lambda c: c["unet"].update(blocks=2), "down.0.res.1.norm1.gamma is missing"),
            (lambda c: c["schedule"].update(input_scale=0), "input_scale: expected a number > 0, got 0"),
            (lambda c: c["schedule"].update(T=3), "'T'"),
            (lambda c: c["diffusion"].update(objective="y"), "objective: unknown 'y'"),
            (lambda c: c.clear(), "'schedule'"),
        ],
    )
    def test_a_configuration_that_does_not_fit(self, tmp_path, change, message):
        unet = UNet(**TINY)
        config = {
            "unet": unet.config, "schedule": {"name": "linear", "input_scale": 1, "parameters": {}},
            "diffusion": {"objective": "eps", "variance": "small"},
        }  # fmt: skip
        change(config)
        tensors = unet.state_dict() | {"schedule.beta": np.array([0.1, 0.2])}
        save_file(tensors, tmp_path / "m", metadata={"tinyddpm": json.dumps(config)})
        with pytest.raises(ValueError, match="path: .*m holds no model that can be built") as error:
            load_model(tmp_path / "m")
        assert message in str(error.value)

    def test_a_file_without_its_schedule(self, tmp_path):
        save_model(tmp_path / "m", UNet(**TINY), DIFFUSION)
        state, metadata = contents(tmp_path / "m")
        save_file({name: x for name, x in state.items() if name != "schedule.beta"}, tmp_path / "m", metadata)
        with pytest.raises(ValueError, match="holds no model that can be built: 'schedule.beta'"):
            load_model(tmp_path / "m")

    @pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", "3"])
    def test_a_configuration_that_is_no_json(self, tmp_path, text):
        save_file(UNet(**TINY).state_dict(), tmp_path / "m", metadata={"tinyddpm": text})
        with pytest.raises(ValueError, match="holds no model that can be built"):
            load_model(tmp_path / "m")

    def test_weights_of_several_dtypes(self, tmp_path):
        save_model(tmp_path / "m", UNet(**TINY), DIFFUSION)
        state, metadata = contents(tmp_path / "m")
        save_file(state | {"conv_in.b": np.zeros(4, np.int32)}, tmp_path / "m", metadata=metadata)
        with pytest.raises(ValueError, match="holds no model that can be built"):
            load_model(tmp_path / "m")


def test_a_model_that_takes_its_place_while_it_is_read(tmp_path, monkeypatch):
    """As in training, which saves now and then: all weights are of one of them."""
    first, second = UNet(**TINY, rng=1), UNet(**TINY, rng=2)
    save_model(tmp_path / "m", first, DIFFUSION)
    read, count = Stored.read, itertools.count()

    def interrupted(tensor, dtype):
        if next(count) == 10:
            save_model(tmp_path / "m", second, DIFFUSION)
        return read(tensor, dtype)

    monkeypatch.setattr(Stored, "read", interrupted)
    loaded, _ = load_model(tmp_path / "m")
    for name, x in first.state_dict().items():
        np.testing.assert_array_equal(loaded.state_dict()[name], x)


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_others_may_read_it_as_any_new_file(tmp_path):
    save_model(tmp_path / "m", UNet(**TINY), DIFFUSION)
    (tmp_path / "other").touch()
    assert (tmp_path / "m").stat().st_mode == (tmp_path / "other").stat().st_mode
