"""An order of tokens in which every device has as much to do.

A causal mask gives the last device of a row of them twice the mean of work. So each gets
a block from the front for one from the back. Without a mask:

    zigzag      device p of P: block p, and block 2P − 1 − p, of 2P

With one, rows of blocks are ranked by how many blocks the mask leaves them, and dealt out
there and back: 0, 1, …, P − 1, P − 1, …, 1, 0, 0, 1, … Within a device they keep their
order. Never by less than a block, for then no block of the mask's table would be empty.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jattn.arrays.integers import is_number
from jattn.blocks.block_table import BlockTable, block_table
from jattn.blocks.kinds import EMPTY, spread

__all__ = ["balanced"]


def balanced(length: int, devices: int, mask=None, block: int = 128):
    """Gives an order of tokens that balances the work of devices: their positions.

    Permute the tokens once, where batches are made, and say where they stand:

        order = balanced(T, devices)
        x = x[:, order]                                       # tokens, labels, segments
        attention(…, query_position=order, key_position=order, context=…)

    A mask or modifier that is a function of positions stays as it is. Arrays that lie
    along the inputs, such as `bias` or the ids of `masks.Segments`, are permuted with the
    tokens.

    Args:
        length: How many tokens, a multiple of `devices`.
        devices: How many devices T is divided among.
        mask: What `attention` takes, of T = S = `length`, or a `block_table` of it: its
            blocks are dealt out by what they cost. None: zigzag, for causal masks. Its
            arrays may be traced.
        block: How many tokens stay together; fewer where devices would get none.

    Returns:
        Positions, int32 of shape (length,): those of each device after another.

    Raises:
        ValueError: If `devices` do not divide `length`.

    Example:
        >>> balanced(8, 2)
        Array([0, 1, 6, 7, 2, 3, 4, 5], dtype=int32)
    """
    given = devices, length, block  # of Python from here on: small ones of NumPy would wrap
    devices, length, block = (int(x) if is_number(x) else 0 for x in given)
    if min(devices, length, block) < 1 or length % devices:
        raise ValueError(
            f"balanced: `devices` must divide `length`, and `block` be at least 1, all "
            f"whole numbers, got {given[0]}, {given[1]} and {given[2]}; pad the tokens to "
            f"a multiple."
        )
    if mask is None:
        return jnp.asarray(_zigzag(length, devices))
    part = length // devices
    block = max(x for x in range(1, min(block, part) + 1) if part % x == 0)
    work = _work(mask, length, block)
    xp = np if isinstance(work, np.ndarray) else jnp
    # Rows in order of their work, the costly ones first, and dealt there and back.
    ranked = xp.argsort(-work, stable=True).reshape(-1, devices)
    back = np.arange(len(ranked))[:, None] % 2 == 1
    dealt = xp.sort(xp.where(back, ranked[:, ::-1], ranked), axis=0)
    tokens = dealt.T.reshape(-1, 1) * block + np.arange(block)[None]
    return jnp.asarray(tokens.reshape(-1).astype(np.int32))


def _zigzag(length: int, devices: int) -> np.ndarray:
    """Gives each device a part from the front and one from the back."""
    order = np.arange(length, dtype=np.int32)
    part = length // devices
    front = (part + 1) // 2
    back = part - front
    split = devices * front
    # The front parts in order, and the back parts in reverse: the last device has the
    # first tokens of the back.
    fronts = order[:split].reshape(devices, front)
    backs = order[split:].reshape(devices, back)[::-1]
    return np.concatenate([fronts, backs], axis=1).reshape(-1)


def _work(mask, length: int, block: int):
    """Counts the blocks of keys that each block of queries sees, over all B and N."""
    shape = jax.ShapeDtypeStruct((length, 1, 1), jnp.float32)
    table = mask
    if not isinstance(mask, BlockTable):
        table = block_table(mask, shape, shape, block=block)
    elif table.lengths != (length, length):
        raise ValueError(
            f"balanced: `mask` is a block table for T={table.lengths[0]} and "
            f"S={table.lengths[1]}, which must both be `length`, got {length}; make one "
            f"with `jattn.block_table`."
        )
    elif table.blocks != (block, block):
        table = block_table(mask.mask, shape, shape, block=block)
    kinds = spread(table.kinds, (length, length), (block, block))
    return (kinds != EMPTY).sum(axis=(0, 1, 3))
