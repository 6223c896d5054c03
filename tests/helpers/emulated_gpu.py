"""The kernels for Hopper GPUs, emulated: what a test calls in place of `jattn`."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jattn.call.pose import check_sink, pose
from jattn.implementations import run as operation
from jattn.implementations.blockwise.prepare import prepare
from jattn.implementations.gpu.kernel import GPU
from jattn.implementations.kernel import Sums
from jattn.state import State, with_sink


def kernel() -> GPU:
    """The kernel, emulated with the detection of races."""
    return GPU(plgpu.InterpretGPUParams(detect_races=True))


def attention_state(query, key, value, *, sink=None, **options) -> State:
    problem, operands = pose("emulated_gpu", query, key, value, **options)
    sink = check_sink("emulated_gpu", sink, problem.sizes)
    output, logsumexp = _state(problem, operands, sink)
    batch = problem.sizes.batch
    return State(
        output.reshape(*batch, *output.shape[1:]),
        logsumexp.reshape(*batch, *logsumexp.shape[1:]),
    )


@functools.partial(jax.jit, static_argnums=0)
def _state(problem, operands, sink):
    state = operation.attention_state(problem, operands, (kernel(),))
    return state._replace(output=with_sink(state, sink).astype(problem.dtype))


def kernels(query, key, value, *, sink=None, **options) -> State:
    """By the kernels alone, forward and backward: nothing stands in for them."""
    problem, operands = pose("emulated_gpu", query, key, value, **options)
    problem, operands = prepare(problem, operands)
    leaves, tree = jax.tree.flatten(operands)
    wanted = tree.unflatten([jnp.issubdtype(x.dtype, jnp.floating) for x in leaves])

    @jax.custom_vjp
    def run(leaves):
        return tuple(kernel().forward(problem, tree.unflatten(leaves)))

    def forward(leaves):
        results = run(leaves)
        return results, (leaves, results)

    def backward(kept, cotangents):
        leaves, results = kept
        operands = tree.unflatten(leaves)
        sums = Sums(*results), Sums(*cotangents)
        found = kernel().backward(problem, operands, *sums, wanted)
        pairs = zip(tree.flatten_up_to(found), leaves, strict=True)
        return ([None if d is None else d.astype(x.dtype) for d, x in pairs],)

    run.defvjp(forward, backward)
    state = operation.state_of(*run(leaves))
    sink = check_sink("emulated_gpu", sink, problem.sizes)
    return state._replace(output=with_sink(state, sink).astype(problem.dtype))
