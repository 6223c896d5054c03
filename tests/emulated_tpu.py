"""The kernels for TPU, emulated, in blocks so small that small inputs have several."""

import functools

import jax
import jax.numpy as jnp

from jattn import tpu
from jattn.problem import check_sink, pose
from jattn.state import State, with_sink
from jattn.tpu.attention import Attention

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


def kernels(query, key, value, *, interpret, **options):
    """Output, logsumexp and the cotangents of all inputs, by the kernels alone."""
    problem, operands = pose("emulated_tpu", query, key, value, **options)
    leaves, tree = jax.tree.flatten(operands)
    operation = Attention(problem, tree, 512, None, BLOCKS, TUNING, interpret)
    state = operation.by_kernel(operands)
    wanted = tree.unflatten([jnp.issubdtype(x.dtype, jnp.floating) for x in leaves])
    cotangents = jax.tree.map(finite, state)
    found = operation.pull_by_kernel(operands, wanted, state, cotangents)
    return *state, found.query, found.key, found.value


def finite(array):
    """The array, 0 where it is not finite."""
    return jnp.where(jnp.isfinite(array), array, 0)
