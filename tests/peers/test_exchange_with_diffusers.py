"""Models go to diffusers and come from it: the same weights, outputs, gradients and whole chains of samples.

Skipped where diffusers is not installed (`pip install 'tinyddpm[peers]'`). Weights are random: nothing is downloaded.
"""

import copy
import json
import pathlib

import numpy as np
import pytest
from ideal import moved
from test_diffusers import Float64, nchw, nhwc

from tinyddpm import Diffusion, Schedule, UNet, backward, load_diffusers, sample, save_diffusers
from tinyddpm import make_schedule as make
from tinyddpm.exchange.diffusers_config import diffusion_from
from tinyddpm.exchange.names import diffusers_layout, laid_out

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:folder. .* has no scheduler_config.json", "ignore::DeprecationWarning")


def blocks(attention, n):
    """The types of n levels, with attention at these."""
    down = ["AttnDownBlock2D" if i in attention else "DownBlock2D" for i in range(n)]
    return dict(down_block_types=down, up_block_types=[kind.replace("Down", "Up") for kind in reversed(down)])


SMALL = blocks([1], 2) | dict(sample_size=16, block_out_channels=[32, 64], norm_num_groups=8)
HO = dict(
    attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
    mid_block_scale_factor=1, act_fn="silu", time_embedding_type="positional", center_input_sample=False,
)  # fmt: skip
GREY = dict(in_channels=1, out_channels=1)
CONFIGURATIONS = {
    "google/ddpm-cifar10-32, a quarter as wide":
        HO | blocks([1], 4) | dict(sample_size=32, block_out_channels=[32, 64, 64, 64]),
    "google/ddpm-{celebahq,cat,church,bedroom}-256, a quarter as wide":
        HO | blocks([4], 6) | dict(sample_size=32, block_out_channels=[32, 32, 64, 64, 128, 128]),
    "what UNet() is":
        HO | GREY | blocks([2], 3) | dict(sample_size=28, block_out_channels=[32, 64, 128], norm_num_groups=8),
    "a well-known course's": GREY | blocks([1, 2], 3) | dict(sample_size=28, block_out_channels=[32, 64, 64]),
    "their training script's, a quarter as wide":
        blocks([4], 6) | dict(sample_size=32, block_out_channels=[32, 32, 64, 64, 128, 128]),
    "defaults": dict(block_out_channels=[32, 32, 64, 64]),
    "no attention in the middle": SMALL | dict(add_attention=False),
    "no attention at all": SMALL | blocks([], 2) | dict(add_attention=False),
    "heads of 4 channels": SMALL | blocks([0, 1], 2) | dict(attention_head_dim=4),
    "flipped, freq_shift 1": SMALL | dict(flip_sin_to_cos=True, freq_shift=1),
    "not flipped, freq_shift 0": SMALL | dict(flip_sin_to_cos=False, freq_shift=0),
    "another epsilon and groups": SMALL | dict(norm_eps=1e-2, norm_num_groups=16),
    "symmetric padding, odd width": SMALL | dict(sample_size=[16, 24], downsample_padding=1),
    "images in [0, 1]": SMALL | dict(center_input_sample=True),
    "classes": SMALL | dict(num_class_embeds=10),
    "learned variance": SMALL | dict(out_channels=6, layers_per_block=1),
    "one level, three layers": blocks([0], 1) | dict(sample_size=8, block_out_channels=[32], layers_per_block=3),
    "dropout, swish": SMALL | dict(dropout=0.1, act_fn="swish"),
}  # fmt: skip


def their_unet(config, seed=0):
    """A UNet2DModel of random weights, gains and biases."""
    torch.manual_seed(seed)
    model = diffusers.UNet2DModel(**config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += 0.1 * torch.randn_like(p)
    return model


def batch(config):
    """Images, timesteps and what weights the outputs in a loss, and the labels that both networks may want."""
    rng, size = np.random.default_rng(0), np.broadcast_to(config.get("sample_size", 32), 2)
    x = rng.standard_normal((2, *size, config.get("in_channels", 3))).astype(np.float32)
    weights = rng.standard_normal((2, *size, config.get("out_channels", 3)))
    return x, np.array([3, 900]), weights, np.array([7, 3]) if config.get("num_class_embeds") else None


def their_output(model, x, t, labels=None):
    return model(nchw(x), torch.from_numpy(t), class_labels=None if labels is None else torch.from_numpy(labels)).sample


def distance(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


def assert_same_weights(ours, state):
    for name, value in laid_out(ours.state_dict(), diffusers_layout).items():
        np.testing.assert_array_equal(value, state[name].numpy())


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def pair(request, tmp_path_factory):
    """A configuration, their network of it, and ours, loaded from the pipeline that they saved."""
    config, folder = CONFIGURATIONS[request.param], tmp_path_factory.mktemp("theirs")
    theirs, learned = their_unet(config), request.param == "learned variance"
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range" if learned else "fixed_large")
    diffusers.DDPMPipeline(theirs, scheduler).save_pretrained(folder)
    ours, diffusion = load_diffusers(folder)
    assert diffusion.variance == ("learned_range" if learned else "large")
    return config, theirs, ours


class TestEveryConfiguration:
    def test_output_and_gradients(self, pair, monkeypatch):
        """The latter in float64; as for float32, test_torch.py compares those of any network."""
        config, theirs, ours = copy.deepcopy(pair)
        x, t, weights, labels = batch(config)
        with torch.no_grad():
            assert distance(ours(x, t, labels=labels).data, nhwc(their_output(theirs, x, t, labels))) < 2e-5
        monkeypatch.setattr(diffusers.models.embeddings, "torch", Float64(torch))  # of the timesteps, float32 else
        ours, theirs, x = ours.to(dtype="float64"), theirs.double(), x.astype(np.float64)
        y, expected = ours(x, t, labels=labels), their_output(theirs, x, t, labels)
        assert distance(y.data, nhwc(expected)) < 1e-10
        (expected * nchw(weights)).sum().backward()
        gradients = backward((y * weights).sum())
        expected = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
        got = laid_out({name: gradients[p] for name, p in ours.named_parameters().items()}, diffusers_layout)
        assert got.keys() == expected.keys()
        largest = max(np.abs(g).max() for g in expected.values())
        for key, want in expected.items():
            assert np.abs(got[key] - want).max() < 1e-10 * largest, key

    def test_back_to_diffusers(self, pair, tmp_path):
        _, theirs, ours = pair
        learned = ours.config["out_channels"] == 2 * ours.config["in_channels"]
        variance = dict(variance="learned_range", loss_type="hybrid") if learned else {}
        save_diffusers(tmp_path / "ours", ours, Diffusion(make(), **variance))
        again = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours").unet
        state, before = again.state_dict(), theirs.state_dict()
        assert state.keys() == before.keys() and all(torch.equal(state[key], before[key]) for key in before)
        listed = lambda value: list(value) if np.ndim(value) else value
        for field in set(theirs.config) - {"_use_default_values", "_name_or_path", "_diffusers_version", "act_fn"}:
            now, before = listed(again.config[field]), listed(theirs.config[field])
            assert now == before or (field, before, now) == ("sample_size", None, 32), field


@pytest.mark.parametrize(("dtype", "variant"), [("float16", "fp16"), ("bfloat16", None), ("float64", None)])
def test_weights_of_other_types(dtype, variant, tmp_path):
    theirs = their_unet(SMALL).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path, variant=variant)
    ours, _ = load_diffusers(tmp_path, variant)
    assert ours.dtype == ("float64" if dtype == "float64" else "float32")
    assert_same_weights(ours, theirs.to(getattr(torch, str(ours.dtype))).state_dict())


def test_what_their_moving_average_saves(tmp_path):
    from diffusers.training_utils import EMAModel

    theirs = their_unet(SMALL)
    EMAModel(theirs.parameters(), model_cls=diffusers.UNet2DModel, model_config=theirs.config).save_pretrained(tmp_path)
    assert_same_weights(load_diffusers(tmp_path)[0], theirs.state_dict())


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_shards(variant, tmp_path):
    """And one file beside them, which diffusers passes over."""
    theirs = their_unet(SMALL)
    theirs.save_pretrained(tmp_path, max_shard_size="200KB", variant=variant)
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 2
    their_unet(SMALL, seed=1).save_pretrained(tmp_path / "other", variant=variant)
    (weights,) = (tmp_path / "other").glob("*.safetensors")
    weights.rename(tmp_path / weights.name)
    again = diffusers.UNet2DModel.from_pretrained(tmp_path, variant=variant).state_dict()
    assert all(torch.equal(again[name], x) for name, x in theirs.state_dict().items())
    assert_same_weights(load_diffusers(tmp_path, variant)[0], again)


SHORT = {"num_train_timesteps": 100}  # one chain of 1,000 steps is enough
SCHEDULERS = {
    "default": SHORT,
    "cifar10-32": dict(variance_type="fixed_large"),
    "trailing, zero terminal SNR": SHORT | dict(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    "cosine, learned": SHORT | dict(beta_schedule="squaredcos_cap_v2", variance_type="learned_range"),
    "sigmoid, image, wide clip": SHORT | dict(
        beta_schedule="sigmoid", prediction_type="sample", clip_sample_range=1.5, timestep_spacing="linspace"),
    "thresholding, log": SHORT | dict(
        thresholding=True, sample_max_value=1.6, dynamic_thresholding_ratio=0.9, variance_type="fixed_small_log"),
    "not clipped": SHORT | dict(clip_sample=False, prediction_type="v_prediction"),
    "betas of its own": SHORT | dict(trained_betas=[1e-3 + 2.5e-6 * i**2 for i in range(100)]),
}  # fmt: skip
OURS = {
    "linear": Diffusion(make("linear", 100, beta_end=0.2), clip=0.8),
    "cosine, v, large": Diffusion(make("cosine", 100), "v", "large", spacing="linspace"),
    "cosine of its own": Diffusion(make("cosine", 60, s=0.02), "x0", clip="dynamic"),
    "Chen's sigmoid, zero terminal SNR": Diffusion(make("sigmoid", 50, zero_terminal_snr=True), "v"),
    "quadratic": Diffusion(make("quadratic", 100, beta_end=0.2), clip=("dynamic", 0.9, 2.0)),
    "betas": Diffusion(Schedule(np.linspace(0.001, 0.4, 30)), variance="learned_range", loss_type="hybrid", clip=False),
}


def assert_same_pictures(monkeypatch, pipeline, unet, diffusion):
    """After all steps of DDPM, theirs by their pipeline, which draws the noise that `sample` draws."""
    streams = np.random.default_rng(0).spawn(2)

    def randn_tensor(shape, **settings):
        shape = (*shape[2:], shape[1])
        return nchw(np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams]))

    for module in (diffusers.pipelines.ddpm.pipeline_ddpm, diffusers.schedulers.scheduling_ddpm):
        monkeypatch.setattr(module, "randn_tensor", randn_tensor)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(batch_size=2, num_inference_steps=diffusion.T, output_type="np").images
    assert expected.std() > 0.05
    images = sample(diffusion, unet, (2, 4, 4, 1), "ddpm")
    np.testing.assert_allclose((images / 2 + 0.5).clip(0, 1), expected, atol=1e-3)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_was_made_there_runs_here_and_goes_back_as_it_was(name, tmp_path, monkeypatch):
    config = blocks([], 1) | dict(block_out_channels=[8], norm_num_groups=4, layers_per_block=1, sample_size=4)
    config |= dict(in_channels=1, out_channels=2 if "learned" in name else 1)
    scheduler = diffusers.DDPMScheduler(**SCHEDULERS[name])
    pipeline = diffusers.DDPMPipeline(their_unet(config), scheduler)
    pipeline.save_pretrained(tmp_path / "theirs")
    unet, diffusion = load_diffusers(tmp_path / "theirs")
    assert_same_pictures(monkeypatch, pipeline, unet, diffusion)
    save_diffusers(tmp_path / "ours", unet, diffusion)
    again = diffusers.DDPMScheduler.from_pretrained(tmp_path / "ours", subfolder="scheduler")
    expected = {key: value for key, value in scheduler.config.items() if key[0] != "_"}
    if expected["variance_type"] == "fixed_small_log":
        expected["variance_type"] = "fixed_small"  # which is the same
    assert {key: again.config[key] for key in expected} == expected and torch.equal(again.betas, scheduler.betas)


@pytest.mark.parametrize("name", OURS)
def test_what_was_made_here_runs_there(name, tmp_path, monkeypatch):
    diffusion = OURS[name]
    outputs = 2 if diffusion.variance == "learned_range" else 1
    unet = moved(UNet(1, outputs, (8,), 1, (True,), groups=4, head_channels=4, image_size=4))
    save_diffusers(tmp_path, unet, diffusion)
    assert_same_pictures(monkeypatch, diffusers.DDPMPipeline.from_pretrained(tmp_path), unet, diffusion)


OTHERS = [
    kind.name
    for kind in diffusers.schedulers.KarrasDiffusionSchedulers
    if issubclass(getattr(diffusers, kind.name), diffusers.SchedulerMixin)  # what it needs besides is installed
    and kind.name != "EDMEulerScheduler"  # for networks of another kind
]


@pytest.mark.parametrize("kind", "DDPMScheduler DDIMScheduler DDPMParallelScheduler DDIMParallelScheduler".split())
def test_what_other_schedulers_leave_in_a_configuration(kind):
    """Which is nothing that acts: `from_config` keeps it for a scheduler that may come again."""
    assert len(OTHERS) > 10
    for name in OTHERS:
        saved = json.loads(getattr(diffusers, name)(num_train_timesteps=10, beta_end=0.4).to_json_string())
        other = getattr(diffusers, name).from_config(saved)  # as from a file, where nothing is left out
        scheduler = getattr(diffusers, kind).from_config(other.config, set_alpha_to_one=True)
        config = json.loads(scheduler.to_json_string())
        assert config.keys() >= saved.keys()
        diffusion = diffusion_from(config, pathlib.Path(name))
        np.testing.assert_allclose(diffusion.schedule.beta, scheduler.betas.numpy(), rtol=1e-6)
