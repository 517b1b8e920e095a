"""Models go to diffusers' folders and come back as they were; models of others mean here what they mean there, and what
is not supported is refused by name. Of diffusers itself nothing is needed: its names and axes are written out below."""

import dataclasses
import errno
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from strategies import make, schedules

from tinyddpm import EMA, Diffusion, Schedule, UNet, load_diffusers, load_original, save_diffusers, save_model
from tinyddpm.diffusion.checks import OBJECTIVES, SPACINGS, VARIANCES
from tinyddpm.exchange import diffusers_config as config_of
from tinyddpm.exchange.diffusers_config import diffusion_from, scheduler_config, unet_settings
from tinyddpm.files.model import _NoWeights
from tinyddpm.files.tensors import Stored

TINY = dict(channels=(4, 8), blocks=1, attention=(False, True), groups=2)
UNET, SCHEDULER, INDEX = "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
MODEL = "diffusion_pytorch_model"
UNET_FIELDS = config_of.UNET_DEFAULTS | config_of.UNET_CHOICES
SCHEDULER_FIELDS = config_of.SCHEDULER_DEFAULTS | config_of.SCHEDULER_CHOICES


def random_unet(seed=0, dtype="float32", **config):
    """A network with no weight that is 0 or 1, so that none can be taken for another."""
    unet, rng = UNet(**(TINY | config)).to(dtype=dtype), np.random.default_rng(seed)
    for p in unet.parameters():
        p.data = rng.standard_normal(p.shape).astype(dtype)
    return unet


def saved(folder, diffusion=None, **config):
    unet = random_unet(**config)
    learned = unet.config["out_channels"] == 2 * unet.config["in_channels"]
    variance = dict(variance="learned_range", loss_type="hybrid") if learned else {}
    save_diffusers(folder, unet, diffusion or Diffusion(make("linear", 10), **variance))
    return unet


def edit(path, **changes):
    """Change fields of a JSON file; ... takes one out."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def assert_same_weights(unet, expected):
    unet, expected = unet.state_dict(), expected.state_dict()
    assert list(unet) == list(expected)
    for name, x in expected.items():
        assert unet[name].dtype == x.dtype
        np.testing.assert_array_equal(unet[name], x)


def safetensors_file(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def header_and_data(path):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


WORDS = {  # of our names: diffusers', those of Ho et al.'s code
    "time1": ("time_embedding.linear_1", "temb.dense.0"), "time2": ("time_embedding.linear_2", "temb.dense.1"),
    "middle1": ("mid_block.resnets.0", "mid.block_1"), "middle2": ("mid_block.resnets.1", "mid.block_2"),
    "middle_attention": ("mid_block.attentions.0", "mid.attn_1"), "norm_out": ("conv_norm_out", "norm_out"),
    "down": ("down_blocks", "down"), "up": ("up_blocks", "up"), "res": ("resnets", "block"),
    "time": ("time_emb_proj", "temb_proj"), "shortcut": ("conv_shortcut", "nin_shortcut"),
    "attention": ("attentions", "attn"), "norm": ("group_norm", "norm"), "q": ("to_q", "q"), "k": ("to_k", "k"),
    "v": ("to_v", "v"), "out": ("to_out.0", "proj_out"), "w": ("weight", "weight"), "gamma": ("weight", "weight"),
    "b": ("bias", "bias"), "beta": ("bias", "bias"),
}  # fmt: skip


def their_tensors(unet, original):
    """The weights of `unet` with PyTorch's axes, and the names of diffusers or of Ho et al.'s code, word by word."""
    found = {}
    for name, x in unet.state_dict().items():
        ours, theirs = name.split("."), []
        if original and ours[0] == "up":  # counted from the finest level
            ours[1] = str(len(unet.up) - 1 - int(ours[1]))
        for i, word in enumerate(ours):
            if word == "resize":
                theirs.append(ours[0] + ("sample.conv" if original else "samplers.0.conv"))
            elif word != "attention" or ours[i + 1].isdigit():
                theirs.append(WORDS.get(word, (word, word))[original])
        if name != "class_embedding.w":
            x = np.einsum("yxio->oiyx", x) if x.ndim == 4 else x.T
        if original and ours[-2] in ("q", "k", "v", "out") and x.ndim == 2:
            x = x[:, :, None, None]
        found[".".join(theirs)] = np.ascontiguousarray(x)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder, the network in it, and what its files hold, for tests that spoil them."""
    folder = tmp_path_factory.mktemp("model")
    return folder, saved(folder), {name: (folder / name).read_bytes() for name in (UNET, SCHEDULER, INDEX, WEIGHTS)}


def restored(model):
    folder, unet, files = model
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder, unet, files


class TestThereAndBack:
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize(
        "config",
        [
            dict(),
            dict(head_channels=4, attention=(True, True), encoding="improved", dropout=0.25),
            dict(middle_attention=False, encoding="improved_flipped", image_size=(8, 12)),
            dict(attention=(False, False), encoding="ddpm_flipped", image_size=16, norm_eps=1e-5),
            dict(downsample_padding=1, center_input=True, classes=3, in_channels=3, out_channels=6),
            dict(channels=(8, 4, 6, 4), attention=(True, False, True, False), blocks=2, image_size=(8, 8)),
            dict(channels=(4,), attention=(True,), blocks=11),  # attentions.10
            dict(channels=(8,), attention=(True,), groups=1, blocks=3, middle_attention=False, image_size=(5, 3)),
        ],
    )
    def test_every_network(self, tmp_path, config, dtype):
        unet = saved(tmp_path / "new" / "m", dtype=dtype, **config)
        again, _ = load_diffusers(str(tmp_path / "new" / "m"))
        assert_same_weights(again, unet)
        size = unet.config["image_size"] or ((32, 32) if len(unet.down) == 4 else (28, 28))
        assert again.config == unet.config | {"image_size": size}
        expected = their_tensors(unet, original=False)
        with safe_open(tmp_path / "new" / "m" / WEIGHTS, "numpy") as file:
            assert file.metadata().keys() == {"format", "sha256"} and file.metadata()["format"] == "pt"
            assert set(file.keys()) == set(expected)
            for name, x in expected.items():
                np.testing.assert_array_equal(file.get_tensor(name), x)

    def test_as_many_heads_at_levels_of_one_width(self, tmp_path):
        unet = saved(tmp_path, heads=2)
        again, _ = load_diffusers(tmp_path)
        assert (again.config["heads"], again.config["head_channels"]) == (1, 4)
        x, t = np.random.default_rng(0).standard_normal((2, 4, 4, 1)).astype(np.float32), np.array([0, 9])
        np.testing.assert_array_equal(again(x, t).data, unet(x, t).data)

    def test_heads_of_the_middle_alone(self, tmp_path):
        saved(tmp_path, heads=2, attention=(False, False))
        assert load_diffusers(tmp_path)[0].config["head_channels"] == 4

    @pytest.mark.parametrize(
        ("encoding", "flip", "shift"),
        [("ddpm", False, 1), ("ddpm_flipped", True, 1), ("improved", True, 0), ("improved_flipped", False, 0)],
    )
    def test_what_they_call_an_encoding(self, encoding, flip, shift):
        config = config_of.unet_config(random_unet(encoding=encoding))
        assert (config["flip_sin_to_cos"], config["freq_shift"]) == (flip, shift)

    @pytest.mark.parametrize(
        ("variance", "theirs"),
        [("small", "fixed_small"), ("large", "fixed_large"), ("learned_range", "learned_range")],
    )
    def test_what_they_call_a_variance(self, variance, theirs):
        loss = "hybrid" if variance == "learned_range" else "simple"
        config = scheduler_config(Diffusion(make("linear", 10), variance=variance, loss_type=loss))
        assert config["variance_type"] == theirs

    @pytest.mark.parametrize(("levels", "size"), [(1, 28), (3, 28), (4, 32), (6, 32), (7, 64)])
    def test_the_size_of_images(self, tmp_path, levels, size):
        unet = UNet(channels=[4] * levels, blocks=1, attention=[False] * levels, groups=2)
        save_diffusers(tmp_path, unet, Diffusion(make("linear", 10)))
        assert json.loads((tmp_path / UNET).read_text())["sample_size"] == size
        save_diffusers(tmp_path, unet, Diffusion(make("linear", 10)), (64, 128))
        assert load_diffusers(tmp_path)[0].config["image_size"] == (64, 128)

    @pytest.mark.parametrize(
        ("schedule", "named"),
        [
            (make("linear", 7, beta_start=0.001, beta_end=0.3), "linear"),
            (make("linear", 7, beta_start=0.001, beta_end=0.3, zero_terminal_snr=True), "linear"),
            (make("quadratic", 7, beta_end=0.3), "scaled_linear"),
            (make("sigmoid_beta", 7, beta_end=0.3, zero_terminal_snr=True), "sigmoid"),
            (make("cosine", 7), "squaredcos_cap_v2"),
            (make("cosine", 7, zero_terminal_snr=True), "squaredcos_cap_v2"),
            (make("cosine", 7, start=0), None),
            (make("cosine", 7, s=0.01), None),
            (make("cosine", 7, s=0), None),
            (make("sigmoid", 7, zero_terminal_snr=True), None),
            (Schedule([0.1, 0.7, 1.0]), None),
            (Schedule([0.1, 0.7], name="linear", parameters={"beta_start": 0.1}), None),  # which it is not
            (dataclasses.replace(make("linear", 7), beta=make("linear", 7).beta * (1 + 1e-9)), None),  # nor is this
        ],
    )
    def test_every_schedule(self, tmp_path, schedule, named):
        saved(tmp_path, Diffusion(schedule, "v"))
        config = json.loads((tmp_path / SCHEDULER).read_text())
        assert set(config) == {"_class_name", "_diffusers_version", *SCHEDULER_FIELDS}
        if named:
            assert (config["beta_schedule"], config["trained_betas"]) == (named, None)
        else:
            assert config["trained_betas"] == schedule.beta.tolist()
        np.testing.assert_array_equal(load_diffusers(tmp_path)[1].schedule.beta, schedule.beta)

    @given(schedule=schedules())
    def test_any_schedule_there_is(self, schedule):
        config = scheduler_config(Diffusion(dataclasses.replace(schedule, input_scale=1.0), "x0"))
        again = diffusion_from(json.loads(json.dumps(config)), pathlib.Path())
        np.testing.assert_array_equal(again.schedule.beta, schedule.beta)

    @pytest.mark.parametrize("clip", [True, False, 0.5, "dynamic", ("dynamic", 0.9, 2.0), ("dynamic", 0.9, math.inf)])
    def test_every_other_setting(self, tmp_path, clip):
        for objective, variance, spacing in itertools.product(OBJECTIVES, VARIANCES, SPACINGS):
            loss = "hybrid" if variance == "learned_range" else "simple"
            given = Diffusion(make("linear", 7), objective, variance, loss, clip=clip, spacing=spacing)
            again = diffusion_from(json.loads(json.dumps(scheduler_config(given))), tmp_path)
            assert again == dataclasses.replace(given, schedule=again.schedule)
            assert type(again.clip) is type(clip)
        saved(tmp_path, given, out_channels=2)
        _, again = load_diffusers(tmp_path)
        assert again == dataclasses.replace(given, schedule=again.schedule)


class TestWhatIsWritten:
    def test_every_field_of_one_model(self, tmp_path):
        diffusion = Diffusion(make("quadratic", 50), "v", "large", clip=("dynamic", 0.9, 2.0), spacing="linspace")
        saved(tmp_path, diffusion, in_channels=3, out_channels=3, head_channels=2, dropout=0.1, image_size=(4, 8))
        read = lambda name: json.loads((tmp_path / name).read_text())
        assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")} == {UNET, SCHEDULER, INDEX, WEIGHTS}
        assert read(INDEX) == {
            "_class_name": "DDPMPipeline", "_diffusers_version": "0.35.0",
            "scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"],
        }  # fmt: skip
        assert read(UNET) == {
            "_class_name": "UNet2DModel", "_diffusers_version": "0.35.0", "in_channels": 3, "out_channels": 3,
            "block_out_channels": [4, 8], "layers_per_block": 1, "attention_head_dim": 2, "add_attention": True,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
            "norm_num_groups": 2, "norm_eps": 1e-6, "dropout": 0.1, "downsample_padding": 0, "flip_sin_to_cos": False,
            "freq_shift": 1, "center_input_sample": False, "num_class_embeds": None, "sample_size": [4, 8],
            "act_fn": "silu", "mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1,
            "downsample_type": "conv", "upsample_type": "conv", "time_embedding_type": "positional",
            "resnet_time_scale_shift": "default", "class_embed_type": None,
        }  # fmt: skip
        assert read(SCHEDULER) == {
            "_class_name": "DDPMScheduler", "_diffusers_version": "0.35.0", "num_train_timesteps": 50,
            "beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02, "trained_betas": None,
            "rescale_betas_zero_snr": False, "prediction_type": "v_prediction", "variance_type": "fixed_large",
            "clip_sample": True, "clip_sample_range": 1.0, "thresholding": True, "dynamic_thresholding_ratio": 0.9,
            "sample_max_value": 2.0, "timestep_spacing": "linspace", "steps_offset": 0,
        }  # fmt: skip

    def test_an_average_of_weights(self, tmp_path):
        unet = random_unet()
        ema = EMA(unet)
        ema.update(np.ones(unet.size, np.float32))
        save_diffusers(tmp_path, ema, Diffusion(make("linear", 10)))
        again, _ = load_diffusers(tmp_path)
        assert_same_weights(again, ema.model)
        assert not np.array_equal(again.conv_in.w.data, unet.conv_in.w.data)

    @pytest.mark.parametrize("failing", ["weights", UNET, SCHEDULER])
    def test_an_older_folder_is_replaced_or_left_whole(self, tmp_path, monkeypatch, failing):
        saved(tmp_path)
        files = lambda: {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        before, write_text = files(), pathlib.Path.write_text

        def disk_full(path, tensors, metadata):
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")

        def disk_full_later(path, text):
            write_text(path, text[:9])
            if path.parent == (tmp_path / failing).parent and pathlib.Path(failing).name in path.name:
                raise OSError("cannot write: No space left")

        with monkeypatch.context() as patch:
            if failing == "weights":
                patch.setattr("tinyddpm.exchange.diffusers.write_tensors", disk_full)
            else:
                patch.setattr(pathlib.Path, "write_text", disk_full_later)
            with pytest.raises(OSError, match="cannot write.*No space left"):
                saved(tmp_path, seed=2, channels=(4, 4))
        assert files() == before
        unet = saved(tmp_path, seed=2, channels=(4, 4))
        assert files().keys() == before.keys()
        assert_same_weights(load_diffusers(tmp_path)[0], unet)

    @pytest.mark.parametrize(
        ("config", "settings", "size", "message"),
        [
            (dict(heads=2, attention=(True, True)), {}, 8, "heads: .* not 2 heads at levels of 4 and 8 channels"),
            (dict(encoding="interleaved"), {}, 8, "encoding: diffusers has no 'interleaved'; it has ddpm"),
            ({}, dict(input_scale=0.5), 8, "input_scale: diffusers has none, which is 1; this schedule has 0.5"),
            (dict(patch=2), {}, 8, "patch: diffusers' U-Nets have none, which is 1; this one has 2"),
            ({}, {}, 7, "image_size: expected .* multiples of 2.*, got .*7"),
        ],
    )
    def test_what_diffusers_has_not(self, tmp_path, config, settings, size, message):
        with pytest.raises(ValueError, match=message):
            save_diffusers(tmp_path, UNet(**(TINY | config)), Diffusion(make("linear", 10, **settings)), size)
        assert not list(tmp_path.iterdir())


class TestRefusedToBeWritten:
    """Nothing is written then."""

    def refuse(self, error, message, folder, *arguments, **settings):
        before = sorted(folder.rglob("*"))
        with pytest.raises(error, match=message):
            save_diffusers(folder, *arguments, **settings)
        assert sorted(folder.rglob("*")) == before

    @pytest.mark.parametrize(
        ("name", "clip"),
        [("clip_sample_range", 1e-7), ("clip_sample_range", 1e31), ("sample_max_value", ("dynamic", 0.9, 2e30))],
    )
    def test_what_could_not_be_read_again(self, tmp_path, name, clip):
        diffusion = Diffusion(make("linear", 10), clip=clip)
        if name == "sample_max_value":  # so large that it is as good as infinite
            saved(tmp_path, diffusion)
            assert load_diffusers(tmp_path)[1].clip == ("dynamic", 0.9, math.inf)
        else:
            message = re.escape(f"diffusion: {name} would be {clip:g}, expected 1e-06 to 1e+30")
            self.refuse(ValueError, message, tmp_path, random_unet(), diffusion)

    def test_what_is_no_model(self, tmp_path):
        plain, unet = Diffusion(make("linear", 10)), random_unet()
        self.refuse(TypeError, "unet: expected a UNet, got Diffusion", tmp_path, plain, unet)
        self.refuse(TypeError, "diffusion: expected a Diffusion, got Schedule", tmp_path, unet, plain.schedule)

    def test_a_file_in_the_place_of_the_folder(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        message = "folder: expected a folder, or a name for a new one, but .*file is a file"
        with pytest.raises(NotADirectoryError, match=message):
            save_diffusers(tmp_path / "file", random_unet(), Diffusion(make("linear", 10)))
        with pytest.raises(FileNotFoundError, match="file is a file; load_original and load_model read files"):
            load_diffusers(tmp_path / "file")

    @pytest.mark.parametrize(
        "name", ["config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"]
    )
    def test_another_model_at_the_top_of_the_folder(self, tmp_path, name):
        """diffusers' UNet2DModel would load that one."""
        (tmp_path / name).write_text("{}")
        message = f"folder: .*{name} would stay beside the new weights; remove it or save elsewhere"
        self.refuse(FileExistsError, message, tmp_path, random_unet(), Diffusion(make("linear", 10)))

    def test_a_folder_in_the_place_of_a_file(self, tmp_path):
        saved(tmp_path)
        before = (tmp_path / WEIGHTS).read_bytes()
        (tmp_path / INDEX).unlink()
        (tmp_path / INDEX).mkdir()
        message = "path: cannot write .*model_index.json, which is a folder"
        self.refuse(IsADirectoryError, message, tmp_path, random_unet(seed=1), Diffusion(make("linear", 10)))
        assert (tmp_path / WEIGHTS).read_bytes() == before

    def test_what_a_killed_run_left_is_no_obstacle(self, tmp_path):
        (tmp_path / "unet").mkdir()
        half = (tmp_path / WEIGHTS).with_name(f".{pathlib.Path(WEIGHTS).name}.0123abcd-1-0ab1.part")
        half.write_bytes(b"half of it")
        unet = saved(tmp_path)
        assert_same_weights(load_diffusers(tmp_path)[0], unet)
        os.utime(half, (0, 0))
        saved(tmp_path)
        assert not half.exists()


class TestFoldersOfOthers:
    def test_both_files_at_the_top(self, tmp_path):
        unet = saved(tmp_path / "a", Diffusion(make("cosine", 9), variance="large"))
        (tmp_path / "b").mkdir()
        for name in (UNET, SCHEDULER, WEIGHTS):
            shutil.copy(tmp_path / "a" / name, tmp_path / "b")
        again, diffusion = load_diffusers(tmp_path / "b")
        assert_same_weights(again, unet)
        assert (diffusion.T, diffusion.variance, diffusion.schedule.name) == (9, "large", "cosine")

    def test_a_second_scheduler_at_the_top(self, tmp_path):
        """The pipeline's is the one in scheduler/."""
        saved(tmp_path)
        shutil.copy(tmp_path / SCHEDULER, tmp_path)
        edit(tmp_path / "scheduler_config.json", num_train_timesteps=7)
        assert load_diffusers(tmp_path)[1].T == 10

    def test_parts_that_are_left_out(self, tmp_path):
        unet = saved(tmp_path)
        edit(tmp_path / INDEX, vae=None, text_encoder=[None, None])
        assert_same_weights(load_diffusers(tmp_path)[0], unet)

    def test_the_warning_is_about_the_line_that_loads(self, tmp_path):
        saved(tmp_path)
        (tmp_path / "unet").rename(tmp_path / "alone")
        with pytest.warns(UserWarning, match="has no scheduler_config.json") as warned:
            load_diffusers(tmp_path / "alone")
        assert warned[0].filename == __file__

    @pytest.mark.parametrize("learned", [False, True])
    def test_a_network_alone(self, tmp_path, learned):
        unet = saved(tmp_path, in_channels=3, out_channels=6 if learned else 3)
        again, of_pipeline = load_diffusers(tmp_path / "unet")  # its scheduler lies beside it
        assert of_pipeline.schedule.beta.tolist() == load_diffusers(tmp_path)[1].schedule.beta.tolist()
        (tmp_path / "unet").rename(tmp_path / "alone")
        with pytest.warns(UserWarning, match="folder: .*alone has no scheduler_config.json, so .* T = 1000, linear"):
            again, diffusion = load_diffusers(tmp_path / "alone")
        assert_same_weights(again, unet)
        np.testing.assert_array_equal(diffusion.schedule.beta, np.linspace(1e-4, 0.02, 1000))
        expected = ("eps", "learned_range", "hybrid") if learned else ("eps", "small", "simple")
        assert (diffusion.objective, diffusion.variance, diffusion.loss_type) == expected

    def test_older_names_and_further_fields(self, tmp_path):
        unet = saved(tmp_path)
        tensors = load_file(tmp_path / WEIGHTS)
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            tensors = {name.replace(f".{new}.", f".{old}."): x for name, x in tensors.items()}
        assert "mid_block.attentions.0.proj_attn.bias" in tensors
        save_file(tensors, tmp_path / WEIGHTS)
        average = dict(decay=0.9999, inv_gamma=1.0, min_decay=0.0, optimization_step=1, power=0.75)
        edit(
            tmp_path / UNET,
            **average,
            update_after_step=0,
            use_ema_warmup=True,
            _name_or_path="/elsewhere",
            news=None,
            num_train_timesteps=1000,
        )
        edit(tmp_path / INDEX, _class_name="DDIMPipeline")
        with pytest.warns(
            UserWarning, match="unet/config.json: unknown fields that are off are passed over: news = null$"
        ):
            assert_same_weights(load_diffusers(tmp_path)[0], unet)

    @pytest.mark.parametrize("off", [None, False, 0, 0.0, "", [], {}])
    def test_unknown_fields_that_are_off(self, off, tmp_path):
        """As those that a newer diffusers writes for what it can do besides."""
        unet = saved(tmp_path)
        edit(tmp_path / INDEX, news=off)
        for name in (UNET, SCHEDULER):
            edit(tmp_path / name, news=off, more=off)
        with pytest.warns(
            UserWarning, match="unknown fields that are off are passed over: news = .*, more = "
        ) as warned:
            assert_same_weights(load_diffusers(tmp_path)[0], unet)
        assert [str(tmp_path / name) == str(w.message).split(":")[0] for w, name in zip(warned, (UNET, SCHEDULER))]
        assert [w.filename for w in warned] == [__file__] * 2

    def test_16_bits_are_widened_exactly(self, tmp_path):
        unet, half = saved(tmp_path), random_unet()
        tensors = load_file(tmp_path / WEIGHTS)
        save_file({name: x.astype(np.float16) for name, x in tensors.items()},
                  tmp_path / WEIGHTS.replace(".safe", ".fp16.safe"))  # fmt: skip
        for p in half.parameters():
            p.data = p.data.astype(np.float16).astype(np.float32)
        assert_same_weights(load_diffusers(tmp_path, variant="fp16")[0], half)
        assert_same_weights(load_diffusers(tmp_path)[0], unet)
        header, data = {}, b""
        for name, x in tensors.items():
            content = x.view("<u2").reshape(*x.shape, 2)[..., 1].tobytes()  # the upper halves
            header[name] = {"dtype": "BF16", "shape": x.shape, "data_offsets": [len(data), len(data) + len(content)]}
            data += content
        (tmp_path / WEIGHTS).write_bytes(safetensors_file(header, data))
        for p, q in zip(half.parameters(), unet.parameters()):
            p.data = (q.data.view("<u4") & 0xFFFF0000).view("<f4")
        assert_same_weights(load_diffusers(tmp_path)[0], half)

    def test_one_tensor_of_64_bits_makes_all_so(self, tmp_path):
        unet = saved(tmp_path)
        tensors = load_file(tmp_path / WEIGHTS)
        save_file(tensors | {"conv_in.bias": tensors["conv_in.bias"].astype(np.float64) + 1e-12}, tmp_path / WEIGHTS)
        unet.to(dtype="float64").conv_in.b.data += 1e-12
        assert_same_weights(load_diffusers(tmp_path)[0], unet)

    def test_links_as_in_a_cache(self, tmp_path):
        unet = saved(tmp_path / "m")
        (tmp_path / "blobs").mkdir()
        for name in (UNET, SCHEDULER, INDEX, WEIGHTS):
            (tmp_path / "m" / name).rename(tmp_path / "blobs" / name.replace("/", "-"))
            (tmp_path / "m" / name).symlink_to(f"{'../' * (1 + name.count('/'))}blobs/{name.replace('/', '-')}")
        assert_same_weights(load_diffusers(tmp_path / "m")[0], unet)

    def test_what_a_missing_field_means(self):
        path = pathlib.Path("config.json")
        expected = dict(
            in_channels=3, out_channels=3, channels=(224, 448, 672, 896), blocks=2, heads=1,
            attention=(False, True, True, True), head_channels=8, middle_attention=True, groups=32, norm_eps=1e-5,
            dropout=0.0, downsample_padding=1, encoding="improved", center_input=False, classes=None, image_size=None,
            label_dropout=0.0, patch=1,
        )  # fmt: skip
        assert unet_settings({}, path) == expected
        d = diffusion_from({}, path)
        assert (d.T, d.objective, d.variance, d.clip, d.spacing) == (1000, "eps", "small", True, "leading")
        np.testing.assert_array_equal(d.schedule.beta, np.linspace(1e-4, 0.02, 1000))
        assert diffusion_from({"thresholding": True}, path).clip == ("dynamic", 0.995, 1.0)

    @pytest.mark.parametrize(
        ("changes", "attributes"),
        [
            (dict(variance_type="fixed_small_log"), dict(variance="small")),
            (dict(variance_type="fixed_large"), dict(variance="large")),
            (dict(variance_type=None), dict(variance="small")),
            (dict(_class_name="DDIMScheduler", set_alpha_to_one=True, variance_type=...), dict(variance="small")),
            (dict(clip_sample_range=0.5), dict(clip=0.5)),
            (dict(clip_sample_range=0.5, clip_sample=False), dict(clip=False)),
            (dict(thresholding=True, clip_sample=False, sample_max_value=3), dict(clip=("dynamic", 0.995, 3.0))),
            (dict(thresholding=True, sample_max_value=3), dict(clip=("dynamic", 0.995, 3.0))),
            (dict(timestep_spacing=...), dict(spacing="leading")),
            (dict(num_train_timesteps=...), dict(T=1000)),
            (dict(tensor_format="pt", timestep_values=[3, 1]), dict(T=10)),  # of the first versions
            (dict(predict_epsilon=True, prediction_type=...), dict(objective="eps")),
            (dict(predict_epsilon=False, prediction_type=...), dict(objective="x0")),
            (dict(predict_epsilon=False, prediction_type="v_prediction"), dict(objective="v")),  # as they take it
            (dict(set_alpha_to_one=False), dict(T=10)),  # left of a DDIMScheduler's
            (
                dict(skip_prk_steps=True, solver_order=2, flow_shift=1.0, use_karras_sigmas=True),
                dict(T=10),
            ),  # of others
            (dict(_class_name="DDPMParallelScheduler", variance_type="fixed_large"), dict(variance="large")),
            (dict(_class_name="DDIMParallelScheduler", set_alpha_to_one=True, variance_type=...), dict(T=10)),
            (dict(steps_offset=1, timestep_spacing="trailing"), dict(spacing="trailing")),  # which it does not shift
            (dict(steps_offset=1, timestep_spacing="linspace"), dict(spacing="linspace")),
        ],
    )
    def test_what_a_scheduler_says(self, tmp_path, changes, attributes):
        saved(tmp_path)
        edit(tmp_path / SCHEDULER, **changes)
        _, diffusion = load_diffusers(tmp_path)
        assert {name: getattr(diffusion, name) for name in attributes} == attributes

    def test_betas_of_its_own_and_a_last_step_of_nothing_but_noise(self, tmp_path):
        saved(tmp_path)
        own = dict(num_train_timesteps=2, trained_betas=[0.25, 0.5], beta_schedule="sigmoid", prediction_type="sample")
        edit(tmp_path / SCHEDULER, **own)
        np.testing.assert_array_equal(load_diffusers(tmp_path)[1].schedule.beta, [0.25, 0.5])
        edit(tmp_path / SCHEDULER, rescale_betas_zero_snr=True)
        np.testing.assert_allclose(load_diffusers(tmp_path)[1].schedule.beta, [0.25, 1], rtol=1e-15)
        edit(tmp_path / SCHEDULER, trained_betas=None, beta_schedule="linear", num_train_timesteps=20)
        expected = make("linear", 20, zero_terminal_snr=True).beta
        np.testing.assert_array_equal(load_diffusers(tmp_path)[1].schedule.beta, expected)


def in_shards(folder, variant="", older=False, seed=3):
    """Save another network in two shards beside the one in `folder`; return it and their index."""
    unet = random_unet(seed)
    tensors, shard_of = their_tensors(unet, original=False), {}
    for i, names in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        shard = f"{MODEL}{variant}-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / "unet" / shard, {"format": "pt"})
        shard_of |= dict.fromkeys(names, shard)
    index = folder / "unet" / f"{MODEL}.safetensors{variant if older else ''}.index{'' if older else variant}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 4 * unet.size}, "weight_map": shard_of}))
    return unet, index


class TestShards:
    @pytest.mark.parametrize("whole", [False, True])
    @pytest.mark.parametrize(("variant", "older"), [("", False), (".fp16", False), (".fp16", True)])
    def test_they_are_read(self, tmp_path, variant, older, whole):
        """Before one file beside them, as diffusers does."""
        one = saved(tmp_path)
        if not whole:
            (tmp_path / WEIGHTS).unlink()
        unet, _ = in_shards(tmp_path, variant, older)
        assert_same_weights(load_diffusers(tmp_path, variant[1:] or None)[0], unet)
        if variant and whole:
            assert_same_weights(load_diffusers(tmp_path)[0], one)

    def test_one_file_of_a_variant_beside_them(self, tmp_path):
        one = saved(tmp_path)
        (tmp_path / WEIGHTS).rename(tmp_path / "unet" / f"{MODEL}.fp16.safetensors")
        unet, index = in_shards(tmp_path)
        assert_same_weights(load_diffusers(tmp_path, "fp16")[0], one)
        assert_same_weights(load_diffusers(tmp_path)[0], unet)
        index.unlink()  # those that are left of an older model belong to nothing
        (tmp_path / "unet" / f"{MODEL}.fp16.safetensors").rename(tmp_path / WEIGHTS)
        (tmp_path / "unet" / f"{MODEL}.bin.index.json").write_text("{}")
        assert_same_weights(load_diffusers(tmp_path)[0], one)
        (tmp_path / WEIGHTS).unlink()
        with pytest.raises(
            FileNotFoundError, match=f"there is no .*{MODEL}.safetensors; .* index, {index.name}, or with"
        ):
            load_diffusers(tmp_path)

    SECOND = f"{MODEL}-00002-of-00002.safetensors"

    @pytest.mark.parametrize(
        ("shard", "message"),  # of conv_in.weight, which is in the first
        [
            (
                "../scheduler/x.safetensors",
                "weight_map: .* beside it for each tensor, got '../scheduler/x.safetensors'",
            ),
            ("/etc/x.safetensors", "weight_map: .* beside it .* got '/etc/x.safetensors'"),
            ("..\\x.safetensors", "weight_map: .* beside it .* got "),
            ("..", r"weight_map: .* beside it .* got '\.\.'"),
            ("model.bin", "weight_map: expected a safetensors file .* got 'model.bin'"),
            (3, "weight_map: .* got 3"),
            (None, "weight_map: .* got None"),
            (..., "the tensors are not where it says: conv_in.weight is in .*-00001-of-00002.safetensors$"),
            (SECOND, f"says: conv_in.weight is in .*-00001-of-.*; conv_in.weight is not in {SECOND}$"),
            ("y.safetensors", "there is no file .*unet/y.safetensors"),
        ],
    )
    def test_an_index_that_is_wrong(self, tmp_path, shard, message):
        saved(tmp_path)
        _, index = in_shards(tmp_path)
        shard_of = json.loads(index.read_text())["weight_map"] | {"conv_in.weight": shard}
        edit(index, weight_map={tensor: name for tensor, name in shard_of.items() if name is not ...})
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_diffusers(tmp_path)

    def test_shards_that_are_wrong(self, tmp_path):
        saved(tmp_path)
        _, index = in_shards(tmp_path)
        second = index.with_name(self.SECOND)
        tensors = load_file(second)
        save_file(tensors | {"conv_in.weight": np.zeros((4, 1, 3, 3), np.float32)}, second)  # which is in the first too
        with pytest.raises(ValueError, match=f"the tensors are not where it says: conv_in.weight is in {second.name}$"):
            load_diffusers(tmp_path)
        second.write_bytes(b"version https://git-lfs.github.com/spec/v1")
        with pytest.raises(ValueError, match=f"{second.name} is not a readable .* pointer of git-lfs"):
            load_diffusers(tmp_path)
        second.unlink()
        with pytest.raises(FileNotFoundError, match=f"there is no file .*{second.name}"):
            load_diffusers(tmp_path)
        for content in ("[]", "{}", '{"weight_map": {}}', '{"weight_map": ["x.safetensors"]}', "<html>"):
            index.write_text(content)
            with pytest.raises(
                ValueError, match=f"{index.name}(: weight_map: expected| is not a JSON|: expected a JSON)"
            ):
                load_diffusers(tmp_path)


BIG = 10**400  # an integer that is no float
CONFIGS_NOT_SUPPORTED = [
    (UNET, dict(_class_name="UNet2DConditionModel"), '_class_name = "UNet2DConditionModel" .*supported: UNet2DModel'),
    (UNET, dict(act_fn="gelu"), 'act_fn = "gelu" is not supported; supported: "silu" or "swish"'),
    (UNET, dict(in_channels="3"), "in_channels: expected an integer >= 1, got '3'"),
    (UNET, dict(in_channels=True), "in_channels: expected an integer >= 1, got True"),
    (UNET, dict(layers_per_block=0), "layers_per_block: expected an integer >= 1, got 0"),
    (UNET, dict(layers_per_block=1.0), "layers_per_block: expected an integer >= 1, got 1.0"),
    (UNET, dict(block_out_channels=[]), r"block_out_channels: expected a sequence with .*, got \[\]"),
    (UNET, dict(block_out_channels=[4, None]), r"multiples of norm_num_groups = 2, got \[4, None\]"),
    (UNET, dict(down_block_types=["DownBlock2D", "SkipDownBlock2D"]), "down_block_types = .*DownBlock2D and AttnDownB"),
    (UNET, dict(down_block_types=["DownBlock2D"]), "down_block_types = .*supported: 2 of them, as many as block_out"),
    (UNET, dict(up_block_types=["UpBlock2D", "UpBlock2D"]), "up_block_types = .*supported: the mirror image.*AttnUpB"),
    (UNET, dict(add_attention=1), "add_attention: expected True or False, got 1"),
    (UNET, dict(norm_eps=math.nan), "norm_eps: expected a number > 0, got nan"),
    (UNET, dict(norm_eps=BIG), "norm_eps: expected a number > 0, got inf"),
    (UNET, dict(freq_shift=True), "freq_shift = true is not .*supported: 0 or 1"),
    (UNET, dict(colour="x" * 1000), r'colour = "x{199}\.\.\. is not supported'),
    (UNET, dict(freq_shift=2), "freq_shift = 2 is not .*supported: 0 or 1"),
    (UNET, dict(time_embedding_type="fourier"), 'time_embedding_type = "fourier" is not .*supported: "positional"'),
    (UNET, dict(resnet_time_scale_shift="scale_shift"), 'resnet_time_scale_shift = "scale_shift".*: "default"'),
    (UNET, dict(class_embed_type="timestep"), 'class_embed_type = "timestep" is not .*supported: null'),
    (UNET, dict(sample_size=1.5), "sample_size: expected a height and a width that are multiples of 2.*got 1.5"),
    (UNET, dict(time_embedding_dim=32), "time_embedding_dim = 32 is not .*supported: null or 16"),
    (UNET, dict(attn_norm_num_groups=1), "attn_norm_num_groups = 1 is not .*supported: null or 2"),
    (UNET, dict(colour=True), "colour = true is not .*supported: the fields in_channels, out_channels"),
    (UNET, dict(colour="red"), 'colour = "red" is not .*supported: the fields in_channels, out_channels'),
    (UNET, dict(colour=0.1), "colour = 0.1 is not .*supported: the fields in_channels, out_channels"),
    (UNET, dict(sample_size=[4, 4, 4]), r"sample_size: expected a height and a width .*got \[4, 4, 4\]"),
    (UNET, dict(sample_size=3), "sample_size: expected a height and a width that are multiples of 2.*got .*3"),
    (UNET, dict(attention_head_dim=3), "attention_head_dim: 3 does not divide the 8 channels"),
    (UNET, dict(norm_num_groups=3), "block_out_channels: expected multiples of norm_num_groups = 3"),
    (UNET, dict(dropout=1), r"dropout: expected a number in \[0, 1\), got 1"),
    (SCHEDULER, dict(_class_name="PNDMScheduler"), '_class_name = "PNDM.*supported: DDPMScheduler or DDIMScheduler'),
    (SCHEDULER, dict(beta_schedule="exp"), 'beta_schedule = "exp" is not .*supported: "linear" or "scaled_linear"'),
    (SCHEDULER, dict(beta_start=-1), "beta_start = -1 is not supported; supported: a number from 0 to 1"),
    (SCHEDULER, dict(beta_end=BIG), "beta_end = Infinity is not supported; supported: a number from 0 to 1"),
    (SCHEDULER, dict(beta_end=True), "beta_end = true is not supported; supported: a number from 0 to 1"),
    (SCHEDULER, dict(dynamic_thresholding_ratio=1.5), "dynamic_thresholding_ratio = 1.5 .*: a number from 0 to 1"),
    (SCHEDULER, dict(dynamic_thresholding_ratio=-0.5), "dynamic_thresholding_ratio = -0.5 .*: a number from 0 to 1"),
    (SCHEDULER, dict(clip_sample=1), "clip_sample = 1 is not .*supported: true or false"),
    (SCHEDULER, dict(beta_end=1e-5), "beta_start, beta_end: expected 0 < beta_start.*, got 0.0001, 1e-05"),
    (SCHEDULER, dict(beta_end="0.02"), 'beta_end = "0.02" is not supported; supported: a number'),
    (SCHEDULER, dict(num_train_timesteps=10**7), "num_train_timesteps = 10000000 .*supported: a number from 1 to 1e"),
    (SCHEDULER, dict(num_train_timesteps=9.5), "num_train_timesteps: expected an integer >= 1, got 9.5"),
    (SCHEDULER, dict(trained_betas=[0.1]), "trained_betas: expected num_train_timesteps = 10 numbers, got 1"),
    (SCHEDULER, dict(trained_betas=[BIG] * 10), "trained_betas: expected a vector of .*got .inf inf"),
    (SCHEDULER, dict(trained_betas="abc"), "json: could not convert string to float: 'abc'"),
    (SCHEDULER, dict(trained_betas={"a": 1}), "json: float.. argument must be a string or a real number, not 'dict'"),
    (SCHEDULER, dict(trained_betas=[2] * 10), r"json: trained_betas: expected a vector of .* in \(0, 1\)"),
    (SCHEDULER, dict(trained_betas=[2] * 10, rescale_betas_zero_snr=True, prediction_type="sample"), "trained_betas: "),
    (SCHEDULER, dict(prediction_type="flow"), 'prediction_type = "flow" is not .*"epsilon" or "sample" or "v_pred'),
    (SCHEDULER, dict(rescale_betas_zero_snr=True), "prediction_type: the schedule ends with alpha_bar = 0"),
    (SCHEDULER, dict(variance_type="learned"), 'variance_type = "learned" is not .*"fixed_small" or "fixed_small_log"'),
    (SCHEDULER, dict(clip_sample_range=0), "clip_sample_range = 0 is not supported; supported: a number from 1e-06"),
    (SCHEDULER, dict(thresholding=True, sample_max_value=0.5), "sample_max_value = 0.5 .*: a number from 1 to 1e.30"),
    (SCHEDULER, dict(steps_offset=1, timestep_spacing="leading"), "steps_offset = 1 is not .*supported: 0"),
    (SCHEDULER, dict(steps_offset=1, timestep_spacing=...), "steps_offset = 1 is not .*supported: 0"),
    (SCHEDULER, dict(_class_name="DDIMScheduler", set_alpha_to_one=False), "set_alpha_to_one = false .*: true"),
    (SCHEDULER, dict(colour="red"), 'colour = "red" is not .*the fields num_train_timesteps'),
    (SCHEDULER, dict(_class_name="DDIMParallelScheduler", set_alpha_to_one=False), "set_alpha_to_one = false .*: true"),
    (INDEX, {"_class_name": "LDMPipeline"}, '_class_name = "LDMPipeline" is not supported; supported: DDPMPipeline or'),
    (INDEX, {"vqvae": ["diffusers", "VQModel"]}, "a pipeline with vqvae is not supported; supported: one of unet and"),
    (INDEX, {"../evil": ["os", "system"]}, "a pipeline with ../evil is not supported"),
]  # fmt: skip


class TestRefusedFolders:
    @pytest.mark.parametrize(("file", "changes", "message"), CONFIGS_NOT_SUPPORTED)
    def test_what_is_not_supported(self, tmp_path, file, changes, message):
        saved(tmp_path)
        edit(tmp_path / file, **changes)
        with pytest.raises(ValueError, match=message) as error:
            load_diffusers(tmp_path)
        assert str(error.value).startswith(f"{tmp_path / file}: ")

    @pytest.mark.parametrize(
        ("channels", "variance"),
        [((1, 1), "learned_range"), ((1, 2), "small"), ((3, 6), "large"), ((2, 3), "learned_range")],
    )
    def test_a_variance_that_the_network_does_not_tell(self, tmp_path, channels, variance):
        loss = "hybrid" if variance == "learned_range" else "simple"
        diffusion, unet = Diffusion(make("linear", 10), variance=variance, loss_type=loss), random_unet()
        unet.config |= dict(zip(("in_channels", "out_channels"), channels))
        message = f"out_channels = {channels[1]} for in_channels = {channels[0]} is not .* variance_type '{variance}'"
        with pytest.raises(ValueError, match=message):
            save_diffusers(tmp_path, unet, diffusion)
        assert not any(tmp_path.iterdir())
        saved(tmp_path)
        edit(tmp_path / UNET, in_channels=channels[0], out_channels=channels[1])
        (tmp_path / SCHEDULER).write_text(json.dumps(scheduler_config(diffusion)))
        with pytest.raises(ValueError, match=message) as error:
            load_diffusers(tmp_path)
        assert str(error.value).startswith(f"{tmp_path / UNET}: ")

    @pytest.mark.parametrize("name", [f"{MODEL}.safetensors.index.json", f"{MODEL}-00001-of-00002.safetensors"])
    def test_what_they_would_load_instead_is_not_left_beside_ours(self, tmp_path, name):
        unet = saved(tmp_path)
        (tmp_path / "unet" / name).write_text("{}")
        before = (tmp_path / WEIGHTS).read_bytes()
        with pytest.raises(
            FileExistsError, match=f"{name} would stay beside the new weights; remove it or save elsewhere"
        ):
            save_diffusers(tmp_path, unet, Diffusion(make("linear", 10)))
        assert (tmp_path / WEIGHTS).read_bytes() == before

    def test_weights_that_do_not_fit(self, tmp_path):
        saved(tmp_path)
        tensors = load_file(tmp_path / WEIGHTS)
        del tensors["conv_in.bias"]
        tensors["conv_out.bias"] = np.zeros(1, np.int8)
        tensors["conv_in.weight"] = tensors["conv_in.weight"].transpose(2, 3, 1, 0)
        tensors["mid_block.attentions.0.query.weight"] = np.zeros((8, 8), np.float32)  # beside to_q
        tensors["mid_block.my_query.weight"] = np.zeros(1, np.float32)  # no older name
        tensors["conv_norm_out.bias"] = tensors["conv_norm_out.bias"][
            :, None, None
        ]  # of filters alone, 1 x 1 is no matter
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, tmp_path / WEIGHTS)
        with pytest.raises(ValueError) as error:
            load_diffusers(tmp_path)
        start = f"{tmp_path / WEIGHTS}: the weights do not fit the configuration: "
        assert str(error.value).startswith(start)
        assert sorted(str(error.value)[len(start) :].split("; ")) == [
            "conv_in.bias is missing",
            "conv_in.weight has shape (3, 3, 1, 4) instead of (4, 1, 3, 3)",
            "conv_norm_out.bias has shape (4, 1, 1) instead of (4,)",
            "conv_out.bias is of type I8 instead of F64, F32, F16, BF16",
            "mid_block.attentions.0.query.weight is unknown",
            "mid_block.my_query.weight is unknown",
        ]

    def test_what_is_not_there(self, tmp_path):
        def refused(message, **settings):
            with pytest.raises(FileNotFoundError, match=message):
                load_diffusers(tmp_path / "m", **settings)

        refused("folder: expected a local folder, since nothing is downloaded; .*m is not there")
        saved(tmp_path / "m")
        refused("folder: there is no .*diffusion_pytorch_model.ema.safetensors; there are config.json", variant="ema")
        (tmp_path / "m" / WEIGHTS).rename(tmp_path / "m" / "unet" / "diffusion_pytorch_model.bin")
        refused(r"there is no .*model.safetensors; there are .*model.bin.* Pickles \(.bin\) are never read.*save_pretr")
        (tmp_path / "m" / SCHEDULER).unlink()
        refused("folder: there is no file .*scheduler_config.json")
        (tmp_path / "m" / UNET).unlink()
        refused("folder: there is no file .*m/unet/config.json")

    @pytest.mark.parametrize(
        ("folders", "message"),
        [
            (["snapshots/1a2b"], "load_diffusers reads the folder {}/snapshots/1a2b"),  # the hub's cache
            (
                ["snapshots/1a2b", "snapshots/3c"],
                "load_diffusers reads the folder {}/snapshots/1a2b or {}/snapshots/3c",
            ),
            (
                ["models--google--ddpm/snapshots/1a"],
                "load_diffusers reads the folder {}/models--google--ddpm/snapshots/1a",
            ),
            (["ddpm-cifar10-32"], "load_diffusers reads the folder {}/ddpm-cifar10-32"),
            ([], "No model is in it"),
        ],
    )
    def test_where_it_is(self, tmp_path, folders, message):
        for name in folders:
            saved(tmp_path / name)
        message = message.format(*[tmp_path] * 2)
        with pytest.raises(FileNotFoundError, match=f"no file {tmp_path}/config.json, which .* a model. {message}$"):
            load_diffusers(tmp_path)
        save_model(tmp_path / "run.safetensors", random_unet(), Diffusion(make("linear", 10)))  # or it is of a training
        if not folders:
            with pytest.raises(
                FileNotFoundError, match="load_model and load_original read files, such as .*run.safeten"
            ):
                load_diffusers(tmp_path)

    @pytest.mark.parametrize("variant", ["../fp16", "a/b", "..", "", "fp16\n", "a.b"])
    def test_a_variant_that_is_no_word(self, tmp_path, variant):
        saved(tmp_path)
        with pytest.raises(ValueError, match="variant: expected a word such as 'fp16', got"):
            load_diffusers(tmp_path, variant=variant)

    @pytest.mark.parametrize("file", [UNET, SCHEDULER, INDEX])
    def test_files_that_are_no_json_object(self, tmp_path, file):
        saved(tmp_path)
        for content in (b"", b"{", b"\xff", b"[" * 100_000, b'{"a": 1}x'):
            (tmp_path / file).write_bytes(content)
            with pytest.raises(ValueError, match=f"{file} is not a JSON file: "):
                load_diffusers(tmp_path)
        for content, kind in (
            (b"[{}]", "list"),
            (b"3", "int"),
            (b"9" * 5000, "float"),
            (b"null", "NoneType"),
            (b'"{}"', "str"),
        ):
            (tmp_path / file).write_bytes(content)
            with pytest.raises(ValueError, match=f"{file}: expected a JSON object, got {kind}"):
                load_diffusers(tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (
                "version https://git-lfs.github.com/spec/v1",
                "it is a pointer of git-lfs .*: run `git lfs pull` in its folder",
            ),
            ("<!doctype html><html>", "it is a web page and not the file: download it again"),
            ("Entry not found", "it is text, which begins with 'Entry not found'; if it was downloaded"),
            ("", "it is empty"),
        ],
    )
    @pytest.mark.parametrize("file", [UNET, SCHEDULER, INDEX])
    def test_what_a_json_file_is_instead(self, tmp_path, file, content, message):
        saved(tmp_path)
        (tmp_path / file).write_text(content)
        with pytest.raises(ValueError, match=f"{file} is not a JSON file: .*; {message}"):
            load_diffusers(tmp_path)

    def test_nesting_that_can_just_be_read(self, tmp_path):
        saved(tmp_path)
        for depth in range(800, 1000):
            (tmp_path / UNET).write_text('{"colour": ' + "[" * depth + "]" * depth + "}")
            with pytest.raises(ValueError, match="config.json"):
                load_diffusers(tmp_path)

    @pytest.mark.parametrize(
        "changes",
        [
            dict(block_out_channels=[10**6, 10**6]), dict(layers_per_block=1000), dict(layers_per_block=10**6),
            dict(layers_per_block=10**8), dict(num_class_embeds=10**6), dict(in_channels=10**6, out_channels=10**6),
            dict(block_out_channels=[4] * 2000, sample_size=None, down_block_types=["DownBlock2D"] * 2000,
                 up_block_types=["UpBlock2D"] * 2000),
        ],
    )  # fmt: skip
    def test_networks_far_larger_than_their_weights(self, tmp_path, changes):
        saved(tmp_path)
        edit(tmp_path / UNET, **changes)
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match="of a network many times as large as the weights that are there"):
                load_diffusers(tmp_path)
            assert tracemalloc.get_traced_memory()[1] < 3e7
        finally:
            tracemalloc.stop()

    def test_weights_to_come_take_no_memory(self):
        unet = UNet(**TINY, classes=3, rng=_NoWeights({}))
        assert all(not any(p.data.strides) for p in unet.parameters() if p.ndim > 1)

    def test_a_network_of_more_parameters_than_there_are_tensors(self):
        few = dict.fromkeys("abcdefghij", Stored(pathlib.Path(), 0, (1,), "F32"))
        with pytest.raises(ValueError, match="many times as large as the weights"):
            UNet(**TINY | {"channels": (4,), "attention": (False,), "blocks": 600}, rng=_NoWeights(few))

    @pytest.mark.parametrize(
        "change",
        [
            lambda header, data: (2**60).to_bytes(8, "little") + data,
            lambda header, data: safetensors_file(header | {"x": header["conv_in.bias"]}, data),
            lambda header, data: safetensors_file(b"[]", data),
            lambda header, data: safetensors_file(header, data + b"more"),
            # what the library reads as tensors too: an entry as a list, a type as an object
            lambda header, data: safetensors_file({n: [*x.values()] for n, x in header.items() if n[0] != "_"}, data),
            lambda header, data: safetensors_file(
                header | {"conv_in.bias": header["conv_in.bias"] | {"dtype": {"F32": None}}}, data
            ),
        ],
    )  # fmt: skip
    def test_weights_that_are_no_safetensors(self, tmp_path, change):
        saved(tmp_path)
        (tmp_path / WEIGHTS).write_bytes(change(*header_and_data(tmp_path / WEIGHTS)))
        with pytest.raises(ValueError, match=f"{WEIGHTS}"):
            load_diffusers(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(
        [BIG, 0, 1, 2, 4, 8, 0.5, 1e-5, 1e300, [4, 8], ["UpBlock2D"], "v_prediction", "learned_range", "sigmoid"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2), max_leaves=4,
)  # fmt: skip


class TestAnything:
    @given(data=st.data())
    def test_weights_cut_short_or_junk(self, data, model):
        folder, _, files = restored(model)
        cut = files[WEIGHTS][: data.draw(st.integers(0, len(files[WEIGHTS]) - 1))]
        for content in (cut, data.draw(st.binary(max_size=100))):
            (folder / WEIGHTS).write_bytes(content)
            with pytest.raises(ValueError, match=f"{WEIGHTS} is not a readable safetensors file"):
                load_diffusers(folder)

    @settings(max_examples=120)
    @given(data=st.data())
    def test_flipped_bits_in_the_header_of_the_weights(self, data, model):
        folder, unet, files = restored(model)
        bad = bytearray(files[WEIGHTS])
        position = st.integers(0, 7 + int.from_bytes(bad[:8], "little"))
        for i, bits in data.draw(st.lists(st.tuples(position, st.integers(1, 255)), min_size=1, max_size=3)):
            bad[i] ^= bits
        (folder / WEIGHTS).write_bytes(bad)
        try:
            assert_same_weights(load_diffusers(folder)[0], unet)
        except ValueError as error:
            assert str(folder / WEIGHTS) in str(error)

    @pytest.mark.filterwarnings("ignore:.*unknown fields that are off")
    @pytest.mark.parametrize(("file", "fields"), [(UNET, UNET_FIELDS), (SCHEDULER, SCHEDULER_FIELDS), (INDEX, [])])
    @given(data=st.data())
    @settings(max_examples=100)
    def test_any_value_in_any_field(self, file, fields, data, model):
        folder, unet, _ = restored(model)
        names = st.sampled_from([*fields, "_class_name", "unet", "scheduler", "../evil"]) | st.text(max_size=3)
        edit(folder / file, **data.draw(st.dictionaries(names, JSON, min_size=1, max_size=3)))
        try:
            assert_same_weights(load_diffusers(folder)[0], unet)
        except ValueError as error:
            assert str(folder) in str(error)


class TestOriginalNames:
    CONFIG = dict(in_channels=3, out_channels=3, channels=(32, 64), groups=32)

    @pytest.mark.parametrize("variance", ["large", "small"])
    @pytest.mark.parametrize("prefix", ["", "module."])
    @pytest.mark.parametrize(
        "config",
        [
            {},
            dict(middle_attention=False, attention=(True, False), blocks=2),
            dict(channels=(32,), attention=(True,)),
            dict(in_channels=1, out_channels=1),
        ],
    )
    def test_a_checkpoint(self, tmp_path, config, prefix, variance):
        unet = random_unet(**(self.CONFIG | config))
        tensors = their_tensors(unet, original=True)
        assert "down.0.block.0.temb_proj.weight" in tensors and "up.0.block.0.nin_shortcut.bias" in tensors
        save_file({prefix + name: x for name, x in tensors.items()}, tmp_path / "m")
        again, diffusion = load_original(tmp_path / "m", variance)
        assert_same_weights(again, unet)
        assert again.config == unet.config
        shape = (2, 4, 4, unet.config["in_channels"])
        x, t = np.random.default_rng(0).standard_normal(shape).astype(np.float32), np.array([0, 999])
        np.testing.assert_array_equal(again(x, t).data, unet(x, t).data)
        np.testing.assert_array_equal(diffusion.schedule.beta, np.linspace(1e-4, 0.02, 1000))
        assert (diffusion.objective, diffusion.variance, diffusion.clip) == ("eps", variance, True)

    @pytest.mark.parametrize(
        ("levels", "size", "variance"), [(4, (32, 32), "large"), (6, (256, 256), "small"), (2, None, "large")]
    )
    def test_which_of_their_models_it_is(self, tmp_path, levels, size, variance):
        unet = UNet(3, 3, [32] * levels, 1, [False] * levels, groups=32)
        save_file(their_tensors(unet, original=True), tmp_path / "m")
        again, diffusion = load_original(tmp_path / "m")
        assert (again.config["image_size"], diffusion.variance) == (size, variance)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"temb.dense.0.bias": None}, "is no checkpoint of Ho et al.'s network: .*temb.dense.0.bias is missing"),
            ({"extra": np.zeros(3)}, "is no checkpoint of Ho et al.'s network: .*extra is unknown"),
            ({"conv_out.weight": None}, "does not have the names .*: expected conv_in.* it has conv_in.bias"),
            ({"down.0.block.0.conv1.weight": np.zeros((33, 32, 3, 3))}, "channels: expected multiples of groups = 32"),
            ({"down.0.block.0.conv1.weight": np.zeros(())}, "is no checkpoint of Ho et al.'s network"),
            ({"conv_in.weight": np.zeros(3)}, "is no checkpoint of Ho et al.'s network"),
            ({"conv_in.bias": np.zeros(32, np.int32)}, "conv_in.bias is of type I32"),
            ({"down.1.attn.0.q.weight": np.zeros((64, 64, 3, 3))}, r"q.weight has shape \(64, 64, 3, 3\) instead of"),
            ({"module.conv_in.bias": np.zeros(32)}, "conv_in.bias"),  # a second one: which?
        ],
    )  # fmt: skip
    def test_what_is_refused(self, tmp_path, changes, message):
        tensors = their_tensors(random_unet(**self.CONFIG), original=True) | changes
        save_file({name: x for name, x in tensors.items() if x is not None}, tmp_path / "m")
        with pytest.raises(ValueError, match=f"path: .*m .*{message}"):
            load_original(tmp_path / "m")

    def test_what_is_no_checkpoint(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="path: there is no file .*nothing"):
            load_original(tmp_path / "nothing")
        save_file({}, tmp_path / "empty")
        with pytest.raises(ValueError, match="path: .*empty does not have the names .* it has no tensors"):
            load_original(tmp_path / "empty")
        save_file({f"x{i:02}": np.zeros(1) for i in range(20)}, tmp_path / "other")
        with pytest.raises(ValueError, match="it has x00, .*, x09$"):
            load_original(tmp_path / "other")
        save_file(their_tensors(random_unet(**self.CONFIG), original=True), tmp_path / "m")
        with pytest.raises(ValueError, match="variance: expected 'small', 'large' or None, got 'medium'"):
            load_original(tmp_path / "m", "medium")
