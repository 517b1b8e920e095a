"""The diffusion process beside its formulas, which are in test_article.py and test_formulas.py: dtypes, clipping, the
variational bound in the losses, gradients, and the look at the scale of the images."""

import math

import numpy as np
import pytest
from hypothesis import given
from ideal import at, image, zeros
from strategies import SEEDS, processes

from tinyddpm import Diffusion, Schedule, backward
from tinyddpm.autograd.tensor import Parameter, Tensor
from tinyddpm.diffusion.bound import prior_terms, vlb_terms
from tinyddpm.diffusion.checks import LOSSES, OBJECTIVES
from tinyddpm.diffusion.clipping import dynamic_threshold, limit
from tinyddpm.diffusion.schedule import linear as linear_beta

linear = lambda T, beta_start=1e-4, beta_end=0.02, b=1.0: Schedule(linear_beta(T, beta_start, beta_end), b)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("b", [1.0, 0.5])
def test_float32_stays_float32_and_timesteps_may_be_unsigned(objective, b):
    d = Diffusion(linear(10, b=b), objective)
    x, t = np.ones((2, 4, 4, 1), np.float32), np.array([3, 4], np.uint8)
    made = [f(x, t, x) for f in (d.q_step, d.q_sample, d.target, d.predict_x0, d.predict_eps, d.eps_from_x0)]
    np.testing.assert_array_equal(made[1], d.q_sample(x, t.astype(int), x))
    made += [d.posterior_mean(x, x, t), d.log_variance(x, t), prior_terms(d, x), vlb_terms(d, x, x, t, x)]
    made += [*d.p_mean_variance(zeros, x, t), d.p_mean_variance(zeros, x, t, "dynamic")[2]]
    assert {a.dtype for a in made} == {np.dtype("float32")}


def test_p_mean_variance_hands_the_model_x_t_itself_and_keeps_no_graph():
    w, x_t, seen = Parameter(np.ones(1)), image(0), []
    Diffusion(linear(10)).p_mean_variance(lambda x, t: seen.extend([x, Tensor(x) * w]) or seen[1], x_t, at(3))
    assert seen[0] is x_t and seen[1].node is None


def test_a_diffusion_cannot_be_changed():
    with pytest.raises(AttributeError):
        Diffusion(linear(10)).objective = "x0"


X0 = np.array([-3.0, -0.5, 0.2, 1.5]).reshape(1, 2, 2, 1)
CLIPS = [  # what `clip` may be, and what it makes of X0
    (True, X0.clip(-1, 1)), (False, X0), (2, X0.clip(-2, 2)), (1.0, X0.clip(-1, 1)), (0.3, X0.clip(-0.3, 0.3)),
    ("dynamic", dynamic_threshold(X0, 0.995, math.inf)), (("dynamic", 0.6, 1.5), dynamic_threshold(X0, 0.6, 1.5)),
    (["dynamic", 0.6, 2], dynamic_threshold(X0, 0.6, 2)),  # as JSON has it
    (("dynamic", 0, 1), X0.clip(-1, 1)), (("dynamic", 1, 1), X0.clip(-1, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("clip", "expected"), CLIPS)
def test_the_predicted_image_is_clipped_as_the_diffusion_says_unless_told_otherwise(clip, expected):
    np.testing.assert_array_equal(limit(X0, clip), expected)
    d, model = Diffusion(linear(10), "x0", clip=clip), lambda x, t: x
    for x0 in (d.denoise(model, X0, at(5))[0], d.p_mean_variance(model, X0, at(5))[2]):
        np.testing.assert_array_equal(x0, expected)
    assert d.denoise(model, X0, at(5), 0.1)[0].max() == d.p_mean_variance(model, X0, at(5), 0.1)[2].max() == 0.1
    assert clip is not False or limit(X0, clip) is X0


def test_the_numbers_of_clip_are_python_s():
    """As JSON wants them."""
    assert type(Diffusion(linear(10), clip=np.float32(0.5)).clip) is float and Diffusion(linear(10)).clip is True
    for given_as in (("dynamic", np.float32(0.5), np.int64(2)), ["dynamic", 0.5, 2]):
        dynamic = Diffusion(linear(10), clip=given_as).clip
        assert dynamic == ("dynamic", 0.5, 2.0) and all(type(n) is float for n in dynamic[1:])


@given(p=processes(1e-3), seed=SEEDS)
def test_the_bound_in_the_losses(p, seed):
    """`vlb` is T times the mean of the terms, `hybrid` the simple loss and 0.001 of that."""
    s, objective, x0 = p[0].schedule, p[0].objective, p[1]
    model, both = lambda x, t: 0.1 * np.sin(x), lambda x, t: np.concatenate([0.1 * np.sin(x), np.cos(x)], axis=-1)
    of = lambda *settings: Diffusion(s, objective, *settings)
    loss = lambda model, *settings: of(*settings).loss(model, x0, np.random.default_rng(seed)).item()
    d, rng = of(), np.random.default_rng(seed)
    t, eps = rng.integers(0, d.T, size=len(x0)), rng.standard_normal(x0.shape)
    x_t = d.q_sample(x0, t, eps)
    terms = vlb_terms(d, x0, x_t, t, d.predict(model, x_t, t)[0]).data
    assert math.isclose(loss(model, "small", "vlb"), d.T * terms.mean(), rel_tol=1e-9)
    hybrid, vlb = (loss(both, "learned_range", kind) for kind in ("hybrid", "vlb"))
    assert math.isclose(hybrid, loss(model) + 0.001 * vlb, rel_tol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("loss_type", "variance"),
    [*[(loss, v) for loss in LOSSES[:-1] for v in ("small", "large")], *[(x, "learned_range") for x in LOSSES[-2:]]],
)
def test_gradients(objective, loss_type, variance):
    """Against central differences, for every loss and objective."""
    d = Diffusion(linear(4, 0.05, 0.5, b=0.8), objective, variance, loss_type)
    x0, h = np.random.default_rng(0).integers(0, 256, (12, 2, 2, 1)) / 127.5 - 1, 1e-6
    w = Parameter(start := np.array([0.3, -0.2] if variance == "learned_range" else [0.3]))
    loss = lambda w, d=d: d.loss(lambda x, t: Tensor(x) * w + 0.1 * w, x0, np.random.default_rng(2))
    gradient = backward(loss(w))[w]
    for i, step in enumerate(h * np.eye(len(start))):
        value = lambda at: loss(Parameter(at)).item()
        if loss_type == "hybrid" and i == 0:  # the bound does not see it: differentiate the simple loss
            value = lambda at: loss(Parameter(at[:1]), Diffusion(d.schedule, objective)).item()
        expected = (value(start + step) - value(start - step)) / (2 * h)
        assert math.isclose(gradient[i], expected, rel_tol=1e-5, abs_tol=1e-9)


SCALES = [  # the darkest and the lightest of the images, and what is to be done
    (0, 1, "; if black is 0 and white is 1, take x0 / 0.5 - 1"), (-0.5, 0.5, ""), (-0.42, 2.82, ""), (-2.1, 0, ""),
    (0, 0.3, "; if black is 0 and white is 1, take x0 / 0.5 - 1"), (-1e9, 0.5, ""),
    (0, 255, "; if black is 0 and white is 255, take x0 / 127.5 - 1"),
    (255, 255, "; if black is 0 and white is 255, take x0 / 127.5 - 1"),
    (0, 2e4, "; if black is 0 and white is 65535, take x0 / 32767.5 - 1"), (-2.5, -2.5, ""),
    (2.5, 2.5, "; if black is 0 and white is 255, take x0 / 127.5 - 1"),
]  # fmt: skip


@pytest.mark.parametrize(("low", "high", "remedy"), SCALES)
def test_images_on_another_scale_are_warned_about_once(low, high, remedy):
    """With the range that was seen, and what is to be done; it points to the caller."""
    x0, d = np.linspace(low, high, 1000).reshape(4, 10, 25, 1), Diffusion(linear(9))
    with pytest.warns(UserWarning) as seen:
        for batch in (0 * x0, x0, x0, 0.9 * x0):  # what tells nothing counts as nothing
            d.loss(zeros, batch, np.random.default_rng(0))
    expected = f"x0: expected images in [-1, 1], got values from {low:.3g} to {high:.3g}{remedy}"
    assert [(str(w.message), w.filename) for w in seen] == [(expected, __file__)]


@pytest.mark.parametrize("ends", [(0, 0, 2048), (0, 1, 32), (-0.6, 0.1, 2048), (-2, 2, 2048)])
def test_images_of_one_colour_too_few_to_tell_dark_or_loud_are_not_warned_about(ends):
    Diffusion(linear(9)).loss(zeros, np.linspace(*ends).reshape(2, 4, -1, 1), np.random.default_rng(0))


def test_once_images_were_fine_light_ones_are_too_but_not_those_beyond_all_reason():
    d, fine = Diffusion(linear(9)), np.linspace(-1, 1, 1000).reshape(4, 10, 25, 1)
    for x0 in (fine, np.abs(fine), fine):
        d.loss(zeros, x0, np.random.default_rng(0))
    with pytest.warns(UserWarning, match="got values from 0 to 255; if black is 0 and white is 255"):
        d.loss(zeros, 127.5 * (fine + 1), np.random.default_rng(0))
