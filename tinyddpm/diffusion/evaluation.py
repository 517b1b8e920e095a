"""A network evaluated on a whole batch, without gradients, as sampling and the variational bound do it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from ..arguments import integer
from ..autograd.tensor import no_grad
from ..backend import Array, paired


@paired
@contextlib.contextmanager
def in_parts(model: Callable, shape: tuple[int, int, int, int], workers: int | None = None) -> Iterator[Callable]:
    """Within this block, run(function, *batches) is function(*batches), an array, without gradients.

    The function calls `model` on images (N, H, W, C) of this shape and treats each alone, so that a faster twin may cut
    the batches, arrays or lists with N entries or None, into parts, and have `workers` threads evaluate these.
    """
    if workers is not None:
        integer("workers", workers)

    def run(function: Callable, *batches: Array | None) -> Array:
        with no_grad():
            return function(*batches)

    yield run
