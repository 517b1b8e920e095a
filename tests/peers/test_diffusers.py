"""Agrees with diffusers: every table of its DDPM scheduler, adding noise, velocity, whole chains with shared noise.

Skipped where diffusers is not installed (`pip install 'tinyddpm[peers]'`). It computes in float32; here its code runs
as it is, but that what it calls float32 is float64, so that agreement is to rounding.
"""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, make

from tinyddpm import Diffusion, sample
from tinyddpm.diffusion.checks import SPACINGS
from tinyddpm.diffusion.sample import timesteps

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SCHEDULES = {"linear": "linear", "scaled_linear": "quadratic", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid_beta"}
OBJECTIVES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCES = {"fixed_small": "small", "fixed_large": "large", "learned_range": "learned_range"}
STEPS = [5, 7, 50]  # 7 does not divide 1000
START = np.random.default_rng(0).standard_normal((2, 3, 3, 1))


class Float64:
    """torch or NumPy, whose float32 is float64."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        return getattr(self.module, "float64" if name == "float32" else name)


@pytest.fixture(scope="module", autouse=True)
def double_precision_and_noise_of_ours():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ddpm", "ddim", "dpmsolver_multistep"):
            module = getattr(diffusers.schedulers, f"scheduling_{name}")
            patch.setattr(module, "torch", Float64(torch))
            patch.setattr(module, "np", Float64(np))
            patch.setattr(module, "randn_tensor", lambda shape, generator, **settings: nchw(generator()))
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(default)


class DDIMByTimestepsVisited(diffusers.DDIMScheduler):
    """Theirs steps from t to t - T // steps, which is not always the timestep that it visits next (spacing "linspace",
    or steps that do not divide T). Here `steps` is, for each step, the number that makes it so."""

    def step(self, output, t, x, **settings):
        following = [*self.timesteps.tolist(), -1]
        down = int(t) - following[following.index(int(t)) + 1]
        self.num_inference_steps = Fraction(self.config.num_train_timesteps, down)
        return super().step(output, t, x, **settings)


def prediction(x, t):
    """A model of some kind."""
    return np.sin(2 * x + 0.01 * np.asarray(t).reshape(-1, 1, 1, 1))


def prediction_and_spread(x, t):
    return np.concatenate([prediction(x, t), np.cos(3 * x)], axis=-1)


prediction.dtype = prediction_and_spread.dtype = np.dtype("float64")


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def assert_same_chain(peer, diffusion, method, steps, model=prediction, clip=True, but_the_last=False, eta=None):
    """`sample` and their scheduler, from one start and with the same noise, arrive at the same x_t after every step."""
    peer.set_timesteps(steps)
    visited = peer.timesteps.tolist()
    streams = np.random.default_rng(3).spawn(len(START))  # as `sample` has them
    noise = lambda: np.stack([stream.standard_normal(START.shape[1:]) for stream in streams])
    noise()  # what it would start from
    theirs, ours = {"generator": noise}, {"steps": steps, "spacing": peer.config.timestep_spacing}
    if method == "dpm++":  # whose scheduler means other timesteps by "leading" and "linspace"
        ours = {"steps": visited}
    if eta is not None:  # and with the noise that the clipped x_0 leaves, which for them is a choice
        theirs |= {"eta": eta, "use_clipped_model_output": True}
        ours |= {"eta": eta}
    path = [START]
    for t in visited:
        output = model(path[-1], np.full(len(START), t))
        path.append(nhwc(peer.step(nchw(output), torch.tensor(t), nchw(path[-1]), **theirs).prev_sample))
    ours |= {"clip": clip, "workers": 1, "start": START, "trajectory": True}
    got, expected = sample(diffusion, model, START.shape, method, rng=3, **ours), np.stack(path)
    if but_the_last:
        got, expected = got[:-1], expected[:-1]
    assert got.shape == expected.shape
    size = np.abs(expected).max(axis=(1, 2, 3, 4), keepdims=True)  # of each x_t
    # it is 1e-12, but that their small variance is never less than 1e-20, the square of noise in the last x_0
    np.testing.assert_allclose(got / size, expected / size, rtol=0, atol=1e-9, err_msg=f"{clip=} {eta=}")


@pytest.mark.parametrize("name", SCHEDULES)
def test_beta_alpha_and_alpha_bar(name):
    for T, zero_terminal_snr in [(1, False), *itertools.product([10, 300, 1000], [False, True])]:
        s = make(SCHEDULES[name], T, zero_terminal_snr=zero_terminal_snr)
        peer = diffusers.DDPMScheduler(T, beta_schedule=name, rescale_betas_zero_snr=zero_terminal_snr)
        for theirs, ours in ((peer.betas, s.beta), (peer.alphas, s.alpha), (peer.alphas_cumprod, s.alpha_bar)):
            np.testing.assert_allclose(theirs, ours, rtol=1e-10)


@given(data=st.data(), seed=SEEDS)
def test_add_noise_and_velocity(data, seed):
    T = data.draw(st.sampled_from([10, 1000]))
    peer, s = diffusers.DDPMScheduler(T), make("linear", T)
    t = np.array(data.draw(st.lists(st.integers(0, T - 1), min_size=1, max_size=4)))
    x0, eps = np.random.default_rng(seed).standard_normal((2, len(t), 3, 2, 2))
    theirs = nchw(x0), nchw(eps), torch.from_numpy(t)
    settings = dict(rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(Diffusion(s).q_sample(x0, t, eps), nhwc(peer.add_noise(*theirs)), **settings)
    np.testing.assert_allclose(Diffusion(s, "v").target(x0, t, eps), nhwc(peer.get_velocity(*theirs)), **settings)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs
@pytest.mark.parametrize("objective", OBJECTIVES)
class TestChains:
    s = make("linear", 1000)

    @pytest.mark.parametrize("variance", VARIANCES)
    def test_ddpm_in_all_steps(self, objective, variance):
        model = prediction_and_spread if variance == "learned_range" else prediction
        for clip in (True, False):
            T = 1000 if variance == "fixed_large" and clip else 100
            peer = diffusers.DDPMScheduler(T, prediction_type=objective, variance_type=variance, clip_sample=clip)
            d = Diffusion(make("linear", T), OBJECTIVES[objective], VARIANCES[variance], "vlb")
            assert_same_chain(peer, d, "ddpm", T, model, clip)

    @pytest.mark.parametrize("spacing", SPACINGS)
    @pytest.mark.parametrize("steps", STEPS)
    def test_ddpm_respaced(self, objective, spacing, steps):
        """Of the large variance respacing makes the small one, which they do not."""
        settings = {"timestep_spacing": spacing, "prediction_type": objective}
        for variance, clip in itertools.product(["small", "large", "learned_range"], [True, False]):
            learned = variance == "learned_range"
            theirs = "learned_range" if learned else "fixed_small"
            peer = diffusers.DDPMScheduler(variance_type=theirs, clip_sample=clip, **settings)
            d = Diffusion(self.s, OBJECTIVES[objective], variance, "vlb")
            noisy = learned and spacing == "trailing"  # they add noise to the last x_0 unless it is that of t = 0
            assert_same_chain(peer, d, "ddpm", steps, prediction_and_spread if learned else prediction, clip, noisy)

    @pytest.mark.parametrize("spacing", SPACINGS)
    @pytest.mark.parametrize("steps", STEPS)
    def test_ddim(self, objective, spacing, steps):
        as_it_is = spacing != "linspace" and 1000 % steps == 0
        kind = diffusers.DDIMScheduler if as_it_is else DDIMByTimestepsVisited
        d = Diffusion(self.s, OBJECTIVES[objective])
        for eta, clip in itertools.product([0.0, 0.5, 1.0], [True, False]):
            peer = kind(timestep_spacing=spacing, prediction_type=objective, clip_sample=clip)
            assert_same_chain(peer, d, "ddim", steps, clip=clip, eta=eta)

    @pytest.mark.parametrize("spacing", SPACINGS)
    @pytest.mark.parametrize("steps", [2, *STEPS])
    def test_dpm_solver(self, objective, spacing, steps):
        for clip in (True, False):
            peer = dpm_solver(objective, spacing, thresholding=clip)  # to at most 1, its default: that is clipping
            assert_same_chain(peer, Diffusion(self.s, OBJECTIVES[objective]), "dpm++", steps, clip=clip)

    def test_dynamic_thresholding(self, objective):
        settings = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
        scheduler = {"timestep_spacing": "trailing", "prediction_type": objective}
        d = Diffusion(self.s, OBJECTIVES[objective], clip=("dynamic", 0.9, 1.5))
        assert_same_chain(diffusers.DDPMScheduler(**scheduler, **settings), d, "ddpm", 20, clip=None)
        assert_same_chain(diffusers.DDIMScheduler(**scheduler, **settings), d, "ddim", 20, clip=None, eta=0.5)
        assert_same_chain(dpm_solver(objective, "trailing", **settings), d, "dpm++", 20, clip=None)


def dpm_solver(objective, spacing, **settings):
    settings |= dict(algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero")
    return diffusers.DPMSolverMultistepScheduler(timestep_spacing=spacing, prediction_type=objective, **settings)


@pytest.mark.parametrize("objective", ["sample", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_ddpm_with_zero_terminal_snr_over_every_schedule(objective, name):
    peer = diffusers.DDPMScheduler(100, beta_schedule=name, rescale_betas_zero_snr=True, prediction_type=objective)
    d = Diffusion(make(SCHEDULES[name], 100, zero_terminal_snr=True), OBJECTIVES[objective])
    assert d.schedule.alpha_bar[-1] == 0
    assert_same_chain(peer, d, "ddpm", 100)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("T", [1000, 250, 37])
def test_every_spacing_visits_the_same_timesteps(spacing, T):
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
