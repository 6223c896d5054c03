"""The letters that every shape is written in, and the checks of the inputs' shapes.

    B batch   T query length   S key length   N query heads   K key/value heads
    G = N/K   H head size of query and key    D head size of value and output

`query` is `BTNH`, `key` is `BSKH`, `value` is `BSKD`, the output is `BTND`; logits and
weights are `BNTS`. The batch of the inputs may be absent or be several axes; inside the
library it is always one axis, B.
"""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp

FLOATS = ("float16", "bfloat16", "float32", "float64")


def wide_dtype(dtype) -> jnp.dtype:
    """Gives the precision of logits, softmax and sums: float32 at least."""
    return jnp.dtype("float64" if dtype == jnp.float64 else "float32")


def widened(array: jax.Array) -> jax.Array:
    """Gives an array in float32 at least; one of integers unchanged.

    Its cotangent is rounded to the dtype of the array. So this comes before the array is
    spread over heads, rows or examples: then their sum is rounded, and not each part of it.
    """
    is_real = jnp.issubdtype(array.dtype, jnp.floating)
    return array.astype(wide_dtype(array.dtype)) if is_real else array


def is_one(length) -> bool:
    """Says whether a length is known to be one; a symbolic length never is."""
    return isinstance(length, int) and length == 1


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of the letters in one call."""

    batch: tuple[int, ...]
    T: int
    S: int
    N: int
    K: int
    H: int
    D: int

    @property
    def B(self) -> int:
        """Gives the number of examples, over all batch axes."""
        return math.prod(self.batch)

    @property
    def G(self) -> int:
        """Gives the number of query heads that share one key/value head."""
        return self.N // self.K if self.K else 0

    @property
    def are_known(self) -> bool:
        """Says whether all sizes are known numbers, not symbolic ones."""
        return all(isinstance(size, int) for size in (*self.BNTS, self.K, self.H, self.D))

    @property
    def BNTS(self) -> tuple[int, ...]:
        """Gives the shape of the logits and the weights."""
        return self.B, self.N, self.T, self.S

    @property
    def are_nothing(self) -> bool:
        """Says whether it is known that there is no pair of a query and a key."""
        return any(isinstance(size, int) and size == 0 for size in self.BNTS)


def measure(where: str, query, key, value) -> Sizes:
    """Reads the sizes of the letters from the inputs; raises if an input does not fit."""
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
        cure = "repeat or regroup the keys" if K else "give `key` and `value` a head"
        raise ValueError(
            f"{where}: num_heads N={N} in `query` {query.shape} = …TNH must be a multiple "
            f"of num_kv_heads K={K} in `key` {key.shape} = …SKH; {cure}.{hint}"
        )
    return Sizes(tuple(batch), T=T, S=S, N=N, K=K, H=H, D=value.shape[-1])


def unflatten_batch(array, sizes: Sizes):
    """Splits the first axis, all examples, into the batch axes of the call."""
    return array.reshape(*sizes.batch, *array.shape[1:])


def flatten_batch(array: jax.Array, sizes: Sizes) -> jax.Array:
    """Gives the same array with one batch axis B in place of all its batch axes."""
    trailing = array.shape[len(sizes.batch) :]
    flat = array.reshape(sizes.B, *trailing)
    chex.assert_rank(flat, 1 + len(trailing))
    return flat


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
    """Gives a hint for inputs that would fit with heads before positions, BNTH."""
    if query.ndim < 4 or key.ndim != query.ndim:
        return ""
    heads, kv_heads = query.shape[-3], key.shape[-3]
    if kv_heads and heads % kv_heads == 0 and query.shape[-1] == key.shape[-1]:
        return " They look like BNTH, heads first; jattn takes BTNH: swap axes -3 and -2."
    return ""
