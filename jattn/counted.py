"""Masks, modifiers and dropout of a whole call, seen from one device's part of it.

Inside `jax.shard_map` the arrays of a call are one device's part, and they do not say
which part. `query_position` and `key_position` tell a call its positions; this module
tells it the numbers of its examples and heads.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from jattn.arrays.checks import check_arguments, known_number
from jattn.arrays.integers import as_int32, check_whole, known_whole, one_number
from jattn.arrays.shapes import Sizes
from jattn.blocks.block_table import BlockTable
from jattn.dropout import Dropout, Numbered
from jattn.masks import Mask, as_mask
from jattn.modifiers import Modifier
from jattn.pytree import pytree

__all__ = ["counted_from"]


def counted_from(rule, *, b=0, n=0, B: int | None = None, N: int | None = None):
    """Makes a mask, modifier or dropout count examples and heads from given numbers.

    Inside `jax.shard_map` over examples or heads, a call counts the first example and the
    first head of each device as 0. With this function they have their numbers in the
    whole call, so the devices give the same results as one device would:

        first = jax.lax.axis_index("data") * query.shape[0]
        attention(…, mask=counted_from(lambda b, n, t, s: s < lengths[b], b=first))

    Args:
        rule: What `attention` takes as `mask`, `modifier` or `dropout`. Of a block table,
            only its mask is used; make a block table of the result instead.
        b: The number of the first example, an integer, traced or not.
        n: The number of the first query head.
        B: How many examples the whole call has. Then arrays of `rule` that are aligned
            with the inputs, such as the lengths of `Lengths`, are those of the whole call.
        N: How many query heads the whole call has. Then arrays of `rule` with an axis of
            heads are those of the whole call. `ALiBi()` needs it.

    Returns:
        A rule of the same kind.

    Raises:
        ValueError: If `rule` is not a mask, a modifier or a dropout.

    Example:
        >>> from jattn import attention_weights
        >>> import jax.numpy as jnp
        >>> query = jnp.zeros((1, 2, 1, 4))
        >>> lengths = jnp.array([2, 1])
        >>> second = counted_from(lambda b, n, t, s: s < lengths[b], b=1)
        >>> attention_weights(query, query, mask=second)
        Array([[[[1., 0.],
                 [1., 0.]]]], dtype=float32)
    """
    for name, number in (("b", b), ("n", n)):
        check_whole("counted_from", name, number)
        if np.ndim(number):
            raise ValueError(
                f"counted_from: `{name}` must be one whole number, got shape "
                f"{np.shape(number)}; give the number of the first."
            )
    B, N = (
        None if count is None else known_whole("counted_from", name, count, least=0)
        for name, count in (("B", B), ("N", N))
    )
    if isinstance(rule, Dropout):
        if rule.shared:  # the same draw for all examples and heads: no numbers needed
            return rule
        own = rule.rng if isinstance(rule.rng, Numbered) else Numbered(rule.rng, 0, 0)
        rng: Any = Numbered(own.rng, _sum("b", own.b, b), _sum("n", own.n, n))
        return dataclasses.replace(rule, rng=rng)
    if isinstance(rule, BlockTable):
        rule = rule.mask
    if isinstance(rule, _CountedFunction):
        firsts = _sum("b", rule.b, b), _sum("n", rule.n, n)
        return _CountedFunction(rule.rule, *firsts, B, N)
    if isinstance(rule, Modifier):
        return _CountedModifier(rule, b, n, B, N)
    if isinstance(rule, Mask) or not callable(rule):
        return _CountedMask(as_mask(rule, "counted_from"), b, n, B, N)
    if isinstance(rule, type):
        raise ValueError(
            f"counted_from: `rule` must be a mask, a modifier or a dropout, got the class "
            f"{rule.__name__}; call it."
        )
    return _CountedFunction(rule, b, n, B, N)


@dataclasses.dataclass(frozen=True, eq=False)
class _Counted:
    """A rule of the whole call, seen from one part."""

    rule: Any
    b: int | jax.Array = 0
    n: int | jax.Array = 0
    B: int | None = None
    N: int | None = None

    def aligned(self, sizes: Sizes) -> Any:
        """Gives the two numbers, and the rule's arrays cut to this device's part.

        The numbers are operands, so that the parts of a whole share one program.
        """
        firsts = self._firsts(sizes)
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
        # For examples and heads: the axis, its length in the whole, and this part of it.
        b, n = (x.reshape(()) for x in firsts)
        cuts = ((0, self.B, b, sizes.B), (1, self.N, n, sizes.N))

        def part(array):
            for axis, count, first, size in cuts:
                if count is not None and array.shape[axis] == count and count != 1:
                    array = jax.lax.dynamic_slice_in_dim(array, first, size, axis)
            return array

        return firsts, jax.tree.map(part, self.rule.aligned(whole))

    def _firsts(self, sizes: Sizes) -> list:
        """Gives the two numbers as operands, checked."""
        _check_part("b", self.b, sizes.B, "B", self.B)
        _check_part("n", self.n, sizes.N, "N", self.N)
        return [one_number("counted_from", x, getattr(self, x)) for x in ("b", "n")]


@pytree("rule", "b", "n", static=("B", "N"))
class _CountedMask(_Counted, Mask):
    def allows(self, b, n, t, s, elements) -> jax.Array:
        """Says what the mask allows for the numbers of the whole call."""
        (first_b, first_n), elements = elements
        return self.rule.allows(b + first_b, n + first_n, t, s, elements)

    def __call__(self, b, n, t, s):
        """Says the same as `allows`, for a mask that reads positions only."""
        return self.rule(b + _int32("b", self.b), n + _int32("n", self.n), t, s)


@pytree("rule", "b", "n", static=("B", "N"))
class _CountedModifier(_Counted, Modifier):
    def modify(self, logit, b, n, t, s, elements) -> jax.Array:
        """Applies the modifier with the numbers of the whole call."""
        (first_b, first_n), elements = elements
        return self.rule.modify(logit, b + first_b, n + first_n, t, s, elements)


@pytree("b", "n", static=("rule", "B", "N"))
class _CountedFunction(_Counted, Mask, Modifier):
    """A function of a mask or a modifier, whichever it is given as."""

    def aligned(self, sizes: Sizes) -> Any:
        """Gives the two numbers; a function has no arrays to be cut."""
        return self._firsts(sizes)

    def allows(self, b, n, t, s, elements) -> jax.Array:
        """Says what the function allows for the numbers of the whole call."""
        check_arguments("counted_from", "rule", self.rule, "b, n, t, s")
        return self.rule(b + elements[0], n + elements[1], t, s)

    def modify(self, logit, b, n, t, s, elements) -> jax.Array:
        """Modifies by the function with the numbers of the whole call."""
        check_arguments("counted_from", "rule", self.rule, "logit, b, n, t, s")
        return self.rule(logit, b + elements[0], n + elements[1], t, s)

    def __call__(self, *at):
        """Calls the function with the numbers of the whole call."""
        *logit, b, n, t, s = at
        return self.rule(*logit, b + _int32("b", self.b), n + _int32("n", self.n), t, s)


def _check_part(name: str, first, size, letter: str, count: int | None) -> None:
    """Raises where the whole has fewer examples or heads than the part counts."""
    first = known_number(first)
    least, end = (0, size) if first is None else (first, first + size)
    if count is not None and (least < 0 or end > count):
        shown = "" if first is None else f" from {name} = {first} on"
        raise ValueError(
            f"counted_from: `{letter}` must count all of the whole call, got {count} for a "
            f"part of {size}{shown}; give `{name}` and `{letter}` of the whole."
        )


def _int32(name: str, number):
    return as_int32("counted_from", name, number)


def _sum(name: str, first, more):
    return _int32(name, first) + _int32(name, more)
