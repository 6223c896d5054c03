"""Arrays cut, written over and padded."""

import jax.numpy as jnp
from jax import lax


def cut_at(array, starts, sizes: tuple, narrow: bool = False):
    """Cuts a part of an array; gives the array itself where that is all of it.

    With `narrow`, what is narrow stays so: XLA:CPU (jax 0.10) would widen all of a bfloat16
    array before a loop that cuts it, but not integers.
    """
    if sizes == array.shape:
        return array
    if narrow and array.dtype == jnp.bfloat16:
        bits = lax.bitcast_convert_type(array, jnp.uint16)
        return lax.bitcast_convert_type(cut_at(bits, starts, sizes), array.dtype)
    return lax.dynamic_slice(array, _indices(starts), sizes)


def put_at(array, part, starts):
    """Writes a part over an array."""
    return lax.dynamic_update_slice(array, part, _indices(starts))


def _indices(starts):
    # Of one type, which JAX asks for also where 64 bits are on.
    return [jnp.asarray(x, jnp.int32) for x in starts]


def padded(array, shape: tuple, fill, repeated: int | None):
    """Pads an array at the end of its axes, with a number or with its own last slice.

    The padding of a `repeated` axis of known size is the last slice. The derivative of a
    modifier is then infinite in the padding only if it is infinite at a real query; zeros
    could make it infinite.
    """
    if shape == array.shape:
        return array
    # `whole` has the padding everywhere; the array is written over it at the end.
    whole = jnp.full(shape, fill, array.dtype)
    count = 0 if repeated is None else array.shape[repeated]
    if isinstance(count, int) and repeated is not None and count != shape[repeated]:
        last = lax.slice_in_dim(array, count - 1, count, axis=repeated)
        rest = [(0, x - y, 0) for x, y in zip(shape, last.shape, strict=True)]
        rest[repeated] = (0, 0, 0)
        whole = jnp.broadcast_to(lax.pad(last, jnp.array(fill, array.dtype), rest), shape)
    return lax.dynamic_update_slice(whole, array, (0,) * array.ndim)
