"""Models go to diffusers' folders and come back as they were; models of others mean here what they mean there, and what
is not supported is refused by name. Of diffusers itself nothing is needed: its names and axes are written out below."""

import dataclasses
import errno
import itertools
import json
import math
import os
import pathlib
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from strategies import make, schedules
from tiny_training import TINY, assert_same_weights, files_in, memory_of_at_most

from tinyddpm import EMA, Diffusion, Schedule, UNet, load_diffusers, load_original, save_diffusers, save_model
from tinyddpm.diffusion.checks import OBJECTIVES, SPACINGS, VARIANCES
from tinyddpm.exchange import diffusers_config as config_of
from tinyddpm.exchange.diffusers_config import diffusion_from, scheduler_config, unet_settings
from tinyddpm.files.model import _NoWeights
from tinyddpm.files.tensors import Stored

S = make("linear", 10)
PLAIN, LARGE = Diffusion(S), Diffusion(S, variance="large")
LEARNED = Diffusion(S, variance="learned_range", loss_type="hybrid")
UNET, SCHEDULER, INDEX = "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"
MODEL = "diffusion_pytorch_model"
WEIGHTS = f"unet/{MODEL}.safetensors"
SHARDS = [f"{MODEL}-0000{i}-of-00002.safetensors" for i in (1, 2)]
JSON_FILE = pathlib.Path("config.json")  # what errors name that has not been read from a file


def random_unet(seed=0, dtype="float32", **config):
    """A network with no weight that is 0 or 1, so that none can be taken for another."""
    unet, rng = UNet(**(TINY | config)).to(dtype=dtype), np.random.default_rng(seed)
    for p in unet.parameters():
        p.data = rng.standard_normal(p.shape).astype(dtype)
    return unet


OURS = random_unet()


@pytest.fixture(scope="module")
def as_saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_diffusers(folder, OURS, PLAIN)
    return folder


@pytest.fixture
def folder(as_saved, tmp_path):
    """What `save_diffusers` wrote of OURS and PLAIN, to be spoilt."""
    return shutil.copytree(as_saved, tmp_path / "m")


def changed(content, changes):
    """With these fields; ... takes one out."""
    return {name: value for name, value in (content | changes).items() if value is not ...}


def edit(path, **changes):
    path.write_text(json.dumps(changed(json.loads(path.read_text()), changes)))


def refused(*rows):
    """Rows of a call, and the message and the type of its error: ValueError where that is not said."""
    return pytest.mark.parametrize(("call", "message", "error"), [(*row, ValueError)[:3] for row in rows])


def safetensors_file(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


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


SAME_HEADS = dict(heads=1, head_channels=4)  # which is 2 heads of 8 channels
NETWORKS = [  # ours, how it comes back where not as it was, and some of what it is there
    (dict(dtype="float64"), {}, dict(flip_sin_to_cos=False, freq_shift=1, sample_size=28)),
    (dict(head_channels=4, attention=(True, True), encoding="improved", dropout=0.25), {},
     dict(flip_sin_to_cos=True, freq_shift=0)),
    (dict(middle_attention=False, encoding="improved_flipped", image_size=(8, 12)), {},
     dict(flip_sin_to_cos=False, freq_shift=0, sample_size=[8, 12])),
    (dict(attention=(False, False), encoding="ddpm_flipped", image_size=16, norm_eps=1e-5), {},
     dict(flip_sin_to_cos=True, freq_shift=1, sample_size=16)),
    (dict(downsample_padding=1, center_input=True, classes=3, in_channels=3, out_channels=6), {}, {}),
    (dict(classes=3, label_dropout=0.1), dict(classes=4, label_dropout=0), dict(num_class_embeds=4)),
    (dict(channels=(8, 4, 6, 4), attention=(True, False, True, False), blocks=2), dict(image_size=(32, 32)), {}),
    (dict(channels=(4,), attention=(True,), blocks=11), {}, dict(layers_per_block=11)),  # attentions.10
    (dict(channels=(8,), attention=(True,), groups=1, blocks=3, middle_attention=False, image_size=(5, 3)), {}, {}),
    (dict(heads=2), SAME_HEADS, dict(attention_head_dim=4)),
    (dict(heads=2, attention=(False, False)), SAME_HEADS, dict(attention_head_dim=4)),  # of the middle alone
]  # fmt: skip


class TestThereAndBack:
    @pytest.mark.parametrize(("config", "changes", "theirs"), NETWORKS)
    def test_every_network(self, tmp_path, config, changes, theirs):
        unet, folder = random_unet(**config), tmp_path / "new" / "m"
        save_diffusers(folder, unet, LEARNED if "out_channels" in config else PLAIN)
        again, _ = load_diffusers(str(folder))
        assert_same_weights(again, unet)
        assert again.config == unet.config | {"image_size": unet.config["image_size"] or (28, 28)} | changes
        x = np.random.default_rng(0).standard_normal((2, 8, 8, unet.config["in_channels"])).astype(unet.dtype)
        t, labels = np.array([0, 9]), np.array([0, 2]) if "classes" in config else None
        np.testing.assert_array_equal(again(x, t, labels=labels).data, unet(x, t, labels=labels).data)
        assert theirs.items() <= json.loads((folder / UNET).read_text()).items()
        expected = their_tensors(unet, original=False)
        with safe_open(folder / WEIGHTS, "numpy") as file:
            assert file.metadata().keys() == {"format", "sha256"} and file.metadata()["format"] == "pt"
            assert set(file.keys()) == set(expected)
            for name, x in expected.items():
                np.testing.assert_array_equal(file.get_tensor(name), x)

    def test_schedules_that_diffusers_has_and_others(self):
        theirs = dict(linear="linear", quadratic="scaled_linear", cosine="squaredcos_cap_v2", sigmoid_beta="sigmoid")
        for name, zero_snr in itertools.product(theirs, [False, True]):
            ends = {} if name == "cosine" else {"beta_start": 0.001, "beta_end": 0.3}
            config = scheduler_config(Diffusion(make(name, 7, **ends, zero_terminal_snr=zero_snr), "v"))
            expected = ends | dict(beta_schedule=theirs[name], rescale_betas_zero_snr=zero_snr, trained_betas=None)
            assert expected.items() <= config.items()
        linear = make("linear", 7)
        like_linear = dataclasses.replace(linear, beta=linear.beta * (1 + 1e-9))
        named_linear = Schedule([0.1, 0.7], name="linear", parameters={"beta_start": 0.1})
        others = make("cosine", 7, start=0), make("cosine", 7, s=0), make("sigmoid", 7), Schedule([0.1, 0.7, 1.0])
        for schedule in (like_linear, named_linear, *others):
            assert scheduler_config(Diffusion(schedule, "v"))["trained_betas"] == schedule.beta.tolist()

    @given(schedule=schedules())
    def test_any_schedule_there_is(self, schedule):
        config = scheduler_config(Diffusion(dataclasses.replace(schedule, input_scale=1.0), "x0"))
        again = diffusion_from(json.loads(json.dumps(config)), JSON_FILE)
        np.testing.assert_array_equal(again.schedule.beta, schedule.beta)

    @pytest.mark.parametrize("clip", [True, False, 0.5, "dynamic", ("dynamic", 0.9, 2.0), ("dynamic", 0.9, math.inf)])
    def test_every_other_setting(self, tmp_path, clip):
        theirs = {"small": "fixed_small", "large": "fixed_large", "learned_range": "learned_range"}
        for objective, variance, spacing in itertools.product(OBJECTIVES, VARIANCES, SPACINGS):
            loss = "hybrid" if variance == "learned_range" else "simple"
            given = Diffusion(make("linear", 7), objective, variance, loss, clip=clip, spacing=spacing)
            config = scheduler_config(given)
            again = diffusion_from(json.loads(json.dumps(config)), JSON_FILE)
            assert again == dataclasses.replace(given, schedule=again.schedule)
            assert type(again.clip) is type(clip) and config["variance_type"] == theirs[variance]
        save_diffusers(tmp_path, random_unet(out_channels=2), given)
        _, again = load_diffusers(tmp_path)
        assert again == dataclasses.replace(given, schedule=again.schedule)


class TestWhatIsWritten:
    def test_every_field_of_one_model(self, tmp_path):
        unet = random_unet(in_channels=3, out_channels=3, head_channels=2, dropout=0.1, image_size=(4, 8))
        clip = ("dynamic", 0.9, 2.0)
        save_diffusers(tmp_path, unet, Diffusion(make("quadratic", 50), "v", "large", clip=clip, spacing="linspace"))
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

    def test_an_average_of_weights_and_another_size_of_images(self, tmp_path):
        ema = EMA(OURS)
        ema.update(np.ones(OURS.size, np.float32))
        save_diffusers(tmp_path, ema, PLAIN, (64, 128))
        again, _ = load_diffusers(tmp_path)
        assert_same_weights(again, ema.model)
        assert not np.array_equal(again.conv_in.w.data, OURS.conv_in.w.data)
        assert again.config["image_size"] == (64, 128)

    @pytest.mark.parametrize("there_is_space_for", range(4))
    def test_an_older_folder_is_replaced_or_left_whole(self, folder, monkeypatch, there_is_space_for):
        (folder / f"unet/.{MODEL}.safetensors.0123abcd-1-0ab1.part").touch()  # which a run that was killed has left
        before, new, files = files_in(folder), random_unet(seed=2, channels=(4, 4)), itertools.count()

        def fsync(file):
            if next(files) == there_is_space_for:
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch, pytest.raises(OSError, match="cannot write.*No space left"):
            patch.setattr(os, "fsync", fsync)
            save_diffusers(folder, new, PLAIN)
        assert files_in(folder) == before
        save_diffusers(folder, new, PLAIN)
        assert files_in(folder).keys() == before.keys()
        assert_same_weights(load_diffusers(folder)[0], new)


# fmt: off
@refused(
    (lambda: (random_unet(heads=2, attention=(True, True)), PLAIN), "heads: .* not 2 heads at levels of 4 and 8 chann"),
    (lambda: (random_unet(encoding="interleaved"), PLAIN), "encoding: .* no 'interleaved'; it has ddpm, ddpm_flip"),
    (lambda: (OURS, Diffusion(make("linear", 10, input_scale=0.5))), "input_scale: diffusers has none, .* has 0.5"),
    (lambda: (random_unet(patch=2), PLAIN), "patch: diffusers' U-Nets have none, which is 1; this one has 2"),
    (lambda: (OURS, PLAIN, 7), "image_size: expected .* multiples of 2.*, got .*7"),
    (lambda: (OURS, Diffusion(S, clip=1e-7)), "diffusion: clip_sample_range would be 1e-07, expected 1e-06 to 1e.30"),
    (lambda: (OURS, Diffusion(S, clip=1e31)), "diffusion: clip_sample_range would be 1e.31, expected 1e-06 to 1e.30"),
    (lambda: (PLAIN, OURS), "unet: expected a UNet, got Diffusion", TypeError),
    (lambda: (OURS, S), "diffusion: expected a Diffusion, got Schedule", TypeError),
)
# fmt: on
def test_what_diffusers_has_not_is_refused(tmp_path, call, message, error):
    with pytest.raises(error, match=message):
        save_diffusers(tmp_path / "new", *call())
    assert not list(tmp_path.iterdir())


BESIDE = ["config.json", f"{MODEL}.safetensors", f"unet/{SHARDS[0]}", f"unet/{MODEL}.bin"]  # diffusers would load them


@refused(
    *[(lambda f, name=name: (f / name).touch(),
       f"folder: .*{name} would stay beside the new weights; remove it or save elsewhere", FileExistsError)
      for name in BESIDE],
    (lambda f: [(f / name).touch() for name in BESIDE[:2]],
     f"folder: .*/{MODEL}.safetensors, [^,]*/config.json would stay", FileExistsError),
    (lambda f: (f / INDEX).unlink() or (f / INDEX).mkdir(),
     "path: cannot write .*model_index.json, which is a folder", IsADirectoryError),
    (lambda f: f.rename(f.with_name("elsewhere")) and f.touch(),
     "folder: expected a folder, or a name for a new one, but .*m is a file", NotADirectoryError),
)  # fmt: skip
def test_a_folder_in_which_something_is_in_the_way(folder, call, message, error):
    call(folder)
    before = files_in(folder)
    with pytest.raises(error, match=message):
        save_diffusers(folder, random_unet(seed=1), PLAIN)
    assert files_in(folder) == before


@pytest.mark.parametrize("case", [(1, 1, LEARNED), (1, 2, PLAIN), (3, 6, LARGE), (2, 3, LEARNED)])
def test_a_variance_that_the_network_does_not_tell(folder, case):
    inputs, outputs, diffusion = case
    message = f"out_channels = {outputs} for in_channels = {inputs} is not .* variance_type '{diffusion.variance}'"
    with pytest.raises(ValueError, match=f"^{message}"):
        save_diffusers(folder / "new", random_unet(in_channels=inputs, out_channels=outputs), diffusion)
    assert not (folder / "new").exists()
    edit(folder / UNET, in_channels=inputs, out_channels=outputs)
    (folder / SCHEDULER).write_text(json.dumps(scheduler_config(diffusion)))
    with pytest.raises(ValueError, match=f"^{folder / UNET}: {message}"):
        load_diffusers(folder)


class TestFoldersOfOthers:
    def test_files_at_the_top(self, folder):
        shutil.copy(folder / SCHEDULER, folder)
        edit(folder / "scheduler_config.json", num_train_timesteps=7, variance_type="fixed_large")
        edit(folder / INDEX, vae=None, text_encoder=[None, None])  # parts that are left out
        again, diffusion = load_diffusers(folder)
        assert_same_weights(again, OURS)
        assert diffusion.T == 10  # a pipeline's scheduler is the one in scheduler/
        (folder / INDEX).unlink()  # which tells nothing more
        assert load_diffusers(folder)[1].T == 10
        for name in (UNET, WEIGHTS):
            shutil.move(folder / name, folder)
        for name in ("unet", "scheduler"):
            shutil.rmtree(folder / name)
        again, diffusion = load_diffusers(folder)
        assert_same_weights(again, OURS)
        assert (diffusion.T, diffusion.variance) == (7, "large")

    @pytest.mark.parametrize("learned", [False, True])
    def test_a_network_alone(self, tmp_path, learned):
        unet = random_unet(in_channels=3, out_channels=6 if learned else 3)
        save_diffusers(tmp_path, unet, LEARNED if learned else PLAIN)
        assert load_diffusers(tmp_path / "unet")[1].T == 10  # its scheduler lies beside it
        (tmp_path / "unet").rename(tmp_path / "alone")
        with pytest.warns(UserWarning, match="alone has no scheduler_config.json, so .* T = 1000, linear, to pr") as w:
            again, diffusion = load_diffusers(tmp_path / "alone")
        assert w[0].filename == __file__  # the line that loads
        assert_same_weights(again, unet)
        np.testing.assert_array_equal(diffusion.schedule.beta, np.linspace(1e-4, 0.02, 1000))
        expected = ("eps", "learned_range", "hybrid") if learned else ("eps", "small", "simple")
        assert (diffusion.objective, diffusion.variance, diffusion.loss_type) == expected

    def test_older_names_and_further_fields(self, folder):
        tensors = load_file(folder / WEIGHTS)
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            tensors = {name.replace(f".{new}.", f".{old}."): x for name, x in tensors.items()}
        assert "mid_block.attentions.0.proj_attn.bias" in tensors
        save_file(tensors, folder / WEIGHTS)
        average = dict(decay=0.9999, inv_gamma=1.0, min_decay=0.0, optimization_step=1, power=0.75)
        average |= dict(update_after_step=0, use_ema_warmup=True)
        edit(folder / UNET, **average, _name_or_path="/elsewhere", num_train_timesteps=1000)
        edit(folder / INDEX, _class_name="DDIMPipeline")
        assert_same_weights(load_diffusers(folder)[0], OURS)
        for name in (UNET, SCHEDULER, INDEX):  # a newer diffusers writes more for what it can do besides
            edit(folder / name, **dict(zip("abcdefg", [None, False, 0, 0.0, "", [], {}])))
        with pytest.warns(UserWarning) as warned:
            assert_same_weights(load_diffusers(folder)[0], OURS)
        listed = 'are passed over: a = null, b = false, c = 0, d = 0.0, e = "", f = [], g = {}'
        expected = [(f"{folder / name}: unknown fields that are off {listed}", __file__) for name in (UNET, SCHEDULER)]
        assert [(str(w.message), w.filename) for w in warned] == expected

    def test_16_bits_are_widened_exactly_and_one_tensor_of_64_makes_all_so(self, folder):
        tensors, half, bfloat, double = load_file(folder / WEIGHTS), random_unet(), random_unet(), random_unet()
        for p, q in zip(half.parameters(), bfloat.parameters()):
            p.data = p.data.astype(np.float16).astype(np.float32)
            q.data = (q.data.view("<u4") & 0xFFFF0000).view("<f4")
        fp16 = folder / "unet" / f"{MODEL}.fp16.safetensors"
        save_file({name: x.astype(np.float16) for name, x in tensors.items()}, fp16)
        assert_same_weights(load_diffusers(folder, variant="fp16")[0], half)
        assert_same_weights(load_diffusers(folder)[0], OURS)
        header, data = {}, b""
        for name, x in tensors.items():
            content = x.view("<u2").reshape(*x.shape, 2)[..., 1].tobytes()  # the upper halves
            header[name] = {"dtype": "BF16", "shape": x.shape, "data_offsets": [len(data), len(data) + len(content)]}
            data += content
        (folder / WEIGHTS).write_bytes(safetensors_file(header, data))
        assert_same_weights(load_diffusers(folder)[0], bfloat)
        save_file(tensors | {"conv_in.bias": tensors["conv_in.bias"].astype(np.float64) + 1e-12}, folder / WEIGHTS)
        double.to(dtype="float64").conv_in.b.data += 1e-12
        assert_same_weights(load_diffusers(folder)[0], double)

    def test_links_as_in_a_cache(self, folder, tmp_path):
        (tmp_path / "blobs").mkdir()
        for name in (UNET, SCHEDULER, INDEX, WEIGHTS):
            (folder / name).rename(tmp_path / "blobs" / name.replace("/", "-"))
            (folder / name).symlink_to(f"{'../' * (1 + name.count('/'))}blobs/{name.replace('/', '-')}")
        assert_same_weights(load_diffusers(folder)[0], OURS)
        (tmp_path / "blobs" / WEIGHTS.replace("/", "-")).unlink()
        with pytest.raises(FileNotFoundError, match=f"{WEIGHTS} is a link to .*/blobs/unet-.* not there: downl"):
            load_diffusers(folder)

    def test_what_a_missing_field_means(self):
        assert unet_settings({}, JSON_FILE) == dict(
            in_channels=3, out_channels=3, channels=(224, 448, 672, 896), blocks=2, heads=1,
            attention=(False, True, True, True), head_channels=8, middle_attention=True, groups=32, norm_eps=1e-5,
            dropout=0.0, downsample_padding=1, encoding="improved", center_input=False, classes=None, image_size=None,
            label_dropout=0.0, patch=1,
        )  # fmt: skip
        d = diffusion_from({}, JSON_FILE)
        assert (d.T, d.objective, d.variance, d.clip, d.spacing) == (1000, "eps", "small", True, "leading")
        np.testing.assert_array_equal(d.schedule.beta, np.linspace(1e-4, 0.02, 1000))
        assert diffusion_from({"thresholding": True}, JSON_FILE).clip == ("dynamic", 0.995, 1.0)

    # fmt: off
    @pytest.mark.parametrize(("changes", "name", "value"), [
        (dict(variance_type="fixed_small_log"), "variance", "small"),
        (dict(variance_type=None), "variance", "small"),
        (dict(_class_name="DDIMScheduler", set_alpha_to_one=True, variance_type=...), "variance", "small"),
        (dict(clip_sample_range=0.5), "clip", 0.5),
        (dict(clip_sample_range=0.5, clip_sample=False), "clip", False),
        (dict(thresholding=True, clip_sample=False, sample_max_value=3), "clip", ("dynamic", 0.995, 3.0)),
        (dict(thresholding=True, sample_max_value=3), "clip", ("dynamic", 0.995, 3.0)),
        (dict(predict_epsilon=True, prediction_type=...), "objective", "eps"),
        (dict(predict_epsilon=False, prediction_type=...), "objective", "x0"),
        (dict(predict_epsilon=False, prediction_type="v_prediction"), "objective", "v"),  # as they take it
        (dict(tensor_format="pt", timestep_values=[3, 1], set_alpha_to_one=False, skip_prk_steps=True, solver_order=2,
              flow_shift=1.0, use_karras_sigmas=True), "T", 10),  # of first versions and of other schedulers
        (dict(_class_name="DDPMParallelScheduler", variance_type="fixed_large"), "variance", "large"),
        (dict(_class_name="DDIMParallelScheduler", set_alpha_to_one=True, variance_type=...), "T", 10),
        (dict(steps_offset=1, timestep_spacing="trailing"), "spacing", "trailing"),  # which it does not shift
        (dict(steps_offset=1, timestep_spacing="linspace"), "spacing", "linspace"),
    ])
    # fmt: on
    def test_what_a_scheduler_says(self, changes, name, value):
        assert getattr(diffusion_from(changed(scheduler_config(PLAIN), changes), JSON_FILE), name) == value

    def test_betas_of_its_own_and_a_last_step_of_nothing_but_noise(self):
        beta = lambda **fields: diffusion_from(dict(prediction_type="sample", **fields), JSON_FILE).schedule.beta
        own = dict(num_train_timesteps=2, trained_betas=[0.25, 0.5], beta_schedule="sigmoid")
        np.testing.assert_array_equal(beta(**own), [0.25, 0.5])
        np.testing.assert_allclose(beta(**own, rescale_betas_zero_snr=True), [0.25, 1], rtol=1e-15)
        expected = make("linear", 20, zero_terminal_snr=True).beta
        np.testing.assert_array_equal(beta(num_train_timesteps=20, rescale_betas_zero_snr=True), expected)


def in_shards(folder, variant="", older=False):
    """Save another network in two shards beside the one in `folder`; return it and their index."""
    unet = random_unet(seed=3)
    tensors, shard_of = their_tensors(unet, original=False), {}
    for shard, names in zip(SHARDS, (list(tensors)[::2], list(tensors)[1::2])):
        shard = shard.replace(MODEL, MODEL + variant)
        save_file({name: tensors[name] for name in names}, folder / "unet" / shard, {"format": "pt"})
        shard_of |= dict.fromkeys(names, shard)
    index = folder / "unet" / f"{MODEL}.safetensors{variant if older else ''}.index{'' if older else variant}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 4 * unet.size}, "weight_map": shard_of}))
    return unet, index


def index_says(folder, shard):
    """That conv_in.weight, which is in the first shard, is in this one."""
    _, index = in_shards(folder)
    edit(index, weight_map=changed(json.loads(index.read_text())["weight_map"], {"conv_in.weight": shard}))


def with_shards(folder, name, content):
    """With this instead of one of their files."""
    in_shards(folder)
    (folder / "unet" / name).unlink()
    if content is not None:
        (folder / "unet" / name).write_bytes(content)


def with_a_tensor_twice(folder):
    in_shards(folder)
    second = folder / "unet" / SHARDS[1]
    save_file(load_file(second) | {"conv_in.weight": np.zeros((4, 1, 3, 3), np.float32)}, second)


@pytest.mark.parametrize(("variant", "older"), [("", False), (".fp16", False), (".fp16", True)])
def test_shards_are_read_before_one_file_beside_them(folder, variant, older):
    unet, index = in_shards(folder, variant, older)
    assert_same_weights(load_diffusers(folder, variant[1:] or None)[0], unet)
    if variant:
        assert_same_weights(load_diffusers(folder)[0], OURS)
    whole = (folder / WEIGHTS).rename(folder / "unet" / f"{MODEL}.ema.safetensors")
    assert_same_weights(load_diffusers(folder, variant[1:] or None)[0], unet)
    assert_same_weights(load_diffusers(folder, "ema")[0], OURS)
    index.unlink()  # shards that are left of an older model belong to nothing
    whole.rename(folder / WEIGHTS)
    (folder / "unet" / f"{MODEL}.bin.index.json").write_text("{}")
    assert_same_weights(load_diffusers(folder)[0], OURS)


THEIR_INDEX = f"{MODEL}.safetensors.index.json"


def spoilt(change):
    """A row's call that makes other weights of the header, as a dictionary, and the data of these."""

    def call(folder):
        content = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(content[:8], "little")
        (folder / WEIGHTS).write_bytes(change(json.loads(content[8 : 8 + length]), content[8 + length :]))

    return call


def moved(folder, *names):
    """Where models lie in a folder of folders."""
    for name in names:
        shutil.copytree(folder, folder / name, ignore=lambda *_: ["snapshots", "models--a--b"])
    for name in ("unet", "scheduler"):
        shutil.rmtree(folder / name)
    (folder / INDEX).unlink()


LIES_IN = "no file .*m/config.json, which .* a model. load_diffusers reads the folder .*m/"


# fmt: off
@refused(  # spoilt so, it is refused so
    (lambda f: index_says(f, "../scheduler/x.safetensors"), "weight_map: .* beside it for each tensor, got '../sched"),
    (lambda f: index_says(f, "/etc/x.safetensors"), "weight_map: .* beside it .* got '/etc/x.safetensors'"),
    (lambda f: index_says(f, "..\\x.safetensors"), "weight_map: .* beside it .* got "),
    (lambda f: index_says(f, "model.bin"), "weight_map: expected a safetensors file .* got 'model.bin'"),
    (lambda f: index_says(f, 3), "weight_map: .* got 3"),
    (lambda f: index_says(f, ...), f"the tensors are not where it says: conv_in.weight is in {SHARDS[0]}$"),
    (lambda f: index_says(f, SHARDS[1]), f"says: conv_in.weight is in {SHARDS[0]}; conv_in.* is not in {SHARDS[1]}$"),
    (lambda f: index_says(f, "y.safetensors"), "there is no file .*unet/y.safetensors", FileNotFoundError),
    (with_a_tensor_twice, f"the tensors are not where it says: conv_in.weight is in {SHARDS[1]}$"),
    (lambda f: with_shards(f, SHARDS[1], b"version https://git-lfs.github.com"), f"{SHARDS[1]} is not .* of git-lfs"),
    (lambda f: with_shards(f, SHARDS[1], None), f"there is no file .*{SHARDS[1]}", FileNotFoundError),
    (lambda f: with_shards(f, THEIR_INDEX, b"{}"), f"{THEIR_INDEX}: weight_map: expected"),
    (lambda f: with_shards(f, THEIR_INDEX, b'{"weight_map": {}}'), f"{THEIR_INDEX}: weight_map: expected"),
    (lambda f: with_shards(f, THEIR_INDEX, b'{"weight_map": ["x.safetensors"]}'), f"{THEIR_INDEX}: weight_map: "),
    (lambda f: with_shards(f, THEIR_INDEX, b"<html>"), f"{THEIR_INDEX} is not a JSON"),
    (lambda f: (f / WEIGHTS).rename(f / f"unet/{MODEL}.bin"), "there is no .*model.safetensors; there are .*model.bin"
     rf".* index, {THEIR_INDEX}, or with .* those of that name. Pickles \(.bin\) are never read, but diffusers "
     r"converts them: DDPMPipeline.from_pretrained\(folder\).save_pretrained\(another_folder\)$", FileNotFoundError),
    (lambda f: (f / SCHEDULER).unlink(), "folder: there is no file .*m/scheduler/scheduler_conf", FileNotFoundError),
    (lambda f: (f / UNET).unlink(), "folder: there is no file .*m/unet/config.json", FileNotFoundError),
    (lambda f: moved(f), "no file .*m/config.json, which .* a model. No model is in it$", FileNotFoundError),
    # as in the hub's cache
    (lambda f: moved(f, "snapshots/1", "snapshots/3"), f"{LIES_IN}snapshots/1 or .*m/snapshots/3$", FileNotFoundError),
    (lambda f: moved(f, "models--a--b/snapshots/1"), f"{LIES_IN}models--a--b/snapshots/1$", FileNotFoundError),
    (lambda f: moved(f, "ddpm-cifar10-32"), f"{LIES_IN}ddpm-cifar10-32$", FileNotFoundError),
    (lambda f: moved(f) or save_model(f / "run.safetensors", OURS, PLAIN),
     "no file .* load_model and load_original read files, such as .*run.safeten", FileNotFoundError),
    (spoilt(lambda h, data: safetensors_file(h | {"x": h["conv_in.bias"]}, data)), WEIGHTS),
    (spoilt(lambda h, data: safetensors_file(b"[]", data)), WEIGHTS),
    # what the library reads as tensors too: an entry as a list, a type as an object
    (spoilt(lambda h, data: safetensors_file({n: [*x.values()] for n, x in h.items() if "dtype" in x}, data)), WEIGHTS),
    (spoilt(lambda h, data: h["conv_in.bias"].update(dtype={"F32": None}) or safetensors_file(h, data)), WEIGHTS),
)
# fmt: on
def test_folders_that_are_refused(folder, call, message, error):
    call(folder)
    with pytest.raises(error, match=message):
        load_diffusers(folder)


# fmt: off
@pytest.mark.parametrize(("path", "settings", "message", "error"), [
    ("n", {}, "folder: expected a local folder, since nothing is downloaded; .*n is not there", FileNotFoundError),
    ("m/model_index.json", {}, "index.json is a file; load_original and load_model read files", FileNotFoundError),
    ("m", {"variant": "ema"}, f"no .*{MODEL}.ema.safetensors; there are config.json, {MODEL}.safet", FileNotFoundError),
    *[("m", {"variant": variant}, "variant: expected a word such as 'fp16', got", ValueError)
      for variant in ("../fp16", "a/b", "..", "", "fp16\n", "a.b")],
])
# fmt: on
def test_arguments_that_are_refused(folder, path, settings, message, error):
    with pytest.raises(error, match=message):
        load_diffusers(folder.parent / path, **settings)


BIG = 10**400  # an integer that is no float
CONFIGS_NOT_SUPPORTED = [
    (UNET, dict(_class_name="UNet2DConditionModel"), '_class_name = "UNet2DConditionModel" .*supported: UNet2DModel'),
    (UNET, dict(act_fn="gelu"), 'act_fn = "gelu" is not supported; supported: "silu" or "swish"'),
    (UNET, dict(layers_per_block=0), "layers_per_block: expected an integer >= 1, got 0"),
    (UNET, dict(block_out_channels=[]), r"block_out_channels: expected a sequence with .*, got \[\]"),
    (UNET, dict(block_out_channels=[4, None]), r"multiples of norm_num_groups = 2, got \[4, None\]"),
    (UNET, dict(down_block_types=["DownBlock2D", "No"]), "down_block_types = .*: a list of DownBlock2D and AttnDown"),
    (UNET, dict(down_block_types=["DownBlock2D"]), "down_block_types = .*supported: 2 of them, as many as block_out"),
    (UNET, dict(up_block_types=["UpBlock2D", "UpBlock2D"]), "up_block_types = .*supported: the mirror image.*AttnUpB"),
    (UNET, dict(norm_eps=BIG), "norm_eps: expected a number > 0, got inf"),
    (UNET, dict(freq_shift=True), "freq_shift = true is not .*supported: 0 or 1"),
    (UNET, dict(colour="x" * 1000), r'colour = "x{199}\.\.\. is not supported'),
    (UNET, dict(class_embed_type="timestep"), 'class_embed_type = "timestep" is not .*supported: null'),
    (UNET, dict(time_embedding_dim=32), "time_embedding_dim = 32 is not .*supported: null or 16"),
    (UNET, dict(attn_norm_num_groups=1), "attn_norm_num_groups = 1 is not .*supported: null or 2"),
    (UNET, dict(colour=True), "colour = true is not .*supported: the fields in_channels, out_channels"),
    (UNET, dict(attention_head_dim=3), "attention_head_dim: 3 does not divide the 8 channels"),
    (UNET, dict(norm_num_groups=3), "block_out_channels: expected multiples of norm_num_groups = 3"),
    (SCHEDULER, dict(_class_name="PNDMScheduler"), '_class_name = "PNDM.*supported: DDPMScheduler or DDIMScheduler'),
    (SCHEDULER, dict(beta_start=-1), "beta_start = -1 is not supported; supported: a number from 0 to 1"),
    (SCHEDULER, dict(beta_end=BIG), "beta_end = Infinity is not supported; supported: a number from 0 to 1"),
    (SCHEDULER, dict(beta_end=True), "beta_end = true is not supported; supported: a number from 0 to 1"),
    (SCHEDULER, dict(dynamic_thresholding_ratio=1.5), "dynamic_thresholding_ratio = 1.5 .*: a number from 0 to 1"),
    (SCHEDULER, dict(clip_sample=1), "clip_sample = 1 is not .*supported: true or false"),
    (SCHEDULER, dict(beta_end=1e-5), "beta_start, beta_end: expected 0 < beta_start.*, got 0.0001, 1e-05"),
    (SCHEDULER, dict(beta_end="0.02"), 'beta_end = "0.02" is not supported; supported: a number'),
    (SCHEDULER, dict(num_train_timesteps=10**7), "num_train_timesteps = 10000000 .*supported: a number from 1 to 1e"),
    (SCHEDULER, dict(num_train_timesteps=9.5), "num_train_timesteps: expected an integer >= 1, got 9.5"),
    (SCHEDULER, dict(trained_betas=[0.1]), "trained_betas: expected num_train_timesteps = 10 numbers, got 1"),
    (SCHEDULER, dict(trained_betas=[BIG] * 10), "trained_betas: expected a vector of .*got .inf inf"),
    (SCHEDULER, dict(trained_betas="abc"), "json: could not convert string to float: 'abc'"),
    (SCHEDULER, dict(trained_betas={"a": 1}), "json: float.. argument must be a string or a real number, not 'dict'"),
    (SCHEDULER, dict(trained_betas=[2] * 10, rescale_betas_zero_snr=True, prediction_type="sample"), "trained_betas: "),
    (SCHEDULER, dict(rescale_betas_zero_snr=True), "prediction_type: the schedule ends with alpha_bar = 0"),
    (SCHEDULER, dict(variance_type="learned"), 'variance_type = "learned" is not .*"fixed_small" or "fixed_small_log"'),
    (SCHEDULER, dict(clip_sample_range=0), "clip_sample_range = 0 is not supported; supported: a number from 1e-06"),
    (SCHEDULER, dict(thresholding=True, sample_max_value=0.5), "sample_max_value = 0.5 .*: a number from 1 to 1e.30"),
    (SCHEDULER, dict(steps_offset=1, timestep_spacing="leading"), "steps_offset = 1 is not .*supported: 0"),
    (SCHEDULER, dict(steps_offset=1, timestep_spacing=...), "steps_offset = 1 is not .*supported: 0"),
    (SCHEDULER, dict(_class_name="DDIMScheduler", set_alpha_to_one=False), "set_alpha_to_one = false .*: true"),
    (SCHEDULER, dict(_class_name="DDIMParallelScheduler", set_alpha_to_one=False), "set_alpha_to_one = false .*: true"),
    (INDEX, {"_class_name": "LDMPipeline"}, '_class_name = "LDMPipeline" is not supported; supported: DDPMPipeline or'),
    (INDEX, {"vqvae": ["diffusers", "VQModel"], "b": 1}, "a pipeline with vqvae, b is not supported; supported: one"),
]  # fmt: skip
NO_JSON_OBJECT = [  # what a file holds, and what is said of it
    (b"", "is not a JSON file: .*; it is empty"),
    (b'{"a": 1}x', "is not a JSON file: [^;]*$"),
    (b"\xff", "is not a JSON file: "),
    (b"[" * 100_000, "is not a JSON file: "),
    (b"version https://git-lfs.github.com/spec/v1", "is not .*; it is a pointer of git-lfs .*: run `git lfs pull` in"),
    (b"[{}]", ": expected a JSON object, got list"),
    (b"9" * 5000, ": expected a JSON object, got float"),
]


class TestRefusedFolders:
    @pytest.mark.parametrize(("file", "changes", "message"), CONFIGS_NOT_SUPPORTED)
    def test_what_is_not_supported(self, folder, file, changes, message):
        edit(folder / file, **changes)
        with pytest.raises(ValueError, match=message) as error:
            load_diffusers(folder)
        assert str(error.value).startswith(f"{folder / file}: ")

    def test_weights_that_do_not_fit(self, folder):
        tensors = load_file(folder / WEIGHTS)
        del tensors["conv_in.bias"]
        tensors["conv_out.bias"] = np.zeros(1, np.int8)
        tensors["conv_in.weight"] = tensors["conv_in.weight"].transpose(2, 3, 1, 0)
        tensors["mid_block.attentions.0.query.weight"] = np.zeros((8, 8), np.float32)  # beside to_q
        tensors["mid_block.my_query.weight"] = np.zeros(1, np.float32)  # no older name
        tensors["conv_norm_out.bias"] = np.zeros((4, 1, 1))  # of filters alone, 1 x 1 is no matter
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / WEIGHTS)
        start = f"{folder / WEIGHTS}: the weights do not fit the configuration: "
        with pytest.raises(ValueError, match=f"^{start}") as error:
            load_diffusers(folder)
        assert sorted(str(error.value).removeprefix(start).split("; ")) == [
            "conv_in.bias is missing",
            "conv_in.weight has shape (3, 3, 1, 4) instead of (4, 1, 3, 3)",
            "conv_norm_out.bias has shape (4, 1, 1) instead of (4,)",
            "conv_out.bias is of type I8 instead of F64, F32, F16, BF16",
            "mid_block.attentions.0.query.weight is unknown",
            "mid_block.my_query.weight is unknown",
        ]

    @pytest.mark.parametrize("file", [UNET, SCHEDULER, INDEX])
    def test_files_that_are_no_json_object(self, folder, file):
        for content, message in NO_JSON_OBJECT:
            (folder / file).write_bytes(content)
            with pytest.raises(ValueError, match=f"{file} ?{message}"):
                load_diffusers(folder)

    def test_nesting_that_can_just_be_read(self, folder):
        for depth in range(800, 1000):
            (folder / UNET).write_text('{"colour": ' + "[" * depth + "]" * depth + "}")
            with pytest.raises(ValueError, match="config.json"):
                load_diffusers(folder)

    @pytest.mark.parametrize("changes", [
        dict(block_out_channels=[10**6, 10**6]), dict(layers_per_block=1000), dict(layers_per_block=10**8),
        dict(num_class_embeds=10**6), dict(in_channels=10**6, out_channels=10**6),
        dict(block_out_channels=[4] * 1000, sample_size=None, down_block_types=["DownBlock2D"] * 1000,
             up_block_types=["UpBlock2D"] * 1000),
    ])  # fmt: skip
    def test_networks_far_larger_than_their_weights(self, folder, changes):
        edit(folder / UNET, **changes)
        message = "of a network many times as large as the weights that are there"
        with memory_of_at_most(3e7), pytest.raises(ValueError, match=message):
            load_diffusers(folder)

    def test_weights_to_come_take_no_memory_and_are_not_many_more_than_there_are_tensors(self):
        unet = UNet(**TINY, classes=3, rng=_NoWeights({}))
        assert all(not any(p.data.strides) for p in unet.parameters() if p.ndim > 1)
        few = dict.fromkeys("abcdefghij", Stored(pathlib.Path(), 0, (1,), "F32"))
        with pytest.raises(ValueError, match="many times as large as the weights"):
            UNet(**TINY | {"channels": (4,), "attention": (False,), "blocks": 600}, rng=_NoWeights(few))


FIELDS = {UNET: config_of.UNET_DEFAULTS | config_of.UNET_CHOICES, INDEX: {}}
FIELDS[SCHEDULER] = config_of.SCHEDULER_DEFAULTS | config_of.SCHEDULER_CHOICES
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(
        [BIG, 0, 1, 2, 4, 8, 0.5, 1e-5, 1e300, [4, 8], ["UpBlock2D"], "v_prediction", "learned_range", "sigmoid"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2), max_leaves=4,
)  # fmt: skip


class TestAnything:
    """Each example writes the file that it is about."""

    @settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_flipped_bits_in_the_header_of_the_weights(self, data, as_saved, folder):
        bad = bytearray((as_saved / WEIGHTS).read_bytes())
        position = st.integers(0, 7 + int.from_bytes(bad[:8], "little"))
        for i, bits in data.draw(st.lists(st.tuples(position, st.integers(1, 255)), min_size=1, max_size=3)):
            bad[i] ^= bits
        (folder / WEIGHTS).write_bytes(bad)
        try:
            assert_same_weights(load_diffusers(folder)[0], OURS)
        except ValueError as error:
            assert str(folder / WEIGHTS) in str(error)

    @pytest.mark.filterwarnings("ignore:.*unknown fields that are off")
    @pytest.mark.parametrize("file", FIELDS)
    @settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_any_value_in_any_field(self, file, data, as_saved, folder):
        names = st.sampled_from([*FIELDS[file], "_class_name", "unet", "scheduler", "../evil"]) | st.text(max_size=3)
        changes = data.draw(st.dictionaries(names, JSON, min_size=1, max_size=3))
        (folder / file).write_text(json.dumps(json.loads((as_saved / file).read_text()) | changes))
        try:
            assert_same_weights(load_diffusers(folder)[0], OURS)
        except ValueError as error:
            assert str(folder) in str(error)


HO = dict(in_channels=3, out_channels=3, channels=(32, 64), groups=32)


class TestOriginalNames:
    @pytest.mark.parametrize(("config", "prefix", "given", "size", "variance"), [
        ({}, "", "small", None, "small"),
        (dict(middle_attention=False, attention=(True, False), blocks=2), "module.", None, None, "large"),
        (dict(channels=(32,), attention=(True,)), "", "large", None, "large"),
        (dict(in_channels=1, out_channels=1), "module.", "small", None, "small"),
        (dict(channels=[32] * 4, attention=[False] * 4), "", None, (32, 32), "large"),  # of CIFAR-10
        (dict(channels=[32] * 6, attention=[False] * 6), "", None, (256, 256), "small"),
        (dict(channels=[32] * 6, attention=[False] * 6), "", "large", (256, 256), "large"),
    ])  # fmt: skip
    def test_a_checkpoint(self, tmp_path, config, prefix, given, size, variance):
        unet = random_unet(**HO | config, image_size=size)
        tensors = their_tensors(unet, original=True)
        assert {"down.0.block.0.temb_proj.weight", "up.0.block.0.nin_shortcut.bias"} <= set(tensors)
        save_file({prefix + name: x for name, x in tensors.items()}, tmp_path / "m")
        again, diffusion = load_original(tmp_path / "m", given)
        assert_same_weights(again, unet)
        assert again.config == unet.config
        np.testing.assert_array_equal(diffusion.schedule.beta, np.linspace(1e-4, 0.02, 1000))
        assert (diffusion.objective, diffusion.variance, diffusion.clip) == ("eps", variance, True)

    @pytest.mark.parametrize(("changes", "message"), [
        ({"temb.dense.0.bias": ...}, "is no checkpoint of Ho et al.'s network: .*temb.dense.0.bias is missing"),
        ({"extra": np.zeros(3)}, "is no checkpoint of Ho et al.'s network: .*extra is unknown"),
        ({"conv_out.weight": ...}, "not have .*: expected conv_in.weight, conv_out.weight, .* it has conv_in.bias"),
        ({"down.0.block.0.conv1.weight": np.zeros((33, 32, 3, 3))}, "channels: expected multiples of groups = 32"),
        ({"down.0.block.0.conv1.weight": np.zeros(())}, "is no checkpoint of Ho et al.'s network"),
        ({"conv_in.weight": np.zeros(3)}, "is no checkpoint of Ho et al.'s network"),
        ({"conv_in.bias": np.zeros(32, np.int32)}, "conv_in.bias is of type I32"),
        ({"down.1.attn.0.q.weight": np.zeros((64, 64, 3, 3))}, r"q.weight has shape \(64, 64, 3, 3\) instead of"),
        ({"module.conv_in.bias": np.zeros(32)}, "conv_in.bias"),  # a second one: which?
        (None, "does not have the names .* it has no tensors"),
    ])  # fmt: skip
    def test_tensors_that_do_not_fit(self, tmp_path, changes, message):
        tensors = {} if changes is None else changed(their_tensors(random_unet(**HO), original=True), changes)
        save_file(tensors, tmp_path / "m")
        with pytest.raises(ValueError, match=f"path: .*m .*{message}"):
            load_original(tmp_path / "m")

    def test_what_is_no_checkpoint(self, tmp_path):
        save_file({f"x{i:02}": np.zeros(1) for i in range(20)}, tmp_path / "other")
        with pytest.raises(ValueError, match="it has x00, .*, x09$"):
            load_original(tmp_path / "other")
        with pytest.raises(ValueError, match="variance: expected 'small', 'large' or None, got 'medium'"):
            load_original(tmp_path / "other", "medium")
