"""The letters that every shape is written in, and the checks at the door.

    B batch   T query length   S key length   N query heads   K key/value heads
    G = N/K   H head size of query and key    D head size of value and output

`query` is `BTNH`, `key` is `BSKH`, `value` is `BSKD`, the output is `BTND`; logits and
weights are `BNTS`. The batch may be absent, or be several axes: inside the library it
is always the one axis B.
"""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp

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
    """The argument as a JAX array, or a sentence saying that it is none."""
    try:
        return jnp.asarray(array)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: `{name}` must be an array, got {type(array).__name__}; {error}"
        ) from None


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
    if not fits:
        letters = ("B" if sizes.batch else "") + axes
        raise ValueError(
            f"{where}: `{name}` must broadcast to {letters} = {full}, got shape "
            f"{array.shape}; give each axis its size or 1."
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


def positions(where: str, name: str, position, sizes: Sizes, axis: str) -> jax.Array | None:
    """Checks the positions of rows (axis T) or columns (axis S): int32, or None.

    They are where the first one stands, an integer, or one integer for each, `T` or `BT`;
    the latter with one batch axis, B or 1.
    """
    if position is None:
        return None
    length = getattr(sizes, axis)
    array = check_array(where, name, position)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"{where}: `{name}` must hold integers, got {array.dtype}; convert it with "
            f"`.astype(int)`."
        )
    if array.shape not in ((), (length,), (*sizes.batch, length)):
        raise ValueError(
            f"{where}: `{name}` must be an integer or have shape {axis} = ({length},) or "
            f"B{axis} = {(*sizes.batch, length)}, got {array.shape}."
        )
    array = array.astype(jnp.int32)
    return array if array.ndim == 0 else array.reshape(-1, length)


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
