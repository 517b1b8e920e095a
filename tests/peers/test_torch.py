"""Against PyTorch: every op, the layers, the U-Net and the optimiser, their values and all their gradients."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ops import LAYERS, NAMES, OPS, SIDES
from strategies import SEEDS

from tinyddpm import backward
from tinyddpm.autograd import functional, tensor
from tinyddpm.network.nn import Linear, Module
from tinyddpm.training.optim import EMA, Adam, clip_norm

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
TORCH = SimpleNamespace(
    array=torch.tensor,
    **{row.op.__name__: functools.partial(row.torch, torch) if row.torch else row.numpy for row in OPS},
)

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
DTYPES = st.sampled_from(sorted(TOLERANCE))
RNGS = SEEDS.map(np.random.default_rng)


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
    own = [*(inputs[i].astype(np.float32) for i in varied), *module.state_dict().values()]
    twins = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in own]
    names = dict(zip(module.named_parameters(), twins[len(varied) :]))
    put = lambda arrays: [arrays[varied.index(i)] if i in varied else x for i, x in enumerate(inputs)]
    z = theirs(*([names] if names else []), *put(twins), **settings)
    u = rng.uniform(0, 2, z.shape).astype(np.float32)
    z.backward(torch.tensor(u, dtype=torch.float64))
    # a layer's gradients are measured together: that of the keys' bias is only rounding, as the softmax ignores it
    largest, layers = {}, [*varied, *(name.rpartition(".")[0] for name in names)]
    for layer, twin in zip(layers, twins):
        largest[layer] = max(largest.get(layer, 0), twin.grad.abs().max())
    for dtype in TOLERANCE:
        leaves = [tensor.Parameter(x.astype(dtype)) for x in own[: len(varied)]] + module.to(dtype=dtype).parameters()
        y = ours(*put(leaves), **({} if names else settings))
        gradients = backward((y * u.astype(dtype)).sum())
        assert y.dtype == dtype and gradients.keys() == set(leaves)
        close(y.data, z)
        for leaf, twin, layer in zip(leaves, twins, layers):
            close(gradients[leaf], twin.grad, largest[layer])


@pytest.mark.parametrize("row", OPS, ids=NAMES)
@given(data=st.data())
def test_ops(row, data):
    inputs, settings = data.draw(row.drawn)
    agree(row.op, getattr(TORCH, row.op.__name__), *inputs, **settings)


@pytest.mark.parametrize("name", LAYERS)
@given(data=st.data())
def test_layers(name, data):
    layer, twin, inputs, settings = data.draw(LAYERS[name])
    agree(layer, functools.partial(twin, TORCH), *inputs, **settings)


@given(shape=st.lists(SIDES, max_size=4), p=st.sampled_from([0, 0.1, 0.5]), seed=st.integers(0, 99))
def test_dropout(shape, p, seed):
    ours = lambda x: functional.dropout(x, p, np.random.default_rng(seed))
    kept = torch.tensor(tensor.as_array(ours(np.ones(shape))) > 0)
    agree(ours, lambda x: x * kept / (1 - p), np.random.default_rng(seed).standard_normal(shape))


@given(dtype=DTYPES, size=st.integers(1, 9), b1=st.sampled_from([0.0, 0.9]), b2=st.sampled_from([0.9, 0.999]), rng=RNGS,
       eps=st.sampled_from([1e-8, 1e-2]), decay=st.sampled_from([0, 0.1]))  # fmt: skip
def test_adam(dtype, size, b1, b2, eps, decay, rng):
    theta, *gradients = rng.standard_normal((21, size)).astype(dtype)
    twin = torch.tensor(theta, requires_grad=True)
    ours, theirs = Adam(theta, 0.1, (b1, b2), eps, decay), torch.optim.AdamW([twin], 0.1, (b1, b2), eps, decay)
    for n, g in enumerate(gradients):
        twin.grad, theirs.param_groups[0]["lr"] = torch.tensor(g), 0.1 / (n + 1)
        ours.step(g, 0.1 / (n + 1))
        theirs.step()
    close(theta, twin)


@given(dtype=DTYPES, sizes=st.lists(SIDES, min_size=1), rng=RNGS, share=st.sampled_from([0.1, 0.9, 1.1, 10]))
def test_clip_norm(dtype, sizes, rng, share):
    g = rng.uniform(1e6, 2e6, sum(sizes)).astype(dtype)  # beside its norm the 1e-6 that torch adds is nothing
    twins = torch.tensor(g).split(sizes)
    for twin in twins:
        twin.grad = twin.clone()
    max_norm = share * float(np.linalg.norm(g))
    close(clip_norm(g, max_norm), torch.nn.utils.clip_grad_norm_(twins, max_norm))
    close(g, torch.cat([twin.grad for twin in twins]))


@given(dtype=DTYPES, decay=st.sampled_from([0, 0.5, 0.9999]), rng=RNGS)
def test_ema(dtype, decay, rng):
    ema = EMA(Linear(3, 2, rng).to(dtype=dtype), decay)
    average = torch.tensor(ema.average)
    for n, theta in enumerate(rng.standard_normal((20, 8)).astype(dtype)):
        ema.update(theta)
        average = torch.optim.swa_utils.get_ema_avg_fn(min(decay, (1 + n) / (10 + n)))(average, torch.tensor(theta), n)
    close(ema.average, average)
