"""A pointwise function of pairs, evaluated on a tile inside a kernel.

Mosaic GPU, the compiler of the kernels, keeps a tile in the registers of 128 threads and
supports elementwise operations on it. All values here are whole tiles; the compiler
computes only once what is equal along a row or a column. `objection` says beforehand what
a kernel cannot evaluate.

Some operations are rewritten in others: those that Mosaic lacks, and those for which the
device has a fast instruction that is not precise enough.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jattn.call.jaxprs import CALLS, RULES, called, walk
from jattn.implementations import joint

_ARITHMETIC = {"abs", "add", "div", "max", "min", "mul", "neg", "rem", "sign", "sub"}
_REAL = {"ceil", "exp", "exp2", "expm1", "floor", "integer_pow", "is_finite", "log"}
_REAL |= {"log1p", "logistic", "round", "rsqrt", "sqrt", "square", "tanh"}
_LOGIC = {"and", "eq", "ge", "gt", "le", "lt", "ne", "not", "or", "xor"}
_BITS = {"shift_left", "shift_right_arithmetic", "shift_right_logical"}
_OTHER = {"clamp", "convert_element_type", "copy", "select_n", "stop_gradient"}
_SAME = {"broadcast_in_dim", "copy", "reshape", "squeeze", "stop_gradient"}
_TAKEN = _ARITHMETIC | _REAL | _LOGIC | _BITS | _OTHER | _SAME
_DTYPES, _NARROW = {"bool", "int32", "uint32", "float32"}, {"bfloat16", "float16"}
LOG2_E = math.log2(math.e)  # exp(x) = 2^(x · log₂ e)
_SMALL = 0.01  # tanh x = x − x³ / 3 + …, and there x³ / 3 is 3e-7
_LARGE = 2.0**23  # from here on every float32 is an integer


def objection(equations) -> str | None:
    """Says in a clause why a kernel cannot evaluate the equations; None if it can."""
    return joint.objection(equations, _TAKEN, _dtypes)


def _dtypes(name: str) -> set[str]:
    # Narrow numbers are converted; all else is computed in float32, as logits are.
    return _DTYPES | _NARROW if name in _SAME | {"convert_element_type"} else _DTYPES


def evaluate(jaxpr, inputs, shape, small=()) -> jax.Array:
    """Evaluates a jaxpr of scalars on tiles of a shape; it can be differentiated.

    An input that the result does not depend on may be None. `small` gives the places of
    inputs that are integers of few bits, see `joint.distances`.
    """
    floats = {jaxpr.invars[i]: inputs[i].astype(jnp.float32) for i in small}
    (result,) = _evaluate(jaxpr, inputs, shape, joint.distances(jaxpr, floats))
    return result


def _evaluate(jaxpr, inputs, shape, known) -> list:
    def step(equation, operands):
        if equation.outvars[0] in known:
            return [known[equation.outvars[0]]]
        if any(x is None for x in operands):  # the result does not depend on it
            return [None] * len(equation.outvars)
        inner = called(equation)
        if inner is not None:
            return _evaluate(inner[0], operands, shape, {})
        if equation.primitive.name in _SAME - {"stop_gradient"}:
            return operands[:1]
        bind = lambda *xs: equation.primitive.bind(
            *xs, **equation.primitive.get_bind_params(equation.params)
        )
        if equation.primitive.name in RULES:  # under vmap it keeps its custom derivative
            return list(jax.vmap(jax.vmap(bind))(*operands))
        result = bind(*operands)
        return list(result) if equation.primitive.multiple_results else [result]

    def literal(atom):
        return jnp.full(shape, atom.val, getattr(atom.aval, "dtype", None))

    return walk(jaxpr, (), inputs, step, literal)


def plain(function, *arguments):
    """Calls a function by operations that Mosaic lowers, its derivatives included.

    The function is traced first, so what `jax.vjp` does in it is equations like others.
    """
    closed, types = jax.make_jaxpr(function, return_shape=True)(*arguments)
    results = _plain(closed.jaxpr, closed.consts, jax.tree.leaves(arguments))
    return jax.tree.unflatten(jax.tree.structure(types), results)


def _plain(jaxpr, constants, inputs) -> list:
    def step(equation, operands):
        primitive = equation.primitive
        inner = called(equation, CALLS | RULES)
        if inner is not None:
            return _plain(inner[0], inner[1], operands)
        if primitive.name in _REWRITTEN:
            return [_REWRITTEN[primitive.name](*operands)]
        if equation.params.get("new_dtype") == jnp.bool_:  # jax 0.11 does not narrow to it
            return [operands[0] != 0]
        if primitive.name == "integer_pow":
            return [_integer_pow(operands[0], equation.params["y"])]
        result = primitive.bind(*operands, **primitive.get_bind_params(equation.params))
        return list(result) if primitive.multiple_results else [result]

    return walk(jaxpr, constants, inputs, step, lambda literal: literal.val)


def _tanh(x):
    # tanh x = 1 − 2 / (e²ˣ + 1); the device's own tanh has 11 correct bits only. For a
    # large x, 2^… is ∞ and the result is 1. A division takes many instructions, and the
    # inverse square root one. The half saves one more.
    root = lax.rsqrt(jnp.exp2(x * (2 * LOG2_E) - 1) + 0.5)
    # The difference is wrong by 4e-7 at most where it is small, however small it is.
    return jnp.where(jnp.abs(x) < _SMALL, x, 1 - root * root)


def _div(x, y):
    if not jnp.issubdtype(jnp.result_type(y), jnp.floating):
        return lax.div(x, y)
    # One inverse for each number, row or column, and one product for each pair. It needs
    # an inverse that float32 holds: the result is 0 for |y| > 2¹²⁶ on the device, which
    # has no subnormal numbers here, and ∞ or NaN for |y| < 2⁻¹²⁸.
    return x * (1 / y)


def _integer_pow(x, y: int):
    # Mosaic lacks the powers 0 and 1, and those below −1. Derivatives have them.
    if y < 0:
        return 1 / _integer_pow(x, -y)
    return lax.integer_pow(x, y) if y > 1 else (jnp.ones_like(x), x)[y]


def _floor(x):
    whole = x.astype(jnp.int32).astype(x.dtype)  # rounds towards 0
    floor = whole - jnp.where(whole > x, 1, 0).astype(x.dtype)
    # NaN and ∞ are not smaller than 2²³, so they stay what they are.
    return jnp.where(jnp.abs(x) < _LARGE, floor, x)


def _log1p(x):
    # log(1 + x) · x / ((1 + x) − 1): the two errors of rounding 1 + x cancel (Kahan).
    more = 1 + x
    exact = jnp.log(more) * (x / jnp.where(more == 1, 1, more - 1))
    return jnp.where(more == 1, x, jnp.where(more == jnp.inf, more, exact))


def _expm1(x):
    # (eˣ − 1) · x / log eˣ, likewise.
    power = jnp.exp(x)
    plain = (power == jnp.inf) | (power < 0.25)  # where nothing cancels
    same = power == 1
    exact = (power - 1) * (x / jnp.where(same | plain, 1, jnp.log(power)))
    return jnp.where(same, x, jnp.where(plain, power - 1, exact))


_REWRITTEN = {
    "add_any": jnp.add,  # the sum of cotangents
    "ceil": lambda x: -_floor(-x),
    "copy": lambda x: x,
    "div": _div,
    "expm1": _expm1,
    "floor": _floor,
    "is_finite": lambda x: jnp.abs(x) < jnp.inf,
    "log1p": _log1p,
    "not": lambda x: x ^ (True if x.dtype == jnp.bool_ else -1),
    "stop_gradient": lambda x: x,
    "tanh": _tanh,
}
