"""The letters that every shape is written in, and the checks at the door.

    B batch   T query length   S key length   N query heads   K key/value heads
    G = N/K   H head size of query and key    D head size of value and output

`query` is `BTNH`, `key` is `BSKH`, `value` is `BSKD`, the output is `BTND`; logits and
weights are `BNTS`. The batch may be absent, or be several axes: inside the library it
is always the one axis B.
"""

import contextlib
import dataclasses
import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

FLOATS = ("float16", "bfloat16", "float32", "float64")


def wide_dtype(dtype) -> jnp.dtype:
    """The precision of logits, softmax and sums: float32 at least."""
    return jnp.dtype("float64" if dtype == jnp.float64 else "float32")


def is_one(length) -> bool:
    """Whether a length is known to be one; symbolic ones never are."""
    return isinstance(length, int) and length == 1


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What each letter stands for in one call."""

    batch: tuple[int, ...]
    T: int
    S: int
    N: int
    K: int
    H: int
    D: int

    @property
    def B(self) -> int:
        """The number of examples, all batch axes together."""
        return math.prod(self.batch)

    @property
    def G(self) -> int:
        """The number of query heads that share one key/value head."""
        return self.N // self.K if self.K else 0

    @property
    def are_known(self) -> bool:
        """Whether no size is symbolic."""
        return all(isinstance(size, int) for size in (*self.BNTS, self.K, self.H, self.D))

    @property
    def BNTS(self) -> tuple[int, ...]:
        """The shape of the logits and the weights."""
        return self.B, self.N, self.T, self.S


def measure(where: str, query, key, value) -> Sizes:
    """Reads the letters off the inputs, or says which input does not fit."""
    arrays = {"query": query, "key": key, "value": value}
    _check_dtypes(where, arrays)
    _check_ranks(where, arrays)
    *batch, T, N, H = query.shape
    *key_batch, S, K, key_H = key.shape
    hint = _layout_hint(query, key)
    if tuple(key_batch) != tuple(batch):
        raise ValueError(
            f"{where}: `key` has batch axes {tuple(key_batch)} in {key.shape}, but "
            f"`query` has {tuple(batch)} in {query.shape}; give both the same batch axes."
        )
    if key_H != H:
        raise ValueError(
            f"{where}: `key` has shape {key.shape} = …SKH, but H={H} in `query`; "
            f"project both to the same head size."
        )
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"{where}: `value` has shape {value.shape} = …SKD, but `key` has "
            f"{key.shape} = …SKH; all axes but the last must agree."
        )
    if K == 0 or N % K:
        raise ValueError(
            f"{where}: num_heads N={N} in `query` {query.shape} = …TNH must be a multiple "
            f"of num_kv_heads K={K} in `key` {key.shape} = …SKH; repeat or regroup the "
            f"keys.{hint}"
        )
    return Sizes(tuple(batch), T=T, S=S, N=N, K=K, H=H, D=value.shape[-1])


def check_array(where: str, name: str, array) -> jax.Array:
    """Gives the argument as a JAX array that holds the same numbers.

    Raises:
        ValueError: If it is no array, or holds an integer that JAX would cut to 32 bits.
    """
    try:
        whole = jnp.asarray(array)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: `{name}` must be an array, got {type(array).__name__}; {error}"
        ) from None
    except OverflowError:
        raise ValueError(_too_wide(where, name, array)) from None
    given = getattr(array, "dtype", whole.dtype)
    is_cut = given != whole.dtype and jnp.issubdtype(given, jnp.integer)
    if is_cut and not fits(np.asarray(array), whole.dtype):
        raise ValueError(_too_wide(where, name, array))
    return whole


def _too_wide(where: str, name: str, array) -> str:
    got = str(array) if np.ndim(array) == 0 else f"{np.min(array)}…{np.max(array)}"
    return (
        f"{where}: `{name}` must hold integers of 32 bits while JAX's `jax_enable_x64` is "
        f"off, got {got}; number them anew from 0, or switch it on."
    )


def check_integers(where: str, name: str, array) -> Any:
    """Gives an argument of integers as int32, or as it is where that may not hold it.

    It is NumPy's where it was no array of JAX.

    Raises:
        ValueError: If it holds anything else, or an integer that JAX would cut to 32 bits.
    """
    checked = check_array(where, name, array)
    if not jnp.issubdtype(checked.dtype, jnp.integer):
        raise ValueError(
            f"{where}: `{name}` must hold integers, got {checked.dtype}; convert it with "
            f"`.astype(int)`."
        )
    with contextlib.suppress(TypeError):  # of a list that holds traced numbers
        # Inside `jit`, JAX would make a traced array of one that is known.
        array = checked if isinstance(array, jax.Array) else np.asarray(array)
    array = array if hasattr(array, "dtype") else checked
    if np.can_cast(array.dtype, np.int32) or (is_known(array) and fits(array)):
        return array.astype(np.int32)
    return array


def is_known(array) -> bool:
    """Says whether the numbers of an array can be read now."""
    return not isinstance(array, jax.core.Tracer)


def fits(array, dtype=np.int32):
    """Says whether an integer type, int32 by default, holds every number of an array."""
    if np.can_cast(array.dtype, dtype):
        return True
    ends = jnp.iinfo(dtype)
    low = True if jnp.issubdtype(array.dtype, jnp.unsignedinteger) else array >= ends.min
    return ((array <= ends.max) & low).all()


def saturate(array: jax.Array) -> jax.Array:
    """Gives integers as int32, those beyond its ends as the ends."""
    if array.dtype == jnp.int32:
        return array
    ends = jnp.iinfo(jnp.int32)
    unsigned = jnp.issubdtype(array.dtype, jnp.unsignedinteger)
    return array.clip(0 if unsigned else ends.min, ends.max).astype(jnp.int32)


def flatten_batch(array: jax.Array, sizes: Sizes) -> jax.Array:
    """The same array with one batch axis B, however many it came with."""
    trailing = array.shape[len(sizes.batch) :]
    flat = array.reshape(sizes.B, *trailing)
    chex.assert_rank(flat, 1 + len(trailing))
    return flat


def align(where: str, name: str, array, sizes: Sizes, axes: str = "NTS") -> jax.Array:
    """The array as four axes BNTS, each of the letter's size or 1.

    `axes` names the last axes of `array`; the axes before them are the batch's, absent
    or present as in the inputs. Any axis may be 1 and leading ones may be left out.
    """
    array = check_array(where, name, array)
    full = (*sizes.batch, *(getattr(sizes, letter) for letter in axes))
    padded = (1,) * (len(full) - array.ndim) + array.shape
    fits = len(padded) == len(full) and all(
        have == 1 or have == want for have, want in zip(padded, full, strict=True)
    )
    cure = _per_example(array, sizes) if axes == "NTS" else None
    if fits and cure and (array.ndim == 2 or array.dtype == jnp.bool_):
        other = "query" if array.ndim == 2 else "head"
        raise ValueError(
            f"{where}: `{name}` of shape {array.shape} may be meant for each example or "
            f"for each {other}, as there are as many of both; write `{name}{cure}` or "
            f"`{name}[None]`."
        )
    if not fits:
        letters = ("B" if sizes.batch else "") + axes
        advice = f"write `{name}{cure}`" if cure else "give each axis its size or 1"
        raise ValueError(
            f"{where}: `{name}` must broadcast to {letters} = {full}, got shape "
            f"{array.shape}; {advice}."
        )
    batch, rest = padded[: len(sizes.batch)], padded[len(sizes.batch) :]
    array = array.reshape(padded)
    if all(size == 1 for size in batch):
        batch = (1,)
    else:  # several batch axes, some of them broadcast: count them as one
        array = jnp.broadcast_to(array, (*sizes.batch, *rest))
        batch = (sizes.B,)
    sides = dict(zip(axes, rest, strict=True))
    return array.reshape(*batch, *(sides.get(letter, 1) for letter in "NTS"))


def _per_example(array: jax.Array, sizes: Sizes) -> str | None:
    """Gives the index that makes BS or BTS broadcast to BNTS; None where it is neither."""
    count = len(sizes.batch)
    rest = array.shape[count:]
    known = rest in ((sizes.S,), (sizes.T, sizes.S), (1, sizes.S), (sizes.T, 1))
    if not known or array.shape[:count] != sizes.batch or math.prod(sizes.batch) == 1:
        return None
    return f"[{', '.join([':'] * count + ['None'] * (3 - len(rest)))}]"


def positions(where: str, name: str, position, sizes: Sizes, axis: str) -> jax.Array | None:
    """Checks the positions of rows (axis T) or columns (axis S): integers, or None.

    They are where the first one stands, an integer, or one integer for each, `T` or `BT`;
    the latter with one batch axis, B or 1. Those that are known are int32.
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
    return array if array.ndim == 0 else array.reshape(-1, length)


def check_range(where: str, sizes: Sizes, query_position, key_position):
    """Checks that int32 holds every position and every difference of two.

    Returns:
        The two, as int32 or None; and a traced Boolean that says whether all fit, or None
        where that is known.

    Raises:
        ValueError: If they are known and do not fit.
    """
    sides = {"query_position": ("T", query_position), "key_position": ("S", key_position)}
    known, ends, placed = [], [], []
    for name, (axis, position) in sides.items():
        length = getattr(sizes, axis)
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
    """Says whether int32 holds high − low."""
    if isinstance(high, int) and isinstance(low, int):
        return high - low < 2**31
    high, low = jnp.int32(high), jnp.int32(low)
    return (high < low) | (high - low >= 0)


def spread_positions(position: jax.Array | None, length: int) -> jax.Array:
    """The position of each row or column, B or 1 by length; 0, 1, … by default."""
    count = jnp.arange(length, dtype=jnp.int32)[None]
    if position is None:
        return count
    return position + count if position.ndim == 0 else position


def _check_dtypes(where: str, arrays: dict[str, jax.Array]) -> None:
    for name, array in arrays.items():
        if array.dtype.name not in FLOATS:
            raise ValueError(
                f"{where}: `{name}` must have one of the dtypes {', '.join(FLOATS)}, got "
                f"{array.dtype}; convert it with `.astype`."
            )
    dtypes = {name: array.dtype.name for name, array in arrays.items()}
    if len(set(dtypes.values())) > 1:
        got = ", ".join(f"`{name}` {dtype}" for name, dtype in dtypes.items())
        raise ValueError(
            f"{where}: all of {', '.join(dtypes)} must have one dtype, got {got}; convert "
            f"them with `.astype`."
        )


def _check_ranks(where: str, arrays: dict[str, jax.Array]) -> None:
    for name, array in arrays.items():
        letters = {"query": "TNH", "key": "SKH", "value": "SKD"}[name]
        rank = arrays["query"].ndim
        if array.ndim < 3:
            raise ValueError(
                f"{where}: `{name}` must have the axes {letters} or more before them, got "
                f"shape {array.shape}; add the missing axes, such as one head."
            )
        if array.ndim != rank:
            raise ValueError(
                f"{where}: `{name}` must have as many axes as `query` ({rank}: "
                f"{arrays['query'].shape}), got shape {array.shape}; give both the same "
                f"batch axes."
            )


def _layout_hint(query, key) -> str:
    """A clause for inputs that would make sense with heads before positions."""
    if query.ndim < 4 or key.ndim != query.ndim:
        return ""
    heads, kv_heads = query.shape[-3], key.shape[-3]
    if kv_heads and heads % kv_heads == 0 and query.shape[-1] == key.shape[-1]:
        return " They look like BNTH, heads first; jattn takes BTNH: swap axes -3 and -2."
    return ""
