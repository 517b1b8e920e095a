"""What holds for every sampler and for everything that starts from pictures; and what comes back of these and of losses
is of one type and dtype, whatever the model returns and whichever branch is taken."""

import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from ideal import column, in_float64, zeros
from strategies import SEEDS

from tinyddpm import Diffusion, Parameter, Schedule, Tensor, UNet, make_schedule, sample
from tinyddpm.diffusion.checks import LOSSES, OBJECTIVES, VARIANCES
from tinyddpm.diffusion.editing import denoise, inpaint, interpolate, invert, sdedit

ONE_WAY = ["method", "start", "eta"]
USES = {  # how it is called, and which settings of `sample` it sets itself
    "ddpm": (lambda d, model, x, **own: sample(d, model, x.shape, steps=3, **own), []),
    "ddim": (lambda d, model, x, **own: sample(d, model, x.shape, "ddim", steps=3, **own), []),
    "ddim, eta": (lambda d, model, x, **own: sample(d, model, x.shape, "ddim", 3, eta=np.float64(0.5), **own), []),
    "dpm++": (lambda d, model, x, **own: sample(d, model, x.shape, "dpm++", steps=3, **own), []),
    "denoise": (lambda d, model, x, **own: denoise(d, model, x, np.float64(0.4), steps=3, **own), ["start", "spacing"]),
    "sdedit": (lambda d, model, x, **own: sdedit(d, model, x, np.float64(0.6), steps=3, **own), ["start", "spacing"]),
    "invert": (lambda d, model, x, **own: invert(d, model, x, steps=3, **own), ONE_WAY),
    "interpolate": (lambda d, model, x, **own: interpolate(d, model, x, x[::-1].copy(), 3, 3, **own),
                    [*ONE_WAY, "clip", "trajectory"]),
    "inpaint": (lambda d, model, x, **own: inpaint(d, model, x, np.eye(*x.shape[1:3]) > 0, steps=3, **own), ["method"]),
}  # fmt: skip
OF_PICTURES = ["denoise", "sdedit", "invert", "interpolate", "inpaint"]
FEW = pytest.mark.filterwarnings("ignore:steps, iterations")  # of so few, it says, it will not come back


@FEW
@pytest.mark.parametrize("name", USES)
@given(
    shape=st.tuples(*[st.integers(1, 6)] * 3, st.sampled_from([1, 3])), b=st.sampled_from([1.0, 0.4]), seed=SEEDS,
    objective=st.sampled_from(["eps", "v"]), learned=st.booleans(), zero=st.booleans(),
    guidance=st.sampled_from([None, 2.5]), clip=st.sampled_from([True, 0.5, "dynamic"]),
)  # fmt: skip
def test_any_picture_model_and_process(name, shape, b, seed, objective, learned, zero, guidance, clip):
    """Finite, within the range, of the picture's shape; the same for any number of workers and of others."""
    assume(name != "interpolate" or math.prod(shape[1:]) > 1)  # of one pixel, what is not the same is the opposite
    schedule = make_schedule("linear", 10, beta_end=0.7, input_scale=b, zero_terminal_snr=zero and objective != "eps")
    d = Diffusion(schedule, objective, *(("learned_range", "hybrid") if learned else ()))

    def model(x, t, labels=None):
        prediction = 0.8 * x + (0 if labels is None else 0.1 * column(labels, slice(None)))
        return np.concatenate([prediction, np.cos(5 * x)], axis=-1) if learned else prediction

    path = {} if name == "interpolate" else {"trajectory": True}
    n, images = shape[0], np.random.default_rng(seed).uniform(-1, 1, shape)
    labels = [*range(n)] if guidance else None
    told = lambda n: dict(guidance=guidance, labels=labels and labels[:n]) | ({"clip": clip} if path else {})
    use = lambda n, **own: USES[name][0](d, in_float64(model), images[:n], **told(n), **own)
    made = use(n, rng=seed, workers=1)
    assert np.isfinite(made).all() and made.dtype == np.float64 and made.shape[-3:] == shape[1:]
    assert name == "invert" or np.abs(made).max() <= 1 + 1e-12
    again = use(n, rng=np.random.default_rng(seed), workers=2, **path)
    np.testing.assert_array_equal(made, again[-1] if path else again)
    if path:
        np.testing.assert_allclose(use(1, rng=seed), made[:1], atol=1e-9 * (1 + np.abs(made).max()))
        assert again.shape[1:] == shape and 2 <= len(again) <= 4


X = np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 1))
SMALL = dict(channels=(4,), blocks=1, attention=(False,), groups=2, classes=3, label_dropout=0.1)
NETWORKS = {dtype: UNet(**SMALL).to(dtype=dtype) for dtype in ("float32", "float64")}
ALSO = {
    "guidance": lambda d, model, x: sample(d, model, x.shape, labels=[0, 1], guidance=np.float64(2), clip="dynamic"),
    "trajectory": lambda d, model, x: sample(d, model, x.shape, steps=2, trajectory=True, start=x),
    "denoise next to nothing": lambda d, model, x: denoise(d, model, x, 1e-9, steps=1),
    "sdedit from near the end": lambda d, model, x: sdedit(d, model, x, 1e-9),
    "inpaint what is all known": lambda d, model, x: inpaint(d, model, x, np.ones((4, 4), bool), 1),
}


@FEW
@pytest.mark.parametrize("name", [*USES, *ALSO])
def test_images_are_arrays_of_the_model_s_dtype(name):
    """Whatever that of the pictures is, and what the model returns, be it a tensor or an array."""
    d, use = Diffusion(Schedule(np.linspace(0.3, 0.9, 3), np.float64(0.5))), ALSO.get(name) or USES[name][0]
    for dtype, unet in NETWORKS.items():
        of_array = lambda x, t, unet=unet, **told: unet(x, t, **told).data.astype(np.float64)
        of_array.dtype = np.dtype(dtype)
        for pictures, model in ((X.astype(np.float32), unet), (X, of_array)):
            made = use(d, model, pictures)
            assert type(made) is np.ndarray and made.dtype == dtype
    assert use(d, lambda x, t, **told: zeros(x, t), X).dtype == np.float32  # unless it says otherwise


@FEW
@pytest.mark.parametrize("name", OF_PICTURES)
def test_pictures_on_another_scale_are_warned_about(name):
    """For those with noise there is no scale to be on; nor for pixels that are not known. It points to the caller."""
    x, known = np.random.default_rng(0).uniform(0.01, 1, (2, 32, 32, 3)), np.tri(32) > 0
    use = USES[name][0] if name != "inpaint" else lambda d, model, x: inpaint(d, model, x, known, steps=3)
    for unknown in (1, -1):
        x[:, ~known] = unknown
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            use(Diffusion(make_schedule("cosine", 9)), zeros, x)
        said = [w for w in seen if "expected images in [-1, 1]" in str(w.message)]
        assert bool(said) == (name == "inpaint" or (name != "denoise" and unknown == 1))
        assert all("if black is 0 and white is 1, take" in str(w.message) and w.filename == __file__ for w in said)


def returning(kind, channels, dtype):
    """A model that returns the same as an array, as a tensor, or as one that depends on a parameter."""
    w, array = Parameter(np.ones((), dtype)), lambda x, t: np.concatenate(channels * [np.sin(3 * x)], axis=-1)
    return {"array": array, "tensor": lambda x, t: Tensor(array(x, t)), "learned": lambda x, t: w * array(x, t)}[kind]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_loss_is_a_tensor_of_the_same_value_whatever_the_model_returns_and_the_generator_decides(loss_type, dtype):
    variances = {"hybrid": ["learned_range"], "vlb": VARIANCES}.get(loss_type, VARIANCES[:2])
    levels = (np.round(127.5 * (X + 1)) / 127.5 - 1).astype(dtype)
    for objective, variance in itertools.product(OBJECTIVES, variances):
        d, values = Diffusion(make_schedule("linear", 20, beta_end=0.6), objective, variance, loss_type), set()
        for kind in ("array", "tensor", "learned"):
            model = returning(kind, 1 + (variance == "learned_range"), dtype)
            loss = d.loss(model, levels, np.random.default_rng(0))
            assert isinstance(loss, Tensor) and loss.shape == () and loss.dtype == dtype
            values.add(loss.item())
        assert len(values) == 1 and d.loss(model, levels, np.random.default_rng(1)).item() not in values
