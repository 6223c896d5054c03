"""The positions of queries and keys, in int32."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jattn.arrays.checks import check_integers, fits, is_known
from jattn.arrays.shapes import Sizes


def positions(where: str, name: str, position, sizes: Sizes, axis: str) -> jax.Array | None:
    """Checks the positions of rows (axis T) or columns (axis S): integers, or None.

    They are an integer, the position of the first row, or one integer for each row, `T`
    or `BT`. The result has one batch axis, B or 1, unless it is one integer. Known
    positions become int32 where int32 holds them.
    """
    if position is None:
        return None
    length = getattr(sizes, axis)
    array = check_integers(where, name, position)
    per_example = bool(sizes.batch) and array.shape == sizes.batch
    is_unclear = per_example and array.shape == (length,) != (1,)
    known = (), (length,), (*sizes.batch, length), (1, length)
    if is_unclear or array.shape not in known:
        advice = "" if length == 1 else f" + jnp.arange({length})"
        advice = f"; for a position of each example, write `{name}[:, None]{advice}`"
        if is_unclear:
            advice += f", and for one of each {axis}, `{name}[None]`"
        raise ValueError(
            f"{where}: `{name}` must be an integer or have shape {axis} = ({length},) or "
            f"B{axis} = {(*sizes.batch, length)}, got {array.shape}"
            f"{advice if per_example else ''}."
        )
    # Not −1 for the examples: no size follows from arrays without rows.
    return array if array.ndim == 0 else array.reshape(math.prod(array.shape[:-1]), length)


def checked_positions(where: str, sizes: Sizes, query_position, key_position):
    """Checks the positions of queries and keys, of each side and together.

    Returns and raises as `positions` and `check_range` do.
    """
    query_position = positions(where, "query_position", query_position, sizes, "T")
    key_position = positions(where, "key_position", key_position, sizes, "S")
    return check_range(where, sizes, query_position, key_position)


def check_range(where: str, sizes: Sizes, query_position, key_position):
    """Checks that int32 holds every position and every difference of two.

    Returns:
        The positions of queries and of keys, int32 or None; and a traced Boolean that says
        whether all fit, or None where that is known.

    Raises:
        ValueError: If they are known and do not fit.
    """
    sides = {"query_position": ("T", query_position), "key_position": ("S", key_position)}
    known, ends, placed = [], [], []
    for name, (axis, position) in sides.items():
        length = getattr(sizes, axis)
        # Nothing is checked for symbolic lengths, nor where there are no positions.
        if not isinstance(length, int) or length == 0:
            placed.append(position if position is None else position.astype(jnp.int32))
            continue
        first, last, inside = _ends(position, length)
        if inside is False:
            raise ValueError(
                f"{where}: `{name}` must put all {axis}={length} positions between −2³¹ "
                f"and 2³¹ − 1, got {first} to {last}; count from a nearer one."
            )
        known.append(inside)
        ends.append((first, last))
        placed.append(position if position is None else position.astype(jnp.int32))
    if len(ends) == 2 and any(x is not None for x in placed):
        (t_first, t_last), (s_first, s_last) = ends
        known += [_differ(t_last, s_first), _differ(s_last, t_first)]
        if any(x is False for x in known):
            raise ValueError(
                f"{where}: `query_position` and `key_position` must differ by less than "
                f"2³¹, got {t_first} to {t_last} and {s_first} to {s_last}; count both "
                f"from nearer ones."
            )
    traced = [x for x in known if not isinstance(x, bool | np.bool_)]
    return *placed, functools.reduce(jnp.logical_and, traced) if traced else None


def _ends(position, length: int):
    """Gives the first and the last position, and whether int32 holds both."""
    if position is None:
        return 0, length - 1, True
    if is_known(position):
        array = np.asarray(position)
        first, last = int(array.min()), int(array.max())
        last = last if array.ndim else last + length - 1
        return first, last, first >= -(2**31) and last < 2**31
    inside = fits(position)
    if position.ndim:
        narrow = position.astype(jnp.int32)
        return narrow.min(), narrow.max(), inside
    first = position.astype(jnp.int32)
    return first, first + (length - 1), inside & (first <= 2**31 - length)


def _differ(high, low):
    """Says whether int32 holds high − low, where high ≥ low; else True."""
    if isinstance(high, int) and isinstance(low, int):
        return high - low < 2**31
    high, low = jnp.int32(high), jnp.int32(low)
    # A difference that does not fit wraps around to a negative number.
    return (high < low) | (high - low >= 0)


def spread_positions(position: jax.Array | None, length: int) -> jax.Array:
    """Gives the position of each row or column, B or 1 by length; by default 0, 1, …."""
    count = jnp.arange(length, dtype=jnp.int32)[None]
    if position is None:
        return count
    return position + count if position.ndim == 0 else position
