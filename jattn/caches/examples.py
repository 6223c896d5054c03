"""Numbers of examples, checked: which are read, copied or emptied."""

import jax
import jax.numpy as jnp

from jattn.arrays.checks import check_array, check_integers
from jattn.caches.asked import check_whole
from jattn.caches.store import check_there


def check_examples(where: str, name: str, value, shape, count: int) -> jax.Array:
    """Checks that numbers name examples, 0 to `count` − 1; −1 is the last one.

    A number that is no example's is refused where it is known, and becomes `count` where
    it is traced.
    """
    given = check_integers(where, name, value)
    check_there(where, name, given, count, least=-count)
    value = check_whole(where, name, given, shape)
    value = jnp.where(value < 0, value + count, value)
    return jnp.where(value < 0, count, value)


def check_pairs(where: str, source, target, count: int) -> tuple[jax.Array, jax.Array]:
    """Gives whose copy each of `count` examples becomes, and which become one."""
    source = check_examples(where, "source", source, None, count).reshape(-1)
    target = check_examples(where, "target", target, None, count).reshape(-1)
    if source.size not in (1, target.size):
        raise ValueError(
            f"{where}: `source` must name one example, or one for each `target`, got "
            f"{source.size} for {target.size}."
        )
    own = jnp.arange(count, dtype=jnp.int32)
    return own.at[target].set(source), own.at[target].set(-1) < 0


def check_owners(where: str, example, shape, count: int) -> jax.Array:
    """Checks the example of each token, 0 to `count` − 1; below 0 for padding."""
    example = check_integers(where, "example", example)
    check_there(where, "example", example, count, or_else=", or −1 for padding")
    return check_whole(where, "example", example, shape)


def chosen_examples(where: str, examples, batch: tuple[int, ...]) -> jax.Array:
    """Gives Booleans `B` from Booleans or from numbers of examples."""
    array = check_array(where, "examples", examples)
    if array.dtype != jnp.bool_:
        numbers = check_examples(where, "examples", examples, None, *batch)
        return jnp.zeros(batch, bool).at[numbers.reshape(-1)].set(True, mode="drop")
    if array.shape != batch:
        raise ValueError(
            f"{where}: `examples` must be Booleans of shape B = {batch}, one of each "
            f"example, or numbers, got Booleans of shape {array.shape}."
        )
    return array
