"""Models go to diffusers and come from it: the same weights, outputs, gradients and whole chains of samples.

Skipped where diffusers is not installed (`pip install 'tinyddpm[peers]'`). Weights are random: nothing is downloaded.
"""

import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest

from tinyddpm import (
    Diffusion,
    Schedule,
    UNet,
    backward,
    load_diffusers,
    load_original,
    make_schedule,
    sample,
    save_diffusers,
)
from tinyddpm.exchange.diffusers_config import diffusion_from
from tinyddpm.exchange.names import diffusers_layout, laid_out

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SMALL = dict(
    sample_size=16, block_out_channels=[32, 64], down_block_types=["DownBlock2D", "AttnDownBlock2D"],
    up_block_types=["AttnUpBlock2D", "UpBlock2D"], norm_num_groups=8,
)  # fmt: skip
HO = dict(
    attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
    mid_block_scale_factor=1, act_fn="silu", time_embedding_type="positional", center_input_sample=False,
)  # fmt: skip


def blocks(attention, n):
    """The types of n levels, with attention at these."""
    down = ["AttnDownBlock2D" if i in attention else "DownBlock2D" for i in range(n)]
    return dict(down_block_types=down, up_block_types=[kind.replace("Down", "Up") for kind in reversed(down)])


CONFIGURATIONS = {
    # google/ddpm-cifar10-32 itself
    "cifar10-32": HO | blocks([1], 4) | dict(sample_size=32, block_out_channels=[128, 256, 256, 256]),
    # google/ddpm-{celebahq,cat,church,bedroom}-256, a quarter as wide
    "celebahq-256": HO | blocks([4], 6) | dict(sample_size=32, block_out_channels=[32, 32, 64, 64, 128, 128]),
    # what `UNet()` is
    "mnist": HO | blocks([2], 3) | dict(
        sample_size=28, in_channels=1, out_channels=1, block_out_channels=[32, 64, 128], norm_num_groups=8),
    # of a well-known course, with diffusers' defaults for the rest
    "course": blocks([1, 2], 3) | dict(sample_size=28, in_channels=1, out_channels=1, block_out_channels=[32, 64, 64]),
    # of diffusers' training script, a quarter as wide
    "script": blocks([4], 6) | dict(sample_size=64, block_out_channels=[32, 32, 64, 64, 128, 128]),
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


def exact_encoding(model):
    """Let the network encode timesteps in float64; its own encoding is float32 always."""

    def encode(t):
        half = model.config.block_out_channels[0] // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / (half - model.config.freq_shift))
        sin_cos = [torch.sin(t[:, None] * rates), torch.cos(t[:, None] * rates)]
        return torch.cat(sin_cos[::-1] if model.config.flip_sin_to_cos else sin_cos, dim=1)

    model.time_proj.forward = encode
    return model


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def batch(config, dtype=np.float32, n=2):
    """Images, timesteps and what weights the outputs in a loss, and the labels that both networks may want."""
    rng = np.random.default_rng(0)
    size = np.broadcast_to(config.get("sample_size", 32), 2)
    x = rng.standard_normal((n, *size, config.get("in_channels", 3))).astype(dtype)
    weights = rng.standard_normal((n, *size, config.get("out_channels", 3))).astype(dtype)
    labels = np.array([7, 3]) if config.get("num_class_embeds") else None
    return x, np.array([3, 900]), weights, labels


def their_output(model, x, t, labels):
    labels = None if labels is None else torch.from_numpy(labels)
    return model(nchw(x), torch.from_numpy(t), class_labels=labels).sample


def gradients_in_their_layout(unet, loss):
    """{their name: gradient, its axes in their order}"""
    gradients = backward(loss)
    return laid_out({name: gradients[p] for name, p in unet.named_parameters().items()}, diffusers_layout)


def distance(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("name", CONFIGURATIONS)
class TestEveryConfiguration:
    """A network that diffusers saved, and what it is here."""

    @pytest.fixture
    def pair(self, name, tmp_path):
        """Their network and ours, loaded from the pipeline that they saved."""
        theirs = their_unet(CONFIGURATIONS[name])
        learned = theirs.config.out_channels == 2 * theirs.config.in_channels
        scheduler = diffusers.DDPMScheduler(variance_type="learned_range" if learned else "fixed_large")
        diffusers.DDPMPipeline(theirs, scheduler).save_pretrained(tmp_path)
        ours, diffusion = load_diffusers(tmp_path)
        assert diffusion.variance == ("learned_range" if learned else "large")
        return theirs, ours

    def test_output_and_gradients(self, name, pair):
        theirs, ours = pair
        x, t, weights, labels = batch(CONFIGURATIONS[name])
        y = ours(x, t, labels=labels)
        expected = their_output(theirs, x, t, labels)
        assert distance(y.data, nhwc(expected)) < 2e-5
        (expected * nchw(weights)).sum().backward()
        got = gradients_in_their_layout(ours, (y * weights).sum())
        expected = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
        assert got.keys() == expected.keys()
        largest = max(np.abs(g).max() for g in expected.values())
        for key, want in expected.items():
            if np.abs(want).max() > 1e-5 * largest:
                assert distance(got[key], want) < 1e-4, key
            else:  # what a norm or softmax takes away again has a gradient of zero, but for rounding
                assert np.abs(got[key]).max() < 1e-5 * largest, key

    def test_output_and_gradients_in_float64(self, name, pair):
        theirs, ours = exact_encoding(pair[0].double()), pair[1].to(dtype="float64")
        x, t, weights, labels = batch(CONFIGURATIONS[name], np.float64)
        y, expected = ours(x, t, labels=labels), their_output(theirs, x, t, labels)
        assert distance(y.data, nhwc(expected)) < 1e-10
        (expected * nchw(weights)).sum().backward()
        got = gradients_in_their_layout(ours, (y * weights).sum())
        expected = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
        largest = max(np.abs(g).max() for g in expected.values())
        for key, want in expected.items():
            assert np.abs(got[key] - want).max() < 1e-10 * largest, key

    def test_back_to_diffusers_and_here_again(self, name, pair, tmp_path):
        theirs, ours = pair
        learned = dict(variance="learned_range", loss_type="hybrid") if name == "learned variance" else {}
        save_diffusers(tmp_path / "ours", ours, Diffusion(make_schedule(), **learned))
        again = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours").unet
        state, before = again.state_dict(), theirs.state_dict()
        assert state.keys() == before.keys()
        assert all(torch.equal(state[key], before[key]) for key in before)
        ignored = {"_use_default_values", "_name_or_path", "_diffusers_version", "act_fn"}
        for field in set(theirs.config) - ignored:
            ours_now, before = (
                c[field] if np.ndim(c[field]) == 0 else list(c[field]) for c in (again.config, theirs.config)
            )
            assert ours_now == before or (field, before, ours_now) == ("sample_size", None, 32), field
        again.save_pretrained(tmp_path / "again")
        with pytest.warns(UserWarning, match="no scheduler_config.json"):
            unet, _ = load_diffusers(tmp_path / "again")
        for key, value in ours.state_dict().items():
            np.testing.assert_array_equal(unet.state_dict()[key], value)


def test_the_network_of_cifar10_has_its_size(tmp_path):
    their_unet(CONFIGURATIONS["cifar10-32"]).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no scheduler_config.json"):  # a model folder
        unet, diffusion = load_diffusers(tmp_path)
    assert unet.size == 35_746_307 and len(unet.parameters()) == 328
    assert unet.config["image_size"] == (32, 32) and diffusion.variance == "small" and diffusion.T == 1000


@pytest.mark.parametrize(("dtype", "variant"), [("float16", "fp16"), ("bfloat16", None), ("float64", None)])
@pytest.mark.filterwarnings("ignore:folder. .* has no scheduler_config.json")
def test_weights_of_other_types(dtype, variant, tmp_path):
    theirs = their_unet(SMALL).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path, variant=variant)
    ours, _ = load_diffusers(tmp_path, variant)
    wide = theirs.double() if dtype == "float64" else theirs.float()
    assert ours.dtype == ("float64" if dtype == "float64" else "float32")
    state = wide.state_dict()
    for name, value in laid_out(ours.state_dict(), diffusers_layout).items():
        np.testing.assert_array_equal(value, state[name].numpy())


@pytest.mark.filterwarnings("ignore:folder. .* has no scheduler_config.json")
def test_what_their_moving_average_saves(tmp_path):
    from diffusers.training_utils import EMAModel

    theirs = their_unet(SMALL)
    average = EMAModel(theirs.parameters(), model_cls=diffusers.UNet2DModel, model_config=theirs.config)
    average.save_pretrained(tmp_path)
    x, t, _, _ = batch(SMALL)
    assert distance(load_diffusers(tmp_path)[0](x, t).data, nhwc(their_output(theirs, x, t, None))) < 2e-5


# ----------------------------------------------------------------------------------------------------- the schedulers

SHORT = {"num_train_timesteps": 250}  # two chains of 1,000 steps are enough
SCHEDULERS = {
    "default": {},
    "cifar10-32": dict(variance_type="fixed_large"),
    "trailing, zero terminal SNR": dict(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", **SHORT),
    "cosine, learned": dict(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", **SHORT),
    "sigmoid, image, wide clip": dict(
        beta_schedule="sigmoid", prediction_type="sample", clip_sample_range=1.5, timestep_spacing="linspace", **SHORT),
    "thresholding, log": dict(
        thresholding=True, sample_max_value=1.6, dynamic_thresholding_ratio=0.9, variance_type="fixed_small_log",
        **SHORT),
    "not clipped": dict(clip_sample=False, prediction_type="v_prediction", **SHORT),
    "betas of its own": dict(**SHORT, trained_betas=[1e-3 + 4e-7 * i**2 for i in range(250)]),
}  # fmt: skip


def saved(folder, scheduler):
    """A small pipeline with this scheduler, as they save it; the network has what the variance asks for."""
    learned = scheduler.get("variance_type") == "learned_range"
    config = SMALL | dict(in_channels=1, out_channels=2 if learned else 1, layers_per_block=1, sample_size=8)
    pipeline = diffusers.DDPMPipeline(their_unet(config), diffusers.DDPMScheduler(**scheduler))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


def share_noise(monkeypatch, n, *modules):
    """Let their pipelines draw the noise that `sample` draws with rng=0."""
    streams = np.random.default_rng(0).spawn(n)

    def randn_tensor(shape, **settings):
        shape = (*shape[2:], shape[1])
        return nchw(np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams]))

    for module in modules:
        monkeypatch.setattr(module, "randn_tensor", randn_tensor)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_whole_chain_of_their_pipeline(name, tmp_path, monkeypatch):
    """All steps of DDPM, theirs by DDPMPipeline, ours by `sample`."""
    pipeline = saved(tmp_path, SCHEDULERS[name])
    unet, diffusion = load_diffusers(tmp_path)
    share_noise(monkeypatch, 2, diffusers.pipelines.ddpm.pipeline_ddpm, diffusers.schedulers.scheduling_ddpm)
    expected = pipeline(batch_size=2, num_inference_steps=diffusion.T, output_type="np").images
    images = sample(diffusion, unet, (2, 8, 8, 1))
    assert expected.std() > 0.05
    np.testing.assert_allclose((images / 2 + 0.5).clip(0, 1), expected, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if "learned" not in name and "sigmoid" not in name])
def test_fifty_steps_of_ddim(name, tmp_path, monkeypatch):
    pipeline = saved(tmp_path, SCHEDULERS[name])
    unet, diffusion = load_diffusers(tmp_path)
    ddim = diffusers.DDIMPipeline(pipeline.unet, diffusers.DDIMScheduler.from_config(pipeline.scheduler.config))
    ddim.set_progress_bar_config(disable=True)
    share_noise(monkeypatch, 2, diffusers.pipelines.ddim.pipeline_ddim)
    settings = dict(use_clipped_model_output=True)  # the noise is derived from the image once it is clipped
    expected = ddim(batch_size=2, num_inference_steps=50, output_type="np", **settings).images
    images = sample(diffusion, unet, (2, 8, 8, 1), "ddim", steps=50)
    assert expected.std() > 0.05
    np.testing.assert_allclose((images / 2 + 0.5).clip(0, 1), expected, atol=1e-4)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_come_back_as_they_were(name, tmp_path):
    pipeline = saved(tmp_path, SCHEDULERS[name])
    unet, diffusion = load_diffusers(tmp_path)
    save_diffusers(tmp_path / "ours", unet, diffusion)
    again = diffusers.DDPMScheduler.from_pretrained(tmp_path / "ours", subfolder="scheduler")
    expected = dict(pipeline.scheduler.config)
    if expected["variance_type"] == "fixed_small_log":
        expected["variance_type"] = "fixed_small"  # which is the same
    ours = {key: again.config[key] for key in expected if key[0] != "_"}
    assert ours == {key: value for key, value in expected.items() if key[0] != "_"}
    assert torch.equal(again.betas, pipeline.scheduler.betas)


OURS = {
    "linear": Diffusion(make_schedule("linear", 1000), clip=0.8),
    "cosine, v, large": Diffusion(make_schedule("cosine", 100), "v", "large", spacing="linspace"),
    "cosine of its own": Diffusion(make_schedule("cosine", 60, s=0.02), "x0", clip="dynamic"),
    "Chen's sigmoid, zero terminal SNR": Diffusion(make_schedule("sigmoid", 50, zero_terminal_snr=True), "v"),
    "quadratic": Diffusion(make_schedule("quadratic", 200, beta_end=0.1), clip=("dynamic", 0.9, 2.0)),
    "betas": Diffusion(Schedule(np.linspace(0.001, 0.4, 30)), variance="learned_range", loss_type="hybrid", clip=False),
}


@pytest.mark.parametrize("name", OURS)
def test_their_pipeline_runs_what_was_made_here(name, tmp_path, monkeypatch):
    diffusion = OURS[name]
    learned = diffusion.variance == "learned_range"
    rng = np.random.default_rng(0)
    unet = UNet(1, 2 if learned else 1, (8, 16), 1, (False, True), groups=4, head_channels=4, image_size=8)
    for p in unet.parameters():
        p.data += (0.1 * rng.standard_normal(p.shape)).astype(np.float32)
    save_diffusers(tmp_path, unet, diffusion)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    share_noise(monkeypatch, 2, diffusers.pipelines.ddpm.pipeline_ddpm, diffusers.schedulers.scheduling_ddpm)
    theirs = pipeline(batch_size=2, num_inference_steps=diffusion.T, output_type="np").images
    ours = sample(diffusion, unet, (2, 8, 8, 1))
    assert theirs.std() > 0.05
    np.testing.assert_allclose((ours / 2 + 0.5).clip(0, 1), theirs, atol=1e-3)
    again, loaded = load_diffusers(tmp_path)
    assert all((again.state_dict()[key] == value).all() for key, value in unet.state_dict().items())
    np.testing.assert_array_equal(loaded.schedule.beta, diffusion.schedule.beta)
    for field in ("objective", "variance", "loss_type", "clip", "spacing"):
        assert getattr(loaded, field) == getattr(diffusion, field)


def test_in_fewer_steps_ddpm_is_theirs_but_for_the_large_variance(tmp_path, monkeypatch):
    pipeline = saved(tmp_path, {"variance_type": "fixed_small"})
    unet, diffusion = load_diffusers(tmp_path)
    assert diffusion.spacing == "leading"
    share_noise(monkeypatch, 2, diffusers.pipelines.ddpm.pipeline_ddpm, diffusers.schedulers.scheduling_ddpm)
    expected = pipeline(batch_size=2, num_inference_steps=50, output_type="np").images
    for variance in ("small", "large"):  # of long steps only the small one gives good pictures
        diffusion = dataclasses.replace(diffusion, variance=variance)
        images = sample(diffusion, unet, (2, 8, 8, 1), "ddpm", steps=50)
        np.testing.assert_allclose((images / 2 + 0.5).clip(0, 1), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"])
def test_what_they_would_load_instead_is_not_left_beside_ours(name, tmp_path):
    theirs = their_unet(SMALL)
    safe = name.endswith("safetensors")
    theirs.save_pretrained(tmp_path / "unet", safe_serialization=safe, variant="fp16" if safe else None)
    assert (tmp_path / "unet" / name).exists()
    with pytest.raises(FileExistsError, match=f"{name} would stay beside the new weights"):
        save_diffusers(tmp_path, UNet(), Diffusion(make_schedule()))


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.filterwarnings("ignore:folder. .* has no scheduler_config.json")
def test_weights_in_shards(variant, tmp_path):
    """And one file beside them, which diffusers passes over."""
    theirs, other = their_unet(SMALL), their_unet(SMALL, seed=1)
    theirs.save_pretrained(tmp_path, max_shard_size="200KB", variant=variant)
    shards = list(tmp_path.glob("*-of-*.safetensors"))
    other.save_pretrained(tmp_path / "other", variant=variant)
    (weights,) = (tmp_path / "other").glob("*.safetensors")
    weights.rename(tmp_path / weights.name)
    again = diffusers.UNet2DModel.from_pretrained(tmp_path, variant=variant).state_dict()
    assert len(shards) > 2 and all(torch.equal(again[name], x) for name, x in theirs.state_dict().items())
    ours, _ = load_diffusers(tmp_path, variant)
    for name, value in laid_out(ours.state_dict(), diffusers_layout).items():
        np.testing.assert_array_equal(value, again[name].numpy())
    for path in shards:
        path.unlink()
    (index,) = tmp_path.glob("*.index*.json")
    index.unlink()
    ours, _ = load_diffusers(tmp_path, variant)
    for name, value in laid_out(ours.state_dict(), diffusers_layout).items():
        np.testing.assert_array_equal(value, other.state_dict()[name].numpy())


OURS_TOO = ["DDPMScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler"]
OTHERS = [
    kind.name
    for kind in diffusers.schedulers.KarrasDiffusionSchedulers
    if issubclass(getattr(diffusers, kind.name), diffusers.SchedulerMixin)  # what it needs besides is installed
    and kind.name != "EDMEulerScheduler"  # for networks of another kind
]


@pytest.mark.parametrize("kind", OURS_TOO)
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


# ------------------------------------------------------------------------------------ the names of Ho et al.'s own code

nn = torch.nn


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


def swish(x):
    return x * torch.sigmoid(x)


class Block(nn.Module):
    def __init__(self, a, b, time):
        super().__init__()
        self.norm1, self.conv1 = norm(a), nn.Conv2d(a, b, 3, padding=1)
        self.temb_proj = nn.Linear(time, b)
        self.norm2, self.conv2 = norm(b), nn.Conv2d(b, b, 3, padding=1)
        if a != b:
            self.nin_shortcut = nn.Conv2d(a, b, 1)

    def forward(self, x, temb):
        h = self.conv1(swish(self.norm1(x))) + self.temb_proj(swish(temb))[:, :, None, None]
        h = self.conv2(swish(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2) for f in (self.q, self.k, self.v))  # (N, C, H W)
        w = torch.softmax(torch.einsum("ncq,nck->nqk", q, k) / x.shape[1] ** 0.5, dim=2)
        return x + self.proj_out(torch.einsum("nqk,nck->ncq", w, v).reshape(x.shape))


class Down(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(nn.functional.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class Original(nn.Module):
    """The network of Ho et al. 2020 with the names of their code: levels of the way up are numbered from the finest."""

    def __init__(self, images, channels, blocks, attention):
        super().__init__()
        c, time = channels[0], 4 * channels[0]
        self.blocks, self.attention, self.c = blocks, attention, c
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(c, time), nn.Linear(time, time)])
        self.conv_in = nn.Conv2d(images, c, 3, padding=1)
        self.down, skips, width = nn.ModuleList(), [c], c
        for i, c in enumerate(channels):
            level = nn.Module()
            level.block = nn.ModuleList([Block(width if j == 0 else c, c, time) for j in range(blocks)])
            level.attn = nn.ModuleList([Attention(c) for _ in range(blocks) if i in attention])
            skips, width = skips + [c] * blocks, c
            if i < len(channels) - 1:
                level.downsample = Down(c)
                skips.append(c)
            self.down.append(level)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.attn_1, self.mid.block_2 = Block(c, c, time), Attention(c), Block(c, c, time)
        self.up = nn.ModuleList()
        for i, c in reversed(list(enumerate(channels))):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(blocks + 1):
                level.block.append(Block(width + skips.pop(), c, time))
                width = c
            level.attn = nn.ModuleList([Attention(c) for _ in range(blocks + 1) if i in attention])
            if i > 0:
                level.upsample = Up(c)
            self.up.insert(0, level)
        self.norm_out, self.conv_out = norm(width), nn.Conv2d(width, images, 3, padding=1)

    def forward(self, x, t):
        half = self.c // 2
        angle = t[:, None].float() * torch.exp(-math.log(10000) / (half - 1) * torch.arange(half))
        temb = self.temb.dense[0](torch.cat([torch.sin(angle), torch.cos(angle)], dim=1))
        temb = self.temb.dense[1](swish(temb))
        skips = [self.conv_in(x)]
        for i, level in enumerate(self.down):
            for j in range(self.blocks):
                h = level.block[j](skips[-1], temb)
                skips.append(level.attn[j](h) if i in self.attention else h)
            if hasattr(level, "downsample"):
                skips.append(level.downsample(skips[-1]))
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(skips[-1], temb)), temb)
        for i in reversed(range(len(self.up))):
            level = self.up[i]
            for j in range(self.blocks + 1):
                h = level.block[j](torch.cat([h, skips.pop()], dim=1), temb)
                h = level.attn[j](h) if i in self.attention else h
            h = level.upsample(h) if i > 0 else h
        return self.conv_out(swish(self.norm_out(h)))


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_checkpoint_with_the_original_names(blocks, tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    theirs = Original(3, (64, 64, 128, 64), blocks, {1, 3})
    with torch.no_grad():
        for p in theirs.parameters():
            p += 0.05 * torch.randn_like(p)
    assert {"temb.dense.0.weight", "down.0.block.0.temb_proj.bias", "up.3.upsample.conv.weight"} <= set(
        theirs.state_dict()
    )
    save_file(theirs.state_dict(), tmp_path / "ema.safetensors")
    ours, diffusion = load_original(tmp_path / "ema.safetensors")
    assert ours.size == sum(p.numel() for p in theirs.parameters())
    assert (diffusion.T, diffusion.variance, diffusion.objective) == (1000, "large", "eps")
    x, t, _, _ = batch({})
    with torch.no_grad():
        expected = nhwc(theirs(nchw(x), torch.from_numpy(t)))
    assert distance(ours(x, t).data, expected) < 2e-5
    save_diffusers(tmp_path / "converted", ours, diffusion, image_size=32)
    converted = diffusers.UNet2DModel.from_pretrained(tmp_path / "converted", subfolder="unet")
    with torch.no_grad():
        assert distance(nhwc(their_output(converted, x, t, None)), expected) < 2e-5
