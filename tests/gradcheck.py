"""The gradient checker: v^T J u by central differences along a random direction against the hand-written gradients."""

from unittest import mock

import numpy as np

from tinyddpm import backend
from tinyddpm.autograd.backward import backward
from tinyddpm.autograd.tensor import Parameter, Tensor


def read_only(x, layout="plain"):
    """The same numbers, perhaps otherwise in memory, and not to be written to."""
    x = np.array(x)
    if layout == "transposed" and x.ndim > 1:
        x = x.swapaxes(-1, -2).copy().swapaxes(-1, -2)
    elif layout == "strided" and x.ndim:
        x = x.repeat(2, axis=-1)[..., ::2]
    x.flags.writeable = False
    return x


def pulled(pull, g, count):
    """The gradients of an op's `count` inputs, with those given as functions computed."""
    gradients = pull(g)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    assert len(gradients) == count
    return [grad() if callable(grad) else grad for grad in gradients]


def summed_to(g, shape):
    """Sum a broadcast gradient down to `shape`."""
    g = np.asarray(g)
    g = g.sum(tuple(range(g.ndim - len(shape))))
    return g.sum(tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True).reshape(shape)


def check_op(op, *inputs, layout="plain", **settings):
    """Check gradients, dtypes and manners of an op at `inputs`: float64 arrays; anything else is held fixed.

    As it comes, with the faster twins of what it calls, and in the plain way. In float64: each gradient against central
    differences; inputs, value and incoming gradient are read-only, and a second pull gives the same again, so nothing
    that is saved gets written to. In float32: the same numbers, in float32. Through the engine: `backward` returns
    those gradients.
    """
    with mock.patch.object(backend, "_twins", wraps=backend._twins) as asked:
        _check_op(op, inputs, layout, settings)
    if asked.called:
        with backend.plain():
            _check_op(op, inputs, layout, settings)


def close(a, b, rtol, atol):
    """As NumPy's `assert_allclose`, which takes longer than what is tested with it here."""
    return a.shape == b.shape and bool((np.abs(a - b) <= atol + rtol * np.abs(b)).all())


def _check_op(op, inputs, layout, settings):
    rng, varied = np.random.default_rng(0), [i for i, x in enumerate(inputs) if isinstance(x, np.ndarray)]
    wide = [read_only(x, layout) if i in varied else x for i, x in enumerate(inputs)]
    y, pull = op.raw(*wide, **settings)
    if isinstance(y, np.ndarray):  # the very array, which `pull` may have saved
        y.flags.writeable = False
    u = read_only(rng.standard_normal(y.shape), layout)
    gradients = pulled(pull, u, len(inputs))
    for again, g in zip(pulled(pull, u, len(inputs)), gradients):
        assert np.array_equal(again, g), f"{op.__name__}: another gradient when asked again"

    exact = {i: summed_to(gradients[i], wide[i].shape) for i in varied}
    for i, g in exact.items():
        assert g.dtype == np.float64
        v, h = rng.standard_normal(g.shape), 1e-5
        there, back = (op.raw(*wide[:i], wide[i] + s * h * v, *wide[i + 1 :], **settings)[0] for s in (1, -1))
        differences, products = (there - back) / (2 * h) * u, g * v
        numeric, by_hand = float(differences.sum()), float(products.sum())
        # the difference has an error of its own; its size is that of the terms summed, not that of the sum
        scale = float(np.abs(differences).sum()) + float(np.abs(products).sum()) + 1e-3
        assert abs(numeric - by_hand) <= 1e-7 * scale, f"{op.__name__}, input {i}: {by_hand} but numerically {numeric}"

    near = lambda a, b: a.dtype == np.float32 and close(a, b, 1e-3, 1e-4 * (1 + np.abs(b).max(initial=0)))
    narrow = [read_only(x.astype(np.float32), layout) if i in varied else x for i, x in enumerate(inputs)]
    y32, pull = op.raw(*narrow, **settings)
    assert near(y32, y), f"{op.__name__} in float32"
    gradients = pulled(pull, read_only(u.astype(np.float32), layout), len(inputs))
    for i, g in exact.items():
        assert near(summed_to(gradients[i], g.shape), g), f"{op.__name__}, input {i} in float32"

    leaves = [Parameter(x) if i in varied else x for i, x in enumerate(wide)]
    returned = backward((op(*leaves, **settings) * Tensor(u)).sum())
    assert set(returned) == {leaves[i] for i in varied}
    for i, g in exact.items():
        mine = returned[leaves[i]]
        assert close(mine, g, 1e-12, 1e-12) and mine.flags.writeable and not np.shares_memory(mine, u)


def check_model(loss, parameters, rng):
    """Check `backward(loss())` for all `parameters` at once along a random direction in float64."""
    gradients, h = backward(loss()), 1e-5
    directions, originals, values = [rng.standard_normal(p.shape) for p in parameters], [p.data for p in parameters], []
    exact = sum(float((gradients[p] * v).sum()) for p, v in zip(parameters, directions))
    scale = sum(float(np.abs(gradients[p] * v).sum()) for p, v in zip(parameters, directions))
    for s in (1, -1, 0):  # 0 last, to leave them as they were
        for p, original, v in zip(parameters, originals, directions):
            p.data = original + s * h * v if s else original
        values += [loss().item()] if s else []
    numeric = (values[0] - values[1]) / (2 * h)
    assert abs(numeric - exact) <= 1e-6 * max(1e-3, scale), f"{exact} but numerically {numeric}"
    return gradients
