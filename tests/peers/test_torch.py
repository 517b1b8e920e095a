"""Against PyTorch: every op, the U-Net and the optimiser, their values and all their gradients."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from ops import NAMES, OPS, SHAPES, a_unet
from strategies import SEEDS

from tinyddpm import backward
from tinyddpm.autograd import functional, tensor
from tinyddpm.network.nn import Module
from tinyddpm.training.optim import Adam

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
FUNCTIONS = [functools.partial(row.torch, torch) if row.torch else row.numpy for row in OPS]
TORCH = SimpleNamespace(array=torch.tensor, **dict(zip(NAMES, FUNCTIONS)))
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def close(ours, theirs, scale=None):
    """Relative to the largest element: another may be what little is left of large terms, and has their rounding."""
    theirs = theirs.detach()
    assert ours.shape == theirs.shape
    scale = float(theirs.abs().max() if scale is None else scale)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE[ours.dtype.name] * scale)


def agree(ours, theirs, *inputs, **settings):
    """Hold `ours` equal to `theirs` at `inputs`: the value, and the gradient with respect to each array of floats.

    If `ours` is a module, `theirs` takes its parameters by name, and their gradients are compared as well. Ours runs in
    both precisions, torch in float64 on the same numbers: so what is seen in float32 is our rounding, not torch's too.
    """
    rng = np.random.default_rng(2**32)  # not one of SEEDS, or the gradient would be drawn like the inputs
    module = ours if isinstance(ours, Module) else Module()
    for p in module.parameters():  # away from 0 and 1, behind which a mistake could hide
        p.data = (p.data + 0.1 * rng.standard_normal(p.shape)).astype(np.float32)
    varied = [i for i, x in enumerate(inputs) if isinstance(x, np.ndarray) and x.dtype.kind == "f"]
    numbers = [*(inputs[i].astype(np.float32) for i in varied), *module.state_dict().values()]
    put = lambda made: [made[varied.index(i)] if i in varied else x for i, x in enumerate(inputs)]
    twins = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in numbers]
    if names := dict(zip(module.named_parameters(), twins[len(varied) :])):
        theirs, settings = functools.partial(theirs, names, **settings), {}
    z = theirs(*put(twins), **settings)
    u = rng.uniform(0, 2, z.shape).astype(np.float32)
    z.backward(torch.tensor(u, dtype=torch.float64))
    # a layer's gradients are measured together: that of the keys' bias is only rounding, as the softmax ignores it
    largest, layers = {}, [*varied, *(name.rpartition(".")[0] for name in names)]
    for layer, twin in zip(layers, twins):
        largest[layer] = max(largest.get(layer, 0), twin.grad.abs().max())
    for dtype in TOLERANCE:
        leaves = [tensor.Parameter(x.astype(dtype)) for x in numbers[: len(varied)]]
        leaves += module.to(dtype=dtype).parameters()
        y = ours(*put(leaves), **settings)
        gradients = backward((y * u.astype(dtype)).sum())
        assert y.dtype == dtype and gradients.keys() == set(leaves)
        close(y.data, z)
        for leaf, twin, layer in zip(leaves, twins, layers):
            close(gradients[leaf], twin.grad, largest[layer])


@pytest.mark.parametrize(("row", "theirs"), [*zip(OPS, FUNCTIONS)], ids=NAMES)
@given(data=st.data())
def test_ops(row, theirs, data):
    inputs, settings = data.draw(row.drawn)
    agree(row.op, theirs, *inputs, **settings)


@given(a_unet)
def test_unet(drawn):
    unet, inputs, settings = drawn
    agree(unet, functools.partial(reference.unet, TORCH), *inputs, **settings)


@given(shape=SHAPES, p=st.sampled_from([0, 0.1, 0.5]), seed=st.integers(0, 99))
def test_dropout(shape, p, seed):
    ours = lambda x: functional.dropout(x, p, np.random.default_rng(seed))
    kept = torch.tensor(tensor.as_array(ours(np.ones(shape))) > 0)
    agree(ours, lambda x: x * kept / (1 - p), np.random.default_rng(seed).standard_normal(shape))


@given(dtype=st.sampled_from(["float32", "float64"]), size=st.integers(1, 9), seed=SEEDS,
       eps=st.sampled_from([1e-8, 1e-2]), b1=st.sampled_from([0.0, 0.9]), b2=st.sampled_from([0.9, 0.999]),
       decay=st.sampled_from([0, 0.1]))  # fmt: skip
def test_adam(dtype, size, seed, b1, b2, eps, decay):
    theta, *gradients = np.random.default_rng(seed).standard_normal((21, size)).astype(dtype)
    twin = torch.tensor(theta, requires_grad=True)
    ours, theirs = Adam(theta, 0.1, (b1, b2), eps, decay), torch.optim.AdamW([twin], 0.1, (b1, b2), eps, decay)
    for n, g in enumerate(gradients):
        twin.grad, theirs.param_groups[0]["lr"] = torch.tensor(g), 0.1 / (n + 1)
        ours.step(g, 0.1 / (n + 1))
        theirs.step()
    close(theta, twin)
