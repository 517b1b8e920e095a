"""Backward: the chain rule, from the loss to the parameters, over the graph of ops that tensor.py has recorded.

The loss L depends on a tensor y by way of all that used y, so dL/dy is the sum of what these send back. Taken from the
loss on, each node's turn comes when all that used it have had theirs; then its `pull` takes its dL/dy and gives what
goes to each of its inputs. What arrives at the parameters are their gradients. Next: functional.py.
"""

from __future__ import annotations

import numpy as np

from ..backend import Array, is_array
from .tensor import Node, Parameter, Tensor, no_scalar


def backward(loss: Tensor, copy: bool = True) -> dict[Parameter, Array]:
    """Return dL/dp for every `Parameter` p that the scalar `loss` L depends on, as {p: array of p's shape and dtype}.

    The chain rule from the loss to the leaves: what is used in several places sums what comes back from each. Every
    op's saved arrays are freed as soon as its `pull` has run, so a graph can be walked once. Without `copy`, gradients
    are only to be read: they may be parts of each other, or arrays that others hold too.

    Raises TypeError if `loss` is no tensor, ValueError if it is not a scalar or depends on no parameter, RuntimeError
    on a second walk.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss: expected a Tensor, got {type(loss).__name__}")
    if loss.data.size != 1:
        raise ValueError(f"loss: expected a scalar, got shape {loss.shape}; reduce it with .mean() or .sum()")
    root = loss if isinstance(loss, Parameter) else loss.node
    if root is None:
        raise ValueError("loss: it depends on no Parameter (was it computed under no_grad?)")
    # taken from the end, a node's turn comes when all that used it have sent their share, so that its sum is whole
    order = _topological_order(root)
    incoming = {root: np.ones_like(loss.data)}  # given a CuPy array, NumPy asks CuPy
    ours = set()  # those whose incoming sum is an array made here; any other is borrowed from a pull
    gradients = {}
    while order:
        node = order.pop()
        if node not in incoming:  # every path to it ended in a None
            continue
        g = incoming.pop(node)
        if isinstance(node, Parameter):
            gradients[node] = g.copy() if copy and node not in ours else g
            continue
        for parent, contribution in _pull(node, g):
            if parent not in incoming:
                incoming[parent] = contribution
            elif parent in ours:
                incoming[parent] += contribution
            else:  # not in place: a pull may hand one array to two parents, as add's (g, g) does
                incoming[parent] = no_scalar(incoming[parent] + contribution)
                ours.add(parent)
    return gradients


def _pull(node: Node, g: Array) -> list[tuple[Node | Parameter, Array]]:
    """Run the pull of `node`, forget it, and return what goes to each parent. All that it saved is free on return."""
    parents, gradients = node.parents, node.pull(g)
    node.parents, node.pull = (), None
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    if len(gradients) != len(parents):
        raise RuntimeError(f"{node.op}: {len(parents)} inputs but {len(gradients)} gradients")
    contributions = []
    for parent, gradient in zip(parents, gradients):
        if parent is not None:
            gradient = gradient() if callable(gradient) else gradient
            if gradient is not None:
                contributions.append((parent, _unbroadcast(gradient, parent, node.op)))
    return contributions


def _topological_order(root: Node | Parameter) -> list[Node | Parameter]:
    """Return all that `root` depends on, each after its parents (depth first, without recursion)."""
    order, seen, stack = [], {root}, [(root, iter(_parents(root)))]
    while stack:
        node, parents = stack[-1]
        for parent in parents:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append((parent, iter(_parents(parent))))
                break
        else:
            order.append(node)
            stack.pop()
    return order


def _parents(node: Node | Parameter) -> tuple[Node | Parameter | None, ...]:
    if isinstance(node, Parameter):
        return ()
    if node.pull is None:
        raise RuntimeError(
            "backward has already gone through this part of the graph and freed it; compute the loss anew, or add the "
            "losses up and call backward once"
        )
    return node.parents


def _unbroadcast(g: Array, parent: Node | Parameter, name: str) -> Array:
    """Undo broadcasting: an input that was used k times by it gets the sum of k gradients. Check shape and dtype."""
    g = no_scalar(g)
    if not is_array(g):
        raise RuntimeError(f"{name}: a gradient must be an array, got {type(g).__name__}")
    if g.shape != parent.shape:
        extra = g.ndim - len(parent.shape)
        if extra < 0 or any(size not in (1, n) for size, n in zip(parent.shape, g.shape[extra:])):
            raise RuntimeError(f"{name}: gradient of shape {g.shape} for an input of shape {parent.shape}")
        axes = tuple(i for i in range(g.ndim) if i < extra or parent.shape[i - extra] != g.shape[i])
        g = g.sum(axis=axes, keepdims=True).reshape(parent.shape)
    if g.dtype != parent.dtype:
        raise RuntimeError(f"{name}: gradient of dtype {g.dtype} for an input of dtype {parent.dtype}")
    return g
