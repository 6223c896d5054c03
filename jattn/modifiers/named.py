"""Modifiers with names: biases, a cap, ALiBi, relative positions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.arrays.checks import (
    align,
    check_arguments,
    check_array,
    check_real,
    known_number,
)
from jattn.arrays.integers import is_number, known_whole
from jattn.arrays.shapes import widened
from jattn.modifiers.buckets import distance
from jattn.modifiers.cap import capped
from jattn.modifiers.modifier import Modifier
from jattn.pytree import pytree


@pytree("array")
class Bias(Modifier):
    """A modifier that adds an array: logit + array[b, n, row, column].

    The array broadcasts to BNTS. The argument `bias` of `attention` is added after all
    modifiers; this modifier adds at its place in a composition, so
    `Bias(array) >> SoftCap(50.0)` caps the sum.
    """

    array: jax.Array

    def aligned(self, sizes) -> Any:
        """Gives the array itself."""
        array = check_array("modifiers.Bias", "array", self.array)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"modifiers.Bias: `array` must be floating, got {array.dtype}; a Boolean "
                f"array belongs in `mask`."
            )
        return align("modifiers.Bias", "array", widened(array), sizes)

    def modify(self, logit, b, n, t, s, elements) -> jax.Array:
        """Computes the sum, in the logit's precision."""
        return logit + elements.astype(logit.dtype)


# Below the least cap, cap⁻² in second derivatives overflows in float32. Above the largest,
# logit / cap is less than float32 holds, and 0, for logits that differ by more than 2⁻²⁶.
_LEAST_CAP, _MOST_CAP = 2.0**-60, 2.0**100


@pytree("cap")
class SoftCap(Modifier):
    """A modifier that keeps logits within ±cap, smoothly: cap · tanh(logit / cap).

    The cap is between 2⁻⁶⁰ and 2¹⁰⁰, which is checked unless it is traced.

    Reference:
        Gemma Team, 2024, arXiv:2408.00118, section 2.
    """

    cap: float | jax.Array

    def __post_init__(self):
        cap = known_number(self.cap)
        if cap is None:
            return
        if not cap > 0:
            raise ValueError(f"modifiers.SoftCap: `cap` must be > 0, got {self.cap}.")
        if not _LEAST_CAP <= cap <= _MOST_CAP:
            raise ValueError(
                f"modifiers.SoftCap: `cap` must be between {_LEAST_CAP:.2g} and "
                f"{_MOST_CAP:.2g}, got {self.cap}; where nothing is to be capped, leave "
                f"the modifier out."
            )

    def aligned(self, sizes) -> Any:
        """Gives the cap as an operand, so that all caps share one program."""
        is_python = isinstance(self.cap, int | float | np.number)
        known = known_number(self.cap) if is_python else None
        cap = self.cap if known is None else np.asarray(known, float)
        cap = check_real("modifiers.SoftCap", "cap", cap)
        if cap.shape:
            raise ValueError(
                f"modifiers.SoftCap: `cap` must be one number, got shape {cap.shape}; a "
                f"cap per head belongs in a function of n."
            )
        return widened(cap).reshape(1, 1, 1, 1)

    def modify(self, logit, b, n, t, s, elements) -> jax.Array:
        """Computes the capped logit."""
        cap = elements.astype(logit.dtype)
        return capped(logit, cap, 1 / cap)


@pytree("slopes")
class ALiBi(Modifier):
    """A penalty that grows with distance: logit − slopes[n] · |t − s|.

    The default slopes are those of the paper: 2^(−8(n+1)/N) if N is a power of two.
    Otherwise, they are the slopes for the largest power of two below N, followed by every
    other slope for the next power of two.

    Reference:
        Press, Smith and Lewis, 2021, arXiv:2108.12409, section 3.
    """

    slopes: jax.Array | None = None

    def aligned(self, sizes) -> Any:
        """Gives the slope of each head."""
        slopes = alibi_slopes(sizes.N) if self.slopes is None else self.slopes
        slopes = check_real("modifiers.ALiBi", "slopes", slopes)
        if slopes.shape not in ((), (sizes.N,)):
            raise ValueError(
                f"modifiers.ALiBi: `slopes` must have shape N = ({sizes.N},), one per "
                f"query head, got {slopes.shape}."
            )
        return jnp.broadcast_to(widened(slopes), (sizes.N,)).reshape(1, -1, 1, 1)

    def modify(self, logit, b, n, t, s, elements) -> jax.Array:
        """Computes the logit minus the penalty."""
        return logit - elements.astype(logit.dtype) * jnp.abs(t - s).astype(logit.dtype)


def alibi_slopes(num_heads: int) -> jax.Array:
    """Computes the slopes of the ALiBi paper, a geometric sequence: one per head."""
    num_heads = known_whole("modifiers.alibi_slopes", "num_heads", num_heads, 0)
    # The largest power of two that is at most N.
    below = 2 ** (num_heads.bit_length() - 1) if num_heads else 1

    def powers(count):
        return [2.0 ** (-8.0 * (i + 1) / count) for i in range(count)]

    slopes = powers(below) + powers(2 * below)[::2]
    return jnp.asarray(slopes[:num_heads], float)  # float64 with `jax_enable_x64`


@pytree("table", static=("bucket",))
class RelativeBias(Modifier):
    """A modifier that adds a learned number for each head and bucket of s − t.

        logit + table[n, bucket(s − t)]

    `table` is N × buckets. `bucket` maps the integer s − t to a column: `distance(radius)`
    and `log_bucket(…)` of this module, or any function written for a scalar. The default
    is `distance(radius)` with the radius of the table's width: (width − 1) / 2.
    """

    table: jax.Array
    bucket: Callable | None = None

    def __post_init__(self):
        if hasattr(self.table, "shape"):
            self._check_width(self.table.shape)
        if callable(self.bucket):
            check_arguments("modifiers.RelativeBias", "bucket", self.bucket, "offset")
        elif self.bucket is not None:
            raise ValueError(
                f"modifiers.RelativeBias: `bucket` must be a function of s − t, got "
                f"{self.bucket!r}; give `distance(radius)`, for example."
            )

    def aligned(self, sizes) -> Any:
        """Gives no arrays; only checks the table, and that it has a row for each head."""
        where = "modifiers.RelativeBias"
        table = check_array(where, "table", self.table)
        if not jnp.issubdtype(table.dtype, jnp.floating):
            raise ValueError(
                f"{where}: `table` must be floating, got {table.dtype}; convert it with "
                f"`.astype(float)`."
            )
        if table.ndim != 2 or table.shape[0] != sizes.N:
            raise ValueError(
                f"{where}: `table` must be N × buckets with N={sizes.N} query heads, got "
                f"shape {table.shape}."
            )
        self._check_width(table.shape)
        return ()

    def modify(self, logit, b, n, t, s, elements) -> jax.Array:
        """Computes the logit plus the table's entry."""
        table = jnp.asarray(self.table).astype(logit.dtype)
        bucket = self.bucket or distance((table.shape[1] - 1) // 2)
        return logit + table[n, _column(bucket(s - t))]

    def _check_width(self, shape) -> None:
        if self.bucket is None and shape and shape[-1] % 2 == 0:
            raise ValueError(
                f"modifiers.RelativeBias: `table` must have an odd number of columns, one "
                f"for each s − t from −radius to radius, got {shape[-1]}; or give `bucket`."
            )


def _column(index):
    """Checks that what a bucket function gave is one integer."""
    dtype = getattr(index, "dtype", None)
    if is_number(index) or (
        dtype is not None and jnp.issubdtype(dtype, jnp.integer) and index.shape == ()
    ):
        return index
    got = type(index).__name__ if dtype is None else f"{dtype}{list(index.shape)}"
    raise ValueError(
        f"modifiers.RelativeBias: `bucket` must give one column for each s − t, an integer "
        f"scalar, got {got}; convert a number with `.astype(int)`."
    )
