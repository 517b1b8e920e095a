"""The samplers: each against its paper's equations, and on models whose images are known in advance."""

import numpy as np
import pytest

from tinyddpm import Diffusion, Schedule, UNet, make_schedule, sample
from tinyddpm.sample import SAMPLERS, SHARD, ddpm
from tinyddpm.schedule import linear
from tinyddpm.tensor import Parameter, Tensor


def zeros(x, t):
    return np.zeros_like(x)


class TestSample:
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
        for t, got in zip(range(29, -1, -1), ours):
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

    def test_it_starts_from_standard_normal_noise(self):
        seen = []
        sample(self.d, lambda x, t: seen.append(x) or zeros(x, t), (100, 10, 10, 1))
        first = np.concatenate(seen[: -(-100 // SHARD)])
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
        n = 2 * SHARD + 3
        images = [sample(self.d, unet, (n, 4, 4, 1), rng=5, workers=w) for w in (1, 2, 3)]
        np.testing.assert_array_equal(images[0], images[1])
        np.testing.assert_array_equal(images[0], images[2])
        for fewer in (1, 4, SHARD + 1):  # other shapes of matrix may round differently
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
            with pytest.raises(ValueError, match=r"model: expected it to return the shape of x_t, \(2, 2, 2, 3\), got"):
                sample(self.d, model, (2, 2, 2, 3))
        with pytest.raises(FloatingPointError, match="model: it led to images that are not finite"):
            sample(self.d, lambda x, t: x * np.float32(np.nan), (1, 2, 2, 1))
        sample(self.d, zeros, (1, 2, 2, 1), steps=30)
