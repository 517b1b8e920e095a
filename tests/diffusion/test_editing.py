"""What starts from pictures does what it says, with ideal denoisers, whose answer is known.

What holds for each of these alike is in test_every_use.py, what they refuse in test_refusals.py.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ideal import behind, gaussian, ideal_denoiser, in_float64, zeros
from strategies import SEEDS, make

from tinyddpm import Diffusion, Schedule, make_schedule, sample
from tinyddpm.diffusion.editing import denoise, inpaint, interpolate, invert, repaint, sdedit, slerp
from tinyddpm.diffusion.sample import SAMPLERS, ddpm

TWO = np.array([[1, 1], [1, -1]])
HADAMARD = np.kron(np.kron(TWO, TWO), np.kron(TWO, TWO))
DATA = 0.8 * HADAMARD[[1, 4, 5, 8, 9, 12]].reshape(6, 4, 4, 1)  # any two differ in half of their pixels, left and right
LINEAR = make_schedule("linear", 100, beta_start=1e-3, beta_end=0.2)
DIFFUSION = Diffusion(LINEAR)
NOISY = make_schedule("linear", 20, beta_start=5e-3, beta_end=0.6)
IDEAL = in_float64(ideal_denoiser(DATA, DIFFUSION))
NONE_LEFT = Diffusion(make_schedule("linear", 50, zero_terminal_snr=True), "v")
LEFT = np.arange(4) < np.full((4, 1), 2)  # the left half is known
IMAGES = np.random.default_rng(0).uniform(-1, 1, (3, 2, 2, 1))
normal = lambda *shape, seed=0: np.random.default_rng(seed).standard_normal(shape)
sigmas = lambda schedule: np.sqrt((1 - schedule.alpha_bar) / schedule.alpha_bar) / schedule.input_scale


def seeing(seen, model=zeros):
    """A model in float64 that notes the timestep and the labels of each call."""
    return in_float64(lambda x, t, **labels: seen.append((t[0], labels)) or model(x, t))


@given(sigma=st.floats(0.02, 0.8), seed=SEEDS, method=st.sampled_from(sorted(SAMPLERS)), b=st.sampled_from([1, 0.6]))
def test_denoise_finds_the_picture_behind_the_noise(sigma, seed, method, b):
    """Also where the process ends in nothing but noise."""
    noisy = DATA + sigma * normal(*DATA.shape, seed=seed)
    for d, steps in ((Diffusion(Schedule(LINEAR.beta, b)), 20), (NONE_LEFT, None)):
        clean = denoise(d, in_float64(ideal_denoiser(DATA, d)), noisy, sigma, method, steps=steps, workers=1)
        np.testing.assert_allclose(clean, DATA, atol=0.02)


@pytest.mark.parametrize("b", [0.5, 1.0])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 3.0])
def test_denoise_in_one_step_is_the_mean(b, sigma):
    """Of Gaussian data it is noisy s^2 / (s^2 + sigma^2), at the very sigma of a timestep."""
    d, seen = Diffusion(Schedule(LINEAR.beta, b)), []
    t = np.abs(sigmas(d.schedule) - sigma).argmin()
    exact = sigmas(d.schedule)[t]
    noisy = np.hypot(0.2, exact) * normal(5, 2, 2, 1)
    mean = denoise(d, seeing(seen, gaussian(d, 0.2)), noisy, exact, steps=1, clip=False)
    np.testing.assert_allclose(mean, noisy * 0.04 / (0.04 + exact**2), rtol=1e-9)
    assert {at for at, _ in seen} == {t}


def test_the_steps_of_denoise_are_evenly_spaced_up_to_where_the_noise_is():
    for steps, expected in ((None, range(41)), (4, [9, 19, 30, 40]), (90, range(41)), (1, [40])):
        denoise(DIFFUSION, seeing(seen := [], IDEAL), DATA, sigmas(LINEAR)[40] * 1.001, steps=steps, workers=1)
        assert sorted({t for t, _ in seen}) == list(expected)
    clean = denoise(DIFFUSION, seeing(seen, IDEAL), DATA, 1e-9)  # less than the schedule knows: its first step
    assert seen[-1][0] == 0
    np.testing.assert_allclose(clean, DATA, atol=1e-6)


def test_sdedit_starts_at_its_share_of_the_steps_from_noise_of_each_image_by_itself():
    for strength, first, seed in ((1, 99, {}), (0.5, 49, {}), (0.3, 29, {"rng": 6}), (0.001, 0, {"rng": 6})):
        settings = dict(steps=7, trajectory=True, workers=1) | seed
        path = sdedit(DIFFUSION, seeing(seen := [], IDEAL), DATA, strength, "ddim", **settings)
        assert seen[0][0] == first and len({t for t, _ in seen}) == min(7, first + 1)
        streams = np.random.default_rng(seed.get("rng", 0)).spawn(2)[0].spawn(6)  # the other: for noise on the way
        eps = np.stack([rng.standard_normal((4, 4, 1)) for rng in streams])
        np.testing.assert_array_equal(path[0], DIFFUSION.q_sample(DATA, np.full(6, first), eps))


@pytest.mark.filterwarnings("ignore:steps, iterations")  # of one iteration
@pytest.mark.parametrize("b", [1.0, 0.7])
@pytest.mark.parametrize("objective", ["eps", "v", "x0"])
def test_with_iterations_invert_is_the_exact_inverse_of_ddim(b, objective):
    d = Diffusion(Schedule(LINEAR.beta, b), objective)

    def error(iterations):
        z = invert(d, gaussian(d), IMAGES, steps=10, iterations=iterations)
        return np.abs(sample(d, gaussian(d), z.shape, "ddim", 10, start=z, clip=False) - IMAGES).max()

    assert error(1) > 2 * error(3) and error(30) < 1e-6


def test_invert_to_where_no_signal_is_left_and_in_all_steps():
    """The last x_t is all noise then: that of the x_t before."""
    d = Diffusion(make_schedule("linear", 50, input_scale=0.7, zero_terminal_snr=True), "v")

    def model(x, t):  # of Gaussian data, bent
        x_t, bar = behind(d.schedule, x, t)
        x0 = 0.1 + 0.25 * np.sqrt(bar) / (0.25 * bar + 1 - bar) * x_t + 0.05 * np.sin(3 * np.sqrt(bar) * x_t)
        return d.target(x0, t, d.eps_from_x0(x_t, t, x0))

    z = invert(d, in_float64(model), IMAGES, steps=10, iterations=40)
    again = sample(d, in_float64(model), z.shape, "ddim", 10, start=z, clip=False)
    np.testing.assert_allclose(again, IMAGES, atol=1e-9)
    assert np.isfinite(invert(Diffusion(Schedule([1.0]), "v"), zeros, IMAGES)).all()
    invert(DIFFUSION, seeing(seen := []), IMAGES, workers=1)
    assert [t for t, _ in seen] == np.repeat(range(100), 3).tolist()  # all steps, unless told otherwise


def test_how_far_off_invert_is_is_said_in_terms_of_the_image():
    with pytest.warns(UserWarning, match="^steps, iterations: of so few, x_t are off by as much as 1 in the image"):
        invert(Diffusion(Schedule([0.5], 0.5), "x0"), zeros, np.sign(IMAGES), iterations=1)


def test_interpolate_goes_from_one_to_the_other_by_way_of_the_data():
    a, b = (0.3 * normal(2, 3, 8, 8, 1)).clip(-1, 1)
    between = interpolate(DIFFUSION, gaussian(DIFFUSION), a, b, count=5, steps=25, iterations=10)
    assert between.shape == (3, 5, 8, 8, 1)
    np.testing.assert_allclose(between[:, 0], a, atol=1e-3)
    np.testing.assert_allclose(between[:, -1], b, atol=1e-3)
    # all that happens to noise on the way is a change of scale, so that this is the sphere between a and b
    np.testing.assert_allclose(between, slerp(a, b, np.linspace(0, 1, 5)).clip(-1, 1), atol=0.02)


@pytest.mark.filterwarnings("ignore:steps, iterations")
def test_labels_are_those_of_each_pair_and_other_settings_are_handed_on():
    asked = dict(labels=[7, 8], guidance=2.0, workers=1)
    interpolate(DIFFUSION, seeing(seen := []), DATA[:2], DATA[2:4], count=3, steps=2, **asked)
    told = [labels.get("labels", np.array([])).tolist() for _, labels in seen]
    assert told[:2] == [[], [7, 8, 7, 8]] and told[-4:] == [[], [7, 7, 7, 8], [], [8, 8]]
    inpaint(DIFFUSION, seeing(seen := []), DATA[:2], LEFT, 1, **asked)
    assert [{k: v.tolist() for k, v in labels.items()} for _, labels in seen] == [{}, {"labels": [7, 8]}]
    three, x0s = lambda x, t: 0 * x + 3, []  # clipped are the pictures, not what is thought of them on the way
    look = lambda t, x, x0: x0s.append(x0.max())
    assert interpolate(Diffusion(LINEAR, "x0"), three, DATA[:1], DATA[1:2], 2, 2, callback=look).max() == 1
    assert set(x0s) == {3}


def test_what_is_not_said_is_as_the_documentation_has_it():
    model = gaussian(DIFFUSION)
    for use, said in (
        (lambda **how: interpolate(DIFFUSION, model, DATA[:2], DATA[2:4], 8, 9, **how), {"iterations": 2}),
        (lambda **how: inpaint(DIFFUSION, model, DATA[:2], LEFT, 9, **how), {"jump": 5, "resamplings": 5}),
    ):
        made = use(**said)
        np.testing.assert_array_equal(use(), made)
        for name in said:
            assert (use(**said | {name: 3}) != made).any(), name
    assert len(interpolate(DIFFUSION, IDEAL, DATA[:1], DATA[1:2], steps=9)[0]) == 8


@given(seed=SEEDS, f=st.floats(0, 1))
def test_slerp_keeps_length_and_divides_the_angle(seed, f):
    a, b = (x / np.linalg.norm(x) for x in normal(2, 1, 3, 2, 1, seed=seed))
    c = slerp(a, b, np.array([0, f, 1]))
    np.testing.assert_allclose(c[:, 0], a, atol=1e-12)
    np.testing.assert_allclose(c[:, 2], b, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(c[0, 1]), 1, rtol=1e-9)
    angle = lambda x, y: math.acos(np.clip((x * y).sum(), -1, 1))
    assert math.isclose(angle(a[0], c[0, 1]), f * angle(a, b), abs_tol=1e-6)


def test_half_a_picture_is_completed_to_the_one_that_fits_and_what_is_not_known_may_be_anything():
    assert len({image[:, :2].tobytes() for image in DATA}) == 6  # the left halves differ, so there is one answer
    made = inpaint(DIFFUSION, IDEAL, np.where(LEFT[..., None], DATA, np.nan), LEFT, steps=50)
    np.testing.assert_allclose(made, DATA, atol=0.02)


@given(
    seed=SEEDS, steps=st.integers(1, 12), jump=st.integers(1, 16), resamplings=st.integers(1, 3),
    b=st.sampled_from([1.0, 0.3]), clip=st.sampled_from([True, False]), of_each=st.booleans(),
)  # fmt: skip
def test_known_pixels_are_kept_to_the_bit(seed, steps, jump, resamplings, b, clip, of_each):
    rng, d = np.random.default_rng(seed), Diffusion(Schedule(LINEAR.beta, b))
    images = rng.uniform(-1, 1, (3, 4, 5, 2)).astype(np.float32)
    mask, before = rng.random((3, 4, 5) if of_each else (4, 5)) < 0.5, images.copy()
    path = inpaint(d, lambda x, t: 0.3 * x, images, mask, steps, jump, resamplings, clip=clip, trajectory=True)
    known, made = np.broadcast_to(mask[..., None], images.shape), path[-1]
    np.testing.assert_array_equal(made[known], images[known])
    assert (made[~known] != images[~known]).all() and np.isfinite(made).all() and len(path) == steps + 1
    np.testing.assert_array_equal(images, before)
    without = inpaint(d, lambda x, t: 0.3 * x, images, mask, steps, jump, resamplings, clip=clip)
    np.testing.assert_array_equal(made, without)
    assert not (path[0][known] == images[known]).any()


def test_with_nothing_known_and_nothing_undone_inpaint_is_ddpm():
    d, zs, x, model = Diffusion(NOISY), normal(40, 3, 2, 2, 1), normal(3, 2, 2, 1, seed=1), lambda x, t: 0.3 * x
    ours, theirs = iter(zs), iter(zs[::2])  # every other is for what is known
    settings = dict(images=IMAGES, mask=np.zeros((3, 2, 2, 1), bool), jump=1, resamplings=1)
    steps = repaint(d, model, x, lambda: next(ours), **settings)
    for (_, a, _), (_, b, _) in zip(steps, ddpm(d, model, x, lambda: next(theirs)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("jump", "resamplings", "evaluations"),
                         [(1, 1, 10), (5, 1, 10), (1, 3, 28), (5, 2, 19), (20, 9, 82), (4, 2, 19)])  # fmt: skip
def test_steps_are_undone_and_taken_again(jump, resamplings, evaluations):
    """All but the last, so often as is asked for, and the callback sees each once."""
    taken = []
    settings = dict(steps=10, jump=jump, resamplings=resamplings, workers=1, callback=lambda t, *_: taken.append(t))
    inpaint(DIFFUSION, seeing(seen := []), DATA[:1], LEFT, **settings)
    assert len(seen) == evaluations and taken == list(range(99, -1, -10))
    if (jump, resamplings) == (4, 2):
        assert [t // 10 for t, _ in seen] == [9, 8, 7, 6, 9, 8, 7, 6, 5, 4, 3, 2, 5, 4, 3, 2, 1, 1, 0]


@pytest.mark.parametrize("jump", [1, 3, 7])
def test_what_is_known_is_as_noisy_as_the_rest_and_so_is_what_was_undone(jump):
    """Of a picture that is all one grey, as the model knows: whenever it is called, x_t is q(x_t | x_0), where it is
    known and where it is made up; but at T - 1, where it begins with noise alone."""
    grey, seen, rng = 0.5, [], np.random.default_rng(0)

    def model(x, t):
        mean, variance = math.sqrt(NOISY.alpha_bar[t[0]]) * grey, NOISY.one_minus_alpha_bar[t[0]]
        for part in (x[:, :, :2], x[:, :, 2:]) if t[0] < 19 else ():
            assert abs(part.mean() - mean) < 0.09 * math.sqrt(variance) and abs(part.var() / variance - 1) < 0.13
        seen.append(t[0])
        return np.full_like(x, grey)

    noise, mask = lambda: rng.standard_normal((400, 2, 4, 1)), LEFT[None, :2, :, None]
    settings = dict(images=np.full((400, 2, 4, 1), grey), mask=mask, jump=jump, resamplings=3)
    list(repaint(Diffusion(NOISY, "x0"), model, noise(), noise, **settings))
    assert len(seen) == 58


def test_resampling_lets_what_is_made_up_fit_what_is_known():
    """Two pixels, N(0, C) with a correlation of 0.9: of a known left one, the right one should be 0.9 times that on
    average, with a variance of 0.19. As all is linear, images in each of which a single number is 1, all others 0, tell
    what each does: the known pixel, those of the start, and of every noise that is drawn."""
    C, d = np.array([[1, 0.9], [0.9, 1]]), Diffusion(make("linear", 50, beta_start=1e-3, beta_end=0.2), "x0")

    def model(x, t):  # E[x_0 | x_t]
        bar = d.schedule.alpha_bar[t[0]]
        return math.sqrt(bar) * C @ np.linalg.inv(bar * C + (1 - bar) * np.eye(2)) @ x

    def made_up(resamplings):
        n = 4 + 2 * 49 * (3 * resamplings - 1)  # noise of a step, of the known pixel, and of a step undone
        one = iter(np.eye(n).reshape(n, n, 1, 1, 1))
        pixels = lambda: np.concatenate([next(one), next(one)], axis=2)
        settings = dict(images=pixels(), mask=np.array([[True], [False]]), jump=5, resamplings=resamplings)
        *_, (_, x, _) = repaint(d, model, pixels(), pixels, False, **settings)  # of the images the left pixel counts
        right = x[:, 0, 1, 0]
        return right[0], (right[1:] ** 2).sum()

    slope, variance = made_up(5)
    assert abs(slope - 0.9) < 0.07 and abs(variance - 0.19) < 0.03
    assert made_up(1)[0] < 0.65
