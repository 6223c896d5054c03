"""How an axis of `vmap` joins the batch of a call, so that it costs no more than a batch.

The examples of all slices become one batch. The index b starts again at 0 in each slice.
The scale and the arrays that a function captured do not depend on the example, so they
must be the same for all slices; otherwise the slices are not joined.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jattn.call.problem import Operands, Problem
from jattn.operations.join import Kept, Leading


@dataclasses.dataclass(frozen=True)
class _Position:
    """Positions of `count` rows or columns; a single number is the first position."""

    leading: Leading
    count: Any

    def join(self, array, is_mapped: bool):
        """Gives the positions of each example, or the positions that all share."""
        if array.ndim == is_mapped:  # a number, or one for each slice
            if not is_mapped:
                return array
            count = jnp.arange(self.count, dtype=jnp.int32)[None, None]
            array = array[:, None, None] + count
        return self.leading.join(array, is_mapped)


def join(problem: Problem, tree, size, mapped, apart) -> tuple[Problem, tuple] | None:
    """Makes the problem of all slices, and says how each leaf of `Operands` joins it.

    Slices that share keys or values are not joined, since these would have to be copied.

    Args:
        problem: The call for one slice.
        tree: The structure of its operands.
        size: How many slices there are.
        mapped: Which leaves have a slice each.
        apart: Which other leaves must be given to each slice separately.

    Returns:
        The problem, and an object with a method `join` for each leaf; None if the slices
        are not joined.
    """
    flags: Operands = tree.unflatten(mapped)
    every = tree.unflatten([x or y for x, y in zip(mapped, apart, strict=True)])
    fixed = every.scale, every.mask.captured, every.modifier.captured
    if not (flags.key and flags.value) or any(jax.tree.leaves(fixed)):
        return None
    sizes = problem.sizes
    whole = Leading(size, sizes.B, apart=True)
    leading = lambda flag: Leading(size, sizes.B, flag)
    position = lambda flag, count: None if flag is None else _Position(leading(flag), count)
    keep = lambda _: Kept()
    slots = jax.tree.map(leading, every)._replace(
        query=dataclasses.replace(whole, wide=problem.wide),  # the cotangents add up wide
        key=whole,
        value=whole,
        scale=Kept(),
        query_position=position(every.query_position, sizes.T),
        key_position=position(every.key_position, sizes.S),
    )
    captured = lambda name: jax.tree.map(keep, getattr(every, name).captured)
    slots = slots._replace(
        mask=slots.mask._replace(captured=captured("mask")),
        modifier=slots.modifier._replace(captured=captured("modifier")),
    )
    joined = dataclasses.replace(
        problem,
        sizes=dataclasses.replace(sizes, batch=(size, *sizes.batch)),
        examples=sizes.B if problem.examples is None else problem.examples,
    )
    return joined, tuple(tree.flatten_up_to(slots))
