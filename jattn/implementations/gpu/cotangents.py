"""The cotangents of operands, before and after the kernels of the backward pass."""

import jax
import jax.numpy as jnp

from jattn.call.problem import Operands, Problem
from jattn.implementations import joint
from jattn.implementations.gpu import layout
from jattn.implementations.shared import isolate, sum_all
from jattn.implementations.sums import Sums

_POWER = 126  # 2 to it and its inverse are normal float32; a GPU takes other ones for 0


def share_kernel(problem: Problem, operands: Operands) -> bool:
    """Says whether the registers of one kernel hold both d_key and d_value.

    Each has 64 rows in 128 threads: half as many registers as a head has numbers. What a
    modifier needs for its derivative takes registers too.
    """
    plain = problem.modifier is None and operands.bias is None
    return (256 if plain else 128) >= problem.sizes.H + problem.sizes.D


def representable(problem: Problem, cotangents: Sums):
    """Scales cotangents that float16 would round to 0 or ∞; gives also the inverse factor.

    The factor is a power of 2, so nothing else changes: backward is linear. It makes the
    largest d_output about 1, but lets no d_total grow to more than 2³², so that no
    product with it leaves float32.
    """
    if problem.dtype != jnp.float16:
        return jnp.ones((), problem.wide), cotangents
    total = _magnitude(largest(cotangents.total), 0)
    power = _magnitude(largest(cotangents.output), 0)
    factor, inverse = _factors(jnp.maximum(power, total - 32))
    return factor, Sums(*(x * inverse for x in cotangents))


def room(problem: Problem, operands: Operands, rows, outputs, cotangents: Sums):
    """Scales cotangents of logits to numbers that float16 holds; gives also the factor.

    These are rounded to float16 before they are multiplied by keys and queries. None is
    larger than |d_logsumexp| and twice |vₛ · d_output|; this becomes 2¹⁵, as much as
    float16 has room for, so that few are rounded to 0. The factor is again a power of 2.
    """
    if problem.dtype != jnp.float16:
        return jnp.ones((), problem.wide), rows
    top, level, share, rest = rows
    value = largest(operands.value).astype(problem.wide)
    products = value * largest(jnp.sum(jnp.abs(cotangents.output), axis=-1))
    most = largest(cotangents.total * outputs.total) + 2 * products / (1 - problem.rate)
    factor, inverse = _factors(_magnitude(most, 15) - 15)
    return factor, (top, level, share * inverse, rest * inverse)


def largest(array):
    """Gives the largest size of the numbers that are finite."""
    return jnp.max(jnp.where(jnp.isfinite(array), jnp.abs(array), 0), initial=0)


def _magnitude(number, otherwise):
    """Computes log₂ of a number, rounded up; `otherwise` for 0."""
    return jnp.where(number > 0, jnp.ceil(jnp.log2(number)), otherwise)


def _factors(power):
    """Gives a power of 2 and its inverse, made of bits: exp2 rounds on a CPU."""
    power = jnp.clip(power, -_POWER, _POWER).astype(jnp.int32)
    bits = lambda x: jax.lax.bitcast_convert_type((x + 127) << 23, jnp.float32)
    return bits(power), bits(-power)


def of_operands(problem: Problem, operands: Operands, results, flags, wanted) -> Operands:
    """Makes the cotangents of the operands from those that the kernels computed.

    A kernel gives Σₛ d_logitₛ kₛ for each query q, multiplied by the scale's sign only.
    From it
        d_q = scale · Σₛ d_logitₛ kₛ        d_scale = Σ q · Σₛ d_logitₛ kₛ
    """
    d_query, d_key, d_value, d_rows, d_columns = results
    sizes = problem.sizes
    heads = lambda x, size: jnp.sum(
        x[:, : sizes.S, :, :size].reshape(sizes.B, sizes.S, sizes.K, sizes.G, size), axis=3
    )
    d_query = d_query[:, : sizes.T, :, : sizes.H]
    finite, _ = isolate(operands.query)
    _, numbers, _ = layout.numbers(problem, operands)
    d_modifier, d_bias = _read_cotangents(problem, operands, flags, (d_rows, d_columns))
    nothing = jax.tree.map(lambda _: None, wanted)
    return nothing._replace(
        query=d_query * operands.scale,
        key=heads(d_key, sizes.H) * numbers[0],
        value=heads(d_value, sizes.D) / (1 - problem.rate),
        scale=sum_all(d_query * finite.astype(problem.wide)),
        bias=d_bias,
        modifier=d_modifier,
    )


def _read_cotangents(problem: Problem, operands: Operands, flags, vectors):
    """Computes the cotangents of the operands that modifier and bias are made of."""
    d_rows, d_columns = map(iter, vectors)
    _, read = layout.read(problem, operands)
    found = []
    for like, flag in zip(*map(jax.tree.leaves, (read, flags)), strict=True):
        if flag and layout.form(like) == "column":
            found.append(next(d_columns))
        elif flag:
            cotangent = next(d_rows)  # padding is hidden, and so has the cotangent 0
            number = layout.form(like) == "number"
            found.append(jnp.sum(cotangent, axis=2) if number else cotangent)
    return joint.read_cotangents(problem, operands, flags, found, layout.arrange)
