"""Which images each step of a training sees, and the random numbers for them.

Both follow from the seed and the step alone, so a training can be taken up at any step, and shared out among any number
of workers, with the same result: a batch is made of micro-batches of fixed size, and each has random numbers of its own
for timesteps, noise and dropout.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

PURPOSES = ("order", "noise", "flip")  # their order is part of what a seed means


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batches of a training: `size` of the images (M, H, W, C) each step, and of the labels (M,) if there are any,
    cut into micro-batches; if `flip`, half of the images are mirrored, anew each time."""

    images: np.ndarray  # or what is indexed like one, see `files.folder.ImageFolder`
    labels: np.ndarray | None
    size: int
    micro_batch: int
    seed: int
    flip: bool = False

    @property
    def starts(self) -> range:
        """Where in a batch each micro-batch begins."""
        return range(0, self.size, self.micro_batch)

    def indices(self, step: int, start: int) -> np.ndarray:
        """Which of the images make up a micro-batch."""
        return batch_indices(len(self.images), step, self.size, self.seed)[start : start + self.micro_batch]

    def read(self, step: int, start: int) -> np.ndarray:
        """These images, as they are: to read them ahead of `draw`."""
        return self.images[self.indices(step, start)]

    def draw(
        self, step: int, start: int, x0: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray | None, np.random.Generator]:
        """The images of a micro-batch, mirrored or not, their labels, and a generator for what else is random. x0: the
        images, if they have been read already."""
        chosen = self.indices(step, start)
        x0 = self.images[chosen] if x0 is None else x0
        if self.flip:
            mirrored = random_stream(self.seed, "flip", step, start).random(len(chosen)) < 0.5
            x0 = np.where(mirrored[:, None, None, None], x0[:, :, ::-1], x0)
        labels = None if self.labels is None else self.labels[chosen]
        return x0, labels, random_stream(self.seed, "noise", step, start)


def random_stream(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """An independent generator for each (seed, purpose, key): the same whoever asks, in whatever order."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(PURPOSES.index(purpose), *key)))


def batch_indices(n: int, step: int, batch: int, seed: int) -> np.ndarray:
    """Which of n images make up the batch of `step`: entries step*batch ... of an endless row of permutations of them.

    Every image comes once per epoch, and any step's batch can be had without the steps before it.
    """
    first, last = step * batch, (step + 1) * batch
    epochs = range(first // n, (last - 1) // n + 1)
    return np.concatenate(
        [_permutation(n, seed, epoch)[max(0, first - epoch * n) : last - epoch * n] for epoch in epochs]
    )


@functools.lru_cache(maxsize=2)  # for a million images it takes as long as a small training step
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return random_stream(seed, "order", epoch).permutation(n)
