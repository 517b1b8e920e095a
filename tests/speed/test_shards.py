"""A network evaluated in shards: how many images each takes, and that all come back as if at once."""

import math
import threading

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tinyddpm.autograd.tensor import Parameter
from tinyddpm.diffusion import evaluation
from tinyddpm.speed.shards import PIXELS, in_parts, shard_size, shards

model = lambda x, t: x


@given(count=st.integers(1, 300), h=st.integers(1, 8) | st.integers(1, 600), w=st.integers(1, 600))
def test_a_shard_is_a_quarter_or_of_few_pixels(count, h, w):
    n = shard_size(count, h, w)
    assert 1 <= n <= max(4, math.ceil(count / 4))
    assert n == 1 or n * h * w <= PIXELS
    if n < max(4, math.ceil(count / 4)):
        assert n & (n - 1) == 0 and 2 * n * h * w > PIXELS


def test_shards():
    assert shards((70, 28, 28, 1), "cpu") == [slice(i, i + 18) for i in range(0, 70, 18)]
    assert shards((40, 28, 28, 1), "cuda") == [slice(0, 40)]


def test_without_a_twin_all_of_it_is_one_part():
    seen = []
    with evaluation.in_parts.plain(abs, (70, 28, 28, 1), 3) as run:
        assert run(lambda *batches: seen.append(batches) or "what comes of it", [1, 2], None) == "what comes of it"
    assert seen == [([1, 2], None)]


@given(n=st.integers(1, 30), workers=st.integers(1, 3))
def test_what_comes_of_the_shards_is_put_together_in_order(n, workers):
    x, names, seen = np.arange(n * 8.0).reshape(n, 2, 4, 1), [f"image {i}" for i in range(n)], []
    of_shard = lambda x, names, labels: seen.append((len(x), names, labels)) or x.sum(axis=(1, 2, 3))
    with in_parts(model, x.shape, workers) as run:
        for _ in range(2):
            seen.clear()
            np.testing.assert_array_equal(run(of_shard, x, names, None), x.sum(axis=(1, 2, 3)))
            seen.sort(key=lambda call: names.index(call[1][0]))  # threads may be at them in any order
            cut = shards(x.shape, "cpu")
            assert seen == [(len(x[part]), names[part], None) for part in cut]


def test_no_graph_is_built():
    p, x, made = Parameter(np.ones(1)), np.ones((9, 2, 2, 1)), []
    with in_parts(model, x.shape, 2) as run, evaluation.in_parts.plain(abs, x.shape) as at_once:
        for way in (run, at_once):
            way(lambda x: made.append(p * x) or x, x)
    assert len(made) == 4 and all(y.node is None for y in made) and (p * x).node is not None


def test_as_many_threads_as_asked_for_and_no_more_than_there_are_shards():
    barrier, x = threading.Barrier(2, timeout=10), np.ones((8, 2, 2, 1))
    assert len(shards(x.shape, "cpu")) == 2
    with in_parts(model, x.shape, 5) as run:  # the barrier passes only if two threads are at it
        assert len(set(run(lambda x: (barrier.wait(), np.array([threading.get_ident()]))[1], x))) == 2
    with in_parts(model, x[:4].shape, 5) as run:
        assert run(lambda x: np.array([threading.get_ident()]), x[:4]) == [threading.get_ident()]
