"""The optimiser: parameters in one vector, Adam, clipping, the learning rate, the moving average."""

import math

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from tinyddpm import EMA, Adam, backward
from tinyddpm.autograd.functional import mse
from tinyddpm.autograd.tensor import Parameter
from tinyddpm.network.nn import Linear
from tinyddpm.training.optim import clip_norm, flat_gradient, flatten, learning_rate


class TestFlat:
    def test_parameters_become_views_of_one_vector(self):
        parameters = [
            Parameter(np.arange(6.0).reshape(2, 3)),
            Parameter(np.array(7.0)),
            Parameter(np.array([8.0, 9.0])),
        ]
        theta = flatten(parameters)
        assert theta.tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9]
        assert [p.shape for p in parameters] == [(2, 3), (), (2,)]
        theta += 1
        assert parameters[0].data[1, 2] == 6 and parameters[1].data == 8 and parameters[2].data[1] == 10

    def test_gradients_are_laid_out_alike_and_missing_ones_are_zero(self):
        a, b, c = Parameter(np.ones((2, 2))), Parameter(np.ones(3)), Parameter(np.ones(1))
        assert flat_gradient({c: np.array([5.0]), a: np.arange(4.0).reshape(2, 2)}, [a, b, c]).tolist() == [
            0,
            1,
            2,
            3,
            0,
            0,
            0,
            5,
        ]


class TestAdam:
    @pytest.mark.parametrize("weight_decay", [0.0, 0.1])
    def test_it_is_algorithm_1(self, weight_decay):
        rng = np.random.default_rng(0)
        theta, gradients = rng.standard_normal(5), rng.standard_normal((20, 5)) * [1, 10, 0.1, 1e-6, 0]
        expected = reference.adam(theta, gradients, 0.01, 0.8, 0.95, 1e-8, weight_decay)
        adam = Adam(theta, lr=0.01, betas=(0.8, 0.95), weight_decay=weight_decay)
        for g in gradients:
            adam.step(g)
        np.testing.assert_allclose(theta, expected, rtol=1e-12)

    def test_a_long_vector_is_updated_to_its_end(self):
        """It is worked on in parts."""
        rng = np.random.default_rng(0)
        theta, gradients = rng.standard_normal(100_000), rng.standard_normal((3, 100_000))
        expected = reference.adam(theta, gradients, 0.01, 0.8, 0.95, 1e-8, 0.1)
        adam = Adam(theta, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)
        for g in gradients:
            adam.step(g)
        np.testing.assert_allclose(theta, expected, rtol=1e-10, atol=1e-12)

    def test_its_defaults_are_those_of_the_paper(self):
        theta, gradients = np.zeros(2), np.random.default_rng(0).standard_normal((5, 2)) * [1, 1e-7]
        expected = reference.adam(theta, gradients, 1e-3, 0.9, 0.999, 1e-8, 0)
        adam = Adam(theta)
        for g in gradients:
            adam.step(g)
        np.testing.assert_allclose(theta, expected, rtol=1e-12)

    def test_without_memory_it_steps_by_the_sign_of_the_gradient(self):
        theta = np.zeros(2)
        adam = Adam(theta, lr=0.5, betas=(0, 0))
        for g in ([3.0, -1.0], [-10.0, -2.0], [-0.1, -3.0]):
            adam.step(np.array(g))
        np.testing.assert_allclose(theta, [0.5, 1.5], rtol=1e-6)

    def test_the_first_step_has_the_length_of_the_learning_rate(self):
        theta = np.zeros(3, np.float32)
        Adam(theta, lr=0.5).step(np.array([1e-3, -2, 30], np.float32))
        np.testing.assert_allclose(theta, [-0.5, 0.5, -0.5], rtol=1e-4)
        assert theta.dtype == np.float32

    def test_the_learning_rate_can_be_given_for_a_step(self):
        theta = np.zeros(1)
        Adam(theta, lr=0.5).step(np.ones(1), lr=0.1)
        assert math.isclose(theta[0], -0.1, rel_tol=1e-6)
        theta = np.ones(1)
        Adam(theta, lr=0.5, weight_decay=0.2).step(np.zeros(1), lr=0.1)
        assert math.isclose(theta[0], 1 - 0.1 * 0.2)

    def test_it_learns_a_line(self):
        rng = np.random.default_rng(0)
        layer = Linear(2, 1, rng).to(dtype="float64")
        parameters = layer.parameters()
        adam = Adam(flatten(parameters), lr=0.05)
        x = rng.standard_normal((100, 2))
        y = x @ [[2.0], [-3.0]] + 0.5
        for _ in range(500):
            adam.step(flat_gradient(backward(mse(layer(x), y)), parameters))
        np.testing.assert_allclose(layer.w.data, [[2], [-3]], atol=1e-3)
        np.testing.assert_allclose(layer.b.data, [0.5], atol=1e-3)

    def test_bad_input(self):
        for name, bad, expected in (("lr", 0, "> 0"), ("eps", 0, "> 0"), ("weight_decay", -1, ">= 0")):
            with pytest.raises(ValueError, match=f"^{name}: expected a number {expected}, got {bad}"):
                Adam(np.zeros(2), **{name: bad})
        for betas in ((1, 0.9), (0.9, -0.1), (0.9,), 0.9):
            with pytest.raises(ValueError, match=r"betas: expected (a number|two numbers) in \[0, 1\)"):
                Adam(np.zeros(2), betas=betas)
        for bad in (np.zeros(3), np.zeros(2, np.float32)):
            with pytest.raises(ValueError, match=r"gradient: expected float64 of shape \(2,\), got"):
                Adam(np.zeros(2)).step(bad)


class TestClipping:
    @given(n=st.integers(1, 20), scale=st.floats(1e-3, 1e3), limit=st.floats(0.01, 100), seed=st.integers(0, 1000))
    def test_direction_is_kept_and_length_limited(self, n, scale, limit, seed):
        g = np.random.default_rng(seed).standard_normal(n) * scale
        before = g.copy()
        norm = clip_norm(g, limit)
        length = math.sqrt((before**2).sum())
        assert math.isclose(norm, length, rel_tol=1e-12)
        np.testing.assert_allclose(g, before * min(1, limit / length), rtol=1e-9)

    def test_zero_float32_and_no_limit(self):
        g = np.zeros(3, np.float32)
        assert clip_norm(g, 1.0) == 0 and not g.any() and g.dtype == np.float32
        g = np.array([1e-13])  # less than what keeps it from dividing by 0
        assert clip_norm(g, 1.0) == 1e-13 and g == 1e-13
        g = np.full(4, 10.0)
        assert clip_norm(g, math.inf) == 20 and (g == 10).all()
        for bad in (0, -1, math.nan):
            with pytest.raises(ValueError, match="max_norm: expected a number > 0"):
                clip_norm(g, bad)


def test_learning_rate():
    assert [learning_rate(2.0, step, 100, 4, 0) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert [learning_rate(2.0, step, 6, 0, 4) for step in range(6)] == [2.0, 2.0, 2.0, 1.5, 1.0, 0.5]
    assert [learning_rate(2.0, step, 4, 4, 4) for step in range(4)] == [0.5, 1.0, 1.0, 0.5]
    assert learning_rate(2.0, 99, 100, 0, 0) == 2.0


class TestEMA:
    def test_it_starts_from_a_copy_and_follows_with_the_decay_of_its_age(self):
        model = Linear(2, 2, np.random.default_rng(0)).to(dtype="float64")
        start = model.w.data.copy()
        theta = flatten(model.parameters())
        ema = EMA(model, decay=0.25)
        np.testing.assert_array_equal(ema.model.w.data, start)
        average = theta.copy()
        for n in range(5):
            theta += 1
            ema.update(theta)
            d = min(0.25, (1 + n) / (10 + n))
            average = d * average + (1 - d) * theta
            np.testing.assert_allclose(ema.average, average, rtol=1e-12)
        assert (1 + 4) / (10 + 4) > 0.25  # both branches were taken
        np.testing.assert_allclose(ema.model.w.data.ravel(), average[:4])
        np.testing.assert_allclose(model.w.data, start + 5)

    def test_without_memory_it_is_the_model(self):
        model = Linear(2, 2, np.random.default_rng(0))
        theta, ema = flatten(model.parameters()), EMA(model, decay=0)
        theta += 1
        ema.update(theta)
        np.testing.assert_allclose(ema.average, theta, rtol=1e-6)

    def test_a_long_vector_is_followed_to_its_end(self):
        ema = EMA(Linear(400, 250, np.random.default_rng(0)), decay=0.25)
        before = ema.average.copy()
        theta = np.random.default_rng(1).standard_normal(before.size).astype(np.float32)
        ema.update(theta)
        np.testing.assert_allclose(ema.average, 0.1 * before + 0.9 * theta, atol=1e-6)

    def test_in_the_end_it_follows_as_slowly_as_that_of_ho_et_al(self):
        model = Linear(2, 2, np.random.default_rng(0)).to(dtype="float64")
        ema = EMA(model)
        ema.n = 10**6
        theta = ema.average + 1
        ema.update(theta)
        np.testing.assert_allclose(theta - ema.average, 0.9999, rtol=1e-12)

    def test_bad_decay(self):
        for bad in (1, -0.1, 2):
            with pytest.raises(ValueError, match=r"decay: expected a number in \[0, 1\)"):
                EMA(Linear(1, 1, np.random.default_rng(0)), bad)
