"""The kernels for NVIDIA GPUs, emulated: what a test calls in place of `jattn`."""

import functools

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jattn.implementations import run as operation
from jattn.implementations.gpu.kernel import GPU
from jattn.implementations.gpu.refusal import HOPPER
from jattn.state import State
from tests.helpers import calls


def kernel(capability: str = HOPPER) -> GPU:
    """The kernel, emulated with the detection of races."""
    return GPU(plgpu.InterpretGPUParams(detect_races=True), capability)


def attention_state(query, key, value, *, capability=HOPPER, **options) -> State:
    compute = functools.partial(_state, capability)
    return calls.state("emulated_gpu", compute, query, key, value, **options)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _state(capability, problem, operands, sink):
    sums = operation.attend(problem, operands, (kernel(capability),))
    return calls.finished(problem, sums, sink)


def kernels(query, key, value, *, capability=HOPPER, **options) -> State:
    by = kernel(capability)
    return calls.by_kernels("emulated_gpu", by, query, key, value, **options)
