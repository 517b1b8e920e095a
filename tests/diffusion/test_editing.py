"""What starts from pictures does what it says, with ideal denoisers, whose answer is known; bad input is refused."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from ideal import ideal_denoiser
from strategies import SEEDS, make

from tinyddpm import Diffusion, Schedule, UNet, make_schedule, sample
from tinyddpm.diffusion.editing import denoise, inpaint, interpolate, invert, repaint, sdedit, slerp
from tinyddpm.diffusion.sample import SAMPLERS

TWO = np.array([[1, 1], [1, -1]])
HADAMARD = np.kron(np.kron(TWO, TWO), np.kron(TWO, TWO))
DATA = 0.8 * HADAMARD[[1, 4, 5, 8, 9, 12]].reshape(6, 4, 4, 1)  # any two differ in half of their pixels, left and right
LINEAR = make_schedule("linear", 100, beta_start=1e-3, beta_end=0.2)
DIFFUSION = Diffusion(LINEAR)


class Model:
    """A function of (x_t, t) as a model that works in float64, and counts its calls."""

    dtype = np.dtype("float64")

    def __init__(self, function):
        self.function, self.seen = function, []

    def __call__(self, x, t, **labels):
        self.seen.append((t[0], labels))
        return self.function(x, t)


def gaussian(diffusion, s=0.5):
    """The ideal denoiser of data N(0, s^2): linear, and nothing like any picture."""

    def model(x, t):
        bar, b = diffusion.schedule.alpha_bar[t].reshape(-1, 1, 1, 1), diffusion.schedule.input_scale
        x_t = x * np.sqrt((b * b - 1) * bar + 1)  # what a network sees is divided by this
        x0 = s * s * b * np.sqrt(bar) / (bar * b * b * s * s + 1 - bar) * x_t
        return (x_t - np.sqrt(bar) * b * x0) / np.sqrt(1 - bar)

    return Model(model)


def rms(a, b):
    return float(np.sqrt(np.mean((a - b) ** 2)))


class TestDenoise:
    @given(
        sigma=st.floats(0.02, 0.8), seed=SEEDS, method=st.sampled_from(sorted(SAMPLERS)), b=st.sampled_from([1, 0.6])
    )
    def test_it_finds_the_picture_behind_the_noise(self, sigma, seed, method, b):
        d = Diffusion(Schedule(LINEAR.beta, b))
        noisy = DATA + sigma * np.random.default_rng(seed).standard_normal(DATA.shape)
        clean = denoise(d, Model(ideal_denoiser(DATA, d)), noisy, sigma, method, steps=20)
        np.testing.assert_allclose(clean, DATA, atol=0.02)

    @pytest.mark.parametrize("b", [0.5, 1.0])
    @pytest.mark.parametrize("sigma", [0.1, 0.7, 3.0])
    def test_one_step_is_the_mean_which_nothing_beats(self, b, sigma):
        """Of Gaussian data it is noisy s^2 / (s^2 + sigma^2), at the very sigma of a timestep."""
        d = Diffusion(Schedule(LINEAR.beta, b))
        sigmas = np.sqrt((1 - LINEAR.alpha_bar) / LINEAR.alpha_bar) / b
        t = np.abs(sigmas - sigma).argmin()
        x0 = np.random.default_rng(1).normal(0, 0.2, (500, 2, 2, 1))
        noisy = x0 + sigmas[t] * np.random.default_rng(2).standard_normal(x0.shape)
        model = gaussian(d, 0.2)
        mean = denoise(d, model, noisy, sigmas[t], steps=1, clip=False)
        np.testing.assert_allclose(mean, noisy * 0.04 / (0.04 + sigmas[t] ** 2), rtol=1e-9)
        assert {seen for seen, _ in model.seen} == {t}
        if sigma > 0.1:  # or there are too few steps to draw from the posterior
            drawn = denoise(d, model, noisy, sigmas[t], "ddpm", clip=False)
            assert rms(mean, x0) < 0.82 * rms(drawn, x0)  # in many steps, a sample is off by sqrt(2) as much
            assert abs(drawn.std() - 0.2) < 0.05 and mean.std() < 0.06  # but as lively as the data

    def test_steps(self):
        model = Model(ideal_denoiser(DATA, DIFFUSION))
        sigmas = np.sqrt((1 - LINEAR.alpha_bar) / LINEAR.alpha_bar)
        for steps, expected in ((None, range(41)), (4, [9, 19, 30, 40]), (90, range(41)), (1, [40])):
            model.seen.clear()
            denoise(DIFFUSION, model, DATA, sigmas[40] * 1.001, steps=steps, workers=1)
            assert sorted({t for t, _ in model.seen}) == list(expected)
        denoise(DIFFUSION, model, DATA, 1e-9)  # less than the schedule knows: its first step
        assert model.seen[-1][0] == 0
        np.testing.assert_allclose(denoise(DIFFUSION, model, DATA, 1e-9), DATA, atol=1e-6)

    def test_noise_that_ends_in_nothing_else(self):
        d = Diffusion(make_schedule("linear", 50, zero_terminal_snr=True), "v")
        noisy = DATA + 0.3 * np.random.default_rng(0).standard_normal(DATA.shape)
        np.testing.assert_allclose(denoise(d, Model(ideal_denoiser(DATA, d)), noisy, 0.3), DATA, atol=0.02)

    def test_bad_input(self):
        call = lambda noisy=DATA, sigma=0.5, **settings: denoise(
            DIFFUSION, lambda x, t: 0 * x, noisy, sigma, **settings
        )
        for bad in (0, -1.0, math.nan, math.inf, "0.5", None):
            with pytest.raises(ValueError, match="sigma: expected a number > 0, got"):
                call(sigma=bad)
        with pytest.raises(ValueError, match="sigma: 1000.0 is more noise than this schedule knows, 221.5"):
            call(sigma=1000)
        to_the_end = Diffusion(make_schedule("linear", 50, zero_terminal_snr=True), "v")
        with pytest.raises(ValueError, match="sigma: 100000.0 is more noise than this schedule knows, [0-9]+"):
            denoise(to_the_end, lambda x, t: 0 * x, DATA, 1e5)
        with pytest.raises(
            ValueError, match=r"noisy: expected values within \[-6, 6\], got -?[0-9.]+ to 255; of 8-bit"
        ):
            call(DATA * 0 + np.arange(96.0).reshape(DATA.shape) / 95 * 255)
        for steps in (0, 101, 1.5):
            with pytest.raises(ValueError, match="steps: expected an integer from 1 to 100"):
                call(steps=steps)
        with pytest.raises(
            ValueError, match="steps: expected how many, since which they are depends on where to begin"
        ):
            call(steps=[3, 4])


class TestSDEdit:
    def test_little_noise_keeps_the_picture_and_much_makes_another(self):
        model = Model(ideal_denoiser(DATA, DIFFUSION))
        many = np.repeat(DATA, 20, axis=0)
        kept = [float((np.abs(sdedit(DIFFUSION, model, many, s) - many) < 0.1).all((1, 2, 3)).mean())
                for s in (0.01, 0.2, 0.5, 1)]  # fmt: skip
        assert kept[0] == kept[1] == 1 and kept[2] < 1 and 0.02 < kept[3] < 0.4  # in the end, one in six

    def test_a_sketch_becomes_one_of_the_data(self):
        sketch = 0.6 * DATA + 0.1
        np.testing.assert_allclose(
            sdedit(DIFFUSION, Model(ideal_denoiser(DATA, DIFFUSION)), sketch, 0.15), DATA, atol=0.02
        )

    def test_strength_is_the_share_of_the_steps(self):
        model = Model(ideal_denoiser(DATA, DIFFUSION))
        for strength, first in ((1, 99), (0.5, 49), (0.3, 29), (0.001, 0)):
            model.seen.clear()
            sdedit(DIFFUSION, model, DATA, strength, "ddim", steps=7, workers=1)
            assert model.seen[0][0] == first and len({t for t, _ in model.seen}) == min(7, first + 1)

    def test_the_seed_decides_and_an_image_does_not_depend_on_the_others(self):
        call = lambda n, **settings: sdedit(DIFFUSION, gaussian(DIFFUSION), DATA[:n], 0.4, **settings)
        first = call(6)
        np.testing.assert_array_equal(first, call(6, rng=0, workers=2))
        np.testing.assert_allclose(first[:2], call(2, rng=np.random.default_rng(0)), atol=1e-12)
        assert np.abs(first - call(6, rng=1)).max() > 0.1
        start = call(6, trajectory=True)[0]
        noise = (start - math.sqrt(LINEAR.alpha_bar[39]) * DATA) / math.sqrt(1 - LINEAR.alpha_bar[39])
        assert abs(noise.mean()) < 0.3 and abs(noise.std() - 1) < 0.2

    def test_bad_input(self):
        for bad in (0, 1.01, -0.5, "1", math.nan):
            with pytest.raises(ValueError, match=r"strength: expected a number in \(0, 1\], got"):
                sdedit(DIFFUSION, lambda x, t: 0 * x, DATA, bad)


class TestInversion:
    @pytest.mark.filterwarnings("ignore:steps, iterations")  # of one iteration
    @pytest.mark.parametrize("b", [1.0, 0.7])
    @pytest.mark.parametrize("objective", ["eps", "v", "x0"])
    def test_with_iterations_it_is_the_exact_inverse_of_ddim(self, b, objective):
        d = Diffusion(Schedule(LINEAR.beta, b), objective)
        linear = gaussian(d)

        def model(x, t):
            x_t = x * np.sqrt((b * b - 1) * d.schedule.alpha_bar[t].reshape(-1, 1, 1, 1) + 1)
            x0 = Diffusion(d.schedule).predict_x0(x_t, t, linear(x, t))
            return d.target(x0, t, d.eps_from_x0(x_t, t, x0))

        images = np.random.default_rng(0).uniform(-1, 1, (3, 2, 2, 1))
        errors = []
        for iterations in (1, 3, 30):
            z = invert(d, Model(model), images, steps=20, iterations=iterations)
            errors.append(np.abs(sample(d, Model(model), z.shape, "ddim", 20, start=z, clip=False) - images).max())
        assert errors[0] > 2 * errors[1] and errors[2] < 1e-6, errors

    def test_to_where_no_signal_is_left(self):
        """The last x_t is all noise then: that of the x_t before."""
        d = Diffusion(make_schedule("linear", 50, zero_terminal_snr=True), "v")
        images = np.random.default_rng(0).uniform(-1, 1, (3, 2, 2, 1))

        def model(x, t):  # of Gaussian data, bent
            bar = d.schedule.alpha_bar[t].reshape(-1, 1, 1, 1)
            x0 = 0.25 * np.sqrt(bar) / (0.25 * bar + 1 - bar) * x + 0.05 * np.sin(3 * np.sqrt(bar) * x)
            return (np.sqrt(bar) * x - x0) / np.sqrt(1 - bar)

        z = invert(d, Model(model), images, steps=10, iterations=40)
        again = sample(d, Model(model), z.shape, "ddim", 10, start=z, clip=False)
        np.testing.assert_allclose(again, images, atol=1e-9)

    def test_the_noise_is_that_of_the_closed_form(self):
        """Of Gaussian data, x_t keeps its place: it is as many standard deviations from 0 all the way."""
        model, images = gaussian(DIFFUSION), np.random.default_rng(0).normal(0, 0.4, (5, 2, 2, 1)).clip(-1, 1)
        last = LINEAR.alpha_bar[-1]
        expected = images / 0.5 * math.sqrt(last * 0.25 + 1 - last)
        errors = [rms(invert(DIFFUSION, model, images, steps), expected) for steps in (25, 50, 100)]
        assert 1.9 < errors[0] / errors[1] < 2.2 and 1.9 < errors[1] / errors[2] < 2.2  # of first order, as `ddim`
        assert errors[2] < 0.03
        assert rms(invert(DIFFUSION, model, images), expected) == errors[2]  # all steps, unless told otherwise

    def test_images_of_a_network_come_back(self):
        """In float32, through the workers."""
        unet = UNet(channels=(4, 8), blocks=1, attention=(False, True), groups=2)
        for p in unet.parameters():
            p.data = (p.data + 0.03 * np.random.default_rng(0).standard_normal(p.shape)).astype(np.float32)
        images = np.random.default_rng(1).uniform(-1, 1, (9, 4, 4, 1)).astype(np.float32)
        d = Diffusion(make("linear", 10, beta_start=2e-3, beta_end=0.2))  # not to where the image is all but gone
        z = invert(d, unet, images, iterations=4)
        assert z.dtype == np.float32 and np.abs(z - images).max() > 0.1
        np.testing.assert_allclose(sample(d, unet, z.shape, "ddim", start=z, clip=False), images, atol=1e-3)
        np.testing.assert_array_equal(z, invert(d, unet, images, iterations=4, workers=1))

    def test_bad_input(self):
        for bad in (0, 1.5, "2"):
            with pytest.raises(ValueError, match="iterations: expected an integer >= 1, got"):
                invert(DIFFUSION, lambda x, t: 0 * x, DATA, iterations=bad)
        with pytest.raises(
            ValueError, match="steps: expected an integer from 1 to 100, the steps of the schedule, got 101"
        ):
            invert(DIFFUSION, lambda x, t: 0 * x, DATA, steps=101)


class TestInterpolation:
    def test_it_goes_from_one_to_the_other_by_way_of_the_data(self):
        model = gaussian(DIFFUSION)
        a, b = np.random.default_rng(0).normal(0, 0.3, (2, 3, 8, 8, 1)).clip(-1, 1)
        between = interpolate(DIFFUSION, model, a, b, count=5, steps=50, iterations=10)
        assert between.shape == (3, 5, 8, 8, 1)
        np.testing.assert_allclose(between[:, 0], a, atol=1e-3)
        np.testing.assert_allclose(between[:, -1], b, atol=1e-3)
        # all that happens to noise on the way is a change of scale, so that this is the sphere between a and b
        np.testing.assert_allclose(between, slerp(a, b, np.linspace(0, 1, 5)).clip(-1, 1), atol=0.02)

    def test_labels_are_those_of_each_pair(self):
        model = Model(lambda x, t: 0 * x)
        interpolate(DIFFUSION, model, DATA[:2], DATA[2:4], count=3, steps=2, labels=[7, 8], workers=1)
        seen = [labels["labels"].tolist() for _, labels in model.seen]
        assert seen[0] == [7, 8, 7, 8] and seen[-2:] == [[7, 7, 7, 8], [8, 8]]

    @given(seed=SEEDS, f=st.floats(0, 1))
    def test_slerp_keeps_length_and_divides_the_angle(self, seed, f):
        a, b = (x / np.linalg.norm(x) for x in np.random.default_rng(seed).standard_normal((2, 1, 3, 2, 1)))
        c = slerp(a, b, np.array([0, f, 1]))
        np.testing.assert_allclose(c[:, 0], a, atol=1e-12)
        np.testing.assert_allclose(c[:, 2], b, atol=1e-12)
        np.testing.assert_allclose(np.linalg.norm(c[0, 1]), 1, rtol=1e-9)
        angle = lambda x, y: math.acos(np.clip((x * y).sum(), -1, 1))
        assert math.isclose(angle(a[0], c[0, 1]), f * angle(a, b), abs_tol=1e-6)

    def test_slerp_of_the_same_twice(self):
        a = np.random.default_rng(0).standard_normal((2, 3, 3, 1)).astype(np.float32)
        c = slerp(a, a, np.linspace(0, 1, 4))
        assert c.dtype == np.float32
        np.testing.assert_allclose(c, np.repeat(a[:, None], 4, axis=1), atol=1e-5)

    def test_bad_input(self):
        call = lambda a=DATA, b=DATA, **settings: interpolate(DIFFUSION, lambda x, t: 0 * x, a, b, **settings)
        for bad in (1, 2.0, "3"):
            with pytest.raises(ValueError, match="count: expected an integer >= 2, got"):
                call(count=bad)
        with pytest.raises(
            ValueError, match=r"first, last: expected two arrays of one shape, got \(6, .* and \(2, 4, 4, 1"
        ):
            call(b=DATA[:2])
        with pytest.raises(ValueError, match=r"last: expected values within \[-1, 1\], got"):
            call(b=DATA * 2)
        for bad in ([1] * 5, 3):
            with pytest.raises(ValueError, match="labels: expected 6, one for each pair, got shape"):
                call(labels=bad)


class TestInpainting:
    half = np.arange(4) < np.full((4, 1), 2)  # the left half is known

    def test_half_a_picture_is_completed_to_the_one_that_fits(self):
        model = Model(ideal_denoiser(DATA, DIFFUSION))
        assert len({image[:, :2].tobytes() for image in DATA}) == 6  # the left halves differ, so there is one answer
        images = np.where(self.half[..., None], DATA, 0.3)
        np.testing.assert_allclose(inpaint(DIFFUSION, model, images, self.half), DATA, atol=0.02)

    def test_what_fits_twice_is_drawn_both_ways(self):
        data = np.concatenate([DATA, np.where(self.half[..., None], DATA, -DATA)])
        made = inpaint(DIFFUSION, Model(ideal_denoiser(data, DIFFUSION)), np.repeat(DATA[:1], 40, 0), self.half)
        same = np.abs(made - DATA[0]).max((1, 2, 3)) < 0.05
        other = np.abs(made - data[6]).max((1, 2, 3)) < 0.05
        assert (same ^ other).all() and 8 < same.sum() < 32

    @given(
        seed=SEEDS, steps=st.integers(1, 30), jump=st.integers(1, 40), resamplings=st.integers(1, 3),
        b=st.sampled_from([1.0, 0.3]), clip=st.sampled_from([True, False]), of_each=st.booleans(),
    )  # fmt: skip
    def test_known_pixels_are_kept_to_the_bit(self, seed, steps, jump, resamplings, b, clip, of_each):
        rng, d = np.random.default_rng(seed), Diffusion(Schedule(LINEAR.beta, b))
        images = rng.uniform(-1, 1, (3, 4, 5, 2)).astype(np.float32)
        mask = rng.random((3, 4, 5) if of_each else (4, 5)) < 0.5
        before = images.copy()
        made = inpaint(d, lambda x, t: 0.3 * x, images, mask, steps, jump, resamplings, clip=clip)
        known = np.broadcast_to(mask[..., None], made.shape)
        np.testing.assert_array_equal(made[known], images[known])
        assert (made[~known] != images[~known]).all() and np.isfinite(made).all()
        np.testing.assert_array_equal(images, before)
        path = inpaint(d, lambda x, t: 0.3 * x, images, mask, steps, jump, resamplings, clip=clip, trajectory=True)
        np.testing.assert_array_equal(path[-1], made)
        assert len(path) == steps + 1

    def test_all_and_nothing_known(self):
        """With all it is the images; with nothing, `ddpm` with other random numbers, and resampled, still the data."""
        model = Model(ideal_denoiser(DATA, DIFFUSION))
        np.testing.assert_array_equal(inpaint(DIFFUSION, model, DATA, np.ones((4, 4), bool)), DATA)
        made = inpaint(DIFFUSION, model, np.zeros((60, 4, 4, 1)), np.zeros((4, 4), bool))
        away = np.abs(made[:, None] - DATA).max((2, 3, 4))
        assert away.min(1).max() < 0.05 and len(set(away.argmin(1))) == 6

    @pytest.mark.parametrize(
        ("jump", "resamplings", "evaluations"),
        [(1, 1, 10), (5, 1, 10), (1, 3, 28), (5, 2, 19), (20, 9, 82), (4, 2, 19)],
    )
    def test_steps_are_undone_and_taken_again(self, jump, resamplings, evaluations):
        """All but the last, so often as is asked for, and the callback sees each once."""
        model, seen = Model(lambda x, t: 0 * x), []
        settings = dict(steps=10, jump=jump, resamplings=resamplings, workers=1, callback=lambda t, *_: seen.append(t))
        inpaint(DIFFUSION, model, DATA[:1], self.half, **settings)
        assert len(model.seen) == evaluations and seen == list(range(99, -1, -10))
        if (jump, resamplings) == (4, 2):
            assert [t // 10 for t, _ in model.seen] == [9, 8, 7, 6, 9, 8, 7, 6, 5, 4, 3, 2, 5, 4, 3, 2, 1, 1, 0]

    @pytest.mark.parametrize("jump", [1, 3, 7])
    def test_what_is_known_is_as_noisy_as_the_rest_and_so_is_what_was_undone(self, jump):
        """Of a picture that is all one grey, as the model knows: whenever it is called, x_t is q(x_t | x_0), where
        it is known and where it is made up; but at T - 1, where it begins with noise alone."""
        s, grey, seen = make_schedule("linear", 20, beta_start=5e-3, beta_end=0.6), 0.5, []
        d = Diffusion(s, "x0")

        def model(x, t):
            known, made_up = x[:, :, :2], x[:, :, 2:]
            for part in (known, made_up) if t[0] < 19 else ():
                mean, variance = math.sqrt(s.alpha_bar[t[0]]) * grey, s.one_minus_alpha_bar[t[0]]
                assert abs(part.mean() - mean) < 0.09 * math.sqrt(variance) and abs(part.var() / variance - 1) < 0.13
            seen.append(t[0])
            return np.full_like(x, grey)

        rng = np.random.default_rng(0)
        noise, mask = lambda: rng.standard_normal((400, 2, 4, 1)), self.half[None, :2, :, None]
        settings = dict(images=np.full((400, 2, 4, 1), grey), mask=mask, jump=jump, resamplings=3)
        list(repaint(d, model, noise(), noise, **settings))
        assert len(seen) == 58

    def test_resampling_lets_what_is_made_up_fit(self):
        """Two pixels that are always alike, one of them known: without, the other has made up its mind too early."""
        d = Diffusion(make_schedule("linear", 20, beta_start=5e-3, beta_end=0.6))
        data = np.array([[-0.2, -0.2], [0.2, 0.2]]).reshape(2, 1, 2, 1)
        images, mask = np.tile(data, (200, 1, 1, 1)), np.array([[True, False]])
        made = [inpaint(d, Model(ideal_denoiser(data, d)), images, mask, jump=1, resamplings=r) for r in (1, 10)]
        right = [float((np.sign(m[:, 0, 1]) == np.sign(m[:, 0, 0])).mean()) for m in made]
        assert right[1] > right[0] + 0.03, right

    def test_labels_and_guidance_are_handed_on(self):
        model = Model(lambda x, t: 0 * x)
        inpaint(DIFFUSION, model, DATA[:2], self.half, 1, labels=[3, 4], guidance=2.0, workers=1)
        assert [{k: v.tolist() for k, v in labels.items()} for _, labels in model.seen] == [{}, {"labels": [3, 4]}]

    def test_bad_input(self):
        call = lambda images=DATA, mask=self.half, **settings: inpaint(
            DIFFUSION, lambda x, t: 0 * x, images, mask, **settings
        )
        for bad in (np.ones((4, 5), bool), np.ones((5, 4, 4), bool), np.ones((6, 4, 4, 1), bool), np.array(True)):
            with pytest.raises(
                ValueError, match=r"mask: expected shape \(4, 4\) or \(6, 4, 4\), as the images have, got"
            ):
                call(mask=bad)
        for bad in (self.half.astype(int), self.half.astype(float), None):
            with pytest.raises(TypeError, match="mask: expected booleans, True where pixels are known, got"):
                call(mask=bad)
        for name in ("jump", "resamplings"):
            for bad in (0, 1.5):
                with pytest.raises(ValueError, match=f"{name}: expected an integer >= 1, got {bad}"):
                    call(**{name: bad})


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("noisy", lambda images: denoise(DIFFUSION, lambda x, t: 0 * x, images, 0.01)),
        ("images", lambda images: sdedit(DIFFUSION, lambda x, t: 0 * x, images, 0.5)),
        ("images", lambda images: invert(DIFFUSION, lambda x, t: 0 * x, images)),
        ("first", lambda images: interpolate(DIFFUSION, lambda x, t: 0 * x, images, DATA)),
        ("images", lambda images: inpaint(DIFFUSION, lambda x, t: 0 * x, images, np.ones((4, 4), bool))),
    ],
)
def test_pictures_of_another_kind_are_refused(name, call):
    for bad, got in ((DATA.astype(np.uint8), "uint8"), ([[1.0]], "list"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"^{name}: expected an array of floats, images in .-1, 1., got {got}"):
            call(bad)
    for bad in (DATA[0], DATA[:0], DATA[..., 0]):
        with pytest.raises(ValueError, match=rf"^{name}: expected one or more images \(N, H, W, C\), got shape"):
            call(bad)
    for bad in (127.5 * (DATA + 1), DATA * np.nan, DATA * np.inf):
        with pytest.raises(
            ValueError, match=f"^{name}: expected values within .*, got .*; of 8-bit levels k, images are"
        ):
            call(bad)


USES = {
    "denoise": lambda d, model, x, **settings: denoise(d, model, x, 0.4, steps=4, **settings),
    "sdedit": lambda d, model, x, **settings: sdedit(d, model, x, 0.6, steps=4, **settings),
    "invert": lambda d, model, x, **settings: invert(d, model, x, steps=4, **settings),
    "interpolate": lambda d, model, x, **settings: interpolate(d, model, x, x[::-1].copy(), 3, 4, **settings),
    "inpaint": lambda d, model, x, **settings: inpaint(d, model, x, np.eye(*x.shape[1:3]) > 0, steps=4, **settings),
}


@pytest.mark.filterwarnings("ignore:steps, iterations")
@pytest.mark.parametrize("name", USES)
@given(
    shape=st.tuples(*[st.integers(1, 6)] * 3, st.sampled_from([1, 3])), b=st.sampled_from([1.0, 0.4]), seed=SEEDS,
    objective=st.sampled_from(["eps", "v"]), learned=st.booleans(), zero=st.booleans(),
    guidance=st.sampled_from([None, 2.5]),
)  # fmt: skip
def test_any_picture_model_and_process(name, shape, b, seed, objective, learned, zero, guidance):
    """Finite, within the range, of the picture's shape; the same for any number of workers and of others."""
    assume(name != "interpolate" or math.prod(shape[1:]) > 1)  # of one pixel, what is not the same is the opposite
    schedule = make_schedule("linear", 10, beta_end=0.7, input_scale=b, zero_terminal_snr=zero and objective != "eps")
    variance, loss = ("learned_range", "hybrid") if learned else ("small", "simple")
    d = Diffusion(schedule, objective, variance, loss)

    def model(x, t, labels=None):
        prediction = 0.8 * x + (0 if labels is None else 0.1 * labels.reshape(-1, 1, 1, 1))
        return np.concatenate([prediction, np.cos(5 * x)], axis=-1) if learned else prediction

    model.dtype = np.dtype("float64")
    images, labels = (
        np.random.default_rng(seed).uniform(-1, 1, shape),
        None if guidance is None else np.arange(shape[0]),
    )
    use = lambda n, **more: USES[name](d, model, images[:n], guidance=guidance, labels=labels and labels[:n], **more)
    labels = None if labels is None else labels.tolist()
    made = use(shape[0], rng=seed, workers=1)
    assert np.isfinite(made).all() and made.dtype == np.float64 and made.shape[-3:] == shape[1:]
    assert name == "invert" or np.abs(made).max() <= 1 + 1e-12
    np.testing.assert_array_equal(made, use(shape[0], rng=np.random.default_rng(seed), workers=2))
    if name != "interpolate":  # whose other ends would be others
        np.testing.assert_allclose(use(1, rng=seed), made[:1], atol=1e-9 * (1 + np.abs(made).max()))
        path = use(shape[0], rng=seed, trajectory=True)
        np.testing.assert_array_equal(path[-1], made)
        assert path.shape[1:] == shape and 2 <= len(path) <= 5


@pytest.mark.filterwarnings("ignore:steps, iterations")
@pytest.mark.parametrize("name", USES)
def test_pictures_on_another_scale_are_warned_about(name):
    """For those with noise there is no scale to be on; nor for pixels that are not known. It points to the caller."""
    x, known = np.random.default_rng(0).uniform(0.01, 1, (2, 32, 32, 3)), np.tri(32) > 0
    mask = {"mask": known} if name == "inpaint" else {}
    use = (lambda d, model, x, mask: inpaint(d, model, x, mask, steps=4)) if mask else USES[name]
    for unknown in (1, -1):
        x[:, ~known] = unknown
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            use(DIFFUSION, lambda x, t: 0 * x, x, **mask)
        said = [w for w in seen if "expected images in [-1, 1]" in str(w.message)]
        assert bool(said) == (name == "inpaint" or (name != "denoise" and unknown == 1))
        assert all("if black is 0 and white is 1, take" in str(w.message) and w.filename == __file__ for w in said)


@pytest.mark.parametrize("name", USES)
def test_what_cannot_be_asked_of_them(name):
    zero = lambda x, t: 0 * x
    with pytest.raises(TypeError, match="diffusion: expected a Diffusion, got function"):
        USES[name](zero, DIFFUSION, DATA)
    fixed = {"denoise": ["start", "spacing"], "sdedit": ["start", "spacing"], "invert": ["method", "start", "eta"],
             "interpolate": ["method", "start", "eta", "clip", "trajectory"], "inpaint": ["method"]}[name]  # fmt: skip
    for setting in fixed:
        with pytest.raises(TypeError, match=f"settings: {name} sets {setting} itself"):
            USES[name](DIFFUSION, zero, DATA, **{setting: 1})
    with pytest.raises(TypeError, match="settings: '[a-z_]+' takes .*, got colour$"):
        USES[name](DIFFUSION, zero, DATA, colour="red")


def test_what_is_not_known_may_be_anything():
    images = np.where(TestInpainting.half[..., None], DATA, np.nan)
    zero = lambda x, t: 0 * x
    made = inpaint(DIFFUSION, zero, images, TestInpainting.half, 5)
    np.testing.assert_array_equal(made, inpaint(DIFFUSION, zero, DATA, TestInpainting.half, 5))


def test_pictures_are_taken_in_the_model_s_precision():
    model = Model(lambda x, t: 0 * x)
    assert sdedit(DIFFUSION, model, DATA.astype(np.float32), 0.1).dtype == np.float64
    assert invert(DIFFUSION, lambda x, t: 0 * x, DATA, 2).dtype == np.float32
    assert inpaint(DIFFUSION, lambda x, t: 0 * x, DATA, TestInpainting.half, 2).dtype == np.float32
