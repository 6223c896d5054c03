"""A call of an implementation in place of `jattn`, and of its kernels alone."""

import jax
import jax.numpy as jnp

from jattn.call.pose import check_sink, pose
from jattn.implementations import run as operation
from jattn.implementations.blockwise.prepare import prepare
from jattn.implementations.kernel import Kernel
from jattn.implementations.sums import Sums, given_as
from jattn.state import State


def state(where: str, compute, query, key, value, *, sink=None, **options) -> State:
    """Gives what `compute(problem, operands, sink)` gives, in the shape of the batch."""
    problem, operands = pose(where, query, key, value, **options)
    output, logsumexp = compute(problem, operands, check_sink(where, sink, problem.sizes))
    batch = problem.sizes.batch
    return State(
        output.reshape(*batch, *output.shape[1:]),
        logsumexp.reshape(*batch, *logsumexp.shape[1:]),
    )


def finished(problem, sums: Sums, sink) -> State:
    """Gives the state with its sink, and its output in the dtype of the call."""
    return given_as("state", sums, sink, problem.dtype)


def by_blocks(tile, query, key, value, **options) -> State:
    """Gives what blockwise gives in tiles of so many queries and keys."""

    def compute(problem, operands, sink):
        found = operation.attend(problem, operands, tile=tile)
        return finished(problem, found, sink)

    return state("by_blocks", compute, query, key, value, **options)


def by_kernels(where: str, kernel: Kernel, query, key, value, *, sink=None, **options):
    """The state by the kernels alone, forward and backward: nothing stands in for them."""
    problem, operands = pose(where, query, key, value, **options)
    problem, operands = prepare(problem, operands)
    leaves, tree = jax.tree.flatten(operands)
    wanted = tree.unflatten([jnp.issubdtype(x.dtype, jnp.floating) for x in leaves])

    @jax.custom_vjp
    def run(leaves):
        return tuple(kernel.forward(problem, tree.unflatten(leaves)))

    def forward(leaves):
        results = run(leaves)
        return results, (leaves, results)

    def backward(kept, cotangents):
        leaves, results = kept
        operands = tree.unflatten(leaves)
        sums = Sums(*results), Sums(*cotangents)
        found = kernel.backward(problem, operands, *sums, wanted)
        pairs = zip(tree.flatten_up_to(found), leaves, strict=True)
        return ([None if d is None else d.astype(x.dtype) for d, x in pairs],)

    run.defvjp(forward, backward)
    return finished(problem, Sums(*run(leaves)), check_sink(where, sink, problem.sizes))
