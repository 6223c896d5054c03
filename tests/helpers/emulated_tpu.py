"""The kernels for TPU, emulated, in blocks so small that small inputs have several."""

import functools

import jax

from jattn.implementations import run as operation
from jattn.implementations.tpu.kernel import TPU
from jattn.state import State
from tests.helpers import calls

BLOCKS, TUNING = (128, 128), (64, 128)


def attention_state(
    query, key, value, *, interpret=True, resident=2**24, **options
) -> State:
    compute = functools.partial(_state, TPU(BLOCKS, TUNING, interpret, resident))
    return calls.state("emulated_tpu", compute, query, key, value, **options)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _state(kernel, problem, operands, sink):
    sums = operation.attend(problem, operands, (kernel,))
    return calls.finished(problem, sums, sink)


def kernels(query, key, value, *, interpret, **options) -> State:
    kernel = TPU(BLOCKS, TUNING, interpret)
    return calls.by_kernels("emulated_tpu", kernel, query, key, value, **options)
