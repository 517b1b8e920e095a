"""A batch's gradient, shared out: the same as in the plain way, wherever the parameters lie."""

import functools

import numpy as np
import pytest
from tiny_training import DIFFUSION, IMAGES, SMALL, Lazy

from tinyddpm import EMA, Adam, UNet
from tinyddpm.speed.workers import is_shared, shared_array
from tinyddpm.training.batches import Batches
from tinyddpm.training.loop import batch_gradient, descend, micro_batch_gradient
from tinyddpm.training.optim import flatten, new_vector


def steps_taken(gradient, micro_batch, images=IMAGES, shared=False, **settings):
    """The losses of five steps, and what has been learned, as who writes a loop by hand would have them."""
    unet = UNet(**SMALL, rng=0)
    parameters = unet.parameters()
    theta = flatten(parameters, out=new_vector(parameters[0].data, unet.size) if shared else None)
    optimizer, batches = Adam(theta, lr=0.02), Batches(images, None, 11, micro_batch, seed=3)
    differentiate = micro_batch_gradient(unet, DIFFUSION, batches)
    with gradient(unet, differentiate, batches, range(5), **settings) as draw_and_differentiate:
        taken = list(descend(draw_and_differentiate, optimizer, EMA(unet), 5, lambda step: 0.02))
    return [loss for _, _, (loss, _) in taken], theta.copy()


plain = functools.cache(lambda micro_batch: steps_taken(batch_gradient.plain, micro_batch))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("images", [IMAGES, Lazy(IMAGES)], ids=["in memory", "read when indexed"])
@pytest.mark.parametrize(("workers", "micro_batch", "groups"), [(1, 4, 16), (2, 2, 2)])
def test_the_twin_is_the_plain_way(monkeypatch, workers, micro_batch, groups, images, shared):
    """Also with more micro-batches than groups, six in two here."""
    monkeypatch.setattr("tinyddpm.speed.micro_batches.GROUPS", groups)
    losses, theta = steps_taken(batch_gradient, micro_batch, images, shared, workers=workers)
    plain_losses, plain_theta = plain(micro_batch)
    np.testing.assert_allclose(losses, plain_losses, rtol=1e-5)
    np.testing.assert_allclose(theta, plain_theta, rtol=0, atol=1e-4)
    assert plain_losses[-1] < 0.9 * plain_losses[0]  # it learned


def test_what_is_shared():
    memory = shared_array((3, 4), np.float32)
    assert is_shared(memory) and is_shared(memory[1:, 2:].T[:1])
    assert not is_shared(memory.copy()) and not is_shared(np.zeros((3, 4))[1:])
