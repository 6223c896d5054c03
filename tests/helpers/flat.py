"""The blockwise implementation as on a GPU: one loop over the tiles of all blocks."""

import functools

import jax

from jattn.implementations import run as operation
from jattn.state import State
from tests.helpers import calls

ALL_HEADS = 2**24  # the most logits in a tile: those of all heads of a small call
ONE_HEAD = 1


def attention_state(query, key, value, *, logits=ALL_HEADS, **options) -> State:
    compute = functools.partial(_state, logits)
    return calls.state("flat", compute, query, key, value, **options)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _state(logits, problem, operands, sink):
    sums = operation.attend(problem, operands, tile=(4, 4), flat=logits)
    return calls.finished(problem, sums, sink)
