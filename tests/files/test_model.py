"""A model goes into one file and comes out as it was; what is no such file is refused, with what it is instead."""

import contextlib
import errno
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tinyddpm import (
    Diffusion,
    Schedule,
    UNet,
    load_diffusers,
    load_model,
    load_original,
    make_schedule,
    sample,
    save_diffusers,
    save_model,
)
from tinyddpm.exchange.names import diffusers_layout, laid_out, original_layout
from tinyddpm.files.checkpoint import read_checkpoint, write_checkpoint
from tinyddpm.files.model import TRAINING
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
@pytest.mark.parametrize("load", ["load_model", "load_diffusers", "load_diffusers of shards", "load_original"])
def test_loading_takes_little_more_memory_than_the_weights(load, tmp_path):
    """ddpm-cifar10-32, 143 MB: no second copy of it, neither in arrays nor in pages of a mapped file."""
    unet = UNet(3, 3, (128, 256, 256, 256), attention=(False, True, False, False), groups=32)
    diffusion = Diffusion(make_schedule("linear", 1000))
    if load == "load_model":
        save_model(tmp_path / "m", unet, diffusion)
    elif load != "load_original":
        save_diffusers(tmp_path / "m", unet, diffusion)
        if load == "load_diffusers of shards":
            weights = tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors"
            shard_of, tensors = {}, load_file(weights)
            for i in range(3):
                shard = {name: tensors[name] for name in list(tensors)[i::3]}
                save_file(shard, weights.with_name(f"{i}.safetensors"))
                shard_of |= dict.fromkeys(shard, f"{i}.safetensors")
            weights.with_name(f"{weights.name}.index.json").write_text(json.dumps({"weight_map": shard_of}))
            weights.unlink()
    else:
        state = laid_out(unet.state_dict(), lambda name, ndim: original_layout(name, ndim, 4))
        save_file({name: np.ascontiguousarray(w) for name, w in state.items()}, tmp_path / "m")
    result = subprocess.run(
        [sys.executable, "-c", PEAK, load.split()[0], tmp_path / "m"], capture_output=True, text=True, check=True
    )
    assert 0.9 < float(result.stdout) < 1.2


VECTORS = {name: np.zeros(3, np.float32) for name in ("theta", "m", "v")}
FACTS = {"config": {}}
SAVERS = {
    "save_model": save_model,
    "in 16 bits": lambda path, unet, diffusion: save_model(path, unet, diffusion, "float16"),
    "save_diffusers": save_diffusers,
    "a checkpoint": lambda path, unet, diffusion: write_checkpoint(path, unet, diffusion, VECTORS, FACTS),
}


class TestWeightsThatAreNotFinite:
    """No file of them is written, and the one before stays; and none is read."""

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("saver", SAVERS)
    def test_they_are_not_written(self, saver, bad, tmp_path):
        good, unet = UNet(**TINY | {"heads": 1}), UNet(**TINY | {"heads": 1})
        unet.time1.w.data[1, 2:4] = unet.conv_out.b.data[0] = bad
        files = lambda: {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
        for _ in range(2):  # the second time there is a file
            before = files()
            with pytest.raises(
                ValueError, match=r"time1.w: 2 of its 64 numbers are nan or infinite, and some in 1 other"
            ):
                SAVERS[saver](tmp_path / "m", unet, DIFFUSION)
            assert files() == before
            SAVERS[saver](tmp_path / "m", good, DIFFUSION)

    @pytest.mark.parametrize("name", VECTORS)
    def test_nor_a_training_that_led_to_some(self, name, tmp_path):
        vectors = VECTORS | {name: np.array([0, np.nan, 1], np.float32)}
        with pytest.raises(ValueError, match=f"{TRAINING}{name}: 1 of its 3 numbers are nan or infinite. Nothing can"):
            write_checkpoint(tmp_path / "run", UNet(**TINY), DIFFUSION, vectors, FACTS)
        assert not list(tmp_path.iterdir())

    def test_they_are_not_read(self, tmp_path, monkeypatch):
        unet = UNet(**TINY | {"heads": 1})
        good = UNet(**TINY | {"heads": 1}, rng=1)
        write_checkpoint(tmp_path / "run", good, DIFFUSION, VECTORS, FACTS)
        with monkeypatch.context() as patch:  # as another program would, or an older version of this one
            for module in ("files.tensors", "exchange.diffusers"):
                patch.setattr(f"tinyddpm.{module}.check_finite", lambda tensors: None, raising=False)
            unet.time1.w.data[1, 2:4] = np.inf
            for saver in SAVERS:
                SAVERS[saver](tmp_path / saver, unet, DIFFUSION)
            SAVERS["a checkpoint"](tmp_path / "run", unet, DIFFUSION)
        for saver in SAVERS:
            load, name = load_model, "time1.w"
            if saver == "save_diffusers":
                load, name = load_diffusers, "time_embedding.linear_1.weight"
            with pytest.raises(ValueError, match=f"{saver}.*: {name}: 2 of its 64 numbers are nan or infinite"):
                load(tmp_path / saver)
        with pytest.warns(UserWarning, match="time1.w: 2 of its 64 .*; going on from the one before it, run.previous"):
            read_checkpoint(tmp_path / "run", unet, {name: x.copy() for name, x in VECTORS.items()}, {})
        np.testing.assert_array_equal(unet.time1.w.data, good.time1.w.data)


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

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "it is empty"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 1", "of git-lfs .* run `git lfs pull`"),
            (b"<!DOCTYPE html>\n<html>", "it is a web page and not the file: download it again"),
            (b"\xef\xbb\xbf \r\n<HTML lang=en>", "it is a web page and not the file: download it again"),
            (b"Entry not found", "it is text, .* 'Entry not found'; if it was downloaded, that is what the server had"),
            (b'{"error":"Invalid username"}', "it is text, .*Invalid username"),
            (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "it is text, .*AccessDenied"),
            (b"PK\x03\x04\0\0\x08\x08", "it is a zip archive, such as torch.save .* never read.* with safetensors"),
            (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "it is a pickle, which is never read.* with safetensors"),
            (b"\x1f\x8b\x08\0\0\0\0\0\0\x03", "it is packed: unpack it with gzip -d"),
            (slice(100), r"it ends after 100 of at least [0-9,]{6} bytes: download or copy it again"),
            (slice(-1), r"it ends after [0-9,]+ of [0-9,]+ bytes: download or copy it again"),
            ((0x01_0280).to_bytes(8, "little") + b"{", "it ends after 9 of at least 66,184 bytes"),  # as a pickle
            ((99 * 10**6).to_bytes(8, "little") + b"{", "it ends after 9 of at least 99,000,008 bytes"),
            (b"\0" * 100, "it begins with zeros, as what was not downloaded to its end: download it again"),
        ],
    )  # fmt: skip
    def test_what_it_is_instead(self, tmp_path, content, message):
        save_model(tmp_path / "m", UNet(**TINY), DIFFUSION)
        good = (tmp_path / "m").read_bytes()
        (tmp_path / "m").write_bytes(good[content] if isinstance(content, slice) else content)
        for load in (load_model, load_original):
            tracemalloc.start()
            try:
                with pytest.raises(ValueError, match=f"path: .*m is not a readable safetensors file: .*{message}"):
                    load(tmp_path / "m")
                assert tracemalloc.get_traced_memory()[1] < 1e6
            finally:
                tracemalloc.stop()

    def test_who_would_read_it(self, tmp_path):
        """A folder instead of a file, and files of others."""
        unet = UNet(**TINY | {"heads": 1})
        save_diffusers(tmp_path / "theirs", unet, DIFFUSION)
        (tmp_path / "run").mkdir()
        save_model(tmp_path / "run" / "model.safetensors", unet, DIFFUSION)
        original = laid_out(unet.state_dict(), lambda name, ndim: original_layout(name, ndim, 2))
        files = {
            "original": original, "lora": {"to_q.lora_A.weight": np.zeros(1)}, "other": {"w": np.zeros(1)},
            "alone.safetensors": laid_out(unet.state_dict(), diffusers_layout),
        }  # fmt: skip
        for name, tensors in files.items():
            save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, tmp_path / name)
        folder = str(tmp_path / "theirs")
        for load, name, message in [
            (load_model, "theirs", f"theirs is a folder. load_diffusers reads the folder {folder}"),
            (load_original, "run", "run is a folder. load_model .* read files, such as .*run/model.safetensors"),
            (load_model, "nothing", "there is no file .*nothing"),
            (load_model, "theirs/unet/diffusion_pytorch_model.safetensors",
             f"not written by save_model; it has the names of diffusers: load_diffusers reads the folder {folder},"),
            (load_original, "alone.safetensors", f"load_diffusers reads the folder {tmp_path}, with its config.json"),
            (load_model, "original", "was not written by save_model; .* Ho et al.'s code: load_original reads it"),
            (load_original, "run/model.safetensors", "does not have the names .*, but load_model reads it"),
            (load_original, "lora", "it is a LoRA, which only changes another network, and nothing here reads it"),
            (load_model, "lora", "it is a LoRA"),
            (load_model, "other", "was not written by save_model; it has w"),
        ]:  # fmt: skip
            with pytest.raises((ValueError, FileNotFoundError), match=f"^path: .*{message}"):
                load(tmp_path / name)

    @pytest.mark.parametrize("big", [10**8, 10**400, 1e300])
    def test_a_small_file_never_takes_much_memory(self, big, tmp_path):
        """Whatever is a number in its configuration may be as large as it wants."""
        save_model(tmp_path / "m", UNet(**TINY | {"heads": 1}, classes=3), DIFFUSION)
        tensors, metadata = contents(tmp_path / "m")
        good = json.loads(metadata["tinyddpm"])
        fields = [(part, name) for part, fields in good.items() for name, x in fields.items() if name != "name"]
        for part, name in fields:
            for value in (big, [big, big]):
                config = good | {part: good[part] | {name: value}}
                save_file(tensors, tmp_path / "m", {"tinyddpm": json.dumps(config)})
                tracemalloc.start()
                try:
                    with contextlib.suppress(ValueError):
                        load_model(tmp_path / "m")
                    assert tracemalloc.get_traced_memory()[1] < 2e6, (name, value)
                finally:
                    tracemalloc.stop()

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
