"""A pointwise function of pairs, evaluated on a tile inside a kernel.

Mosaic, the compiler of the kernels, supports operations on arrays of two axes. So a value
here is a tile of keys × queries, one row or one column of it, or a single number. An
operation first spreads its operands to one shape. `objection` says beforehand what a kernel
cannot evaluate.
"""

import jax
import jax.numpy as jnp

from jattn.call.jaxprs import RULES, called, walk
from jattn.implementations import joint

# The operations that Mosaic supports on two axes, in float32 and int32.
_ARITHMETIC = {"abs", "add", "div", "max", "min", "mul", "neg", "rem", "sign", "sub"}
_REAL = {"ceil", "cos", "erf", "exp", "exp2", "floor", "integer_pow", "is_finite", "log"}
_REAL |= {"log1p", "logistic", "pow", "round", "rsqrt", "sin", "sqrt", "square", "tan"}
_REAL |= {"tanh"}
_LOGIC = {"and", "eq", "ge", "gt", "le", "lt", "ne", "not", "or", "xor"}
_BITS = {"shift_left", "shift_right_arithmetic", "shift_right_logical"}
_OTHER = {"clamp", "convert_element_type", "copy", "select_n", "stop_gradient"}
_TAKEN = _ARITHMETIC | _REAL | _LOGIC | _BITS | _OTHER
_SAME = {"broadcast_in_dim", "reshape", "squeeze"}  # these leave a single number as it is
_DTYPES = {"bool", "int32", "uint32", "float32", "bfloat16"}


def objection(equations) -> str | None:
    """Says in a clause why a kernel cannot evaluate the equations; None if it can."""
    return joint.objection(equations, _TAKEN | _SAME, lambda name: _DTYPES)


def evaluate(jaxpr, inputs, small=()) -> jax.Array:
    """Evaluates a jaxpr of scalars on inputs of two axes, which spread to a tile.

    An input that the result does not depend on may be None. `small` gives the places of
    inputs that are integers of few bits, so that the sum of two is exact in float32. If a
    function converts a distance of two such integers to float, the distance is computed in
    float from the start, which takes half the instructions.
    """
    floats = {jaxpr.invars[i]: inputs[i] for i in small if inputs[i] is not None}
    floats = {var: x.astype(jnp.float32) for var, x in floats.items()}
    (result,) = _evaluate(jaxpr, inputs, floats)
    return result


def spread(array, shape):
    """Repeats an array to a shape."""
    if array.shape == shape:
        return array
    if array.dtype == jnp.bool_:  # Mosaic spreads numbers, but not Booleans
        return jnp.broadcast_to(array.astype(jnp.int32), shape) != 0
    return jnp.broadcast_to(array, shape)


def _same_shape(x, y):
    """Repeats two arrays to one shape."""
    shape = jnp.broadcast_shapes(x.shape, y.shape)
    return spread(x, shape), spread(y, shape)


def _evaluate(jaxpr, inputs, floats=()) -> list:
    distances = joint.distances(jaxpr, dict(floats), _same_shape)

    def step(equation, operands):
        if equation.outvars[0] in distances:
            return [distances[equation.outvars[0]]]
        if any(x is None for x in operands):  # the result does not depend on it
            return [None] * len(equation.outvars)
        return _apply(equation, operands)

    def literal(atom):
        return jnp.full((1, 1), atom.val, getattr(atom.aval, "dtype", None))

    return walk(jaxpr, (), inputs, step, literal)


def _apply(equation, operands) -> list:
    primitive, name = equation.primitive, equation.primitive.name
    inner = called(equation)
    if inner is not None:
        return _evaluate(inner[0], operands)
    if name in _SAME:
        return operands[:1]
    shape = jnp.broadcast_shapes(*(x.shape for x in operands))
    is_real = jnp.issubdtype(operands[0].dtype, jnp.floating)
    if name == "div" and is_real and operands[1].shape != shape:
        # A division takes many instructions. One for each row or column, times a product
        # for each pair, is cheaper than one for each pair.
        inverse = spread(1 / operands[1], shape)
        return [spread(operands[0], shape) * inverse]
    operands = [spread(x, shape) for x in operands]
    bind = lambda *xs: primitive.bind(*xs, **primitive.get_bind_params(equation.params))
    if name in RULES:  # binding it under vmap keeps its custom derivative
        return list(jax.vmap(jax.vmap(bind))(*operands))
    result = bind(*operands)
    return list(result) if primitive.multiple_results else [result]
