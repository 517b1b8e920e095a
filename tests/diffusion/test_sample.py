"""The samplers: each against its paper's equations, and on models whose images are known in advance."""

import contextlib
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ideal import ideal_denoiser
from strategies import SEEDS, schedules

from tinyddpm import Diffusion, Schedule, UNet, make_schedule, sample
from tinyddpm.autograd.tensor import Parameter, Tensor
from tinyddpm.backend import plain
from tinyddpm.diffusion.checks import OBJECTIVES, SPACINGS
from tinyddpm.diffusion.sample import SAMPLERS, ddim, ddpm, dpm_solver, guided, respace, timesteps
from tinyddpm.diffusion.schedule import linear


def zeros(x, t):
    return np.zeros_like(x)


def normals(seed, shape=(3, 2, 2, 1)):
    """A function that draws the same sequence of noises for the same seed."""
    rng = np.random.default_rng(seed)
    return lambda: rng.standard_normal(shape)


def images_after(sampler, diffusion, model, x, noise, **settings):
    return [(x, x0) for _, x, x0 in sampler(diffusion, model, x, noise, **settings)]


class TestDDPM:
    d = Diffusion(Schedule(linear(30, 1e-4, 0.5)))

    @pytest.mark.parametrize("variance", ["small", "large"])
    def test_the_chain_is_algorithm_2(self, variance):
        """Step by step with the paper's own form of the mean, on a model whose x0 is never clipped."""
        s, d = self.d.schedule, Diffusion(self.d.schedule, variance=variance)
        beta_tilde = s.beta * (1 - s.alpha_bar_prev) / (1 - s.alpha_bar)
        sigma = np.sqrt(beta_tilde if variance == "small" else s.beta)
        model = lambda x, t: 0.1 * x
        noises = iter(np.random.default_rng(1).standard_normal((30, 3, 2, 2, 1)))
        x = np.random.default_rng(2).standard_normal((3, 2, 2, 1))
        ours = [step for _, step, _ in ddpm(d, model, x, lambda: next(noises), clip=False)]
        z = iter(np.random.default_rng(1).standard_normal((30, 3, 2, 2, 1)))
        for t, got in zip(range(29, -1, -1), ours, strict=True):
            x = (x - s.beta[t] / np.sqrt(1 - s.alpha_bar[t]) * model(x, t)) / np.sqrt(s.alpha[t])
            if t > 0:
                x = x + sigma[t] * next(z)
            np.testing.assert_allclose(got, x, rtol=1e-9)
        assert len(ours) == 30

    def test_a_model_of_v_takes_the_same_way_as_the_same_model_of_eps(self):
        s = self.d.schedule
        eps = lambda x, t: 0.1 * x
        v = lambda x, t: (eps(x, t) - np.sqrt(1 - s.alpha_bar[t[0]]) * x) / np.sqrt(s.alpha_bar[t[0]])
        ways = []
        for d, model in ((self.d, eps), (Diffusion(s, "v"), v)):
            rng = np.random.default_rng(1)
            x = rng.standard_normal((3, 2, 2, 1))
            ways.append([step for _, step, _ in ddpm(d, model, x, lambda rng=rng: rng.standard_normal((3, 2, 2, 1)))])
        np.testing.assert_allclose(ways[0], ways[1], atol=1e-9)

    def test_noise_is_added_at_every_step_but_the_last(self):
        calls = []
        list(ddpm(self.d, zeros, np.zeros((1, 2, 2, 1)), lambda: calls.append(1) or np.zeros((1, 2, 2, 1))))
        assert len(calls) == 29

    def test_a_learned_variance_sets_the_noise_of_every_pixel(self):
        d = Diffusion(self.d.schedule, "x0", "learned_range", "hybrid")
        model = lambda x, t: np.concatenate([0.5 * np.ones_like(x), np.tanh(x)], axis=-1)
        x, noise = normals(2)(), normals(1)
        steps = images_after(ddpm, d, model, x, noise)
        noise, log_beta, small = normals(1), np.log(d.schedule.beta), d.schedule.posterior_log_variance
        for t, (got, _) in zip(range(29, 0, -1), steps[:-1], strict=True):
            w = (np.tanh(x) + 1) / 2
            sigma = np.exp((w * log_beta[t] + (1 - w) * small[t]) / 2)
            x = d.posterior_mean(0 * x + 0.5, x, np.full(3, t)) + sigma * noise()
            np.testing.assert_allclose(got, x, rtol=1e-12)


class TestDDIM:
    d = Diffusion(Schedule(linear(30, 1e-4, 0.5)))

    @given(s=schedules(), seed=SEEDS, clip=st.booleans())
    def test_with_eta_1_it_is_ddpm_with_the_small_variance(self, s, seed, clip):
        d = Diffusion(Schedule(s.beta[-25:], s.input_scale), "v")
        model = lambda x, t: np.sin(2 * x + t[0])
        x = normals(seed)()
        ours = images_after(ddim, d, model, x, normals(seed + 1), clip=clip, eta=1.0)
        theirs = images_after(ddpm, d, model, x, normals(seed + 1), clip=clip)
        for (a, a0), (b, b0) in zip(ours, theirs, strict=True):
            scale = 1 + np.abs(a).max()
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * scale)
            np.testing.assert_allclose(a0, b0, rtol=0, atol=1e-10 * scale)

    @pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("b", [1.0, 0.5])
    def test_equation_12(self, eta, b):
        d = Diffusion(Schedule(linear(20, 1e-3, 0.5), b))
        model = lambda x, t: 2 * np.cos(3 * x)
        x, noise = normals(0)(), normals(1)
        steps, noise = images_after(ddim, d, model, x, noise, eta=eta), normals(1)
        bars = np.append(1.0, np.cumprod(1 - np.linspace(1e-3, 0.5, 20)))
        for t, (got, x0) in zip(range(19, -1, -1), steps, strict=True):
            before, bar = bars[t], bars[t + 1]
            eps = model(x / np.sqrt(b * b * bar + 1 - bar), t)
            x0hat = np.clip((x - np.sqrt(1 - bar) * eps) / np.sqrt(bar) / b, -1, 1)
            eps = (x - np.sqrt(bar) * b * x0hat) / np.sqrt(1 - bar)  # anew, since x0hat was clipped
            s = eta * np.sqrt((1 - before) / (1 - bar) * (1 - bar / before))
            x = (
                np.sqrt(before) * b * x0hat
                + np.sqrt(np.maximum(1 - before - s**2, 0)) * eps
                + (s * noise() if s else 0)
            )
            np.testing.assert_allclose(got, x, atol=1e-9)
            np.testing.assert_allclose(x0, x0hat, atol=1e-9)

    def test_with_eta_0_nothing_is_random(self):
        def noise():
            raise AssertionError("no noise is needed")

        assert len(images_after(ddim, self.d, zeros, np.ones((1, 2, 2, 1)), noise)) == 30

    def test_numbers_of_numpy_leave_float32_alone(self):
        unet = UNet(channels=(8,), blocks=1, attention=(False,))
        d = Diffusion(Schedule(self.d.schedule.beta, np.float64(0.7)))
        for eta in np.linspace(0, 1, 3):
            assert sample(d, unet, (1, 4, 4, 1), "ddim", steps=3, eta=eta).dtype == np.float32
        assert sample(d, unet, (1, 4, 4, 1), "dpm++", steps=3).dtype == np.float32

    @pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
    def test_bad_eta(self, eta):
        with pytest.raises(ValueError, match=rf"eta: expected a number in \[0, 1\], got {eta}"):
            sample(self.d, zeros, (1, 2, 2, 1), method="ddim", eta=eta)


class TestDPMSolver:
    @pytest.mark.parametrize("b", [1.0, 0.5])
    def test_algorithm_2(self, b):
        """Written out as in the paper, from alpha, sigma and lambda at every point."""
        d = Diffusion(Schedule(linear(12, 1e-2, 0.6), b), "x0")
        model = lambda x, t: np.sin(3 * x + t[0])
        x = normals(0)()
        steps = images_after(dpm_solver, d, model, x, None)
        bar = np.cumprod(1 - np.linspace(1e-2, 0.6, 12))[::-1]  # in the order in which they are visited
        alpha, sigma = np.sqrt(bar), np.sqrt(1 - bar)
        l = np.log(alpha / sigma)
        ms = []
        for i in range(12):
            x_in = x / np.sqrt(b * b * bar[i] + 1 - bar[i])
            ms.append(b * np.clip(model(x_in, np.array([11 - i])), -1, 1))
            if i == 11:
                x = ms[-1]
            else:
                h = l[i + 1] - l[i]
                D = ms[i]
                if i > 0:
                    r = (l[i] - l[i - 1]) / h
                    D = (1 + 1 / (2 * r)) * ms[i] - 1 / (2 * r) * ms[i - 1]
                x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * (np.exp(-h) - 1) * D
            np.testing.assert_allclose(steps[i][0], x, atol=1e-9)
            np.testing.assert_allclose(steps[i][1], ms[-1] / b, atol=1e-9)

    def test_in_two_steps_it_is_ddim(self):
        """Of first order it is DDIM, and so are its first step and its last."""
        d = respace(Diffusion(make_schedule("linear", 1000), "v"), np.array([499, 999]))
        model = lambda x, t: np.sin(x)
        ways = [images_after(f, d, model, normals(0)(), None) for f in (dpm_solver, ddim)]
        for ours, theirs in zip(*ways, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-9)


class TestRespacing:
    def test_alpha_bar_is_that_of_the_steps_visited(self):
        s = make_schedule("linear", 1000, input_scale=0.7)
        ts = np.array([0, 10, 300, 999])
        short = respace(Diffusion(s, "v"), ts)
        assert short.T == 4 and short.objective == "v" and short.schedule.input_scale == 0.7
        np.testing.assert_allclose(short.schedule.alpha_bar, s.alpha_bar[ts], rtol=1e-12)
        np.testing.assert_allclose(short.schedule.alpha_bar_prev, [1, *s.alpha_bar[ts[:-1]]], rtol=1e-12)
        assert respace(Diffusion(s), np.array([7, 8])).T == 2  # neighbours, too
        np.testing.assert_allclose(short.schedule.beta[2], 1 - s.alpha_bar[300] / s.alpha_bar[10], rtol=1e-12)

    def test_of_long_steps_the_small_variance(self):
        s, ts = make_schedule("linear", 1000), np.array([499, 999])
        for before, after in (("small", "small"), ("large", "small"), ("learned_range", "learned_range")):
            loss_type = "hybrid" if before == "learned_range" else "weighted_mu"
            short = respace(Diffusion(s, "eps", before, loss_type, 3.0), ts)
            assert (short.variance, short.loss_type, short.min_snr_gamma) == (after, loss_type, 3.0)

    def test_all_steps_are_no_respacing(self):
        d, model = Diffusion(Schedule(linear(30, 1e-4, 0.5)), variance="large"), lambda x, t: 0.1 * x
        a, b = (sample(d, model, (2, 2, 2, 1), steps=steps) for steps in (None, 30))
        np.testing.assert_array_equal(a, b)
        assert np.abs(a - sample(Diffusion(d.schedule), model, (2, 2, 2, 1))).max() > 1e-3

    @pytest.mark.parametrize("method", sorted(SAMPLERS))
    def test_the_model_and_the_callback_see_the_timesteps_visited(self, method):
        d = Diffusion(Schedule(linear(30, 1e-4, 0.5)))
        seen, called = [], []
        model = lambda x, t: seen.extend(t.tolist()) or zeros(x, t)
        sample(d, model, (1, 2, 2, 1), method, steps=7, callback=lambda t, x, x0: called.append(t))
        assert seen == called == [29, 25, 20, 16, 12, 8, 3]
        seen.clear()
        sample(d, model, (1, 2, 2, 1), method, steps=1)
        assert seen == [29]

    @given(T=st.integers(1, 300), data=st.data())
    def test_every_spacing_ascends_and_begins_or_ends_where_it_should(self, T, data):
        steps = data.draw(st.integers(1, T))
        trailing, leading, linspace = (timesteps(T, steps, spacing) for spacing in SPACINGS)
        for ts in (trailing, leading, linspace):
            assert len(ts) == steps and ts[0] >= 0 and ts[-1] < T and np.all(np.diff(ts) > 0)
            assert len(set(np.diff(ts))) <= 2 or abs(np.diff(ts) - T / steps).max() < 2
        assert trailing[-1] == T - 1 and leading[0] == linspace[0] == 0
        assert set(np.diff(leading)) <= {T // steps}
        assert steps == 1 or linspace[-1] == T - 1

    def test_spacings(self):
        assert timesteps(10, 4).tolist() == timesteps(10, 4, "trailing").tolist() == [1, 4, 7, 9]
        assert timesteps(10, 4, "leading").tolist() == [0, 2, 4, 6]
        assert timesteps(10, 4, "linspace").tolist() == [0, 3, 6, 9]
        assert timesteps(10, 5, "linspace").tolist() == [0, 2, 4, 7, 9]  # of 0, 2.25, 4.5, 6.75, 9
        assert timesteps(10, 1, "linspace").tolist() == timesteps(10, 1, "leading").tolist() == [0]
        for bad in (0, 11, 2.0, "3"):
            with pytest.raises(ValueError, match="steps: expected an integer from 1 to 10, .*, got"):
                timesteps(10, bad)
        with pytest.raises(ValueError, match="spacing: unknown 'karras'; known: trailing, leading, linspace"):
            timesteps(10, 4, "karras")
        with pytest.raises(ValueError, match="spacing: unknown 'karras'"):
            timesteps(10, [1, 2], "karras")

    @pytest.mark.parametrize("method", sorted(SAMPLERS))
    def test_spacing_and_clip_are_those_of_the_diffusion_unless_told_otherwise(self, method):
        model = lambda x, t: seen.append(int(t[0])) or 3 * x
        own = Diffusion(Schedule(linear(30, 1e-4, 0.5)), clip=0.25, spacing="leading")
        outcomes = []
        for settings in ({}, {"spacing": "linspace"}, {"clip": 0.5}, {"clip": False}):
            seen, x0s = [], []
            look = lambda t, x, x0, x0s=x0s: x0s.append(np.abs(x0).max())
            outcomes.append(sample(own, model, (1, 2, 2, 1), method, steps=7, **settings, callback=look))
            assert seen == timesteps(30, 7, settings.get("spacing", "leading")).tolist()[::-1]
            assert max(x0s) == settings.get("clip", 0.25) or settings.get("clip") is False and max(x0s) > 1
        plain = Diffusion(own.schedule)
        told = sample(plain, lambda x, t: 3 * x, (1, 2, 2, 1), method, steps=7, clip=0.25, spacing="leading")
        np.testing.assert_array_equal(told, outcomes[0])

    @pytest.mark.parametrize("method", sorted(SAMPLERS))
    def test_the_timesteps_themselves(self, method):
        """In either direction; the same as if their number had been given."""
        d, seen = Diffusion(Schedule(linear(30, 1e-4, 0.5))), []
        model = lambda x, t: seen.append(int(t[0])) or 0.1 * x
        images = [sample(d, model, (1, 2, 2, 1), method, steps)
                  for steps in (4, [7, 14, 21, 29], (29, 21, 14, 7), np.array([7, 14, 21, 29], np.uint8))]  # fmt: skip
        assert seen == [29, 21, 14, 7] * 4
        assert all((image == images[0]).all() for image in images)
        seen.clear()
        with pytest.warns(
            UserWarning, match="^steps: the first, t = 7, is 0.603 image, but starts as noise; take spacing 'trailing'$"
        ):
            sample(d, model, (1, 2, 2, 1), method, [7], spacing="leading")
        assert seen == [7]
        given = sample(d, model, (1, 2, 2, 1), method, range(30))
        np.testing.assert_array_equal(given, sample(d, model, (1, 2, 2, 1), method))

    def test_bad_lists_of_timesteps(self):
        bad = ([], [3, 3], [5, 2, 9], [-1, 4], [0, 30], [30], [1.0, 2.0], [[1, 2]], [5, 5, 3], ["a"])
        for steps in bad:
            for call in (lambda s: timesteps(30, s), lambda s: sample(self.d, zeros, (1, 2, 2, 1), steps=s)):
                with pytest.raises(
                    ValueError, match="steps: expected timesteps within 0 ... 29 in order, each once, got"
                ):
                    call(steps)

    d = Diffusion(Schedule(linear(30, 1e-4, 0.5)))

    @pytest.mark.parametrize("ts", [[], [3, 3], [5, 2], [-1, 4], [0, 30]])
    def test_bad_timesteps(self, ts):
        with pytest.raises(ValueError, match="ts: expected ascending timesteps within 0 ... 29, got"):
            respace(Diffusion(Schedule(linear(30))), np.array(ts, dtype=int))


class TestLabels:
    def test_each_image_is_made_with_its_own(self):
        """In whatever shards the model is called."""
        unet = UNet(channels=(4, 8), blocks=1, attention=(False, False), groups=2, classes=5)
        rng = np.random.default_rng(0)
        for p in unet.parameters():
            p.data = (p.data + 0.3 * rng.standard_normal(p.shape)).astype(np.float32)
        d, labels = Diffusion(Schedule(linear(10, 1e-3, 0.7))), np.array([4, 0, 2, 2, 1, 0, 3, 4, 1])
        images = sample(d, unet, (9, 4, 4, 1), labels=labels, workers=2)
        others = sample(d, unet, (9, 4, 4, 1), labels=np.append(labels[:-1], 3), workers=1)
        np.testing.assert_array_equal(images[:-1], others[:-1])
        assert np.abs(images[-1] - others[-1]).max() > 0.01
        np.testing.assert_allclose(sample(d, unet, (1, 4, 4, 1), labels=labels[:1].tolist())[0], images[0], atol=1e-5)

    def guidable(self):
        unet = UNet(channels=(4, 8), blocks=1, attention=(False, False), groups=2, classes=5, label_dropout=0.1)
        for p in unet.parameters():
            p.data = (p.data + 0.3 * np.random.default_rng(1).standard_normal(p.shape)).astype(np.float32)
        return unet

    def test_guidance_from_the_labels_to_none_and_beyond(self):
        unet, d, labels = self.guidable(), Diffusion(Schedule(linear(10, 1e-3, 0.7))), np.array([4, 0, 2, 2, 1, 0])
        draw = lambda **settings: sample(d, unet, (6, 4, 4, 1), **settings)
        told, untold = draw(labels=labels), draw()
        np.testing.assert_array_equal(draw(labels=labels, guidance=1), told)
        np.testing.assert_array_equal(draw(labels=labels, guidance=0), untold)
        np.testing.assert_array_equal(draw(labels=np.full(6, -1)), untold)
        more = draw(labels=labels, guidance=3.0, workers=2)
        assert np.abs(more - told).max() > 0.01 and np.abs(told - untold).max() > 0.01
        np.testing.assert_array_equal(more, draw(labels=labels, guidance=3.0, workers=1))
        by_hand = lambda x, t: 3 * unet(x, t, labels=labels[: len(x)]).data - 2 * unet(x, t).data
        np.testing.assert_allclose(more[:4], sample(d, by_hand, (4, 4, 4, 1)), atol=1e-4)  # of four, one shard

    def test_guidance_needs_labels_and_a_model_that_can_do_without(self):
        d = Diffusion(Schedule(linear(10, 1e-3, 0.7)))
        with pytest.raises(ValueError, match="guidance: 2.0 towards which labels[?] Give labels too"):
            sample(d, self.guidable(), (2, 4, 4, 1), guidance=2.0)
        unet = UNet(channels=(4,), blocks=1, attention=(False,), groups=2, classes=5)
        with pytest.raises(TypeError, match="labels: expected .*; a network made with label_dropout can do without"):
            sample(d, unet, (2, 4, 4, 1), guidance=2.0, labels=[0, 1])
        for bad in ("2", math.nan, math.inf, [2]):
            with pytest.raises(ValueError, match="guidance: expected a finite number, got"):
                sample(d, self.guidable(), (2, 4, 4, 1), guidance=bad, labels=[0, 1])
        with pytest.raises(ValueError, match="labels: expected 2 integers in -1 ... 4, one for each image, got"):
            sample(d, self.guidable(), (2, 4, 4, 1), guidance=2.0, labels=[0, 5])

    def test_bad_labels(self):
        d = Diffusion(Schedule(linear(10, 1e-3, 0.7)))
        for bad in ([1], [[1, 2]], 3):
            with pytest.raises(ValueError, match="labels: expected 2, one for each image, got shape"):
                sample(d, zeros, (2, 4, 4, 1), labels=bad)
        with pytest.raises(ValueError, match="labels: this network knows no classes"):
            sample(d, UNet(channels=(4,), blocks=1, attention=[False], groups=2), (2, 4, 4, 1), labels=[0, 1])


class TestKnownImages:
    target = np.random.default_rng(0).uniform(-1, 1, (1, 3, 2, 2))

    @given(
        s=schedules(),
        objective=st.sampled_from(OBJECTIVES),
        method=st.sampled_from(sorted(SAMPLERS)),
        steps=st.integers(1, 6),
        seed=SEEDS,
    )
    def test_a_denoiser_that_knows_the_image_draws_it(self, s, objective, method, steps, seed):
        """Whatever schedule, b, objective, sampler and number of steps; with zero terminal SNR as well."""
        s = s if objective != "eps" or s.alpha_bar[-1] > 1e-9 else Schedule(s.beta[:1].clip(0, 0.9), s.input_scale)
        d = Diffusion(s, objective)
        model = ideal_denoiser(self.target, d)

        class Float64:
            dtype = np.dtype("float64")
            __call__ = staticmethod(model)

        images = sample(d, Float64(), (2, 3, 2, 2), method, min(steps, d.T), seed, clip=False)
        np.testing.assert_allclose(images, np.broadcast_to(self.target, images.shape), atol=1e-5)

    @pytest.mark.parametrize("method", sorted(SAMPLERS))
    @pytest.mark.parametrize("b", [0.5, 1.0, 2.0])
    def test_clipping_is_to_the_range_of_the_images_whatever_b(self, method, b):
        d = Diffusion(Schedule(linear(30, 1e-4, 0.5), b), "x0")
        big = lambda x, t: 3 + 0 * x
        seen = []
        kept = sample(d, big, (2, 2, 2, 1), method, callback=lambda t, x, x0: seen.append(x0))
        np.testing.assert_allclose(kept, 1, rtol=1e-6)
        assert np.max(seen) == np.min(seen) == 1
        _, _, x0 = next(SAMPLERS[method](d, big, normals(0)(), normals(1)))
        assert np.all(x0 == 1)  # by default, too
        np.testing.assert_allclose(sample(d, big, (2, 2, 2, 1), method, clip=False), 3, rtol=1e-6)
        np.testing.assert_allclose(sample(d, big, (2, 2, 2, 1), method, clip="dynamic"), 1, rtol=1e-6)


def test_guidance_goes_from_one_model_to_the_other_and_beyond():
    u, c = (lambda x, t: Tensor(x * 2)), (lambda x, t: x + t.reshape(-1, 1, 1, 1))
    x, t = normals(0)(), np.array([1, 2, 3])
    for scale, expected in ((0, 2 * x), (1, c(x, t)), (np.float64(3), 2 * x + 3 * (c(x, t) - 2 * x))):
        np.testing.assert_allclose(guided(u, c, scale)(x, t), expected, rtol=1e-12)
    assert guided(c, c, np.float64(3))(x.astype(np.float32), t.astype(np.float32)).dtype == np.float32


def test_guidance_of_networks_with_a_learned_variance():
    """The prediction is guided, the variance is the conditional network's; dtype and device are passed on."""
    config = dict(channels=(8,), blocks=1, attention=(False,), out_channels=2)
    u, c = (UNet(**config, rng=seed).to(dtype="float64") for seed in (1, 2))
    for network in (u, c):
        for p in network.parameters():
            p.data = p.data + 0.1
    both = guided(u, c, 5.0)
    x, t = np.random.default_rng(0).standard_normal((2, 4, 4, 1)), np.array([3, 7])
    a, b, got = u(x, t).data, c(x, t).data, both(x, t)
    np.testing.assert_allclose(got[..., :1], a[..., :1] + 5 * (b[..., :1] - a[..., :1]), rtol=1e-12)
    np.testing.assert_array_equal(got[..., 1:], b[..., 1:])
    d = Diffusion(make_schedule("cosine", 10), variance="learned_range", loss_type="hybrid")
    assert sample(d, both, (1, 4, 4, 1)).dtype == np.float64 and both.device == "cpu"
    assert not hasattr(guided(zeros, zeros, 1), "dtype")


class Foreign:
    """What a model of another framework returns: no array, but NumPy can make one of it."""

    def __init__(self, values):
        self.values, self.shape = values, values.shape

    def __array__(self, dtype=None, copy=None):
        return self.values


class TestSample:
    @pytest.mark.parametrize("way", [contextlib.nullcontext, plain])
    def test_a_model_may_return_what_numpy_takes(self, way):
        diffusion, model = Diffusion(make_schedule("linear", 20, beta_end=0.5)), lambda x, t: 0.1 * x
        settings = dict(shape=(9, 4, 4, 1), steps=3, rng=0)
        with way():
            drawn = sample(diffusion, lambda x, t: Foreign(model(x, t)), **settings)
            np.testing.assert_array_equal(drawn, sample(diffusion, model, **settings))

    d = Diffusion(Schedule(linear(30, beta_start=1e-4, beta_end=0.5)))

    def test_it_starts_from_standard_normal_noise(self):
        seen = []
        sample(self.d, lambda x, t: seen.append(x) or zeros(x, t), (100, 10, 10, 1))
        first = np.concatenate(seen[:4])
        assert abs(first.mean()) < 0.05 and abs(first.var() - 1) < 0.05

    def test_an_oracle_for_one_image_arrives_at_it(self):
        target = np.random.default_rng(0).uniform(-1, 1, (4, 4, 1))

        def oracle(x_t, t):
            a = self.d.schedule.alpha_bar[t].reshape(-1, 1, 1, 1)
            return ((x_t - np.sqrt(a) * target) / np.sqrt(1 - a)).astype(x_t.dtype)

        images = sample(self.d, oracle, (3, 4, 4, 1))
        np.testing.assert_allclose(images, np.broadcast_to(target, images.shape), atol=1e-4)

    def test_an_ideal_denoiser_of_two_images_draws_each_half_of_the_time(self):
        a, b = np.full((1, 1, 1), -0.5), np.full((1, 1, 1), 0.5)
        d = Diffusion(Schedule(linear(200, 5e-4, 0.1)))

        def ideal(x, t):  # E[eps | x_t], a softmax over the data
            bar = d.schedule.alpha_bar[t].reshape(-1, 1, 1, 1)
            wa, wb = (np.exp(-((x - np.sqrt(bar) * y) ** 2) / (2 * (1 - bar))) + 1e-300 for y in (a, b))
            x0 = (wa * a + wb * b) / (wa + wb)
            return ((x - np.sqrt(bar) * x0) / np.sqrt(1 - bar)).astype(x.dtype)

        images = sample(d, ideal, (400, 1, 1, 1))
        assert np.abs(np.abs(images) - 0.5).max() < 0.02
        assert 0.4 < (images > 0).mean() < 0.6

    def test_clipping(self):
        big = lambda x, t: -100 * np.ones_like(x)
        kept, wild = (sample(self.d, big, (2, 2, 2, 1), clip=c) for c in (True, False))
        assert np.abs(kept).max() <= 1 and np.abs(wild).max() > 1

    def test_an_image_depends_neither_on_the_others_nor_on_the_workers(self):
        unet = UNet(channels=(4, 8), blocks=1, attention=(False, True), groups=2)
        for p in unet.parameters():
            p.data = (p.data + 0.1 * np.random.default_rng(0).standard_normal(p.shape)).astype(np.float32)
        n = 19
        images = [sample(self.d, unet, (n, 4, 4, 1), rng=5, workers=w) for w in (1, 2, 3)]
        np.testing.assert_array_equal(images[0], images[1])
        np.testing.assert_array_equal(images[0], images[2])
        for fewer in (1, 4, 9):  # other shapes of matrix may round differently
            np.testing.assert_allclose(images[0][:fewer], sample(self.d, unet, (fewer, 4, 4, 1), rng=5), atol=1e-3)
        assert len({image.tobytes() for image in images[0]}) == n
        assert np.abs(sample(self.d, unet, (n, 4, 4, 1), rng=6) - images[0]).max() > 0.1

    def test_every_shard_gets_its_own_timesteps(self, monkeypatch):
        def odd(diffusion, model, x, noise, clip):
            yield 0, model(x, np.arange(len(x))), x

        monkeypatch.setitem(SAMPLERS, "odd", odd)
        ts = sample(self.d, lambda x, t: 0 * x + t.reshape(-1, 1, 1, 1).astype(x.dtype), (20, 2, 2, 1), method="odd")
        assert ts[:, 0, 0, 0].tolist() == list(range(20))

    def test_the_callback_sees_every_step(self):
        seen = []
        last = sample(self.d, zeros, (2, 2, 2, 1), callback=lambda t, x, x0: seen.append((t, x, x0)))
        assert [t for t, _, _ in seen] == list(range(29, -1, -1))
        np.testing.assert_array_equal(seen[-1][1], last)
        np.testing.assert_array_equal(seen[-1][2], last)  # at t = 0 the mean is the predicted x0

    def test_it_takes_models_that_return_tensors_and_draws_in_their_dtype(self):
        class Model:
            dtype = np.dtype("float64")

            def __call__(self, x, t):
                return Tensor(x) * 0.1

        assert sample(self.d, Model(), (1, 2, 2, 1)).dtype == np.float64
        assert sample(self.d, zeros, (1, 2, 2, 1)).dtype == np.float32

    def test_images_are_made_where_the_model_is_and_there_in_one_batch(self, on_second_gpu):
        model, went, shapes = on_second_gpu("sample")
        sample(self.d, model, (11, 2, 2, 1))
        assert set(went) == {"cuda:1"} and set(shapes) == {(11, 2, 2, 1)}
        shapes.clear()
        sample(self.d, lambda x, t: shapes.append(x.shape) or 0 * x, (11, 2, 2, 1))
        assert set(shapes) == {(4, 2, 2, 1), (3, 2, 2, 1)}

    @pytest.mark.parametrize("b", [1.0, 0.5])
    def test_start_and_trajectory(self, b):
        d, x = Diffusion(Schedule(self.d.schedule.beta, b)), np.random.default_rng(3).standard_normal((5, 2, 2, 1))
        seen = []
        settings = dict(steps=7, start=x, callback=lambda t, x, x0: seen.append(x))
        path = sample(d, zeros, x.shape, "ddim", **settings, trajectory=True)
        assert path.shape == (8, 5, 2, 2, 1) and path.dtype == np.float32
        np.testing.assert_allclose(path[0], x / b, rtol=1e-6)
        np.testing.assert_array_equal(path[1:], np.stack(seen) / np.float32(b))
        np.testing.assert_array_equal(path[-1], sample(d, zeros, x.shape, "ddim", **settings))
        noise = sample(d, zeros, (5, 2, 2, 1), "ddim", rng=4, trajectory=True)[0] * b
        for method in SAMPLERS:  # `ddpm`, too: what is drawn on the way does not depend on the start
            again = sample(d, zeros, (5, 2, 2, 1), method, start=noise, rng=4)
            np.testing.assert_allclose(again, sample(d, zeros, (5, 2, 2, 1), method, rng=4), rtol=1e-4, atol=1e-6)
        with pytest.raises(FloatingPointError, match="not finite; are its weights, and the start?"):
            sample(d, zeros, (5, 2, 2, 1), start=np.full_like(noise, np.nan))
        no_start = (
            (x[:4], r"float64 \(4, 2, 2, 1\)"),
            (x > 0, "bool"),
            (x * 1j, "complex"),
            (x.tolist(), "list"),
            (1.0, "float"),
        )
        for bad, got in no_start:
            with pytest.raises(ValueError, match=rf"start: expected .* of the images, \(5, 2, 2, 1\), got {got}"):
                sample(d, zeros, (5, 2, 2, 1), start=bad)

    def test_a_bar_is_shown_if_wanted(self, capsys):
        sample(self.d, zeros, (1, 2, 2, 1), steps=7)
        assert capsys.readouterr().err == ""
        sample(self.d, zeros, (1, 2, 2, 1), steps=7, progress=True)
        assert "sampling" in (bar := capsys.readouterr().err) and "7/7" in bar

    def test_a_sampler_of_one_s_own(self):
        def halved(diffusion, model, x, noise, clip=None, times=1):
            for t in reversed(range(diffusion.T)):
                x /= 2**times  # in place: it is its own
                yield t, x, model(x, np.full(len(x), t))

        start = np.ones((2, 2, 2, 1), np.float32)
        np.testing.assert_array_equal(sample(self.d, zeros, start.shape, halved, 4, start=start, times=2), start / 256)
        assert (start == 1).all()
        with pytest.raises(TypeError, match="settings: 'halved' takes times, got eta$"):
            sample(self.d, zeros, start.shape, halved, eta=0.5, times=2)

    def test_the_seed_is_0_unless_given(self):
        a, b = sample(self.d, zeros, (1, 2, 2, 1)), sample(self.d, zeros, (1, 2, 2, 1), rng=0)
        np.testing.assert_array_equal(a, b)

    def test_no_graph_is_kept_in_the_workers(self):
        w, nodes = Parameter(np.ones(1, np.float32)), []

        def model(x, t):
            y = Tensor(x) * w
            nodes.append(y.node)
            return y

        sample(self.d, model, (1, 2, 2, 1))
        assert set(nodes) == {None}

    def test_bad_input(self):
        with pytest.raises(ValueError, match="method: unknown sampler 'dpm'; known: ddpm, ddim, dpm\\+\\+"):
            sample(self.d, zeros, (1, 2, 2, 1), method="dpm")
        for shape in ((2, 2, 1), (0, 2, 2, 1), 16):
            with pytest.raises(ValueError, match=r"shape: expected \(N, H, W, C\), each at least 1"):
                sample(self.d, zeros, shape)
        for steps in (0, 31, 2.0, "all"):
            with pytest.raises(ValueError, match="steps: expected an integer from 1 to 30, the steps of the schedule"):
                sample(self.d, zeros, (1, 2, 2, 1), steps=steps)
        for workers in (0, 1.5):
            with pytest.raises(ValueError, match=f"workers: expected an integer >= 1, got {workers}"):
                sample(self.d, zeros, (1, 2, 2, 1), workers=workers)
        for model in (lambda x, t: x[..., :1], lambda x, t: x[:1], lambda x, t: np.concatenate([x, x], -1)):
            with pytest.raises(ValueError, match=r"model: expected it to return the shape of x_t, \(8, 2, 2, 3\), got"):
                sample(self.d, model, (8, 2, 2, 3))
        with pytest.raises(FloatingPointError, match=r"^model: it led to images .* not finite; are its weights\?$"):
            sample(self.d, lambda x, t: x * np.float32(np.nan), (1, 2, 2, 1))
        for method, takes in (("ddpm", "none"), ("ddim", "eta"), ("dpm++", "none")):
            with pytest.raises(TypeError, match=rf"settings: '{re.escape(method)}' takes {takes}, got seed"):
                sample(self.d, zeros, (1, 2, 2, 1), method, seed=0)
        with pytest.raises(TypeError, match="settings: 'ddpm' takes none, got eta, seed$"):
            sample(self.d, zeros, (1, 2, 2, 1), eta=0.5, seed=1)
        with pytest.raises(ValueError, match=r"method: unknown sampler \['ddim'\]; known"):
            sample(self.d, zeros, (1, 2, 2, 1), method=["ddim"])
        with pytest.raises(TypeError, match="diffusion: expected a Diffusion, got UNet"):
            sample(UNet(channels=(8,), blocks=1, attention=(False,)), self.d, (1, 4, 4, 1))
