"""A modifier whose arrays are narrower than its logits, computed as wide as these.

The cotangent of an array is a sum over pairs, and JAX adds it up in the dtype of what is
indexed or spread: in bfloat16, where 256 + 1 is 256. So the arrays are widened before the
program reads them, and what follows from them stays wide until it is rounded by name, as
by `.astype("bfloat16")`. Each number is the same, and its gradient is rounded once.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from jattn.call.jaxprs import called, walk
from jattn.call.program import Arrays, Program, trace

# These compute the same of wide numbers, and none of their parameters names a dtype.
_MOVING = {"broadcast_in_dim", "concatenate", "copy", "dynamic_slice", "gather", "reshape"}
_MOVING |= {"rev", "select_n", "slice", "squeeze", "transpose"}
_ARITHMETIC = {"abs", "add", "clamp", "div", "max", "min", "mul", "neg", "sign", "sub"}
_REAL = {"cos", "exp", "exp2", "expm1", "integer_pow", "log", "log1p", "logistic", "pow"}
_REAL |= {"rsqrt", "sin", "sqrt", "square", "tanh"}
_COMPARING = {"eq", "ge", "gt", "is_finite", "le", "lt", "ne"}
_TAKEN = _MOVING | _ARITHMETIC | _REAL | _COMPARING


def with_wide_arrays(
    where: str, program: Program, arrays: Arrays, wide
) -> tuple[Program, Arrays]:
    """Gives a modifier that reads its arrays in the dtype `wide` of the logits."""
    if not any(_is_narrow(x.dtype, wide) for x in jax.tree.leaves(arrays)):
        return program, arrays
    captured, aligned = jax.tree.map(lambda x: _widen(x, wide), arrays)

    def modify(*scalars):
        (result,) = _computed(program.jaxpr, captured, scalars, wide)
        return jnp.asarray(result)

    return trace(where, modify, aligned, wide)


def _computed(jaxpr, captured, scalars, wide) -> list:
    """Evaluates a jaxpr, with wide arrays in place of narrow ones."""
    widen = functools.partial(_widen, wide=wide)

    def step(equation, operands):
        if (inner := called(equation)) is not None:
            constants = [widen(jnp.asarray(x)) for x in inner[1]]
            return _computed(inner[0], constants, operands, wide)
        name, params = equation.primitive.name, equation.params
        dtypes = [getattr(x.aval, "dtype", None) for x in equation.invars]
        if name == "convert_element_type":
            return [_converted(operands[0], dtypes[0], params["new_dtype"], wide)]
        if name not in _TAKEN:  # it sees what it would have seen
            pairs = zip(operands, dtypes, strict=True)
            operands = [x.astype(y) if _is_narrow(y, wide) else x for x, y in pairs]
        bind = equation.primitive.bind
        results = bind(*operands, **equation.primitive.get_bind_params(params))
        results = results if equation.primitive.multiple_results else [results]
        return [widen(x) for x in results]

    return walk(jaxpr, captured, scalars, step, lambda x: _literal(x, wide))


def _converted(x, dtype, new, wide):
    """Converts a number that had one dtype to another; it is wide where that is narrow."""
    if not _is_narrow(new, wide):
        return lax.convert_element_type(x, new)
    if jnp.issubdtype(dtype, jnp.floating) and not _is_narrow(dtype, wide):
        x = lax.convert_element_type(x, new)  # rounded by name
    return lax.convert_element_type(x, wide)


def _literal(literal: Literal, wide):
    dtype = getattr(literal.aval, "dtype", None)
    return jnp.asarray(literal.val, wide) if _is_narrow(dtype, wide) else literal.val


def _widen(x, wide):
    return x.astype(wide) if _is_narrow(getattr(x, "dtype", None), wide) else x


def _is_narrow(dtype, wide) -> bool:
    """Says whether a dtype is floating, and narrower than `wide`."""
    is_float = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    return is_float and jnp.dtype(dtype).itemsize < jnp.dtype(wide).itemsize
