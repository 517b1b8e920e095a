"""Sampling: the steps that are taken, models whose images are known, labels, and all else that `sample` takes.

Each sampler beside its paper is in test_formulas.py, 11, 19 and 20; what holds for all of them, in test_every_use.py.
"""

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ideal import at, column, ideal_denoiser, image, in_float64, moved, zeros
from strategies import SEEDS, schedules

from tinyddpm import Diffusion, Schedule, UNet, sample
from tinyddpm.backend import plain
from tinyddpm.diffusion.checks import OBJECTIVES, SPACINGS
from tinyddpm.diffusion.sample import SAMPLERS, ddim, ddpm, guided, timesteps
from tinyddpm.diffusion.schedule import linear

D = Diffusion(Schedule(linear(30, 1e-4, 0.5)))
ONE = (1, 2, 2, 1)
EACH = pytest.mark.parametrize("method", sorted(SAMPLERS))


def normals(seed, shape=(3, 2, 2, 1)):
    """A function that draws the same sequence of noises for the same seed."""
    rng = np.random.default_rng(seed)
    return lambda: rng.standard_normal(shape)


@given(s=schedules(), seed=SEEDS, clip=st.booleans())
def test_ddim_with_eta_1_is_ddpm_with_the_small_variance(s, seed, clip):
    d, x = Diffusion(Schedule(s.beta[-25:], s.input_scale), "v"), normals(seed)()
    model = lambda x, t: np.sin(2 * x + t[0])
    by_ddim, by_ddpm = ddim(d, model, x, normals(seed + 1), clip, 1.0), ddpm(d, model, x, normals(seed + 1), clip)
    for (_, a, a0), (_, b, b0) in zip(by_ddim, by_ddpm, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * (1 + np.abs(a).max()))
        np.testing.assert_allclose(a0, b0, rtol=0, atol=1e-10 * (1 + np.abs(a).max()))


def test_all_steps_are_no_respacing():
    d, model = Diffusion(D.schedule, variance="large"), lambda x, t: 0.1 * x
    a, b, small = (sample(x, model, ONE, steps=steps) for x, steps in ((d, None), (d, 30), (D, None)))
    assert (a == b).all() and np.abs(a - small).max() > 1e-3


@given(T=st.integers(1, 300), data=st.data())
def test_every_spacing_ascends_and_begins_or_ends_where_it_should(T, data):
    steps = data.draw(st.integers(1, T))
    trailing, leading, linspace = (timesteps(T, steps, spacing) for spacing in SPACINGS)
    for ts in (trailing, leading, linspace):
        assert len(ts) == steps and ts[0] >= 0 and ts[-1] < T and np.all(np.diff(ts) > 0)
        assert len(set(np.diff(ts))) <= 2 or abs(np.diff(ts) - T / steps).max() < 2
    assert trailing[-1] == T - 1 and leading[0] == linspace[0] == 0
    assert set(np.diff(leading)) <= {T // steps}
    assert steps == 1 or linspace[-1] == T - 1


def test_spacings():
    assert timesteps(10, 4).tolist() == timesteps(10, 4, "trailing").tolist() == [1, 4, 7, 9]
    assert timesteps(10, 4, "leading").tolist() == [0, 2, 4, 6]
    assert timesteps(10, 4, "linspace").tolist() == [0, 3, 6, 9]
    assert timesteps(10, 5, "linspace").tolist() == [0, 2, 4, 7, 9]  # of 0, 2.25, 4.5, 6.75, 9
    assert timesteps(10, 1, "linspace").tolist() == timesteps(10, 1, "leading").tolist() == [0]


@EACH
def test_model_and_callback_see_the_timesteps_visited_whether_told_how_many_or_which(method):
    """In either direction; the x of the last step is the image, as is its x0."""
    images, given_as = [], (4, [7, 14, 21, 29], (29, 21, 14, 7), np.array([7, 14, 21, 29], np.uint8))
    for steps, visited in (*[(steps, [29, 21, 14, 7]) for steps in given_as], (7, [29, 25, 20, 16, 12, 8, 3]),
                           (1, [29]), (None, [*range(29, -1, -1)]), (range(30), [*range(29, -1, -1)])):  # fmt: skip
        seen, called = [], []
        model = lambda x, t, seen=seen: seen.extend(t.tolist()) or 0.1 * x
        callback = lambda t, *of_step, called=called: called.append((t, *of_step))
        images.append(sample(D, model, ONE, method, steps, callback=callback))
        assert seen == [t for t, _, _ in called] == visited
        np.testing.assert_array_equal(called[-1][1], images[-1])
        np.testing.assert_array_equal(called[-1][2], images[-1])
    assert all((image == images[0]).all() for image in images[:4]) and (images[-1] == images[-2]).all()
    message = "^steps: the first, t = 7, is 0.603 image, but starts as noise; take spacing 'trailing'$"
    with pytest.warns(UserWarning, match=message):
        sample(D, model, ONE, method, [7], spacing="leading")
    assert seen[-1] == 7


@EACH
def test_spacing_and_clip_are_those_of_the_diffusion_unless_told_otherwise(method):
    own, images = Diffusion(D.schedule, clip=0.25, spacing="leading"), []
    model = lambda x, t: seen.append(int(t[0])) or 3 * x
    for settings in ({}, {"spacing": "linspace"}, {"clip": 0.5}, {"clip": False}):
        seen, x0s = [], []
        look = lambda t, x, x0, x0s=x0s: x0s.append(np.abs(x0).max())
        images.append(sample(own, model, ONE, method, steps=7, **settings, callback=look))
        assert seen == timesteps(30, 7, settings.get("spacing", "leading")).tolist()[::-1]
        assert max(x0s) == settings.get("clip", 0.25) or settings.get("clip") is False and max(x0s) > 1
    told = sample(D, lambda x, t: 3 * x, ONE, method, steps=7, clip=0.25, spacing="leading")
    np.testing.assert_array_equal(told, images[0])


TARGET = np.random.default_rng(0).uniform(-1, 1, (1, 3, 2, 2))


@given(
    s=schedules(), objective=st.sampled_from(OBJECTIVES), method=st.sampled_from(sorted(SAMPLERS)),
    steps=st.integers(1, 6), seed=SEEDS,
)  # fmt: skip
def test_a_denoiser_that_knows_the_image_draws_it(s, objective, method, steps, seed):
    """Whatever schedule, b, objective, sampler and number of steps; with zero terminal SNR as well."""
    s = s if objective != "eps" or s.alpha_bar[-1] > 1e-9 else Schedule(s.beta[:1].clip(0, 0.9), s.input_scale)
    d = Diffusion(s, objective)
    model = in_float64(ideal_denoiser(TARGET, d))
    images = sample(d, model, (2, 3, 2, 2), method, min(steps, d.T), seed, clip=False)
    np.testing.assert_allclose(images, np.broadcast_to(TARGET, images.shape), atol=1e-5)


FEW = Diffusion(Schedule(linear(4, 1e-2, 0.9)))


def test_guidance_goes_from_no_labels_to_the_labels_and_beyond():
    unet = moved(UNet(channels=(4,), blocks=1, attention=(False,), groups=2, classes=5, label_dropout=0.1), 0.3)
    labels = at(4, 0, 2, 2)
    draw = lambda model=unet, **settings: sample(FEW, model, (4, 4, 4, 1), **settings)  # of four, one shard
    told, untold, more = draw(labels=labels), draw(), draw(labels=labels.tolist(), guidance=3.0)
    np.testing.assert_array_equal(draw(labels=labels, guidance=1), told)
    np.testing.assert_allclose(draw(labels=labels, guidance=0), untold, atol=1e-4)
    assert np.abs(more - told).max() > 0.01 and np.abs(told - untold).max() > 0.01
    by_hand = draw(lambda x, t: 3 * unet(x, t, labels=labels).data - 2 * unet(x, t).data)
    np.testing.assert_allclose(more, by_hand, atol=1e-4)


def test_a_network_that_is_both_is_asked_for_both_in_one_call():
    seen = []

    def both(x, t, labels=None):
        seen.append((len(x), t.tolist(), None if labels is None else labels.tolist()))
        return x * (1 if labels is None else 2 + labels[:, None, None, None])

    both.label_dropout = 0.1
    model, x, t = guided(both, both, 3.0), normals(0)(), at(5, 0, 2)
    np.testing.assert_allclose(model(x, t, labels=at(0, 1, 4)), x * column(1 + 3 * at(1, 2, 5), at(0, 1, 2)))
    assert seen == [(6, [5, 0, 2] * 2, [-1, -1, -1, 0, 1, 4])]
    np.testing.assert_array_equal(model(x, t), x)  # nothing to be guided to
    guided(lambda x, t: both(x, t), both, 3.0)(x, t, labels=at(0, 1, 4))
    assert seen[-2:] == [(3, [5, 0, 2], None), (3, [5, 0, 2], [0, 1, 4])]


def test_guidance_of_networks_with_a_learned_variance():
    """The prediction is guided, the variance is the conditional network's; dtype and device are passed on."""
    config = dict(channels=(8,), blocks=1, attention=(False,), out_channels=2)
    u, c = (moved(UNet(**config, rng=seed).to(dtype="float64"), seed=seed) for seed in (1, 2))
    both, x, t = guided(u, c, 5.0), normals(0, (2, 4, 4, 1))(), at(3, 7)
    a, b, got = u(x, t).data, c(x, t).data, both(x, t)
    np.testing.assert_allclose(got[..., :1], a[..., :1] + 5 * (b[..., :1] - a[..., :1]), rtol=1e-12)
    np.testing.assert_array_equal(got[..., 1:], b[..., 1:])
    assert both.dtype == np.float64 and both.device == "cpu"
    narrow = guided(u.to(dtype="float32"), c.to(dtype="float32"), np.float64(5))
    assert narrow(x.astype(np.float32), t).dtype == np.float32


@pytest.mark.parametrize("way", [contextlib.nullcontext, plain])
def test_a_model_may_return_what_numpy_takes(way):
    with way():
        lists = sample(D, lambda x, t: (0.1 * x).tolist(), (9, 4, 4, 1), steps=3)
        np.testing.assert_array_equal(lists, sample(D, lambda x, t: np.float32(0.1) * x, (9, 4, 4, 1), steps=3))


@pytest.mark.parametrize(("file", "use"), [
    ("sample", lambda model: sample(D, model, (11, 2, 2, 1), steps=2)),
    ("bound", lambda model: FEW.bits_per_dim(model, np.ones((11, 2, 2, 1)), progress=False)),
])  # fmt: skip
def test_it_is_computed_where_the_model_is_and_there_in_one_batch(on_second_gpu, file, use):
    model, went, shapes = on_second_gpu(file)
    use(model)
    assert set(went) == {"cuda:1"} and set(shapes) == {(11, 2, 2, 1)}
    shapes.clear()
    use(lambda x, t: shapes.append(x.shape) or 0 * x)
    assert set(shapes) == {(4, 2, 2, 1), (3, 2, 2, 1)}


def test_sampling_starts_from_standard_normal_noise_of_each_image_and_the_seed_which_is_0_unless_given():
    start = lambda **settings: sample(D, zeros, (9, 10, 10, 1), steps=1, trajectory=True, **settings)[0]
    for noise, seed in ((start(), 0), (start(rng=6), 6)):
        streams = np.random.default_rng(seed).spawn(9)
        np.testing.assert_array_equal(noise, [rng.standard_normal((10, 10, 1), np.float32) for rng in streams])


@pytest.mark.parametrize("b", [1.0, 0.5])
def test_start_and_trajectory(b):
    d, x, seen = Diffusion(Schedule(D.schedule.beta, b)), normals(3, (5, 2, 2, 1))(), []
    settings = dict(steps=7, start=x, callback=lambda t, x, x0: seen.append(x))
    path = sample(d, zeros, x.shape, "ddim", **settings, trajectory=True)
    assert path.shape == (8, 5, 2, 2, 1) and path.dtype == np.float32
    np.testing.assert_allclose(path[0], x / b, rtol=1e-6)
    np.testing.assert_array_equal(path[1:], np.stack(seen) / np.float32(b))
    np.testing.assert_array_equal(path[-1], sample(d, zeros, x.shape, "ddim", **settings))
    noise = sample(d, zeros, x.shape, "ddim", rng=4, trajectory=True)[0] * b
    for method in SAMPLERS:  # `ddpm`, too: what is drawn on the way does not depend on the start
        again = sample(d, zeros, x.shape, method, start=noise, rng=4)
        np.testing.assert_allclose(again, sample(d, zeros, x.shape, method, rng=4), rtol=1e-4, atol=1e-6)


def test_a_sampler_of_one_s_own():
    """May give each image a timestep of its own, and work on its x in place."""

    def odd(diffusion, model, x, noise, clip):
        yield 0, model(x, np.arange(len(x))), x

    ts = sample(D, lambda x, t: 0 * x + column(t, slice(None)).astype(x.dtype), (20, 1, 1, 1), odd)
    assert ts.ravel().tolist() == list(range(20))  # whichever shard they are in

    def halved(diffusion, model, x, noise, clip=None, times=1):
        for t in reversed(range(diffusion.T)):
            x /= 2**times
            yield t, x, model(x, np.full(len(x), t))

    start = np.ones((2, 2, 2, 1), np.float32)
    np.testing.assert_array_equal(sample(D, zeros, start.shape, halved, 4, start=start, times=2), start / 256)
    assert (start == 1).all()
    with pytest.raises(TypeError, match="settings: 'halved' takes times, got eta$"):
        sample(D, zeros, start.shape, halved, eta=0.5, times=2)


def test_bars_are_shown_by_sample_if_wanted_and_by_bits_per_dim_unless_told_not_to(capsys):
    black = image(-1, -1)
    for silent in (lambda: sample(D, zeros, ONE, steps=7), lambda: D.bits_per_dim(zeros, black, progress=False)):
        silent()
        assert capsys.readouterr().err == ""
    sample(D, zeros, ONE, steps=7, progress=True)
    assert "sampling" in (bar := capsys.readouterr().err) and "7/7" in bar
    D.bits_per_dim(zeros, black)
    assert "bits/dim: 100%" in (bar := capsys.readouterr().err) and "30/30" in bar
