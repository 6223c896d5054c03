"""What all keys, or all values, of a head have in common.

A sum of them, times numbers that were rounded to bfloat16, has errors in proportion to it.
Where it is known what the numbers add up to, that is made good apart from the sum.
"""

import jax
import jax.numpy as jnp
from jax import lax

_SOME = 64  # vectors that are looked at: any c is right, and an exact mean takes a pass


def common(array, axis: int, wide) -> jax.Array:
    """Gives c for each feature, in the dtype `wide`; `axis`, that of the vectors, is 1.

    Where vectors differ by more than their mean, c is 0. Elsewhere most differences from it
    are exact, because it is rounded as they are.
    """
    count = array.shape[axis]
    step = max(count // _SOME, 1) if isinstance(count, int) else 1
    some = lax.slice_in_dim(array, 0, count, step, axis)
    some = jnp.where(jnp.isfinite(some), some, 0).astype(wide)
    mean, spread = (f(some, axis=axis, keepdims=True) for f in (jnp.mean, jnp.std))
    rounded = mean.astype(array.dtype).astype(wide)
    return jnp.where(jnp.abs(mean) > spread, rounded, 0)
