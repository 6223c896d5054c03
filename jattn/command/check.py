"""The self-check: every implementation against the definition, output and gradients.

The check takes a few seconds and a few cases of `jattn.testing`; the tests take all cases,
and check more derivatives. An error is the largest difference from the definition in
float64, relative to the largest number. It may be `_ROUNDINGS` roundings of the case's
dtype. Some devices multiply less precisely; there it may be twice the definition's own
error in this dtype. GPUs and TPUs round the factors of a product of float32 unless more is
asked for; here it is.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jattn
from jattn import definition
from jattn.implementations import dispatch
from jattn.testing.cases import CASES, Case, random_inputs

CHECKS = (
    ("causal", "float32"),
    ("causal_with_empty_rows", "bfloat16"),
    ("segments_with_padding", "float32"),
    ("capped_bias", "float32"),
)
# Keys where an implementation refuses as few as the case has: one for long buffers.
_MANY = 640
_ROUNDINGS = 4  # units of the dtype's precision, for the few roundings of each sum


class Result(NamedTuple):
    """The result of one implementation on one case."""

    refusal: str | None = None
    output_error: float = 0.0
    gradient_error: float = 0.0
    passed: bool = True


def implementations() -> dict[str, Callable]:
    """Gives every implementation, as a function of the signature of `jattn.attention`."""
    return {
        name: functools.partial(jattn.attention, implementation=name)
        for name in dispatch.IMPLEMENTATIONS
    }


def check(name: str, attend: Callable, case_name: str, dtype: str) -> Result:
    """Compares one attention function with the definition in one case."""
    # Half precision keeps what is set: some kernels have no higher precision for it.
    precise = jax.default_matmul_precision("highest")
    with precise if dtype == "float32" else contextlib.nullcontext():
        return _check(name, attend, case_name, dtype)


def _check(name: str, attend: Callable, case_name: str, dtype: str) -> Result:
    case = next(case for case in CASES if case.name == case_name)
    refusal = _refusal(name, case, dtype)
    if refusal is not None:
        case = dataclasses.replace(case, sizes=dataclasses.replace(case.sizes, S=_MANY))
        if _refusal(name, case, dtype) is not None:
            return Result(refusal)
    errors = _errors(attend, case, dtype)
    limits = np.full(len(errors), _ROUNDINGS * float(jnp.finfo(dtype).eps))
    if not np.all(errors <= limits):
        limits = np.maximum(limits, 2 * _errors(definition.attention, case, dtype))
    passed = bool(np.all(errors <= limits))  # a NaN does not pass
    return Result(None, float(errors[0]), float(errors[1:].max()), passed)


def _refusal(name: str, case: Case, dtype: str) -> str | None:
    """Says why an implementation refuses a case also when it is named; None if not."""
    named = functools.partial(jattn.explain, implementation=name)
    with jax.enable_x64(dtype == "float64"):
        try:
            case.call(named, random_inputs(case, dtype))
        except ValueError as error:
            start = f'explain(implementation="{name}"): '
            if not str(error).startswith(start):
                raise
            return str(error).removeprefix(start)
    return None


def _errors(attend: Callable, case: Case, dtype: str) -> np.ndarray:
    """Computes the error of the output, then the errors of the gradients."""
    with jax.enable_x64(dtype == "float64"):
        inputs = random_inputs(case, dtype)
        answers = _output_and_gradients(attend, case, inputs)
    with jax.enable_x64(True):
        exact = {name: _widened(np.asarray(x)) for name, x in inputs.items()}
        truths = _output_and_gradients(definition.attention, case, exact)
    pairs = zip(jax.tree.leaves(answers), jax.tree.leaves(truths), strict=True)
    pairs = [(_widened(np.asarray(x)), np.asarray(y)) for x, y in pairs]
    return np.array([np.abs(x - y).max() / np.abs(y).max() for x, y in pairs])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _output_and_gradients(attend: Callable, case: Case, inputs):
    """Computes the output, and the gradients of a weighted sum of it by the inputs."""
    floating = {name: x for name, x in inputs.items() if _is_floating(x)}
    output, transpose = jax.vjp(lambda x: case.call(attend, inputs | x), floating)
    slopes = np.cos(np.arange(output.size)).reshape(output.shape)
    return output, transpose(jnp.asarray(slopes, output.dtype))


def _is_floating(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _widened(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) if _is_floating(x) else x
