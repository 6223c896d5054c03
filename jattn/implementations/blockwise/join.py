"""How an axis of `vmap` joins the batch of a call, so that it costs what that does.

The examples of all slices become one batch, in which b starts again with every slice.
What belongs to no example, the scale and the arrays that a function captured, must be
the same for all slices; else they stay apart.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jattn.call.problem import Operands, Problem
from jattn.operations.join import Kept, Leading


@dataclasses.dataclass(frozen=True)
class _Position:
    """Positions of `count` rows or columns; one number stands for those from it on."""

    leading: Leading
    count: Any

    def join(self, array, is_mapped: bool):
        """The positions of each example, or those of all."""
        if array.ndim == is_mapped:  # a number, or one for each slice
            if not is_mapped:
                return array
            count = jnp.arange(self.count, dtype=jnp.int32)[None, None]
            array = array[:, None, None] + count
        return self.leading.join(array, is_mapped)


def join(problem: Problem, tree, size, mapped, apart) -> tuple[Problem, tuple] | None:
    """The problem of all slices, and how each leaf of `Operands` joins in it.

    Not where all slices share keys or values, for these would have to be copied.

    Args:
        problem: The call for one slice.
        tree: The structure of its operands.
        size: How many slices there are.
        mapped: Which leaves have a slice each.
        apart: Which others must be given to each slice apart.

    Returns:
        The problem, and what has a `join` for each leaf; None where slices stay apart.
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
        query=whole,
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
