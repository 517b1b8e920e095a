"""Every op: gradients along random directions in float64, the same in float32, and values against reference.py."""

import numpy as np
import pytest
import reference
from gradcheck import check_op, pulled, read_only
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, mutually_broadcastable_shapes

from tinyddpm.autograd import conv, functional, fused, tensor
from tinyddpm.autograd.backward import backward
from tinyddpm.autograd.functional import (
    at_least,
    concat,
    dropout,
    linear,
    logistic,
    mse,
    normal_cdf,
    sigmoid,
    silu,
    softmax,
)
from tinyddpm.autograd.tensor import (
    Parameter,
    Tensor,
    add,
    div,
    getitem,
    matmul,
    mul,
    op,
    power,
    reduce_mean,
    reduce_sum,
    sub,
)

rng = np.random.default_rng(0)
normal = rng.standard_normal
positive = np.abs(normal((3, 4))) + 0.5

SMALL_ENOUGH = array_shapes(min_dims=0, max_dims=4, min_side=1, max_side=4)
SEEDS = st.integers(0, 2**32 - 1)

# op -> inputs and settings at which it is checked
CASES = {
    tensor.add: [((normal((3, 4)), normal((4,))), {}), ((normal(()), 2.0), {})],
    tensor.sub: [((normal((3, 4)), normal((3, 1))), {}), ((1.5, normal((2,))), {})],
    tensor.mul: [((normal((3, 4)), normal((1, 4))), {}), ((normal((2,)), -3.0), {})],
    tensor.div: [((normal((3, 4)), positive), {}), ((2.0, positive), {}), ((normal((2, 3, 4)), positive), {})],
    tensor.neg: [((normal((3, 4)),), {})],
    tensor.power: [((positive,), {"exponent": p}) for p in (0, 1, 2, 3, -1, 0.5, -1.5)]
    + [((normal((5,)),), {"exponent": 2})],
    tensor.exp: [((normal((3, 4)),), {})],
    tensor.log: [((positive,), {})],
    tensor.sqrt: [((positive,), {})],
    tensor.tanh: [((normal((3, 4)),), {})],
    functional.normal_cdf: [((normal((3, 4)),), {}), ((np.array([-6.0, -3.0, 2.0, 5.0]),), {}), ((np.array(0.3),), {})],
    functional.at_least: [((normal((3, 4)),), {"least": 0.1})],
    tensor.matmul: [
        ((normal((3, 4)), normal((4, 5))), {}),
        ((normal((2, 3, 4)), normal((4, 5))), {}),
        ((normal((2, 1, 3, 4)), normal((6, 4, 5))), {}),
    ],
    tensor.reduce_sum: [
        ((normal((2, 3, 4)),), {"axis": a, "keepdims": k}) for a in (None, 1, (0, 2), -1) for k in (False, True)
    ],
    tensor.reduce_mean: [
        ((normal((2, 3, 4)),), {"axis": a, "keepdims": k}) for a in (None, 1, (0, 2), -1) for k in (False, True)
    ],
    tensor.reshape: [((normal((2, 6)),), {"shape": s}) for s in ((3, 4), (-1,), (2, 1, 6))],
    tensor.transpose: [((normal((2, 3, 4)),), {"axes": a}) for a in ((), (1, 2, 0), (0, -1, 1))],
    tensor.getitem: [
        ((normal((4, 5, 6)),), {"index": i})
        for i in (
            1,
            -1,
            slice(1, 3),
            (slice(None), 2),
            (..., None, slice(None, None, 2)),
            (slice(None, None, -1), 0, 3),
        )
    ],
    functional.sigmoid: [((normal((3, 4)) * 3,), {})],
    functional.silu: [((normal((3, 4)) * 3,), {})],
    functional.softmax: [((normal((3, 4)),), {"axis": a}) for a in (-1, 0)],
    functional.concat: [
        ((normal((2, 3)), normal((2, 4)), normal((2, 1))), {}),
        ((normal((2, 3)), normal((5, 3))), {"axis": 0}),
    ],
    functional.linear: [
        ((normal((3, 4)), normal((4, 5)), normal((5,))), {}),
        ((normal((2, 3, 4)), normal((4, 5)), normal((5,))), {}),
        ((normal((2, 4)), normal((4, 1)), None), {}),
    ],
    functional.embedding: [((normal((4, 3)),), {"index": np.array(i)}) for i in ([2, 0, 2, 2, 3], [1])],
    functional.mse: [((normal((3, 4)), normal((3, 4))), {})],
    conv.conv2d: [
        ((normal((2, 5, 6, 3)), normal((3, 3, 3, 4)), normal((4,))), {"padding": 1}),
        ((normal((2, 6, 4, 2)), normal((3, 3, 2, 2)), normal((2,))), {"stride": 2, "padding": ((0, 1), (0, 1))}),
        ((normal((1, 4, 4, 3)), normal((1, 1, 3, 2)), None), {}),
        ((normal((2, 4, 5, 3)), normal((2, 3, 3, 2)), None), {"padding": ((2, 0), (0, 1))}),  # as wide as the filter
        ((normal((2, 4, 5, 3)), normal((3, 2, 3, 2)), None), {"padding": ((1, 0), (0, 2))}),
        ((normal((1, 3, 3, 2)), normal((1, 1, 2, 2)), None), {"padding": 1}),
    ],
    conv.upsample: [((normal((2, 3, 4, 2)),), {})],
    fused.group_norm: [
        ((normal((2, 3, 3, 6)), normal((6,)), normal((6,))), {"groups": 3, "silu": s}) for s in (False, True)
    ],
    fused.attention: [((normal((2, 4, 6)), normal((2, 5, 6)), normal((2, 5, 6))), {"heads": h}) for h in (1, 2)],
}


def ops_of(module):
    return {value for value in vars(module).values() if hasattr(value, "raw") and value.__module__ == module.__name__}


def test_every_op_of_the_package_is_checked_here():
    assert set(CASES) == ops_of(tensor) | ops_of(functional) | ops_of(conv) | ops_of(fused)


@pytest.mark.parametrize(("f", "inputs", "settings"), [(f, *case) for f, cases in CASES.items() for case in cases])
def test_gradients_dtypes_and_manners(f, inputs, settings):
    check_op(f, *inputs, **settings)


# ------------------------------------------------------------------------------------------- the checker is checked


def wrong_by(factor, silent_input=False):
    @op
    def nearly(x, w):
        return x * w, lambda g: (g * w * factor, np.zeros_like(w) if silent_input else g * x)

    return nearly


def test_the_checker_passes_the_right_gradient_and_fails_one_that_is_off_by_a_thousandth():
    x, w = normal((3, 4)), normal((3, 4))
    check_op(wrong_by(1), x, w)
    for factor in (1.001, 0.999):
        with pytest.raises(AssertionError, match="nearly, input 0"):
            check_op(wrong_by(factor), x, w)
    with pytest.raises(AssertionError, match="nearly, input 1"):
        check_op(wrong_by(1, silent_input=True), x, w)


def test_the_checker_fails_one_wrong_element_among_many():
    @op
    def one_off(x):
        def pull(g):
            dx = 2 * g * x
            dx[0, 0] *= 1.5
            return dx

        return x * x, pull

    with pytest.raises(AssertionError, match="one_off"):
        check_op(one_off, normal((10, 10)))


def test_the_checker_fails_an_op_that_writes_to_what_it_was_given():
    @op
    def writes_to_input(x):
        x *= 2
        return x, lambda g: g

    @op
    def writes_to_gradient(x):
        def pull(g):
            g *= 2
            return g

        return x * 2, pull

    @op
    def writes_to_saved(x):
        saved = x * 2

        def pull(g):
            nonlocal saved
            saved = saved * 0.5
            return g * saved

        return x * x, pull

    @op
    def writes_to_its_value(x):
        y = x * x

        def pull(g):
            y[...] = 0
            return 2 * g * x

        return y, pull

    for bad in (writes_to_input, writes_to_gradient, writes_to_its_value):
        with pytest.raises(ValueError, match="read-only"):
            check_op(bad, normal((3,)))
    with pytest.raises(AssertionError):
        check_op(writes_to_saved, normal((3,)))


def test_the_checker_fails_an_op_that_leaks_float64():
    @op
    def leaks(x):
        return x * 2, lambda g: g * np.float64(2)

    with pytest.raises(AssertionError):
        check_op(leaks, normal((3,)))


# ------------------------------------------------------------------------------------------------- property by property


@given(shapes=mutually_broadcastable_shapes(num_shapes=2, max_dims=4, max_side=4), seed=SEEDS)
def test_elementwise_ops_broadcast(shapes, seed):
    a, b = (np.asarray(np.random.default_rng(seed + i).standard_normal(s)) for i, s in enumerate(shapes.input_shapes))
    b = np.asarray(np.sign(b) * (np.abs(b) + 0.5))
    for f, plain in ((add, np.add), (sub, np.subtract), (mul, np.multiply), (div, np.divide)):
        check_op(f, a, b)
        np.testing.assert_array_equal(f(Tensor(a), b).data, plain(a, b))


@given(shape=array_shapes(min_dims=1, max_dims=4, max_side=4), data=st.data(), keepdims=st.booleans(), seed=SEEDS)
def test_reductions_over_any_axes(shape, data, keepdims, seed):
    axis = data.draw(st.none() | st.sets(st.integers(0, len(shape) - 1), min_size=1).map(tuple))
    x = np.random.default_rng(seed).standard_normal(shape)
    for f, plain in ((reduce_sum, np.sum), (reduce_mean, np.mean)):
        check_op(f, x, axis=axis, keepdims=keepdims)
        y = f(Tensor(x), axis=axis, keepdims=keepdims)
        np.testing.assert_allclose(y.data, plain(x, axis=axis, keepdims=keepdims), rtol=1e-14, atol=1e-15, strict=True)
        assert f(Tensor(x)).shape == ()


@given(n=st.integers(1, 4), k=st.integers(1, 4), m=st.integers(1, 4), seed=SEEDS,
       leading=mutually_broadcastable_shapes(num_shapes=2, max_dims=2, max_side=3))  # fmt: skip
def test_matmul_broadcasts_leading_axes(n, k, m, leading, seed):
    r = np.random.default_rng(seed)
    a, b = (r.standard_normal(s + tail) for s, tail in zip(leading.input_shapes, ((n, k), (k, m))))
    check_op(matmul, a, b)
    np.testing.assert_allclose(matmul(Tensor(a), b).data, np.einsum("...nk,...km->...nm", a, b), atol=1e-12)


@given(shape=array_shapes(min_dims=1, max_dims=4, max_side=5), data=st.data(), seed=SEEDS)
def test_getitem_with_any_basic_index(shape, data, seed):
    from hypothesis.extra.numpy import basic_indices

    index = data.draw(basic_indices(shape, allow_newaxis=True))
    x = np.random.default_rng(seed).standard_normal(shape)
    assume(x[index].size > 0)
    check_op(getitem, x, index=index)


@given(shape=SMALL_ENOUGH, exponent=st.sampled_from([0, 1, 2, 3, -1, 0.5, -2.5]), seed=SEEDS)
def test_powers(shape, exponent, seed):
    x = np.abs(np.random.default_rng(seed).standard_normal(shape)) + 0.5
    check_op(power, np.asarray(x), exponent=exponent)
    np.testing.assert_allclose((Tensor(np.asarray(x)) ** exponent).data, x**exponent, rtol=1e-15)


def test_a_power_of_zero_has_a_gradient_at_zero():
    x = Parameter(np.zeros(3))
    assert backward((x**0 + x).sum())[x].tolist() == [1, 1, 1]


@given(shape=SMALL_ENOUGH, seed=SEEDS)
def test_activations_equal_their_formulas(shape, seed):
    x = np.asarray(np.random.default_rng(seed).standard_normal(shape) * 4)
    check_op(silu, x)
    check_op(sigmoid, x)
    np.testing.assert_allclose(silu(Tensor(x)).data, reference.silu(x), rtol=1e-13)
    np.testing.assert_allclose(sigmoid(Tensor(x)).data, 1 / (1 + np.exp(-x)), rtol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_logistic_function_neither_overflows_nor_warns(dtype):
    x = np.array([-1e4, -200, -50, 0, 50, 200, 1e4], dtype)
    np.testing.assert_allclose(logistic(x), [0, 0, np.exp(-50), 0.5, 1, 1, 1], rtol=1e-6, atol=1e-40)
    assert not np.isnan(silu.raw(x)[0]).any() and not np.isnan(silu.raw(x)[1](np.ones_like(x))).any()


@given(shape=array_shapes(min_dims=1, max_dims=3, max_side=5), seed=SEEDS, shift=st.sampled_from([0, 1e4, -1e4]))
def test_softmax_is_a_distribution_and_ignores_shifts(shape, seed, shift):
    x = np.random.default_rng(seed).standard_normal(shape)
    check_op(softmax, x)
    y = softmax(Tensor(x + shift)).data
    np.testing.assert_allclose(y.sum(-1), 1, rtol=1e-12)
    np.testing.assert_allclose(y, reference.softmax(x), rtol=1e-9)


@given(
    rows=array_shapes(min_dims=0, max_dims=3, max_side=4),
    c=st.integers(1, 5),
    o=st.integers(1, 5),
    bias=st.booleans(),
    seed=SEEDS,
)
def test_linear_over_any_leading_axes(rows, c, o, bias, seed):
    r = np.random.default_rng(seed)
    x, w, b = r.standard_normal((*rows, c)), r.standard_normal((c, o)), r.standard_normal(o) if bias else None
    check_op(linear, x, w, b)
    np.testing.assert_allclose(linear(x, Parameter(w), b).data, x @ w + (b if bias else 0), atol=1e-12)


@given(parts=st.lists(st.integers(1, 4), min_size=1, max_size=4), axis=st.integers(-3, 2), seed=SEEDS)
def test_concat_along_any_axis(parts, axis, seed):
    r = np.random.default_rng(seed)
    xs = []
    for n in parts:
        shape = [2, 3, 4]
        shape[axis] = n
        xs.append(r.standard_normal(shape))
    check_op(concat, *xs, axis=axis)
    np.testing.assert_array_equal(concat(*map(Tensor, xs), axis=axis).data, np.concatenate(xs, axis=axis))


@given(shape=SMALL_ENOUGH, seed=SEEDS)
def test_mse(shape, seed):
    r = np.random.default_rng(seed)
    a, b = np.asarray(r.standard_normal(shape)), np.asarray(r.standard_normal(shape))
    check_op(mse, a, b)
    np.testing.assert_allclose(mse(Tensor(a), b).item(), sum((a - b).ravel() ** 2) / a.size, rtol=1e-12)


def test_the_normal_distribution():
    """Against tables of it, and out on the left to many digits, where 1 - Phi(x) would have lost them all."""
    x = np.array([-10.0, -6.0, -1.0, 0.0, 1.0, 1.96, 40.0])
    values = [7.619853024160527e-24, 9.865876450376946e-10, 0.15865525393145707, 0.5, 0.8413447460685429,
              0.9750021048517795, 1.0]  # fmt: skip
    np.testing.assert_allclose(normal_cdf(x).data, values, rtol=1e-12)
    assert normal_cdf(x.astype(np.float32)).dtype == np.float32


def test_at_least():
    x = Parameter(np.array([-1.0, 0.5, 0.6, 2.0]))
    y = at_least(x, least=0.5)
    np.testing.assert_array_equal(y.data, [0.5, 0.5, 0.6, 2.0])
    np.testing.assert_array_equal(backward(y.sum())[x], [0, 0, 1, 1])


class TestDropout:
    x = Parameter(np.full((200, 200), 2.0, np.float32))

    def test_without_a_generator_it_is_the_identity(self):
        assert dropout(self.x, 0.5) is self.x
        assert dropout(self.x, 0.0, np.random.default_rng(0)) is self.x

    def test_it_keeps_the_mean_and_drops_the_share_asked_for(self):
        y = dropout(self.x, 0.25, np.random.default_rng(0)).data
        assert y.dtype == np.float32
        assert set(np.unique(y)) == {np.float32(0), np.float32(2 / 0.75)}
        assert abs((y == 0).mean() - 0.25) < 0.01

    def test_the_same_elements_are_dropped_from_the_gradient(self):
        y = dropout(self.x, 0.25, np.random.default_rng(0))
        values = y.data.copy()
        np.testing.assert_allclose(backward(y.sum())[self.x], values / 2)

    def test_the_generator_decides(self):
        first, again, other = (dropout(self.x, 0.5, np.random.default_rng(s)).data for s in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()

    def test_numbers_from_0_up_to_but_not_including_1_fall_below_p_with_probability_p(self):
        class Fixed(np.random.Generator):
            def random(self, shape, dtype):
                return np.arange(4, dtype=dtype) / 4

        assert dropout(np.ones(4), 0.5, Fixed(np.random.PCG64())).data.tolist() == [0, 0, 2, 2]

    @pytest.mark.parametrize("p", [-0.1, 1, 1.5])
    def test_probabilities_out_of_range(self, p):
        with pytest.raises(ValueError, match=r"p: expected a number in \[0, 1\), got"):
            dropout(self.x, p, np.random.default_rng(0))


class TestBadInput:
    def test_linear(self):
        with pytest.raises(
            ValueError, match=r"x: last axis must be 4 to fit w of shape \(4, 2\), got x of shape \(3, 5\)"
        ):
            linear(Tensor(normal((3, 5))), normal((4, 2)))

        with pytest.raises(ValueError, match=r"x: last axis must be 4 .* got x of shape \(\)"):
            linear(Tensor(normal(())), normal((4, 2)))
        for w in (normal((5,)), normal((2, 5, 3))):
            with pytest.raises(ValueError, match=r"w: expected shape \(C, O\), got"):
                linear(Tensor(normal((3, 5))), w)
        for b in (normal((5,)), normal((1,))):
            with pytest.raises(ValueError, match=r"b: expected shape \(2,\) to fit w of shape \(4, 2\), got"):
                linear(Tensor(normal((3, 4))), normal((4, 2)), b)

    def test_axes(self):
        with pytest.raises(ValueError, match="axis 5 is out of bounds"):
            concat(Tensor(normal((2, 3))), normal((2, 3)), axis=5)
        with pytest.raises(ValueError, match="must match|must have same shape"):  # NumPy's words, and CuPy's
            concat(Tensor(normal((2, 3))), normal((3, 3)))

    def test_dropout_takes_arrays(self):
        assert dropout(np.ones(1000), 0.5, np.random.default_rng(0)).shape == (1000,)

    def test_mse_of_nothing(self):
        with pytest.raises(ValueError, match="mse: expected the same shape twice, and not an empty one"):
            mse(Tensor(normal((0, 3))), normal((0, 3)))

    def test_mse_does_not_broadcast(self):
        with pytest.raises(
            ValueError, match=r"mse: expected the same shape twice, and not an empty one, got \(3, 1\) and \(3,\)"
        ):
            mse(Tensor(normal((3, 1))), normal((3,)))


def test_pulled_computes_gradients_given_as_functions():
    g = read_only(np.ones(2))
    assert all(isinstance(x, np.ndarray) for x in pulled(mul.raw(normal((2,)), normal((2,)))[1], g, 2))
