"""Models go to diffusers and come from it: the same weights, outputs, gradients and whole chains of samples.

Skipped where diffusers is not installed (`pip install 'tinyddpm[peers]'`). Weights are random: nothing is downloaded.
"""

import copy
import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest
from test_diffusers import Float64, nchw, nhwc

from tinyddpm import Diffusion, Schedule, UNet, backward, load_diffusers, load_original, sample, save_diffusers
from tinyddpm import make_schedule as make
from tinyddpm.exchange.diffusers_config import diffusion_from
from tinyddpm.exchange.names import diffusers_layout, laid_out

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
torch.set_num_threads(1)
F = torch.nn.functional
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
CIFAR10 = HO | blocks([1], 4) | dict(sample_size=32, block_out_channels=[128, 256, 256, 256])  # google/ddpm-cifar10-32
GREY = dict(in_channels=1, out_channels=1)
CONFIGURATIONS = {
    "cifar10-32, a quarter as wide": CIFAR10 | dict(block_out_channels=[32, 64, 64, 64]),
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


def batch(config, dtype="float32"):
    """Images, timesteps and what weights the outputs in a loss, and the labels that both networks may want."""
    rng = np.random.default_rng(0)
    size = np.broadcast_to(config.get("sample_size", 32), 2)
    x = rng.standard_normal((2, *size, config.get("in_channels", 3))).astype(dtype)
    weights = rng.standard_normal((2, *size, config.get("out_channels", 3))).astype(dtype)
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
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_output_and_gradients(self, pair, dtype, monkeypatch):
        config, theirs, ours = copy.deepcopy(pair)
        if dtype == "float64":
            theirs, ours = theirs.double(), ours.to(dtype=dtype)
            monkeypatch.setattr(diffusers.models.embeddings, "torch", Float64(torch))  # of the timesteps, float32 else
        x, t, weights, labels = batch(config, dtype)
        y, expected = ours(x, t, labels=labels), their_output(theirs, x, t, labels)
        assert distance(y.data, nhwc(expected)) < {"float32": 2e-5, "float64": 1e-10}[dtype]
        (expected * nchw(weights)).sum().backward()
        gradients, expected = (
            backward((y * weights).sum()),
            {name: p.grad.numpy() for name, p in theirs.named_parameters()},
        )
        got = laid_out({name: gradients[p] for name, p in ours.named_parameters().items()}, diffusers_layout)
        assert got.keys() == expected.keys()
        largest = max(np.abs(g).max() for g in expected.values())
        for key, want in expected.items():
            if dtype == "float64":
                assert np.abs(got[key] - want).max() < 1e-10 * largest, key
            elif np.abs(want).max() > 1e-5 * largest:
                assert distance(got[key], want) < 1e-4, key
            else:  # what a norm or softmax takes away again has a gradient of zero, but for rounding
                assert np.abs(got[key]).max() < 1e-5 * largest, key

    def test_back_to_diffusers_and_here_again(self, pair, tmp_path):
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
        again.save_pretrained(tmp_path / "again")
        assert_same_weights(load_diffusers(tmp_path / "again")[0], state)


def test_the_network_of_cifar10_has_its_size_and_output(tmp_path):
    theirs = their_unet(CIFAR10)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no scheduler_config.json"):  # a model folder
        ours, diffusion = load_diffusers(tmp_path)
    assert ours.size == 35_746_307 and len(ours.parameters()) == 328
    assert ours.config["image_size"] == (32, 32) and diffusion.variance == "small" and diffusion.T == 1000
    x, t, _, _ = batch(CIFAR10)
    with torch.no_grad():
        assert distance(ours(x, t).data, nhwc(their_output(theirs, x, t))) < 2e-5


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
    x, t, _, _ = batch(SMALL)
    assert distance(load_diffusers(tmp_path)[0](x, t).data, nhwc(their_output(theirs, x, t))) < 2e-5


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"])
def test_what_they_would_load_instead_is_not_left_beside_ours(name, tmp_path):
    safe = name.endswith("safetensors")
    their_unet(SMALL).save_pretrained(tmp_path / "unet", safe_serialization=safe, variant="fp16" if safe else None)
    assert (tmp_path / "unet" / name).exists()
    with pytest.raises(FileExistsError, match=f"{name} would stay beside the new weights"):
        save_diffusers(tmp_path, UNet(), Diffusion(make()))


@pytest.mark.parametrize("variant", [None, "fp16"])
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
    assert_same_weights(load_diffusers(tmp_path, variant)[0], again)
    for path in (*shards, *tmp_path.glob("*.index*.json")):
        path.unlink()
    assert_same_weights(load_diffusers(tmp_path, variant)[0], other.state_dict())


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


def pipeline_of(scheduler):
    """A tiny pipeline with this scheduler; the network has what the variance asks for."""
    learned = scheduler.get("variance_type") == "learned_range"
    config = blocks([], 1) | dict(block_out_channels=[8], norm_num_groups=4, layers_per_block=1, sample_size=4)
    config |= dict(in_channels=1, out_channels=2 if learned else 1)
    return diffusers.DDPMPipeline(their_unet(config), diffusers.DDPMScheduler(**scheduler))


@pytest.fixture(scope="module", params=SCHEDULERS)
def made_there(request, tmp_path_factory):
    """The name of a scheduler, a pipeline with it, and what was loaded of what they saved of it."""
    pipeline, folder = pipeline_of(SCHEDULERS[request.param]), tmp_path_factory.mktemp("theirs")
    pipeline.save_pretrained(folder)
    return request.param, pipeline, *load_diffusers(folder)


def assert_same_pictures(monkeypatch, pipeline, unet, diffusion, method="ddpm", steps=None, atol=1e-3, **settings):
    """Of their pipeline, which draws the noise that `sample` draws."""
    streams = np.random.default_rng(0).spawn(2)

    def randn_tensor(shape, **settings):
        shape = (*shape[2:], shape[1])
        return nchw(np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams]))

    pipelines, schedulers = diffusers.pipelines, diffusers.schedulers
    for module in (pipelines.ddpm.pipeline_ddpm, pipelines.ddim.pipeline_ddim, schedulers.scheduling_ddpm):
        monkeypatch.setattr(module, "randn_tensor", randn_tensor)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(batch_size=2, num_inference_steps=steps or diffusion.T, output_type="np", **settings).images
    images = sample(diffusion, unet, (2, 4, 4, 1), method, steps=steps)
    assert expected.std() > 0.05
    np.testing.assert_allclose((images / 2 + 0.5).clip(0, 1), expected, atol=atol)


class TestEveryScheduler:
    def test_the_whole_chain_of_their_pipeline(self, made_there, monkeypatch):
        """All steps of DDPM, theirs by DDPMPipeline, ours by `sample`."""
        _, *models = made_there
        assert_same_pictures(monkeypatch, *models)

    def test_fifty_steps_of_ddim(self, made_there, monkeypatch):
        name, pipeline, unet, diffusion = made_there
        if "learned" in name or "sigmoid" in name:
            pytest.skip("diffusers' DDIM means something else")
        ddim = diffusers.DDIMPipeline(pipeline.unet, diffusers.DDIMScheduler.from_config(pipeline.scheduler.config))
        settings = dict(use_clipped_model_output=True)  # the noise is derived from the image once it is clipped
        assert_same_pictures(monkeypatch, ddim, unet, diffusion, "ddim", 50, 1e-4, **settings)

    def test_it_comes_back_as_it_was(self, made_there, tmp_path):
        _, pipeline, unet, diffusion = made_there
        save_diffusers(tmp_path, unet, diffusion)
        again = diffusers.DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
        expected = {key: value for key, value in pipeline.scheduler.config.items() if key[0] != "_"}
        if expected["variance_type"] == "fixed_small_log":
            expected["variance_type"] = "fixed_small"  # which is the same
        assert {key: again.config[key] for key in expected} == expected
        assert torch.equal(again.betas, pipeline.scheduler.betas)


@pytest.mark.parametrize("name", OURS)
def test_their_pipeline_runs_what_was_made_here(name, tmp_path, monkeypatch):
    diffusion, rng = OURS[name], np.random.default_rng(0)
    outputs = 2 if diffusion.variance == "learned_range" else 1
    unet = UNet(1, outputs, (8,), 1, (True,), groups=4, head_channels=4, image_size=4)
    for p in unet.parameters():
        p.data += (0.1 * rng.standard_normal(p.shape)).astype(np.float32)
    save_diffusers(tmp_path, unet, diffusion)
    assert_same_pictures(monkeypatch, diffusers.DDPMPipeline.from_pretrained(tmp_path), unet, diffusion)
    again, loaded = load_diffusers(tmp_path)
    assert all((again.state_dict()[key] == value).all() for key, value in unet.state_dict().items())
    np.testing.assert_array_equal(loaded.schedule.beta, diffusion.schedule.beta)
    assert loaded == dataclasses.replace(diffusion, schedule=loaded.schedule)


def test_in_fewer_steps_ddpm_is_theirs_but_for_the_large_variance(tmp_path, monkeypatch):
    pipeline = pipeline_of({"variance_type": "fixed_small"})
    pipeline.save_pretrained(tmp_path)
    unet, diffusion = load_diffusers(tmp_path)
    assert diffusion.spacing == "leading"
    for variance in ("small", "large"):  # of long steps only the small one gives good pictures
        diffusion = dataclasses.replace(diffusion, variance=variance)
        assert_same_pictures(monkeypatch, pipeline, unet, diffusion, steps=50)


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


class Original:
    """The network of Ho et al. 2020 with the names of their code: levels of the way up are numbered from the finest.
    A parameter is drawn when it is first met."""

    def __init__(self, images, channels, blocks, attention):
        self.images, self.channels, self.blocks, self.attention, self.state = images, channels, blocks, attention, {}

    def parameters(self, name, *shape):
        draw = lambda scale, *shape: scale * torch.randn(shape)
        self.state.setdefault(f"{name}.weight", draw(math.prod(shape[1:]) ** -0.5, *shape) + (len(shape) == 1))
        return self.state[f"{name}.weight"], self.state.setdefault(f"{name}.bias", draw(0.1, shape[0]))

    def dense(self, name, x, c):
        return F.linear(x, *self.parameters(name, c, x.shape[1]))

    def conv(self, name, x, c, size=3, **settings):
        return F.conv2d(x, *self.parameters(name, c, x.shape[1], size, size), **settings)

    def norm(self, name, x):
        return F.group_norm(x, 32, *self.parameters(name, x.shape[1]), 1e-6)

    def block(self, name, x, temb, c):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), c, padding=1)
        h = h + self.dense(f"{name}.temb_proj", F.silu(temb), c)[:, :, None, None]
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), c, padding=1)
        return h + (x if x.shape == h.shape else self.conv(f"{name}.nin_shortcut", x, c, 1))

    def attend(self, name, x):
        c, h = x.shape[1], self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{which}", h, c, 1).flatten(2) for which in "qkv")  # (N, C, H W)
        w = torch.softmax(torch.einsum("ncq,nck->nqk", q, k) / c**0.5, dim=2)
        return x + self.conv(f"{name}.proj_out", torch.einsum("nqk,nck->ncq", w, v).reshape(x.shape), c, 1)

    def level(self, name, i, j, x, temb):
        h = self.block(f"{name}.{i}.block.{j}", x, temb, self.channels[i])
        return self.attend(f"{name}.{i}.attn.{j}", h) if i in self.attention else h

    def __call__(self, x, t):
        c, last = self.channels, len(self.channels) - 1
        half = c[0] // 2
        angle = t[:, None].float() * torch.exp(-math.log(10000) / (half - 1) * torch.arange(half))
        temb = self.dense("temb.dense.0", torch.cat([torch.sin(angle), torch.cos(angle)], dim=1), 4 * c[0])
        temb = self.dense("temb.dense.1", F.silu(temb), 4 * c[0])
        skips = [self.conv("conv_in", x, c[0], padding=1)]
        for i in range(last + 1):
            for j in range(self.blocks):
                skips.append(self.level("down", i, j, skips[-1], temb))
            if i < last:
                skips.append(self.conv(f"down.{i}.downsample.conv", F.pad(skips[-1], (0, 1, 0, 1)), c[i], stride=2))
        h = self.attend("mid.attn_1", self.block("mid.block_1", skips[-1], temb, c[-1]))
        h = self.block("mid.block_2", h, temb, c[-1])
        for i in reversed(range(last + 1)):
            for j in range(self.blocks + 1):
                h = self.level("up", i, j, torch.cat([h, skips.pop()], dim=1), temb)
            if i > 0:
                h = self.conv(f"up.{i}.upsample.conv", F.interpolate(h, scale_factor=2.0), c[i], padding=1)
        return self.conv("conv_out", F.silu(self.norm("norm_out", h)), self.images, padding=1)


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_checkpoint_with_the_original_names(blocks, tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    x, t, _, _ = batch({})
    theirs = Original(3, (64, 64, 128, 64), blocks, {1, 3})
    expected = nhwc(theirs(nchw(x), torch.from_numpy(t)))
    assert {"temb.dense.0.weight", "down.0.block.0.temb_proj.bias", "up.3.upsample.conv.weight"} <= set(theirs.state)
    save_file(theirs.state, tmp_path / "ema.safetensors")
    ours, diffusion = load_original(tmp_path / "ema.safetensors")
    assert ours.size == sum(p.numel() for p in theirs.state.values())
    assert (diffusion.T, diffusion.variance, diffusion.objective) == (1000, "large", "eps")
    assert distance(ours(x, t).data, expected) < 2e-5
    save_diffusers(tmp_path / "converted", ours, diffusion, image_size=32)
    converted = diffusers.UNet2DModel.from_pretrained(tmp_path / "converted", subfolder="unet")
    with torch.no_grad():
        assert distance(nhwc(their_output(converted, x, t)), expected) < 2e-5
