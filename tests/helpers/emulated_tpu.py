"""The kernels for TPU, emulated, in blocks so small that small inputs have several."""

import functools

import jax
import jax.numpy as jnp

from jattn.call.problem import check_sink, pose
from jattn.implementations import tpu
from jattn.implementations.blockwise.attention import prepared, state_of
from jattn.implementations.tpu.attention import Attention
from jattn.state import State, with_sink

BLOCKS, TUNING = (128, 128), (64, 128)


def attention_state(
    query, key, value, *, sink=None, interpret=True, resident=2**24, **options
) -> State:
    problem, operands = pose("emulated_tpu", query, key, value, **options)
    sink = check_sink("emulated_tpu", sink, problem.sizes)
    output, logsumexp = _state(problem, interpret, resident, operands, sink)
    batch = problem.sizes.batch
    return State(
        output.reshape(*batch, *output.shape[1:]),
        logsumexp.reshape(*batch, *logsumexp.shape[1:]),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _state(problem, interpret, resident, operands, sink):
    state = tpu.attention_state(
        problem,
        operands,
        blocks=BLOCKS,
        tuning=TUNING,
        interpret=interpret,
        resident=resident,
    )
    return state._replace(output=with_sink(state, sink).astype(problem.dtype))


def kernels(query, key, value, *, interpret, sink=None, **options) -> State:
    """By the kernels alone, forward and backward: nothing stands in for them."""
    problem, operands = pose("emulated_tpu", query, key, value, **options)
    problem, operands, size = prepared(problem, operands)
    leaves, tree = jax.tree.flatten(operands)
    operation = Attention(problem, tree, size, None, BLOCKS, TUNING, interpret)
    wanted = tree.unflatten([jnp.issubdtype(x.dtype, jnp.floating) for x in leaves])

    @jax.custom_vjp
    def run(leaves):
        return tuple(operation.by_kernel(tree.unflatten(leaves)))

    def forward(leaves):
        results = run(leaves)
        return results, (leaves, results)

    def backward(kept, cotangents):
        leaves, results = kept
        operands = tree.unflatten(leaves)
        found = operation.pull_by_kernel(operands, wanted, results, cotangents)
        pairs = zip(tree.flatten_up_to(found), leaves, strict=True)
        return ([None if d is None else d.astype(x.dtype) for d, x in pairs],)

    run.defvjp(forward, backward)
    state = state_of(*run(leaves))
    sink = check_sink("emulated_tpu", sink, problem.sizes)
    return state._replace(output=with_sink(state, sink).astype(problem.dtype))
