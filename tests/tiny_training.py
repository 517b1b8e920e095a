"""A training so small that it takes milliseconds, and copies of this process that may end as they like."""

import contextlib
import json
import multiprocessing
import sys
import tracemalloc

import numpy as np
import pytest
from safetensors import safe_open

from tinyddpm import Diffusion, UNet, make_schedule, train

TINY = dict(channels=(4, 8), blocks=1, attention=(False, True), groups=2)
SMALL = dict(channels=(4,), blocks=1, attention=(False,), middle_attention=False, groups=2)  # where any network will do
DIFFUSION = Diffusion(make_schedule("linear", 20, beta_end=0.6))
IMAGES = np.random.default_rng(0).uniform(-1, 1, (23, 4, 4, 1)).astype(np.float32)
SETTINGS = dict(batch=11, micro_batch=4, lr=0.01, warmup_steps=3, decay_steps=3, seed=3)
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are copied there only")


class Lazy:
    """Images that are read when they are indexed, of which `look` is told, and recognised by what a user says."""

    fingerprint = "mine"

    def __init__(self, images, look=lambda indices: None):
        self.images, self.shape, self.dtype, self.look = images, images.shape, images.dtype, look

    def __len__(self):
        return len(self.images)

    def __getitem__(self, indices):
        self.look(indices)
        return self.images[indices]


def training(path=None, steps=8, *, unet=None, rng=0, diffusion=DIFFUSION, images=IMAGES, **changes):
    """A network and the training of it that goes on from `path`."""
    unet = unet or UNet(**TINY, rng=rng)
    return unet, train(unet, diffusion, images, steps, resume=path, **SETTINGS | changes)


def step_in(path):
    """The step that a checkpoint says it is of."""
    with safe_open(path, "numpy") as file:
        return json.loads(file.metadata()["training"])["step"]


def in_a_copy(function):
    """Run `function` in a copy of this process and return how that ended: 0, its exit status, or minus a signal."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(120)
    return process.exitcode


@contextlib.contextmanager
def files_of_at_most(size):
    """Within this block the system lets a file grow to so many bytes only, as a full disk does."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # and SIGXFSZ is ignored by Python
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_same_weights(one, other):
    """Of two networks, or of what their `state_dict`s say: to the bit, of one type, in one order."""
    one, other = (x if isinstance(x, dict) else x.state_dict() for x in (one, other))
    assert list(one) == list(other)
    for name, x in other.items():
        np.testing.assert_array_equal(one[name], x, err_msg=name, strict=True)


def names(folder):
    return {path.name for path in folder.iterdir()}


def files_in(folder):
    """What is in all files, and False for each folder."""
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@contextlib.contextmanager
def memory_of_at_most(size, *what):
    """Within this block, so many bytes of Python's and NumPy's are taken at most."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < size, what
    finally:
        tracemalloc.stop()
