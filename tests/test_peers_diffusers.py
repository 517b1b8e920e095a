"""Agrees with diffusers: every table of its DDPM scheduler, adding noise, velocity, whole chains with shared noise.

Skipped where diffusers is not installed (`pip install 'tinyddpm[peers]'`). Its tables are float32; for the chains they
are made anew in float64, with its own formulas, so that agreement is to rounding.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, make

from tinyddpm import Diffusion, Schedule, sample
from tinyddpm.diffusion import SPACINGS
from tinyddpm.sample import ddim, ddpm, dpm_solver, respace, timesteps

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SCHEDULES = {"linear": "linear", "scaled_linear": "quadratic", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid_beta"}
OBJECTIVES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCES = {"fixed_small": "small", "fixed_large": "large", "learned_range": "learned_range"}


def theirs(kind, T, **settings):
    """One of diffusers' schedulers with its tables in float64."""
    scheduler = kind(num_train_timesteps=T, **settings)
    if settings.get("beta_schedule", "linear") == "linear":
        betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    else:
        betas = scheduler.betas.double()
    if settings.get("rescale_betas_zero_snr"):
        betas = diffusers.schedulers.scheduling_ddpm.rescale_zero_terminal_snr(betas)
    scheduler.betas, scheduler.alphas = betas, 1 - betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, dim=0)
    if hasattr(scheduler, "alpha_t"):
        scheduler.alpha_t, scheduler.sigma_t = scheduler.alphas_cumprod**0.5, (1 - scheduler.alphas_cumprod) ** 0.5
    return scheduler


def model(x, t):
    """Some prediction, with a second half for the variance."""
    x = np.asarray(x)
    return np.concatenate([np.sin(2 * x + 0.01 * np.asarray(t).reshape(-1, 1, 1, 1)), np.cos(3 * x)], axis=-1)


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def nhwc(x):
    return x.numpy().transpose(0, 2, 3, 1)


def their_chain(scheduler, x, steps, learned=False, **settings):
    """Run their sampler from x on `model`, yielding each x_{t-1}."""
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        output = model(x, np.full(len(x), int(t)))[..., : 2 if learned else 1]
        x = nhwc(scheduler.step(nchw(output), t, nchw(x), **settings).prev_sample)
        yield x


def shared_noise(monkeypatch, module, count, shape):
    """Let their module draw the noises that are returned, in the same order."""
    noises = np.random.default_rng(1).standard_normal((count, *shape))
    left = iter(noises)
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **settings: nchw(next(left)))
    again = iter(noises)
    return lambda: next(again)


class TestTables:
    @pytest.mark.parametrize("T", [1, 10, 300, 1000])
    @pytest.mark.parametrize("name", SCHEDULES)
    @pytest.mark.parametrize("zero_terminal_snr", [False, True])
    def test_beta_alpha_and_alpha_bar(self, name, T, zero_terminal_snr):
        if zero_terminal_snr and T == 1:
            pytest.skip("takes two steps")
        s = make(SCHEDULES[name], T, zero_terminal_snr=zero_terminal_snr)
        peer = diffusers.DDPMScheduler(T, beta_schedule=name, rescale_betas_zero_snr=zero_terminal_snr)
        # theirs are float32, with rounding errors of up to T times 6e-8 in the product
        np.testing.assert_allclose(peer.betas, s.beta, rtol=2e-3 if zero_terminal_snr else 1e-5, atol=1e-7)
        np.testing.assert_allclose(peer.alphas, s.alpha, rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(peer.alphas_cumprod, s.alpha_bar, rtol=1e-4, atol=2e-7)

    @pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
    def test_variance(self, variance):
        s, peer = make("linear", 1000), theirs(diffusers.DDPMScheduler, 1000, variance_type=variance)
        d = Diffusion(s, variance=VARIANCES[variance])
        ours = np.exp(d.log_variance(np.zeros((1000, 1, 1, 1)), np.arange(1000))).ravel()
        np.testing.assert_allclose([peer._get_variance(t).item() for t in range(1, 1000)], ours[1:], rtol=1e-10)

    def test_betas_of_one_s_own(self):
        beta = np.linspace(0.01, 0.3, 20)
        peer = diffusers.DDPMScheduler(20, trained_betas=beta)
        np.testing.assert_allclose(peer.alphas_cumprod, np.cumprod(1 - beta), rtol=1e-5)


class TestForward:
    @given(data=st.data(), seed=SEEDS)
    def test_add_noise_and_velocity(self, data, seed):
        T = data.draw(st.sampled_from([10, 1000]))
        peer, s = theirs(diffusers.DDPMScheduler, T), make("linear", T)
        t = np.array(data.draw(st.lists(st.integers(0, T - 1), min_size=1, max_size=4)))
        x0, eps = np.random.default_rng(seed).standard_normal((2, len(t), 3, 2, 2))
        x_t = nhwc(peer.add_noise(nchw(x0), nchw(eps), torch.from_numpy(t)))
        np.testing.assert_allclose(Diffusion(s).q_sample(x0, t, eps), x_t, rtol=1e-12, atol=1e-14)
        v = nhwc(peer.get_velocity(nchw(x0), nchw(eps), torch.from_numpy(t)))
        np.testing.assert_allclose(Diffusion(s, "v").target(x0, t, eps), v, rtol=1e-12, atol=1e-14)


class TestChains:
    shape = (2, 3, 3, 1)
    x = np.random.default_rng(0).standard_normal((2, 3, 3, 1))

    @pytest.mark.parametrize("prediction_type", OBJECTIVES)
    @pytest.mark.parametrize("variance", VARIANCES)
    @pytest.mark.parametrize("clip", [True, False])
    def test_ddpm(self, monkeypatch, prediction_type, variance, clip):
        """All 1000 steps: every x_t on the way, the same noise."""
        peer = theirs(diffusers.DDPMScheduler, 1000, prediction_type=prediction_type, variance_type=variance,
                      clip_sample=clip)  # fmt: skip
        learned = variance == "learned_range"
        d = Diffusion(make("linear", 1000), OBJECTIVES[prediction_type], VARIANCES[variance], "vlb")
        noise = shared_noise(monkeypatch, diffusers.schedulers.scheduling_ddpm, 1000, self.shape)
        ours = ddpm(d, lambda x, t: model(x, t)[..., : 2 if learned else 1], self.x, noise, clip)
        for (_, got, _), expected in zip(ours, their_chain(peer, self.x, 1000, learned), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-8 * (1 + np.abs(expected).max()))

    @pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
    @pytest.mark.parametrize("name", SCHEDULES)
    def test_ddpm_with_zero_terminal_snr_over_every_schedule(self, monkeypatch, name, prediction_type):
        peer = theirs(diffusers.DDPMScheduler, 100, beta_schedule=name, rescale_betas_zero_snr=True,
                      prediction_type=prediction_type)  # fmt: skip
        noise = shared_noise(monkeypatch, diffusers.schedulers.scheduling_ddpm, 100, self.shape)
        d = Diffusion(Schedule(peer.betas.numpy()), OBJECTIVES[prediction_type])
        assert d.schedule.alpha_bar[-1] == 0
        ours = ddpm(d, lambda x, t: model(x, t)[..., :1], self.x, noise)
        for (_, got, _), expected in zip(ours, their_chain(peer, self.x, 100), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-7)

    @pytest.mark.parametrize("steps", [5, 50])
    def test_ddpm_respaced(self, monkeypatch, steps):
        peer = theirs(diffusers.DDPMScheduler, 1000, timestep_spacing="trailing", variance_type="fixed_small")
        noise = shared_noise(monkeypatch, diffusers.schedulers.scheduling_ddpm, steps, self.shape)
        d, ts = self.respaced("eps", steps)
        ours = ddpm(d, lambda x, i: model(x, ts[i])[..., :1], self.x, noise)
        for (_, got, _), expected in zip(ours, their_chain(peer, self.x, steps), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-8)

    @pytest.mark.parametrize("prediction_type", OBJECTIVES)
    @pytest.mark.parametrize(("steps", "eta"), [(20, 0.0), (20, 1.0), (1000, 0.4)])
    def test_ddim(self, monkeypatch, prediction_type, steps, eta):
        peer = theirs(diffusers.DDIMScheduler, 1000, timestep_spacing="trailing", prediction_type=prediction_type)
        peer.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
        noise = shared_noise(monkeypatch, diffusers.schedulers.scheduling_ddim, steps, self.shape)
        d, ts = self.respaced(OBJECTIVES[prediction_type], steps)
        ours = ddim(d, lambda x, i: model(x, ts[i])[..., :1], self.x, noise, eta=eta)
        settings = {"eta": eta, "use_clipped_model_output": True}  # the noise derived anew from the clipped x0
        for (_, got, _), expected in zip(ours, their_chain(peer, self.x, steps, **settings), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-8)

    @pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs
    @pytest.mark.parametrize("prediction_type", OBJECTIVES)
    @pytest.mark.parametrize("steps", [2, 10, 20])
    def test_dpm_solver(self, prediction_type, steps):
        peer = theirs(diffusers.DPMSolverMultistepScheduler, 1000, timestep_spacing="trailing",
                      prediction_type=prediction_type, solver_order=2, final_sigmas_type="zero")  # fmt: skip
        d, ts = self.respaced(OBJECTIVES[prediction_type], steps)
        ours = dpm_solver(d, lambda x, i: model(x, ts[i])[..., :1], self.x, None, clip=False)
        for (_, got, _), expected in zip(ours, their_chain(peer, self.x, steps), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-5 * (1 + np.abs(expected).max()))  # its sigmas: float32

    def test_sample_takes_the_same_steps(self):
        """From the same starting noise, in the timesteps that `trailing` spacing visits."""
        seen = []
        sample(
            Diffusion(make("linear", 1000)), lambda x, t: seen.append(int(t[0])) or x, (1, 2, 2, 1), "ddim", steps=20
        )
        peer = diffusers.DDIMScheduler(1000, timestep_spacing="trailing")
        peer.set_timesteps(20)
        assert seen == peer.timesteps.tolist()

    @pytest.mark.parametrize("spacing", SPACINGS)
    @pytest.mark.parametrize("T", [1000, 250, 37])
    def test_every_spacing_visits_the_same_timesteps(self, spacing, T):
        """But that theirs are floats, whose rounding error decides between two neighbours, or adds a step too many."""
        peer = diffusers.DDIMScheduler(T, timestep_spacing=spacing)
        same = 0
        for steps in range(1, T + 1):
            peer.set_timesteps(steps)
            theirs, ours = peer.timesteps.numpy()[::-1], timesteps(T, steps, spacing)
            if spacing == "trailing" and len(theirs) == steps and (theirs != ours).any():
                assert np.all(np.isin(ours - theirs, (0, -1, 1)))
                exact = np.arange(1, steps + 1) * T % steps * 2 == steps  # a number halfway between two integers
                assert np.all(exact[theirs != ours])
            elif len(theirs) == steps:
                np.testing.assert_array_equal(ours, theirs)
                same += 1
        assert same > 0.7 * T

    def respaced(self, objective, steps):
        ts = np.arange(1, steps + 1) * 1000 // steps - 1
        return respace(Diffusion(make("linear", 1000), objective), ts), ts
