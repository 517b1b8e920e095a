"""The optimiser: parameters in one vector, Adam, clipping, the learning rate, the moving average."""

import math

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from tinyddpm import EMA, Adam
from tinyddpm.autograd.tensor import Parameter
from tinyddpm.network.nn import Linear
from tinyddpm.training.optim import clip_norm, flat_gradient, flatten, learning_rate

DRAWN, ZEROS, ONE = np.random.default_rng(0).standard_normal, np.zeros(2), Linear(1, 1, np.random.default_rng(0))
OURS = dict(lr=0.01, betas=(0.8, 0.95))


class TestFlat:
    def test_parameters_become_views_of_one_vector(self):
        parameters = [Parameter(x) for x in (np.arange(6.0).reshape(2, 3), np.array(7.0), np.ones(2))]
        theta = flatten(parameters)
        assert theta.tolist() == [0, 1, 2, 3, 4, 5, 7, 1, 1]
        theta += 1
        assert [p.data.tolist() for p in parameters] == [[[1, 2, 3], [4, 5, 6]], 8, [2, 2]]

    def test_gradients_are_laid_out_alike_and_missing_ones_are_zero(self):
        a, b, c = Parameter(np.ones((2, 2))), Parameter(np.ones(3)), Parameter(np.ones(1))
        laid_out = flat_gradient({c: np.array([5.0]), a: np.arange(4.0).reshape(2, 2)}, [a, b, c])
        assert laid_out.tolist() == [0, 1, 2, 3, 0, 0, 0, 5]


class TestAdam:
    @pytest.mark.parametrize(("gradients", "settings", "expected"), [
        (DRAWN((20, 5)) * [1, 10, 0.1, 1e-6, 0], OURS, (0.01, 0.8, 0.95, 1e-8, 0)),
        (DRAWN((20, 5)), OURS | {"weight_decay": 0.1, "eps": 0.1}, (0.01, 0.8, 0.95, 0.1, 0.1)),
        (DRAWN((2, 50_000)), OURS | {"weight_decay": 0.1}, (0.01, 0.8, 0.95, 1e-8, 0.1)),  # it is worked on in parts
        (DRAWN((5, 2)) * [1, 1e-7], {}, (1e-3, 0.9, 0.999, 1e-8, 0)),  # the defaults are those of the paper
        (DRAWN((3, 2)), {"betas": (0, 0)}, (1e-3, 0, 0, 1e-8, 0)),  # without memory it steps by the sign
    ])  # fmt: skip
    def test_it_is_algorithm_1(self, gradients, settings, expected):
        theta = DRAWN(gradients.shape[1])
        outcome, adam = reference.adam(theta, gradients, *expected), Adam(theta, **settings)
        for g in gradients:
            adam.step(g)
        np.testing.assert_allclose(theta, outcome, rtol=1e-12, atol=1e-14)

    def test_a_step_takes_the_learning_rate_given_and_keeps_the_dtype(self):
        theta = np.ones(3, np.float32)
        Adam(theta, lr=0.5, weight_decay=0.2).step(np.array([1e-3, -2, 30], np.float32), lr=0.1)
        np.testing.assert_allclose(theta, 1 - 0.1 * 0.2 - 0.1 * np.array([1, -1, 1]), rtol=1e-4)
        assert theta.dtype == np.float32


class TestClipping:
    @given(n=st.integers(1, 20), scale=st.floats(1e-3, 1e3), limit=st.floats(0.01, 100), seed=st.integers(0, 1000))
    def test_direction_is_kept_and_length_limited(self, n, scale, limit, seed):
        g = np.random.default_rng(seed).standard_normal(n) * scale
        before, length = g.copy(), math.sqrt((g**2).sum())
        assert math.isclose(clip_norm(g, limit), length, rel_tol=1e-12)
        np.testing.assert_allclose(g, before * min(1, limit / length), rtol=1e-9)

    def test_what_is_short_enough_stays(self):
        for numbers, limit, norm in (([0, 0, 0], 1.0, 0), ([1e-13], 1.0, 1e-13), ([10] * 4, math.inf, 20)):
            gradient = np.array(numbers, float)  # 1e-13 is less than what keeps it from dividing by 0
            assert clip_norm(gradient, limit) == norm and gradient.tolist() == numbers


def test_the_learning_rate_rises_and_falls():
    rates = lambda *settings: [learning_rate(2.0, step, *settings) for step in range(min(6, settings[0]))]
    assert rates(100, 4, 0) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert rates(6, 0, 4) == [2.0, 2.0, 2.0, 1.5, 1.0, 0.5]
    assert rates(4, 4, 4) == [0.5, 1.0, 1.0, 0.5] and learning_rate(2.0, 99, 100, 0, 0) == 2.0


class TestEMA:
    def test_it_starts_from_a_copy_and_follows_with_the_decay_of_its_age(self):
        model = Linear(2, 2, np.random.default_rng(0)).to(dtype="float64")
        start, theta = model.w.data.copy(), flatten(model.parameters())
        ema, average = EMA(model, decay=0.25), theta.copy()
        np.testing.assert_array_equal(ema.model.w.data, start)
        for d in [1 / 10, 2 / 11, 3 / 12, 0.25, 0.25]:  # (1 + n) / (10 + n), at most the decay
            theta += 1
            ema.update(theta)
            average = d * average + (1 - d) * theta
            np.testing.assert_allclose(ema.average, average, rtol=1e-12)
        np.testing.assert_allclose(ema.model.w.data.ravel(), average[:4])
        np.testing.assert_allclose(model.w.data, start + ema.n)

    def test_a_long_vector_is_followed_to_its_end_and_in_the_end_as_slowly_as_by_ho_et_al(self):
        ema = EMA(Linear(400, 250, np.random.default_rng(0)).to(dtype="float64"))
        before, theta = ema.average.copy(), DRAWN(400 * 250 + 250)
        ema.update(theta)
        np.testing.assert_allclose(ema.average, 0.1 * before + 0.9 * theta, atol=1e-12)
        ema.n, theta = 10**6, ema.average + 1
        ema.update(theta)
        np.testing.assert_allclose(theta - ema.average, 0.9999, rtol=1e-12)


BAD = [
    (lambda: Adam(ZEROS, weight_decay=-1), "^weight_decay: expected a number >= 0, got -1"),
    *[(lambda b=bad: Adam(ZEROS, betas=b), r"betas: expected (a number|two numbers) in \[0, 1\)")
      for bad in ((1, 0.9), (0.9, -0.1), (0.9,), 0.9)],
    (lambda: Adam(ZEROS).step(np.zeros(3)), r"gradient: expected float64 of shape \(2,\), got"),
    (lambda: Adam(ZEROS).step(np.zeros(2, np.float32)), r"gradient: expected float64 of shape \(2,\), got"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
