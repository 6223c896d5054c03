"""The blockwise implementation in tiles of 4 × 4, so that small inputs have many."""

import functools

import jax

from jattn.call.pose import check_sink, pose
from jattn.implementations import run as operation
from jattn.state import State, with_sink


def attention_state(query, key, value, *, sink=None, **options) -> State:
    problem, operands = pose("small_tiles", query, key, value, **options)
    sink = check_sink("small_tiles", sink, problem.sizes)
    output, logsumexp = _state(problem, operands, sink)
    batch = problem.sizes.batch
    return State(
        output.reshape(*batch, *output.shape[1:]),
        logsumexp.reshape(*batch, *logsumexp.shape[1:]),
    )


def attention(query, key, value, **options) -> jax.Array:
    return attention_state(query, key, value, **options).output


@functools.partial(jax.jit, static_argnums=0)
def _state(problem, operands, sink):
    state = operation.attention_state(problem, operands, tile=(4, 4))
    return state._replace(output=with_sink(state, sink).astype(problem.dtype))
