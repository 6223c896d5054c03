"""Masks, modifiers and dropout of a whole call, seen from one device's part of it.

Inside `jax.shard_map` the arrays of a call are one device's part, and nothing says which:
positions are told by `query_position` and `key_position`, and examples and heads here.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jattn.blocks.block_table import BlockTable
from jattn.dropout import Dropout, Numbered
from jattn.mask import Mask, as_mask
from jattn.modifiers import Modifier
from jattn.pytree import pytree
from jattn.shapes import Sizes

__all__ = ["counted_from"]


def counted_from(rule, *, b=0, n=0, B: int | None = None, N: int | None = None):
    """Makes a mask, modifier or dropout count examples and heads from given ones.

    Inside `jax.shard_map` over examples or heads, the first example and head of each
    device are 0 to a call, which cannot know better. With this they have the numbers that
    they have in the whole, so the devices' results are those of one device:

        first = jax.lax.axis_index("data") * query.shape[0]
        attention(…, mask=counted_from(lambda b, n, t, s: s < lengths[b], b=first))

    Args:
        rule: What `attention` takes as `mask`, `modifier` or `dropout`. A block table
            counts as its mask alone; make one of the result instead.
        b: The number of the first example, an integer, traced or not.
        n: The number of the first query head.
        B: How many examples there are in the whole. Then arrays of `rule` that are aligned
            with the inputs, such as the lengths of `Lengths`, are those of the whole.
        N: How many query heads there are in the whole; likewise. `ALiBi()` needs it.

    Returns:
        A rule of the same kind.

    Raises:
        ValueError: If `rule` is none of these.

    Example:
        >>> from jattn import attention_weights
        >>> query = jnp.zeros((1, 2, 1, 4))
        >>> lengths = jnp.array([2, 1])
        >>> second = counted_from(lambda b, n, t, s: s < lengths[b], b=1)
        >>> attention_weights(query, query, mask=second)
        Array([[[[1., 0.],
                 [1., 0.]]]], dtype=float32)
    """
    if isinstance(rule, Dropout):
        if rule.shared:  # which draws alike for all examples and heads
            return rule
        rng: Any = Numbered(rule.rng, _int32(b), _int32(n))
        return dataclasses.replace(rule, rng=rng)
    if isinstance(rule, BlockTable):
        rule = rule.mask
    if isinstance(rule, Modifier):
        return _CountedModifier(rule, b, n, B, N)
    if isinstance(rule, Mask) or not callable(rule):
        return _CountedMask(as_mask(rule, "counted_from"), b, n, B, N)
    if isinstance(rule, type):
        raise ValueError(
            f"counted_from: `rule` must be a mask, a modifier or a dropout, got the class "
            f"{rule.__name__}; call it."
        )
    return lambda *x: rule(*x[:-4], x[-4] + _int32(b), x[-3] + _int32(n), *x[-2:])


@dataclasses.dataclass(frozen=True, eq=False)
class _Counted:
    """A rule of the whole, seen from a part."""

    rule: Any
    b: int | jax.Array = 0
    n: int | jax.Array = 0
    B: int | None = None
    N: int | None = None

    def aligned(self, sizes: Sizes) -> Any:
        """The part of the rule's arrays."""
        whole = sizes
        if self.B is not None:
            if len(sizes.batch) != 1:
                raise ValueError(
                    f"counted_from: `B` needs inputs with one batch axis, got "
                    f"{sizes.batch}; leave it out, and give arrays of the part."
                )
            whole = dataclasses.replace(whole, batch=(self.B,))
        if self.N is not None:
            whole = dataclasses.replace(whole, N=self.N)
        cuts = ((0, self.B, self.b, sizes.B), (1, self.N, self.n, sizes.N))

        def part(array):
            for axis, count, first, size in cuts:
                if count is not None and array.shape[axis] == count and count != 1:
                    array = jax.lax.dynamic_slice_in_dim(array, _int32(first), size, axis)
            return array

        return jax.tree.map(part, self.rule.aligned(whole))


@pytree("rule", "b", "n", static=("B", "N"))
class _CountedMask(_Counted, Mask):
    def allows(self, b, n, t, s, elements) -> jax.Array:
        """What the mask allows."""
        return self.rule.allows(b + _int32(self.b), n + _int32(self.n), t, s, elements)


@pytree("rule", "b", "n", static=("B", "N"))
class _CountedModifier(_Counted, Modifier):
    def modify(self, logit, b, n, t, s, elements) -> jax.Array:
        """What the modifier gives."""
        b, n = b + _int32(self.b), n + _int32(self.n)
        return self.rule.modify(logit, b, n, t, s, elements)


def _int32(number):
    return jnp.asarray(number, jnp.int32)
