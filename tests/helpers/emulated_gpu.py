"""The kernels for Hopper GPUs, emulated: what a test calls in place of `jattn`."""

import functools

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jattn.implementations import run as operation
from jattn.implementations.gpu.kernel import GPU
from jattn.state import State
from tests.helpers import calls


def kernel() -> GPU:
    """The kernel, emulated with the detection of races."""
    return GPU(plgpu.InterpretGPUParams(detect_races=True))


def attention_state(query, key, value, **options) -> State:
    return calls.state("emulated_gpu", _state, query, key, value, **options)


@functools.partial(jax.jit, static_argnums=0)
def _state(problem, operands, sink):
    state = operation.attention_state(problem, operands, (kernel(),))
    return calls.finished(problem, state, sink)


def kernels(query, key, value, **options) -> State:
    return calls.by_kernels("emulated_gpu", kernel(), query, key, value, **options)
