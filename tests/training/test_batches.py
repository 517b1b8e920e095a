"""Which images make up the batch of each step, and what is drawn for them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tinyddpm.training.batches import Batches, batch_indices


@given(n=st.integers(1, 12), batch=st.integers(1, 20), steps=st.integers(1, 8), seed=st.integers(0, 100))
def test_batches_run_through_every_image_once_per_epoch(n, batch, steps, seed):
    drawn = np.concatenate([batch_indices(n, step, batch, seed) for step in range(steps)])
    assert len(drawn) == batch * steps
    for epoch in range(len(drawn) // n):
        assert sorted(drawn[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_batches_differ_between_epochs_and_seeds():
    first, second, other = batch_indices(50, 0, 50, 0), batch_indices(50, 1, 50, 0), batch_indices(50, 0, 50, 1)
    assert (first != second).any() and (first != other).any()
    np.testing.assert_array_equal(first, batch_indices(50, 0, 50, 0))


@given(size=st.integers(1, 20), micro_batch=st.integers(1, 8), step=st.integers(0, 5), seed=st.integers(0, 9))
def test_micro_batches_make_up_the_batch_and_have_random_numbers_of_their_own(size, micro_batch, step, seed):
    images, labels = np.arange(12.0).reshape(12, 1, 1, 1), np.arange(12)
    batches = Batches(images, labels, size, micro_batch, seed)
    drawn = [batches.draw(step, start) for start in batches.starts]
    assert np.concatenate([of_part for _, of_part, _ in drawn]).tolist() == batch_indices(12, step, size, seed).tolist()
    assert all(len(x0) <= micro_batch and (x0.ravel() == of_part).all() for x0, of_part, _ in drawn)
    numbers = [rng.random() for *_, rng in drawn]
    assert len(set(numbers)) == len(numbers)
    for start, number in zip(batches.starts, numbers):  # again, in any order, and of images that were read before
        x0, _, rng = batches.draw(step, start, batches.read(step, start))
        assert (x0 == images[batches.indices(step, start)]).all() and rng.random() == number
