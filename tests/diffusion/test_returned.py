"""What comes back is of one type and dtype, whatever the model returns and whichever branch is taken."""

import itertools

import numpy as np
import pytest
from tiny_training import TINY

from tinyddpm import Diffusion, Parameter, Schedule, Tensor, UNet, make_schedule, sample
from tinyddpm.autograd import functional, tensor
from tinyddpm.diffusion.checks import LOSSES, OBJECTIVES, VARIANCES
from tinyddpm.diffusion.editing import denoise, inpaint, interpolate, invert, sdedit
from tinyddpm.diffusion.sample import SAMPLERS

SCHEDULE = make_schedule("linear", 20, beta_end=0.6)
X = np.random.default_rng(0).uniform(-1, 1, (3, 4, 4, 1))
LEVELS = np.round(127.5 * (X + 1)) / 127.5 - 1


def returning(kind, channels, dtype):
    """A model that returns the same as an array, as a tensor, or as one that depends on a parameter."""
    w = Parameter(np.ones((), dtype))
    array = lambda x, t: np.concatenate(channels * [np.sin(3 * x)], axis=-1)
    return {"array": array, "tensor": lambda x, t: Tensor(array(x, t)), "learned": lambda x, t: w * array(x, t)}[kind]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_loss_is_a_tensor_of_the_same_value_whatever_the_model_returns(loss_type, dtype):
    variances = {"hybrid": ["learned_range"], "vlb": VARIANCES}.get(loss_type, VARIANCES[:2])
    for objective, variance in itertools.product(OBJECTIVES, variances):
        diffusion, values = Diffusion(SCHEDULE, objective, variance, loss_type), set()
        for kind in ("array", "tensor", "learned"):
            model = returning(kind, 1 + (variance == "learned_range"), dtype)
            loss = diffusion.loss(model, LEVELS.astype(dtype), np.random.default_rng(0))
            assert isinstance(loss, Tensor) and loss.shape == () and loss.dtype == dtype
            values.add(loss.item())
        assert len(values) == 1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_model_that_returns_another_dtype_is_named(objective):
    """By every loss; what `sample` makes is of the model's dtype, which is float32 unless it says otherwise."""
    wide = lambda x, t: np.sin(3 * x.astype(np.float64))
    for loss_type in LOSSES[:-1]:
        diffusion = Diffusion(SCHEDULE, objective, loss_type=loss_type)
        with pytest.raises(TypeError, match="^model: expected it to return float32, as x_t is, got float64"):
            diffusion.loss(wide, LEVELS.astype(np.float32), np.random.default_rng(0))
    for method in SAMPLERS:
        assert sample(Diffusion(SCHEDULE, objective), wide, X.shape, method).dtype == np.float32


USES = {
    "ddpm": lambda d, model, x: sample(d, model, x.shape),
    "ddim": lambda d, model, x: sample(d, model, x.shape, "ddim", eta=np.float64(0.5)),
    "dpm++": lambda d, model, x: sample(d, model, x.shape, "dpm++"),
    "trajectory": lambda d, model, x: sample(d, model, x.shape, steps=3, trajectory=True, start=x),
    "guidance": lambda d, model, x: sample(d, model, x.shape, labels=[0, 1, 2], guidance=np.float64(2), clip="dynamic"),
    "denoise": lambda d, model, x: denoise(d, model, x, np.float64(0.5)),
    "denoise next to nothing": lambda d, model, x: denoise(d, model, x, 1e-9, steps=1),
    "sdedit": lambda d, model, x: sdedit(d, model, x, np.float64(0.5)),
    "sdedit from near the end": lambda d, model, x: sdedit(d, model, x, 1e-9),
    "invert": lambda d, model, x: invert(d, model, x),
    "interpolate": lambda d, model, x: interpolate(d, model, x, np.roll(x, 1, 0), 2),
    "inpaint": lambda d, model, x: inpaint(d, model, x, np.eye(4) > 0, 3, 1, 2),
    "inpaint what is all known": lambda d, model, x: inpaint(d, model, x, np.ones((4, 4), bool), 1),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("b", [1.0, 0.5])
def test_images_are_arrays_of_the_model_s_dtype(use, b):
    """Whatever that of the pictures is, and what the model returns, be it a tensor or an array."""
    diffusion = Diffusion(Schedule(np.linspace(0.1, 0.8, 6), b))
    for dtype in ("float32", "float64"):
        unet = UNet(**TINY, classes=3, label_dropout=0.1).to(dtype=dtype)
        of_array = lambda x, t, unet=unet, **told: unet(x, t, **told).data.astype(np.float64)
        of_array.dtype = np.dtype(dtype)
        for pictures, model in ((X.astype(np.float32), unet), (X, of_array)):
            made = use(diffusion, model, pictures)
            assert type(made) is np.ndarray and made.dtype == dtype


def test_ops_return_tensors_of_arrays_too():
    x, rng = X.astype(np.float32), np.random.default_rng(0)
    for made in (
        *[functional.dropout(x, p, r) for p in (0, 0.5) for r in (None, rng)], functional.silu(x), tensor.add(x, 1.0),
        functional.concat(x, x), functional.mse(x, x), tensor.reduce_mean(x), tensor.getitem(x, index=0),
    ):  # fmt: skip
        assert type(made) is Tensor and made.dtype == np.float32 and made.node is None
