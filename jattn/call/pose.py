"""The arguments of a public function, checked and taken apart into facts and arrays."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jattn.arrays.checks import align, check_array
from jattn.arrays.positions import checked_positions
from jattn.arrays.shapes import Sizes, flatten_batch, measure, wide_dtype, widened
from jattn.call.problem import Operands, Problem, given
from jattn.call.program import Arrays, trace
from jattn.call.widen import with_wide_arrays
from jattn.dropout import Dropout
from jattn.masks import Explicit, Mask, as_mask
from jattn.masks.named import in_words, reach
from jattn.modifiers import as_modifier


def pose(
    where: str,
    query,
    key,
    value,
    *,
    mask=None,
    bias=None,
    modifier=None,
    scale=None,
    query_position=None,
    key_position=None,
    dropout=None,
) -> tuple[Problem, Operands]:
    """Checks the arguments of the function `where`, and takes them apart.

    Raises:
        ValueError: *where: what must hold, what was got, what to do*.
    """
    query, key = check_array(where, "query", query), check_array(where, "key", key)
    value = check_array(where, "value", value)
    sizes = measure(where, query, key, value)
    wide = wide_dtype(query.dtype)
    placed = {"query_position": query_position, "key_position": key_position}
    of_pairs = {"mask": mask, "modifier": modifier, **placed}
    problem, operands = pose_mask(where, sizes, query.dtype, **of_pairs)
    rate, shared, rng = _check_dropout(where, dropout)
    named = {"bias": bias, "scale": scale}
    config: Any = jax.config  # `Any`, for type checkers do not know its attributes
    precision = config.jax_default_matmul_precision
    problem = dataclasses.replace(
        problem,
        rate=rate,
        shared=shared,
        precision=precision,
        given=problem.given | {name for name, x in named.items() if x is not None},
    )
    return problem, operands._replace(
        query=flatten_batch(query, sizes),
        key=flatten_batch(key, sizes),
        value=flatten_batch(value, sizes),
        scale=_check_scale(where, scale, sizes).astype(wide),
        bias=None if bias is None else check_bias(where, bias, sizes).astype(wide),
        rng=rng,
    )


def pose_mask(
    where: str,
    sizes: Sizes,
    dtype,
    *,
    mask=None,
    modifier=None,
    query_position=None,
    key_position=None,
) -> tuple[Problem, Operands]:
    """Takes apart the arguments that decide which blocks are skipped.

    The fields of all other arguments stay None.

    Raises:
        ValueError: As `pose` does.
    """
    # Only a mask such as a `BlockTable` brings blocks with it.
    blocks = kinds = None
    are_given = given(query_position), given(key_position)
    if isinstance(mask, Mask):
        known = mask.known_blocks(where, sizes, are_given)
        blocks, kinds = known or (None, None)
    placed = checked_positions(where, sizes, query_position, key_position)
    if mask is None and modifier is None:  # nothing reads positions, so they may wrap
        placed = *placed[:2], None
    mask_program, mask_arrays = _trace_mask(where, mask, sizes)
    traced = _trace_modifier(where, modifier, sizes, wide_dtype(dtype))
    modifier_program, modifier_arrays = traced
    problem = Problem(
        sizes,
        jnp.dtype(dtype),
        mask_program,
        modifier_program,
        0.0,
        blocks,
        given=frozenset({"positions"} if any(are_given) else ()),
        near=None if any(are_given) else _near(mask, sizes),
    )
    fields: dict[str, Any] = dict.fromkeys(Operands._fields)
    fields |= zip(("query_position", "key_position", "fits"), placed, strict=True)
    arrays: dict[str, Any] = {
        "mask": mask_arrays,
        "modifier": modifier_arrays,
        "kinds": kinds,
    }
    return problem, Operands(**fields | arrays)


def _near(mask, sizes: Sizes) -> tuple[int, int] | None:
    """Says how many keys before and after its own row a query sees; see `Problem.near`.

    Rounded up to multiples of 64, the least size of a tile that is worth it; so windows of
    about one size share a program. A window of an eighth of the keys or more is not narrow:
    there large tiles are as fast. Two such tiles have all of a short call.
    """
    before, after = reach(mask)
    shorter = min(sizes.T, sizes.S) if sizes.are_known else 0
    if shorter <= 2 * 64 or 8 * (before + after) > shorter:
        return None
    before, after = (64 * math.ceil(max(x, 0) / 64) for x in (before, after))
    return before, after


def by_name(problem: Problem, mask) -> Problem:
    """Adds the mask as it was given, for an implementation that takes masks by name."""
    return dataclasses.replace(problem, named=in_words(mask))


def check_sink(where: str, sink, sizes: Sizes) -> jax.Array | None:
    """Checks the sink, and gives it for each query head, `N`."""
    if sink is None:
        return None
    sink = _check_floating(where, "sink", sink)
    if sink.shape not in ((), (sizes.N,)):
        raise ValueError(
            f"{where}: `sink` must be one number or N = ({sizes.N},), one per query head, "
            f"got shape {sink.shape}."
        )
    return jnp.broadcast_to(widened(sink), (sizes.N,))


def _trace_mask(where, mask, sizes):
    if mask is None:
        return None, Arrays()
    made = as_mask(mask, where)
    if made is not mask and isinstance(made, Explicit):
        align(where, "mask", made.array, sizes)  # its error names `mask`, not `array`
    mask = made
    elements, tree = jax.tree.flatten(mask.aligned(sizes))

    def allows(b, n, t, s, *elements):
        return mask.allows(b, n, t, s, tree.unflatten(elements))

    return trace(f"{where}: `mask`", allows, elements)


def _trace_modifier(where, modifier, sizes, wide):
    if modifier is None:
        return None, Arrays()
    modifier = as_modifier(modifier, where)
    elements, tree = jax.tree.flatten(modifier.aligned(sizes))

    def modify(logit, b, n, t, s, *elements):
        return modifier.modify(logit, b, n, t, s, tree.unflatten(elements))

    where = f"{where}: `modifier`"
    return with_wide_arrays(where, *trace(where, modify, elements, wide), wide)


def _check_floating(where, name, array):
    array = check_array(where, name, array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        cure = "convert it with `.astype`"
        if array.dtype == jnp.bool_:
            cure = "a Boolean array belongs in `mask`"
        raise ValueError(f"{where}: `{name}` must be floating, got {array.dtype}; {cure}.")
    return array


def check_bias(where: str, bias, sizes: Sizes) -> jax.Array:
    """Checks the bias, and gives it as BNTS, each axis in full or 1."""
    return align(where, "bias", widened(_check_floating(where, "bias", bias)), sizes)


def _check_scale(where, scale, sizes):
    # With H = 0 all products are 0, whatever the scale.
    if scale is None:
        return jnp.asarray(sizes.H**-0.5 if sizes.H else 1.0)
    scale = check_array(where, "scale", scale)
    real = any(jnp.issubdtype(scale.dtype, kind) for kind in (jnp.floating, jnp.integer))
    if scale.shape != () or not real:
        raise ValueError(
            f"{where}: `scale` must be one real number, got "
            f"{scale.dtype}{list(scale.shape)}; a scale per head belongs in `modifier`."
        )
    return scale


@functools.cache  # a call must not trace it each time
def _raw_key(implementation: str) -> tuple[int, ...]:
    """Gives the shape of a key of the old style, `jax.random.PRNGKey(seed)`."""
    make = functools.partial(jax.random.PRNGKey, impl=implementation)
    return jax.eval_shape(make, 0).shape


def _check_dropout(where, dropout):
    if dropout is None:
        return 0.0, False, None
    if not isinstance(dropout, Dropout):
        raise ValueError(
            f"{where}: `dropout` must be jattn.Dropout(rate, rng), got "
            f"{type(dropout).__name__}."
        )
    rng = getattr(dropout.rng, "rng", dropout.rng)  # of a `Numbered`
    if rng is None and dropout.rate == 0:
        return 0.0, False, None
    dtype, shape = getattr(rng, "dtype", None), getattr(rng, "shape", ())
    is_key = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
    config: Any = jax.config  # as in `pose`
    raw = _raw_key(config.jax_default_prng_impl)
    if not (shape == () if is_key else dtype == jnp.uint32 and shape == raw):
        got = type(rng).__name__ if dtype is None else f"{dtype}{list(shape)}"
        raise ValueError(
            f"{where}: `dropout` must have one random key as `rng`, got {got}; give "
            f"`jax.random.key(seed)`, or one of those that `jax.random.split` makes."
        )
    return dropout.rate, dropout.shared, dropout.rng
