"""The engine: what `@op`, `backward` and `no_grad` promise."""

import gc
import threading
import weakref

import numpy as np
import pytest

from tinyddpm.autograd import tensor as T
from tinyddpm.autograd.backward import backward
from tinyddpm.autograd.functional import linear, silu
from tinyddpm.autograd.tensor import Parameter, Tensor, no_grad, op


def leaf(*values, dtype=np.float64):
    return Parameter(np.array(values, dtype))


def test_backward_returns_a_mapping_from_parameters_to_gradients():
    a, b, c = leaf(1, 2), leaf(3, 4), Tensor(np.array([5.0, 6.0]))
    gradients = backward((a * b * c).sum())
    assert set(gradients) == {a, b}  # c is no Parameter
    np.testing.assert_array_equal(gradients[a], [15, 24])
    np.testing.assert_array_equal(gradients[b], [5, 12])
    assert not hasattr(a, "grad")


def test_a_parameter_that_the_loss_does_not_reach_is_absent():
    a, b = leaf(1), leaf(2)
    assert set(backward((a * 2).sum())) == {a}
    assert set(backward((b * 2).sum())) == {b}


def test_a_loss_that_is_itself_a_parameter():
    a = leaf(3)
    np.testing.assert_array_equal(backward(a)[a], [1])


def test_fan_out_sums_and_leaves_borrowed_gradients_alone():
    a = leaf(1, 2, 3)
    gradients = backward((a + a + a * a + a).sum())
    np.testing.assert_array_equal(gradients[a], 3 + 2 * a.data)


def test_gradients_without_axes_are_arrays_too():
    a = Parameter(np.array(2.0))
    g = backward((a * a + a * np.ones(1)).sum())[a]
    assert isinstance(g, np.ndarray) and g.shape == () and g == 5 and g.flags.writeable


def test_one_gradient_array_handed_to_several_parents_is_not_shared_between_leaves():
    a, b = leaf(1, 2), leaf(3, 4)
    gradients = backward((a + b).sum())  # add hands the same array to both
    assert not np.shares_memory(gradients[a], gradients[b])
    gradients[a] += 1  # and each is the caller's own, to write to
    np.testing.assert_array_equal(gradients[b], [1, 1])


def test_summing_never_writes_into_a_gradient_that_a_pull_still_holds():
    held = []

    @op
    def twice(x):
        def pull(g):
            held.append(g)
            return g

        return x + 0, pull

    a = leaf(1.0, 2.0)
    y, z = twice(a), twice(a)
    gradients = backward((y + z + a).sum())
    np.testing.assert_array_equal(gradients[a], [3, 3])
    for g in held:
        np.testing.assert_array_equal(g, [1, 1])


def test_diamonds_call_every_pull_once():
    calls = []

    @op
    def counted(x):
        return x * 1.0, lambda g: calls.append(1) or g

    a = leaf(2)
    x = counted(a)
    for _ in range(20):  # 2^20 paths, 20 nodes
        x = counted(x + x)
    gradients = backward(x.sum())
    assert gradients[a] == 2**20
    assert len(calls) == 21


def test_a_chain_of_50000_ops():
    a = leaf(1.0)
    x = a
    for _ in range(50_000):
        x = x + 1.0
    assert backward(x.sum())[a] == 1


def test_dropping_a_chain_of_50000_ops_without_backward():
    x = leaf(1.0)
    for _ in range(50_000):
        x = x + 1.0
    del x  # would overflow the C stack if tensors were freed recursively
    gc.collect()


def test_a_second_backward_is_refused_and_says_why():
    a = leaf(1.0)
    y = a * 2
    loss = y.sum()
    backward(loss)
    with pytest.raises(
        RuntimeError, match="^backward has already gone through .*, or add the losses up and call .* once$"
    ):
        backward(loss)
    with pytest.raises(RuntimeError, match="already gone through"):
        backward((y * 3).sum())


def test_a_refused_walk_leaves_the_rest_of_the_graph_whole():
    a, b = leaf(1.0), leaf(2.0)
    used, fresh = a * 2, b * 3
    backward(used.sum())
    with pytest.raises(RuntimeError):
        backward((fresh + used).sum())
    assert backward(fresh.sum())[b] == 3


@pytest.mark.parametrize("lazy", [False, True])
def test_saved_arrays_are_freed_as_backward_consumes_them(lazy):
    alive, at_the_end = [], []

    class Saved(np.ndarray):
        """An array that can be referred to weakly."""

    @op
    def saving(x):
        saved = x.copy().view(Saved)
        alive.append(weakref.ref(saved))

        def pull(g):
            at_the_end.append(sum(ref() is not None for ref in alive))
            gradient = lambda: g * (np.asarray(saved) * 0 + 1)
            return gradient if lazy else gradient()

        return x + 0.0, pull

    x = leaf(1.0)
    for _ in range(5):
        x = saving(x)
    loss = x.sum()
    del x
    backward(loss)
    assert at_the_end == [5, 4, 3, 2, 1]
    gc.collect()
    assert all(ref() is None for ref in alive)


def test_values_that_no_pull_needs_are_freed_at_once():
    class Watched(np.ndarray):
        """An array that can be referred to weakly."""

    alive = []

    @op
    def plus_one(x):
        y = (np.asarray(x) + 1).view(Watched)
        alive.append(weakref.ref(y))
        return y, lambda g: g

    x = leaf(1.0)
    for _ in range(5):
        x = plus_one(x)
    assert [ref() is not None for ref in alive] == [False] * 4 + [True]
    assert backward(x.sum()) != {}


def test_shape_ops_and_reductions_do_not_keep_their_input():
    a = Parameter(np.ones((100, 100)))
    for f in (lambda x: x.sum(), lambda x: x.mean(0), lambda x: x.reshape(-1), lambda x: x.transpose(), lambda x: x[0]):
        y = f(a)
        cells = [cell.cell_contents for cell in y.node.pull.__closure__ or ()]
        assert not any(isinstance(content, np.ndarray) for content in cells)


def test_nodes_are_freed_while_the_loss_is_still_held():
    a = leaf(1.0)
    nodes, x = [], a
    for _ in range(5):
        x = silu(x + a)  # a diamond at each step, so that sums are made
        nodes.append(weakref.ref(x.node))
    loss = x.sum()
    del x
    backward(loss)
    assert [ref() is None for ref in nodes] == [True] * 5


def test_a_graph_that_is_dropped_is_freed_without_the_garbage_collector():
    gc.disable()
    try:
        a = leaf(1.0)
        y = silu(a * 2)
        ref = weakref.ref(y.node)
        del y
        assert ref() is None
    finally:
        gc.enable()


def test_no_grad_remembers_nothing():
    a = leaf(1.0)
    with no_grad():
        y = a * 2
    assert y.node is None
    with pytest.raises(ValueError, match=r"^loss: it depends on no Parameter \(was it computed under no_grad\?\)$"):
        backward(y.sum())
    assert backward((a * 2).sum())[a] == 2


def test_no_grad_is_restored_after_an_exception_and_when_nested():
    a = leaf(1.0)
    with pytest.raises(KeyError), no_grad():
        raise KeyError
    with no_grad():
        with no_grad():
            pass
        assert (a * 2).node is None
    assert (a * 2).node is not None


def test_no_grad_is_a_matter_of_one_thread():
    a = leaf(1.0)
    inside, seen = threading.Event(), []
    done = threading.Event()

    def other():
        with no_grad():
            inside.set()
            done.wait(10)
            seen.append((a * 2).node)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    assert (a * 2).node is not None
    done.set()
    thread.join()
    assert seen == [None]


def test_threads_differentiate_through_shared_parameters():
    w = Parameter(np.random.default_rng(0).standard_normal((20, 20)))
    xs = np.random.default_rng(1).standard_normal((8, 5, 20))
    expected = [backward(silu(linear(x, w)).sum())[w] for x in xs]
    results = [None] * 8

    def work(i):
        for _ in range(20):
            results[i] = backward(silu(linear(xs[i], w)).sum())[w]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, e in zip(results, expected):
        np.testing.assert_array_equal(result, e)


def test_gradients_are_asked_for_only_where_they_go():
    asked = []

    @op
    def pair(a, b):
        return a + b, lambda g: (lambda: asked.append("a") or g, lambda: asked.append("b") or g)

    backward(pair(leaf(1.0), np.array([2.0])).sum())
    assert asked == ["a"]


def test_none_means_a_gradient_of_zero():
    @op
    def stop(x):
        return x + 0, lambda g: None

    a, b = leaf(1.0), leaf(2.0)
    assert set(backward((stop(a * 2) + b).sum())) == {b}
    assert set(backward((b + stop(a * 2)).sum())) == {b}  # whichever is walked first


def test_inputs_may_be_given_by_name_and_optional_ones_left_out():
    x, w, b = leaf(1, 2).data[None], Parameter(np.ones((2, 3))), Parameter(np.ones(3))
    by_position, by_name = backward(linear(x, w, b).sum()), backward(linear(x, b=b, w=w).sum())
    np.testing.assert_array_equal(by_position[b], by_name[b])
    np.testing.assert_array_equal(by_position[w], by_name[w])
    assert set(backward(linear(x, w).sum())) == {w}


def test_raw_is_the_op_on_arrays_alone():
    y, pull = silu.raw(np.array([0.0]))
    assert isinstance(y, np.ndarray) and y == 0 and pull(np.array([1.0])) == 0.5


def test_arrays_on_the_left_defer_to_the_tensor():
    a = leaf(1.0, 2.0)
    x = np.array([3.0, 4.0])
    for y in (x + a, x - a, x * a, x / a, np.ones((2, 2)) @ a.reshape(2, 1), 1 - a, 2 / a, 1 + a, 3 * a):
        assert isinstance(y, Tensor) and y.node is not None


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_keep_the_dtype(dtype):
    a = leaf(1.0, 2.0, dtype=dtype)
    for y in (a * 2, a + 0.5, 1 / a, a**2, a.sum() * 3, a.mean() / 2, (a.sum() * a.sum()).sqrt()):
        assert y.dtype == dtype
        assert isinstance(y.data, np.ndarray)


METHODS = {
    "a + b": (lambda a, b: a + b,), "a - b": (lambda a, b: a - b,), "a * b": (lambda a, b: a * b,),
    "a / b": (lambda a, b: a / b,), "2 - a": (lambda a, b: 2 - a,), "a - 2": (lambda a, b: a - 2,),
    "2 / a": (lambda a, b: 2 / a,), "a / 2": (lambda a, b: a / 2,), "2 + a": (lambda a, b: 2 + a,),
    "2 * a": (lambda a, b: 2 * a,), "-a": (lambda a, b: -a,), "a ** 3": (lambda a, b: a**3,),
    "a @ b.T": (lambda a, b: a @ b.transpose(1, 0),), "a[1:, 2]": (lambda a, b: a[1:, 2],),
    "a[np.int64(1)]": (lambda a, b: a[np.int64(1)],),
    "exp": (lambda a, b: a.exp(), lambda a, b: np.exp(a)), "log": (lambda a, b: a.log(), lambda a, b: np.log(a)),
    "sqrt": (lambda a, b: a.sqrt(), lambda a, b: np.sqrt(a)), "tanh": (lambda a, b: a.tanh(), lambda a, b: np.tanh(a)),
    "sum": (lambda a, b: a.sum(),), "sum of rows": (lambda a, b: a.sum(1, keepdims=True),),
    "mean": (lambda a, b: a.mean(), lambda a, b: a.sum() / a.size),
    "mean of columns": (lambda a, b: a.mean(0, keepdims=True),),
    "reshape": (lambda a, b: a.reshape(2, 6),), "reshape to a tuple": (lambda a, b: a.reshape((4, -1)),),
    "transpose": (lambda a, b: a.transpose(),), "transpose by a tuple": (lambda a, b: a.transpose((1, 0)),),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_methods_and_operators_are_those_of_numpy(name):
    f, plain = METHODS[name][0], METHODS[name][-1]
    a, b = np.random.default_rng(0).uniform(0.5, 2, (2, 3, 4))
    np.testing.assert_allclose(f(Parameter(a), Tensor(b)).data, plain(a, b), rtol=1e-14, strict=True)
    np.testing.assert_allclose(f(Parameter(a), b).data, plain(a, b), rtol=1e-14, strict=True)


def test_a_numpy_number_as_exponent_does_not_promote():
    assert (leaf(2.0, dtype=np.float32) ** np.float64(2)).dtype == np.float32


class TestBadInput:
    def test_no_tensor(self):
        with pytest.raises(TypeError, match="loss: expected a Tensor, got ndarray"):
            backward(np.ones(1))

    def test_missing_and_unknown_arguments(self):
        with pytest.raises(TypeError, match="missing a required argument: 'w'"):
            linear(np.ones((2, 2)))
        with pytest.raises(TypeError, match="colour"):
            silu(np.ones(2), colour="red")

    def test_the_mean_of_nothing(self):
        with pytest.raises(ValueError, match=r"x: an empty array has no mean, got shape \(0,\)"):
            Parameter(np.ones(0)).mean()

    def test_tensors_hold_float_arrays(self):
        for data, what in (
            ([1.0], "list"),
            (np.array([1], np.int16), "an array of int16"),
            (1.0, "float"),
            (None, "NoneType"),
        ):
            with pytest.raises(TypeError, match=f"data: expected a NumPy or CuPy array of floats, got {what}$"):
                Tensor(data)

    def test_mixed_dtypes(self):
        with pytest.raises(TypeError, match="mul: inputs must share one float dtype, got float32, float64"):
            leaf(1.0, dtype=np.float32) * leaf(1.0)
        with pytest.raises(TypeError, match="float32, float64"):  # a NumPy scalar is no Python number
            leaf(1.0, dtype=np.float32) * np.float64(2)
        with pytest.raises(TypeError, match="add: float32 became float64"):
            leaf(1.0, dtype=np.float32) + np.array([1])
        with pytest.raises(TypeError, match="add: inputs must share one float dtype, got no float array; convert"):
            T.add(1, np.array([1]))

    def test_loss_must_be_a_scalar(self):
        with pytest.raises(ValueError, match=r"loss: expected a scalar, got shape \(2,\)"):
            backward(leaf(1.0, 2.0) * 2)

    def test_a_pull_with_a_wrong_shape_dtype_or_count_is_named(self):
        def make(gradient):
            @op
            def bad(x):
                return x + 0, lambda g: gradient

            return bad

        x = leaf(1.0, 2.0)
        for gradient, message in [
            (np.ones(3), r"bad: gradient of shape \(3,\) for an input of shape \(2,\)"),
            (np.ones(()), r"bad: gradient of shape \(\)"),
            (np.ones((4, 1)), r"bad: gradient of shape \(4, 1\)"),
            (np.ones(2, np.float32), "bad: gradient of dtype float32 for an input of dtype float64"),
            ((np.ones(2), np.ones(2)), "bad: 1 inputs but 2 gradients"),
            (0.0, "bad: a gradient must be an array, got float"),
        ]:
            with pytest.raises(RuntimeError, match=message):
                backward(make(gradient)(x).sum())

    def test_indices_and_exponents(self):
        with pytest.raises(TypeError, match="index: expected integers, slices"):
            leaf(1.0, 2.0)[np.array([0, 0])]
        with pytest.raises(ValueError, match="exponent: expected a finite number"):
            leaf(1.0) ** leaf(2.0)

    def test_matmul_of_vectors(self):
        vector, matrix = leaf(1.0, 2.0), Tensor(np.ones((2, 2)))
        for a, b in ((vector, vector), (vector, matrix), (matrix, vector)):
            with pytest.raises(
                ValueError, match=f"matmul: both inputs need two axes or more, got {a.ndim} and {b.ndim}"
            ):
                a @ b


def test_repr_ndim_and_item():
    a = leaf(1.0, 2.0)
    assert repr(a) == "Parameter(shape=(2,), dtype=float64)"
    assert [x.ndim for x in (a, a.sum(), a.reshape(1, 2))] == [1, 0, 2]
    assert a.sum().item() == 3.0 and isinstance(a.sum().item(), float)
    assert T.as_array(a) is a.data and T.as_array(a.data) is a.data
