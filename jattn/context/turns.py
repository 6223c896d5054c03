"""How many turns of a ring the mask leaves anything to do: a table of P × P blocks.

At turn i a device has the keys of the device i before it. If every pair of that block is
hidden, on every device, the turn is not run and its keys are not sent; one that only some
devices need has to be run by all, for they send together.

    turns = 1 + max { (p − q) mod P : some query of device p sees a key of device q }

The table is that of the whole call, so all devices find the same number. Where the mask
is made of known numbers it is a number of Python, and elsewhere one program serves all.
"""

import jax.numpy as jnp
import numpy as np

from jattn.arrays.checks import are_numbers
from jattn.blocks import of_call
from jattn.call.problem import Operands, Problem

__all__ = ["distances", "live_parts", "turns"]


def live_parts(problem: Problem, operands: Operands, devices: int):
    """Says for each two devices if a query of the first sees a key of the second: P × P."""
    blocks = problem.sizes.T // devices, problem.sizes.S // devices
    kinds = of_call.block_table(problem, operands, *blocks)
    xp = np if isinstance(kinds, np.ndarray) else jnp
    live = xp.any(kinds != of_call.EMPTY, axis=(0, 1))
    return xp.broadcast_to(live, (devices, devices))


def distances(devices: int) -> np.ndarray:
    """Says in which turn device p has the keys of device q: (p − q) mod P."""
    count = np.arange(devices)
    return (count[:, None] - count) % devices


def turns(problem: Problem, operands: Operands, devices: int):
    """Counts the turns until no device needs more: an int, or int32 where traced."""
    if not of_call.skips(problem, operands) or not problem.sizes.are_known:
        return devices
    live = live_parts(problem, operands, devices)
    xp = np if isinstance(live, np.ndarray) else jnp
    count = 1 + xp.max(xp.where(live, distances(devices), 0))
    return int(count) if xp is np else count.astype(jnp.int32)


def known_turns(problem: Problem, operands: Operands, devices: int) -> int | None:
    """Counts the turns where Python's numbers decide them; None where arrays do.

    Arrays at hand would say it too, but each number of turns would then be a program.
    """
    if not of_call.skips(problem, operands):
        return devices
    where = operands.query_position, operands.key_position, operands.bias
    if not are_numbers((operands.mask, operands.modifier, operands.kinds, where)):
        return None
    found = turns(problem, operands, devices)
    return found if isinstance(found, int) else None
