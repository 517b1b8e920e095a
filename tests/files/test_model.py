"""A model goes into one file and comes out as it was; what is no such file is refused, with what it is instead."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_training import DIFFUSION, SMALL, TINY, assert_same_weights, files_in, memory_of_at_most, names

from tinyddpm import Diffusion, Schedule, UNet, load_model, make_schedule, save_model
from tinyddpm.exchange.diffusers import load_diffusers, save_diffusers
from tinyddpm.exchange.names import diffusers_layout, laid_out, original_layout
from tinyddpm.exchange.original import load_original
from tinyddpm.files.checkpoint import read_checkpoint, write_checkpoint
from tinyddpm.files.model import TRAINING
from tinyddpm.files.tensors import Stored


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.safetensors"


def save_laid_out(path, unet, layout):
    """As other programs do."""
    save_file({name: np.ascontiguousarray(x) for name, x in laid_out(unet.state_dict(), layout).items()}, path)


def tensors_and_configuration(path):
    with safe_open(path, "numpy") as file:
        return load_file(path), json.loads(file.metadata()["tinyddpm"])


@pytest.mark.parametrize(("unet", "schedule", "settings", "dtype", "digits"), [
    (UNet(**TINY, heads=2, dropout=0.1), DIFFUSION.schedule, dict(objective="v", variance="large"), None, 0),
    (UNet(**TINY).to(dtype="float64"), make_schedule("linear_gamma", 30), dict(loss_type="vlb"), None, 0),
    (UNet(**TINY, encoding="interleaved"), Schedule([0.1, 0.7, 1.0], 2.0), dict(objective="x0"), "float16", 5e-4),
    (UNet(**TINY, classes=3, label_dropout=0.1), make_schedule("cosine", 30, input_scale=0.5, s=0.01, tau=2),
     dict(objective="x0", loss_type="weighted_mu"), np.float32, 0),
    (UNet(**TINY), make_schedule("sigmoid", 30, zero_terminal_snr=True, start=0, tau=0.5), dict(objective="v"),
     "float64", 0),
    (UNet(**TINY), make_schedule("cosine_logsnr", 30, shift=-1), dict(loss_type="min_snr", min_snr_gamma=3.0), None, 0),
    (UNet(**TINY, out_channels=2), make_schedule("linear_gamma", 30),
     dict(variance="learned_range", loss_type="hybrid"), None, 0),
])  # fmt: skip
def test_there_and_back(path, unet, schedule, settings, dtype, digits):
    (path.parent / "new").touch()
    given = Diffusion(schedule, **settings)
    save_model(path, unet, given, dtype)
    assert names(path.parent) == {"m.safetensors", "new"}
    assert path.stat().st_mode == (path.parent / "new").stat().st_mode  # others may read it as any new file
    again, diffusion = load_model(path)
    stored = np.dtype(dtype or unet.dtype)
    assert again.config == unet.config and again.dtype == ("float64" if stored == "float64" else "float32")
    for w, stored_w in zip(unet.state_dict().values(), again.state_dict().values(), strict=True):
        np.testing.assert_allclose(stored_w, w, rtol=digits, atol=digits and 1e-7)
    np.testing.assert_array_equal(diffusion.schedule.beta, schedule.beta)  # this is never rounded
    for name in ("name", "input_scale", "parameters"):
        assert getattr(diffusion.schedule, name) == getattr(schedule, name)
    assert diffusion == dataclasses.replace(given, schedule=diffusion.schedule)
    assert {x.itemsize for x in load_file(path).values()} == {stored.itemsize, 8}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # so that numbers may be mapped


def test_equal_models_are_equal_files(path):
    """Though the library that writes them has metadata in any order, another one each time."""
    assert len({save_model(path, UNet(**SMALL), DIFFUSION) or path.read_bytes() for _ in range(9)}) == 1


@pytest.mark.parametrize(("dtype", "where", "error", "message"), [
    *((bad, "m", ValueError, f"dtype: expected 'float16', 'float32' or 'float64', got {bad!r}")
      for bad in ("int8", "bfloat16", "half", 16)),
    ("float16", "m", ValueError, "dtype: conv_out.b has weights of up to 1e[+]05, too large for float16"),
    (None, "nowhere/m", FileNotFoundError, "path: there is no folder .*nowhere"),
])  # fmt: skip
def test_what_cannot_be_saved(tmp_path, dtype, where, error, message):
    unet = UNet(**TINY)
    unet.conv_out.b.data = np.full_like(unet.conv_out.b.data, 1e5)
    with pytest.raises(error, match=message):
        save_model(tmp_path / where, unet, DIFFUSION, dtype)
    assert not list(tmp_path.iterdir())


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
    def test_they_are_not_written(self, saver, bad, path):
        good, unet = UNet(**TINY), UNet(**TINY)
        unet.time1.w.data[1, 2:4] = unet.conv_out.b.data[0] = bad
        for _ in range(2):  # the second time there is a file
            before = files_in(path.parent)
            with pytest.raises(ValueError, match="time1.w: 2 of its 64 numbers are nan or infinite, and some in 1 oth"):
                SAVERS[saver](path, unet, DIFFUSION)
            assert files_in(path.parent) == before
            SAVERS[saver](path, good, DIFFUSION)

    @pytest.mark.parametrize("name", VECTORS)
    def test_nor_a_training_that_led_to_some(self, name, path):
        vectors = VECTORS | {name: np.array([0, np.nan, 1], np.float32)}
        with pytest.raises(ValueError, match=f"{TRAINING}{name}: 1 of its 3 numbers are nan or infinite. Nothing can"):
            write_checkpoint(path, UNet(**TINY), DIFFUSION, vectors, FACTS)
        assert not list(path.parent.iterdir())

    def test_they_are_not_read(self, tmp_path, monkeypatch):
        unet = UNet(**TINY)
        unet.time1.w.data[1, 2:4] = np.inf
        with monkeypatch.context() as patch:  # as another program would, or an older version of this one
            for module in ("files.tensors", "exchange.diffusers"):
                patch.setattr(f"tinyddpm.{module}.check_finite", lambda tensors: None, raising=False)
            for saver in SAVERS:
                SAVERS[saver](tmp_path / saver, unet, DIFFUSION)
        for saver in SAVERS:
            load, name = load_model, "time1.w"
            if saver == "save_diffusers":
                load, name = load_diffusers, "time_embedding.linear_1.weight"
            with pytest.raises(ValueError, match=f"{saver}.*: {name}: 2 of its 64 numbers are nan or infinite"):
                load(tmp_path / saver)
            if saver == "a checkpoint":
                with pytest.raises(ValueError, match="time1.w: 2 of its 64 numbers are nan or infinite"):
                    read_checkpoint(tmp_path / saver, unet, {name: x.copy() for name, x in VECTORS.items()}, {})


class TestBadInput:
    @pytest.mark.parametrize(("content", "message"), [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d", "it is a pointer of git-lfs .*run `git lfs"),
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
        ((0x01_0280).to_bytes(8, "little") + b'{"w', "it ends after 11 of at least 66,184 bytes"),  # as a pickle
        ((99 * 10**6).to_bytes(8, "little") + b"{", "it ends after 9 of at least 99,000,008 bytes"),
        (b"\x02\x03" * 50, r"Error .* \(it has 100 bytes\)$"),
        (b"\0" * 100, "it begins with zeros, as what was not downloaded to its end: download it again"),
    ])  # fmt: skip
    def test_what_it_is_instead(self, path, content, message):
        save_model(path, UNet(**TINY), DIFFUSION)
        path.write_bytes(path.read_bytes()[content] if isinstance(content, slice) else content)
        for load in (load_model, load_original):
            with (
                memory_of_at_most(1e6),
                pytest.raises(ValueError, match=f"path: {path} is not a readable safetensors file: {message}"),
            ):
                load(path)

    def test_a_bit_that_has_changed(self, path):
        save_model(path, UNet(**TINY), DIFFUSION)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"path: {path} has been damaged since it was written"):
            load_model(path)

    @given(st.binary(max_size=100))
    def test_other_files(self, tmp_path_factory, content):
        path = tmp_path_factory.mktemp("files") / "bad"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="path: .*bad is not a readable safetensors file"):
            load_model(path)

    def test_who_would_read_it(self, tmp_path):
        """A folder instead of a file, and files of others."""
        unet = UNet(**TINY)
        save_diffusers(tmp_path / "theirs", unet, DIFFUSION)
        (tmp_path / "run").mkdir()
        save_model(tmp_path / "run" / "model.safetensors", unet, DIFFUSION)
        save_laid_out(tmp_path / "original", unet, lambda name, ndim: original_layout(name, ndim, 2))
        save_laid_out(tmp_path / "alone.safetensors", unet, diffusers_layout)
        save_file({"to_q.lora_A.weight": np.zeros(1)}, tmp_path / "lora")
        save_file({"w": np.zeros(1), "b": np.zeros(1)}, tmp_path / "other")
        folder = str(tmp_path / "theirs")
        for load, name, message in [
            (load_model, "theirs", f"theirs is a folder. load_diffusers reads the folder {folder}"),
            (load_original, "run", "run is a folder. load_model .* read files, such as .*run/model.safetensors"),
            (load_model, "nothing", "there is no file .*nothing"),
            (load_model, "theirs/unet/diffusion_pytorch_model.safetensors",
             f"not written by save_model; it has the names of diffusers: load_diffusers reads the folder {folder},"),
            (load_original, "alone.safetensors", f"load_diffusers reads the folder {tmp_path}, with its config.json"),
            (load_model, "original",
             "was not written by save_model; it has the names of Ho et al.'s code: load_original reads it$"),
            (load_original, "run/model.safetensors", "does not have the names .*, but load_model reads it"),
            (load_original, "lora", "but it is a LoRA, which only changes another network, and nothing here reads it"),
            (load_model, "lora", "it is a LoRA"),
            (load_model, "other", "was not written by save_model; it has b, w$"),
        ]:  # fmt: skip
            with pytest.raises((ValueError, FileNotFoundError), match=f"^path: .*{message}"):
                load(tmp_path / name)

    @pytest.mark.parametrize(("change", "message"), [
        (lambda t, c: c.pop("unet"), "'unet'"),
        (lambda t, c: c["unet"].update(blocks=0), "blocks: expected an integer >= 1, got 0"),
        (lambda t, c: c["unet"].update(colour="red"), "colour"),
        (lambda t, c: c["unet"].update(blocks=2), "norm1.gamma is missing; down.0.res.1.norm1.beta is missing"),
        (lambda t, c: c["unet"].update(blocks=9), "down.1.res.2.conv2.b is missing; and 416 more"),
        (lambda t, c: c["schedule"].update(input_scale=0), "input_scale: expected a number > 0, got 0"),
        (lambda t, c: c["schedule"].update(T=3), "'T'"),
        (lambda t, c: c["diffusion"].update(objective="y"), "objective: unknown 'y'"),
        (lambda t, c: t.pop("schedule.beta"), "'schedule.beta'"),
        (lambda t, c: t.update({"conv_in.b": np.zeros(4, np.int32)}), "is of type I32 instead of F64, F32"),
        (lambda t, c: "{", ""),
        (lambda t, c: "[" * 100_000, ""),
        (lambda t, c: "[]", ""),
    ])  # fmt: skip
    def test_a_configuration_that_does_not_fit(self, path, change, message):
        """Or is no JSON."""
        save_model(path, UNet(**TINY), DIFFUSION)
        tensors, config = tensors_and_configuration(path)
        changed = change(tensors, config)
        save_file(tensors, path, {"tinyddpm": changed if isinstance(changed, str) else json.dumps(config)})
        with pytest.raises(ValueError, match=f"path: {path} holds no model that can be built: .*{re.escape(message)}"):
            load_model(path)

    @pytest.mark.parametrize("big", [10**8, 10**400, 1e300], ids=["1e8", "1e400", "1e300"])
    def test_a_small_file_never_takes_much_memory(self, big, path):
        """Whatever is a number in its configuration may be as large as it wants."""
        save_model(path, UNet(**TINY, classes=3), DIFFUSION)
        tensors, good = tensors_and_configuration(path)
        fields = [(part, name, x) for part in good for name, x in good[part].items() if not isinstance(x, str)]
        for part, name, x in fields:
            for value in [big] * (not isinstance(x, list)) + [[big, big]] * (x is None or isinstance(x, list)):
                save_file(tensors, path, {"tinyddpm": json.dumps(good | {part: good[part] | {name: value}})})
                with memory_of_at_most(2e6, (name, value)), contextlib.suppress(ValueError):
                    load_model(path)


def test_a_model_that_takes_its_place_while_it_is_read(path, monkeypatch):
    """As in training, which saves now and then: all weights are of one of them."""
    first, second = UNet(**TINY, rng=1), UNet(**TINY, rng=2)
    save_model(path, first, DIFFUSION)
    read, count = Stored.read, itertools.count()

    def interrupted(tensor, dtype):
        if next(count) == 10:
            save_model(path, second, DIFFUSION)
        return read(tensor, dtype)

    monkeypatch.setattr(Stored, "read", interrupted)
    assert_same_weights(load_model(path)[0], first)


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
def test_loading_takes_little_more_memory_than_the_weights(load, path):
    """ddpm-cifar10-32, 143 MB: no second copy of it, neither in arrays nor in pages of a mapped file."""
    unet = UNet(3, 3, (128, 256, 256, 256), attention=(False, True, False, False), groups=32)
    diffusion = Diffusion(make_schedule("linear", 1000))
    if load == "load_model":
        save_model(path, unet, diffusion)
    elif load == "load_original":
        save_laid_out(path, unet, lambda name, ndim: original_layout(name, ndim, 4))
    else:
        save_diffusers(path, unet, diffusion)
    if load == "load_diffusers of shards":
        weights = path / "unet" / "diffusion_pytorch_model.safetensors"
        tensors, shard_of = load_file(weights), {}
        for i in range(3):
            shard = {name: tensors[name] for name in list(tensors)[i::3]}
            save_file(shard, weights.with_name(f"{i}.safetensors"))
            shard_of |= dict.fromkeys(shard, f"{i}.safetensors")
        weights.with_name(f"{weights.name}.index.json").write_text(json.dumps({"weight_map": shard_of}))
        weights.unlink()
    command = [sys.executable, "-c", PEAK, load.split()[0], path]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.9 < float(result.stdout) < 1.2
