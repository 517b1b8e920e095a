"""What holds for whatever has parameters: how they begin, their names, their state, their conversion."""

import numpy as np
import pytest

from tinyddpm.autograd.tensor import Parameter
from tinyddpm.network.nn import Conv2d, GroupNorm, Linear, Module


def test_initial_weights_have_the_variance_of_glorot_and_bengio():
    rng = np.random.default_rng(0)
    for layer, fan_in, fan_out in ((Linear(300, 500, rng), 300, 500), (Conv2d(30, 50, 3, rng), 270, 450)):
        assert abs(layer.w.data.var() / (2 / (fan_in + fan_out)) - 1) < 0.02
        assert layer.w.dtype == np.float32 and not layer.b.data.any()
    assert GroupNorm(4, 2).eps == 1e-6


class Nested(Module):
    def __init__(self):
        rng = np.random.default_rng(0)
        self.scale = Parameter(np.ones(3, np.float32))
        self.blocks = [Linear(2, 3, rng), Linear(3, 2, rng)]
        self.norm = GroupNorm(4, 2)
        self.absent = None
        self.numbers = [1, 2]
        self.more = (Parameter(np.ones(5, np.float32)), {"tied": self.scale, "deep": Linear(1, 1, rng)})


def test_names_order_and_size_of_parameters():
    names = ["scale", "blocks.0.w", "blocks.0.b", "blocks.1.w", "blocks.1.b", "norm.gamma", "norm.beta"]
    names += ["more.0", "more.1.deep.w", "more.1.deep.b"]  # the tied one is listed where it is met first
    assert list(Nested().named_parameters()) == names
    assert Nested().size == 3 + 6 + 3 + 6 + 2 + 4 + 4 + 5 + 1 + 1
    assert Nested().dtype == np.float32 and Nested().device == "cpu"


def test_a_state_goes_out_as_a_copy_and_in_in_place():
    a, b = Nested(), Nested()
    a.scale.data[...] = 7
    state, kept = a.state_dict(), b.scale.data
    a.scale.data[...] = 8
    b.load_state_dict(state)
    assert b.scale.data is kept and (b.scale.data == 7).all()


def test_a_state_that_does_not_fit_is_refused_whole():
    a = Nested()
    before = a.state_dict()
    state = {name: value + 1 for name, value in before.items()} | {"extra": np.zeros(1), "scale": np.zeros(5)}
    del state["norm.beta"]
    with pytest.raises(ValueError) as error:
        a.load_state_dict(state)
    wrong = "norm.beta is missing; extra is unknown; scale has shape (5,) instead of (3,)"
    assert str(error.value) == f"state: it does not fit Nested: {wrong}"
    assert all((before[name] == value).all() for name, value in a.state_dict().items())


def test_conversion():
    a = Nested()
    assert a.to("cpu") is a and a.device == "cpu"
    assert a.to(dtype="float64") is a and {p.dtype for p in a.parameters()} == {np.dtype("float64")}
    for bad in ("int32", np.int64, "float16", "longdouble"):  # of the last two, no noise can be drawn
        with pytest.raises(ValueError, match="dtype: expected 'float32' or 'float64', got"):
            a.to(dtype=bad)
    for bad in ("gpu", "cuda:x", "cuda:-1", ""):
        with pytest.raises(ValueError, match="is unknown; use 'cpu', 'cuda' or 'cuda:N'"):
            a.to(bad)
