"""One state from those of many devices, each of its own keys.

    top    = max over devices of own top
    share  = own total · exp(own top − top)
    total  = Σ share
    output = Σ share / total · own output

One maximum and two sums, D + 2 numbers for each query and head, whatever the number of
keys. The maximum is a constant to derivatives: what it adds, the sums take away.
"""

import jax.numpy as jnp
from jax import lax

from jattn.arrays.shapes import wide_dtype
from jattn.implementations.sums import Sums, finish, of_state, own_top, quotient, state_of
from jattn.state import State

__all__ = ["combined_over", "merge_over"]


def merge_over(state: State, axis) -> State:
    """Combines the states that the devices of a mesh axis have of their own keys.

    Inside `jax.shard_map`, for queries that all of the devices have and keys that lie on
    many, such as a cache in shards:

        part = attention_state(query, key, value, mask=…, key_position=axis_index * S)
        whole = merge_over(part, "context")

    Args:
        state: This device's state.
        axis: The name of the mesh axis, or several.

    Returns:
        The state of all keys, the same on every device: the output in the dtype of the
        parts', the logsumexp in float32 at least. Each part was rounded to that dtype once,
        and its logsumexp to float32; see `jattn.merge`.

    Raises:
        ValueError: If the state is none, or there is no such axis here.
    """
    _check(state, axis)
    dtype = state.output.dtype
    wide = wide_dtype(dtype)
    part = of_state(State(state.output.astype(wide), state.logsumexp))
    whole = state_of(combined_over(part, axis))
    return whole._replace(output=whole.output.astype(dtype))


def combined_over(part: Sums, axis) -> Sums:
    """Gives the sums over all keys from those of each device, nothing rounded between."""
    own = own_top(part)
    # A maximum has no derivative across devices, and needs none.
    top = lax.pmax(own, axis)
    # As in `merge`: a sink of ∞ has all the weight, unless another is ∞ too.
    share = part.total * jnp.exp(jnp.where(own == jnp.inf, 0, own - top))
    total = lax.psum(share, axis)
    total = jnp.where((top == jnp.inf) & (total > 1), jnp.nan, total)
    output = lax.psum(quotient(share, total)[..., None] * part.output, axis)
    return finish(Sums(output, top, total))


def _check(state, axis) -> None:
    if not all(hasattr(getattr(state, x, None), "dtype") for x in State._fields):
        raise ValueError(
            f"merge_over: `state` must be a `jattn.State` of arrays, got "
            f"{type(state).__name__}; `jattn.attention_state` gives one."
        )
    for name in axis if isinstance(axis, tuple | list) else (axis,):
        try:
            lax.axis_size(None if isinstance(name, int) else name)  # no axis of an array
        except (NameError, KeyError, AssertionError, TypeError):
            raise ValueError(
                f"merge_over: `axis` must name a mesh axis of the `jax.shard_map` around "
                f"it, got {name!r}; call it inside one over that axis."
            ) from None
