"""A pointwise function of pairs, evaluated on a tile inside a kernel.

Mosaic, the compiler of the kernels, supports operations on arrays of two axes. So a value
here is a tile of keys × queries, one row or one column of it, or a single number. An
operation first spreads its operands to one shape. `objection` says beforehand what a kernel
cannot evaluate.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jattn.call.jaxprs import RULES, called, walk
from jattn.dropout import keep
from jattn.implementations import joint
from jattn.implementations.shared import rounded

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


class PairTile:
    """A tile whose pairs are evaluated from the arrays that it has read.

    Attributes:
        call: The call, with its `problem` and whether it is emulated, `interpret`.
        pairs: The programs that join a query and a key.
        shape: The shape of the tile.
        key: The number of each key: keys × 1 or 1 × keys, as the tile lies.
        read: The arrays that masks, modifiers, bias and dropout read.
    """

    call: Any
    pairs: joint.Pairs
    shape: tuple[int, int]
    key: jax.Array
    read: Any

    @property
    def active(self):
        """Gives the arrays in which the logits are differentiated, beside the products."""
        return self.read.modifier, self.read.bias

    def logits(self, products, active=None):
        """Computes the logits from scaled products: applies the modifier, then the bias.

        `active`, if given, replaces the arrays that were read.
        """
        modifier, bias = self.active if active is None else active
        logits = products
        if self.pairs.modifier is not None:
            inputs = [products, *self._index, *modifier]
            small = (3, 4) if self.pairs.counts else ()  # t and s
            logits = evaluate(self.pairs.modifier.jaxpr, inputs, small)
            logits = spread(logits.astype(products.dtype), self.shape)
            logits = rounded(logits) if self.call.interpret else logits
        return logits if bias is None else logits + bias

    def allowed(self, has_padding: bool):
        """Says which pairs count: the mask allows them, and the key is not padding."""
        allowed = None
        if self.pairs.mask is not None:
            allowed = evaluate(self.pairs.mask.jaxpr, [*self._index, *self.read.mask])
            allowed = spread(allowed, self.shape)
        if has_padding:
            inside = spread(self.inside, self.shape)
            allowed = inside if allowed is None else allowed & inside
        return allowed

    def kept(self):
        """Says which weights dropout keeps; None without dropout."""
        if self.read.words is None:
            return None
        queries, keys = (spread(x, self.shape) for x in self.read.words)
        return keep(queries, keys, self.call.problem.rate)

    @property
    def inside(self):
        """Says which keys are no padding, in the shape of their numbers."""
        return self.key < self.call.problem.sizes.S

    @property
    def _index(self):
        at = self.read.index
        return (*at[:3], self.key) if self.pairs.counts_keys else at


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
