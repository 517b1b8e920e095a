"""Every twin has the name and the arguments of the plain function that it stands in for; on a CPU it computes the same.

What the others, CuPy's, compute, test_cuda.py tests; here CuPy is not needed.
"""

import importlib
import inspect
import math
import pathlib
import sys
from unittest import mock

import numpy as np
import pytest
from gradcheck import pulled, read_only
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS

import tinyddpm
from tinyddpm.autograd.functional import column_sums
from tinyddpm.autograd.fused import normalise
from tinyddpm.speed import cpu
from tinyddpm.speed.workers import is_shared
from tinyddpm.training.optim import adam_update, ema_update, new_vector

PACKAGE = pathlib.Path(tinyddpm.__file__).parent


def cuda_without_cupy():
    """The module speed/cuda.py, for the caller alone, with something else in CuPy's place."""
    cupy = ["cupy", "cupy.cublas", "cupy_backends.cuda.libs", "cupyx.scipy.special"]
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in cupy}):
        sys.modules.pop("tinyddpm.speed.cuda", None)
        cuda = importlib.import_module("tinyddpm.speed.cuda")
    del tinyddpm.speed.cuda
    return cuda


def paired_functions():
    """What stands under `@paired`, wherever in the package."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        if "\n@paired\n" in path.read_text():
            module = importlib.import_module(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
            functions = [getattr(f, "raw", f) for f in vars(module).values()]  # of an op, the function on arrays
            found += [f for f in functions if hasattr(f, "plain") and f.__module__ == module.__name__]
    return found


PAIRED = {f.__name__: f for f in paired_functions()}
TWINS = {"cpu": cpu.TWINS, "cuda": cuda_without_cupy().TWINS}
OURS = [(kind, name) for kind in TWINS for name in TWINS[kind] if name != "erfc"]  # CuPy's; `normal_cdf` is tested with


def test_what_is_paired_stands_in_a_room_that_is_to_be_read_under_a_name_of_its_own_and_has_a_twin():
    assert {f.__module__.split(".")[1] for f in paired_functions()} <= {"autograd", "network", "diffusion", "training"}
    assert len(PAIRED) == len(paired_functions()) > 10
    assert set(PAIRED) == {*TWINS["cpu"], *TWINS["cuda"]} and set(TWINS["cpu"]) < {*TWINS["cuda"], "new_vector"}
    assert all(list(twins) == sorted(twins) for twins in TWINS.values())


@pytest.mark.parametrize(("kind", "name"), OURS)
def test_a_twin_takes_the_same_arguments_at_least(kind, name):
    plain, twin = PAIRED[name].plain, TWINS[kind][name]
    assert twin.__name__ == name and not hasattr(twin, "plain")  # or a paired function would be its own twin
    taken, its = ([p.replace(annotation=None) for p in inspect.signature(f).parameters.values()] for f in (plain, twin))
    assert its[: len(taken)] == taken
    assert all(p.default is not p.empty for p in its[len(taken) :])  # for nobody gives it more


# what they compute: on drawn numbers, as they come and otherwise in memory, the same as the plain functions
FLOATS, LAYOUTS = st.sampled_from(["float32", "float64"]), st.sampled_from(["plain", "transposed", "strided"])


def close(ours, plain, dtype, digits, term=0.0):
    """Equal but for so many times the rounding of the largest number, or of a `term` of which these are sums, for what
    is left of such may be small; and of this type."""
    assert ours.shape == plain.shape and ours.dtype == plain.dtype == np.dtype(dtype)
    tolerance = digits * np.finfo(dtype).eps * (np.abs(plain).max(initial=0) + term)
    np.testing.assert_allclose(ours, plain, rtol=0, atol=tolerance)


@given(dtype=FLOATS, seed=SEEDS, layout=LAYOUTS, L=st.integers(0, 300), C=st.integers(1, 9),
       lead=st.sampled_from([(), (1,), (3,), (2, 3)]))  # fmt: skip
def test_column_sums(dtype, seed, layout, L, C, lead):
    x = read_only(np.random.default_rng(seed).uniform(0, 1, (*lead, L, C)).astype(dtype), layout)
    close(cpu.column_sums(x), column_sums.plain(x), dtype, 20)


@given(dtype=FLOATS, seed=SEEDS, layout=LAYOUTS, N=st.integers(1, 3), groups=st.integers(1, 4), D=st.integers(1, 5),
       between=st.lists(st.integers(1, 6), max_size=3), silu=st.booleans())  # fmt: skip
def test_normalise(dtype, seed, layout, N, groups, D, between, silu):
    """Of (N, C), (N, L, C), images, and more axes."""
    r, shapes = np.random.default_rng(seed), ((N, *between, groups * D), groups * D, groups * D)
    x, gamma, beta = (read_only((1 + 2 * r.standard_normal(shape)).astype(dtype), layout) for shape in shapes)
    # what SiLU leaves of a number far below 0 is small, and rstd is at most 1 / sqrt(eps)
    size = np.abs(normalise.plain(x, gamma, beta, groups, 0.1, False)[0]).max()
    (y, pull), (y_plain, pull_plain) = (f(x, gamma, beta, groups, 0.1, silu) for f in (cpu.normalise, normalise.plain))
    close(y, y_plain, dtype, 8, size)
    y.flags.writeable = False  # `pull` may have saved it
    g = read_only(r.standard_normal(y.shape).astype(dtype), layout)
    for ours, plain, again in zip(*(pulled(f, g, 3) for f in (pull, pull_plain, pull))):
        close(ours, plain, dtype, 32, np.abs(g).max() * (1 + size) * (1 + np.abs(gamma).max() / math.sqrt(0.1)))
        np.testing.assert_array_equal(ours, again)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e20, -1e20])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_finite_stays_in_its_group(value, silu):
    r = np.random.default_rng(0)
    x, gamma, beta, g = (r.standard_normal(s).astype(np.float32) for s in ((2, 4, 5, 16), 16, 16, (2, 4, 5, 16)))
    x[1, 2, 3, 5] = value
    (y, pull), (y_plain, pull_plain) = (f(x, gamma, beta, 8, 1e-6, silu) for f in (cpu.normalise, normalise.plain))
    others = np.ones(x.shape, bool)
    others[1, ..., 4:6] = False
    for a, e in ((y, y_plain), (pull(g)[0], pull_plain(g)[0])):
        np.testing.assert_allclose(a[others], e[others], rtol=0, atol=1e-5)


@pytest.mark.parametrize("z", [-200.0, -20.0, 20.0, 2000.0, 1e8])
def test_silu_is_exact_far_from_0(z):
    x, beta = np.tile(np.float32([-1, 1]), (1, 3, 1)), np.float32([z, z])
    _, pull = cpu.normalise(x, np.float32([1e-3, 1e-3]), beta, 1, 1e-6, True)
    slope = pull(np.ones_like(x))[2] / 3  # of the three positions, where z is almost the same
    np.testing.assert_allclose(slope, 1 if z > 0 else 0, atol=1e-6)


SIZES = st.integers(1, 50) | st.sampled_from([cpu.PART - 1, cpu.PART, cpu.PART + 1, 3 * cpu.PART + 5])


@given(dtype=FLOATS, seed=SEEDS, size=SIZES, n=st.integers(1, 2000), decay=st.sampled_from([0.0, 0.1]),
       lr=st.sampled_from([1e-4, 1e-2]), betas=st.sampled_from([(0.9, 0.999), (0.0, 0.5)]),
       finite=st.booleans())  # fmt: skip
def test_adam_update(dtype, seed, size, n, decay, lr, betas, finite):
    r = np.random.default_rng(seed)
    theta, gradient, m = (0.1 * r.standard_normal((3, size))).astype(dtype)
    v = (m * m * r.uniform(1, 2, size)).astype(dtype)
    if not finite:
        gradient[0] = np.nan
    ours, plain = [[x.copy() for x in (theta, m, v)] for _ in range(2)]
    for update, (theta_, m_, v_) in ((cpu.adam_update, ours), (adam_update.plain, plain)):
        update(theta_, read_only(gradient), m_, v_, lr, *betas, 1e-8, decay, n)
    close(ours[0], plain[0], dtype, 4, term=np.abs(theta).max())
    np.testing.assert_array_equal(ours[1:], plain[1:])  # m and v, to the bit
    assert [(x != before).any() for x, before in zip(ours, (theta, m, v))] == [finite] * 3


@given(dtype=FLOATS, seed=SEEDS, size=SIZES, d=st.floats(0, 0.9999))
def test_ema_update(dtype, seed, size, d):
    average, theta = np.random.default_rng(seed).standard_normal((2, size)).astype(dtype)
    ours, plain, theta = average.copy(), average.copy(), read_only(theta)
    cpu.ema_update(ours, theta, d), ema_update.plain(plain, theta, d)
    close(ours, plain, dtype, 0)
    assert (ours != average).any()


@given(dtype=FLOATS, size=st.integers(1, 10_000))
def test_new_vector(dtype, size):
    p = read_only(np.zeros((3, 2), dtype))
    ours, plain = cpu.new_vector(p, size), new_vector.plain(p, size)
    assert type(ours) is type(plain) is np.ndarray and ours.shape == plain.shape == (size,) and is_shared(ours)
    assert ours.dtype == plain.dtype == np.dtype(dtype) and ours.flags.writeable and ours.flags.c_contiguous
