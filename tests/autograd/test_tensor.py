"""The engine: what `@op`, `backward` and `no_grad` promise."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tinyddpm.autograd import tensor as T
from tinyddpm.autograd.backward import backward
from tinyddpm.autograd.functional import linear, silu
from tinyddpm.autograd.tensor import Parameter, Tensor, no_grad, op

leaf = lambda *values, dtype=np.float64: Parameter(np.array(values, dtype))


def test_backward_returns_a_mapping_from_parameters_to_gradients():
    a, b, c, d = leaf(1, 2), leaf(3, 4), Tensor(np.array([5.0, 6.0])), Parameter(np.array(2.0))
    gradients = backward((a * b * c).sum())
    assert set(gradients) == {a, b} and not hasattr(a, "grad")  # c is no Parameter
    assert gradients[a].tolist() == [15, 24] and gradients[b].tolist() == [5, 12]
    for g, value in ((backward(d)[d], 1), (backward((d * d + d * np.ones(1)).sum())[d], 5)):  # without axes
        assert isinstance(g, np.ndarray) and g.shape == () and g == value and g.flags.writeable


def test_gradients_are_sums_of_all_uses_and_each_the_caller_s_own():
    held, a, b = [], leaf(1.0, 2.0), leaf(3.0, 4.0)
    same = op(lambda x: (x + 0, lambda g: held.append(g) or g))
    y, z = same(a), same(a)
    gradients = backward((y + z + a + a * a + a + b).sum())
    np.testing.assert_array_equal(gradients[a], 4 + 2 * a.data)
    gradients[a] += 1
    gradients[b] += 2  # which `add` handed to several
    assert gradients[b].tolist() == [3, 3] and [g.tolist() for g in held] == [[1, 1], [1, 1]]


def test_diamonds_call_every_pull_once():
    calls, a = [], leaf(2)
    counted = op(lambda x: (x * 1.0, lambda g: calls.append(1) or g))
    x = counted(a)
    for _ in range(20):  # 2^20 paths, 20 nodes
        x = counted(x + x)
    assert backward(x.sum())[a] == 2**20 and len(calls) == 21


def test_a_chain_of_50000_ops_is_walked_or_dropped_without_recursion():
    x = a = leaf(1.0)
    chain = [x := -x for _ in range(50_000)]
    assert backward(chain[25_000])[a] == -1
    chain.clear()
    del x  # the other half would overflow the C stack if tensors were freed recursively
    gc.collect()


def test_a_second_backward_is_refused_and_leaves_the_rest_of_the_graph_whole():
    a, b = leaf(1.0), leaf(2.0)
    used, fresh = a * 2, b * 3
    loss = used.sum()
    backward(loss)
    message = "^backward has already gone through .*, or add the losses up and call .* once$"
    for again in (loss, (used * 3).sum(), (fresh + used).sum()):
        with pytest.raises(RuntimeError, match=message):
            backward(again)
    assert backward(fresh.sum())[b] == 3


@pytest.mark.parametrize("lazy", [False, True])
def test_saved_arrays_are_freed_as_backward_consumes_them(lazy):
    alive, counts, x = [], [], leaf(1.0)
    left = lambda: sum(ref() is not None for ref in alive)

    @op
    def saving(x):
        saved = x.copy()
        alive.append(weakref.ref(saved))
        gradient = lambda g: g * (saved * 0 + 1)
        return x + 0.0, lambda g: counts.append(left()) or ((lambda: gradient(g)) if lazy else gradient(g))

    for _ in range(5):
        x = saving(x)
    backward(x)
    assert counts == [5, 4, 3, 2, 1] and left() == 0


def test_values_that_no_pull_needs_are_freed_at_once():
    alive, plus_one = [], op(lambda x: (x + 1, lambda g: g))
    x = a = leaf(1.0)
    for _ in range(5):
        x = plus_one(x)
        alive.append(weakref.ref(x.data))
    assert [ref() is not None for ref in alive] == [False] * 4 + [True]
    for f in (lambda x: x.sum(), lambda x: x.mean(0), lambda x: x.reshape(-1), lambda x: x.transpose(), lambda x: x[0]):
        cells = [cell.cell_contents for cell in f(a).node.pull.__closure__ or ()]
        assert not any(isinstance(content, np.ndarray) for content in cells)


def test_nodes_are_freed_while_the_loss_is_still_held_and_without_the_garbage_collector():
    a = x = leaf(1.0)
    nodes = []
    gc.disable()
    try:
        for _ in range(5):
            x = silu(x + a)  # a diamond at each step, so that sums are made
            nodes.append(weakref.ref(x.node))
        loss, dropped = x.sum(), silu(a * 2)
        nodes.append(weakref.ref(dropped.node))
        del x, dropped
        backward(loss)
        assert [ref() is None for ref in nodes] == [True] * 6
    finally:
        gc.enable()


def test_no_grad_remembers_nothing_in_its_block_and_its_thread():
    a = leaf(1.0)
    records = lambda: (a * 2).node is not None
    with no_grad(), ThreadPoolExecutor(1) as another:
        with no_grad():
            pass
        assert not records() and another.submit(records).result()
        y = a * 2
    with pytest.raises(ValueError, match=r"^loss: it depends on no Parameter \(was it computed under no_grad\?\)$"):
        backward(y)
    with pytest.raises(KeyError), no_grad():
        raise KeyError
    assert records()


def test_threads_differentiate_through_shared_parameters():
    w, xs = Parameter(np.random.default_rng(0).standard_normal((20, 20))), np.random.default_rng(1).random((8, 5, 20))
    gradient = lambda x: backward(silu(linear(x, w)).sum())[w]
    with ThreadPoolExecutor(8) as threads:
        np.testing.assert_array_equal(list(threads.map(gradient, [*xs] * 20)), list(map(gradient, xs)) * 20)


def test_gradients_are_asked_for_only_where_they_go_and_none_is_zero():
    asked, a, b = [], leaf(1.0), leaf(2.0)
    pair = op(lambda a, b: (a + b, lambda g: (lambda: asked.append("a") or g, lambda: asked.append("b") or g)))
    backward(pair(a, np.array([2.0])).sum())
    assert asked == ["a"]
    stop = op(lambda x: (x + 0, lambda g: None))
    for loss in (stop(a * 2) + b, b + stop(a * 2)):  # whichever is walked first
        assert set(backward(loss.sum())) == {b}


def test_inputs_may_be_given_by_name_and_optional_ones_left_out():
    x, w, b = leaf(1, 2).data[None], Parameter(np.ones((2, 3))), Parameter(np.ones(3))
    by_position, by_name = backward(linear(x, w, b).sum()), backward(linear(x, b=b, w=w).sum())
    np.testing.assert_array_equal(by_position[b], by_name[b])
    np.testing.assert_array_equal(by_position[w], by_name[w])
    assert set(backward(T.matmul(x, b=w).sum())) == {w}  # which takes no settings
    assert set(backward(linear(x, w).sum())) == {w}


def test_numbers_keep_the_dtype():
    a = leaf(1.0, 2.0, dtype=np.float32)
    for y in (a * 2, a + 0.5, 1 / a, a**2, a ** np.float64(2), a.sum() * 3, a.mean() / 2, (a.sum() * a.sum()).sqrt()):
        assert y.dtype == np.float32 and isinstance(y.data, np.ndarray)


METHODS = [
    lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b, lambda a, b: a / b, lambda a, b: a @ b.transpose(1, 0),
    lambda a, b: b + a, lambda a, b: b - a, lambda a, b: b * a, lambda a, b: b / a, lambda a, b: b.transpose(1, 0) @ a,
    lambda a, b: 2 + a, lambda a, b: 2 - a, lambda a, b: 2 * a, lambda a, b: 2 / a, lambda a, b: -a,
    lambda a, b: a + 2, lambda a, b: a - 2, lambda a, b: a * 2, lambda a, b: a / 2, lambda a, b: a**3,
    lambda a, b: a[1:, 2], lambda a, b: a[np.int64(1)], lambda a, b: a.sum(), lambda a, b: a.sum(1, keepdims=True),
    lambda a, b: a.mean(), lambda a, b: a.mean(0, keepdims=True), lambda a, b: a.reshape(2, 6),
    lambda a, b: a.reshape((4, -1)), lambda a, b: a.transpose(), lambda a, b: a.transpose((1, 0)),
]  # fmt: skip


@pytest.mark.parametrize("f", METHODS)
def test_methods_and_operators_are_those_of_arrays(f):
    """Which, on the left of a tensor, leave it to that."""
    a, b = np.random.default_rng(0).uniform(0.5, 2, (2, 3, 4))
    for other in (Tensor(b), b):
        y = f(Parameter(a), other)
        assert isinstance(y, Tensor) and y.node is not None
        np.testing.assert_allclose(y.data, f(a, b), rtol=1e-14, strict=True)


def test_methods_that_arrays_do_not_have_repr_ndim_and_item():
    a = leaf(1.0, 2.0)
    for name in ("exp", "log", "sqrt", "tanh"):
        np.testing.assert_allclose(getattr(a, name)().data, getattr(np, name)(a.data), rtol=1e-14, strict=True)
    assert repr(a) == "Parameter(shape=(2,), dtype=float64)"
    assert [x.ndim for x in (a, a.sum(), a.reshape(1, 2))] == [1, 0, 2]
    assert a.sum().item() == 3.0 and isinstance(a.sum().item(), float)
    assert T.as_array(a) is a.data and T.as_array(a.data) is a.data


@op
def odd(x, *, gradient):
    return x + 0, lambda g: gradient


def of_two(gradient):
    """The walk through an op that returns this gradient for one input of two numbers."""
    return lambda: backward(odd(leaf(1.0, 2.0), gradient=gradient).sum())


NARROW, TWO = leaf(1.0, dtype=np.float32), np.ones(2)
REFUSED = [
    (lambda: backward(np.ones(1)), "loss: expected a Tensor, got ndarray", TypeError),
    (lambda: backward(leaf(1.0, 2.0) * 2), r"loss: expected a scalar, got shape \(2,\)"),
    (lambda: linear(np.ones((2, 2)), 3 * NARROW.data), "linear: inputs must share one float dtype", TypeError),
    (lambda: linear(np.ones((2, 2))), "missing a required argument: 'w'", TypeError),
    (lambda: silu(np.ones(2), colour="red"), ".*colour", TypeError),
    *((lambda data=data: Tensor(data), f"data: expected a NumPy or CuPy array of floats, got {what}$", TypeError)
      for data, what in (([1.0], "list"), (np.int16([1]), "an array of int16"), (1.0, "float"), (None, "NoneType"))),
    (lambda: NARROW * leaf(1.0), "mul: inputs must share one float dtype, got float32, float64", TypeError),
    (lambda: NARROW * np.float64(2), "mul: .* float32, float64", TypeError),  # a NumPy scalar is no Python number
    (lambda: NARROW + np.array([1]), "add: float32 became float64", TypeError),
    (lambda: T.add(1, np.int64([1])), "add: inputs must share one float dtype, got no float array; convert", TypeError),
    *((of_two(g), f"odd: {what}", RuntimeError) for g, what in (
        (np.ones(3), r"gradient of shape \(3,\) for an input of shape \(2,\)"),
        (np.ones(()), r"gradient of shape \(\)"), (np.ones((4, 1)), r"gradient of shape \(4, 1\)"),
        (np.float32(TWO), "gradient of dtype float32 for an input of dtype float64"),
        ((TWO, TWO), "1 inputs but 2 gradients"), (0.0, "a gradient must be an array, got float"),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message", "error"), [(*row, ValueError)[:3] for row in REFUSED])
def test_what_is_refused(call, message, error):
    with pytest.raises(error, match=f"^{message}"):
        call()
