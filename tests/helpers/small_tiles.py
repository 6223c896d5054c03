"""The blockwise implementation in tiles of 4 × 4, so that small inputs have many."""

import functools

import jax

from jattn.implementations import run as operation
from jattn.state import State
from tests.helpers import calls


def attention_state(query, key, value, **options) -> State:
    return calls.state("small_tiles", _state, query, key, value, **options)


def attention(query, key, value, **options) -> jax.Array:
    return attention_state(query, key, value, **options).output


@functools.partial(jax.jit, static_argnums=0)
def _state(problem, operands, sink):
    sums = operation.attend(problem, operands, tile=(4, 4))
    return calls.finished(problem, sums, sink)
