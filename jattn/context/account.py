"""What a call on many devices moves, holds and does: the rows that `explain` adds."""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import NamedSharding

from jattn.blocks import of_call
from jattn.call.problem import Operands, Problem
from jattn.context.choose import cost, refusals, settled
from jattn.context.place import Context, Place, axes_of, written
from jattn.context.turns import turns

__all__ = ["Devices", "account", "gathered"]


@dataclasses.dataclass(frozen=True)
class Devices:
    """How the devices of a mesh share a call.

    Attributes:
        strategy: The one that runs.
        place: Along which mesh axes the arrays lie, and how many devices these have.
        part: Queries and keys of each device.
        turns: How many turns of the ring are run; None: no ring, or known when it runs.
        forward: Bytes that each device receives.
        backward: Bytes that each device receives for the gradients of query, key and value.
        held: Bytes of keys and values that come to a device and are there at once.
        whole: Bytes of all keys and values.
        work: The most blocks of a device that are not skipped, over the mean of all.
        refusals: For every strategy its reason for not running, or None.
    """

    strategy: str
    place: Place
    part: tuple[int, int]
    turns: int | None
    forward: int
    backward: int
    held: int
    whole: int
    work: float | None
    refusals: dict[str, str | None]

    def rows(self) -> list[tuple[str, str]]:
        """Gives the label and the text of each row of `explain`."""
        unit = lambda amount: f"{amount / 1e6:.3g} MB"
        rows = [
            ("devices", self._layout()),
            ("strategy", self._strategy()),
            (
                "moves",
                f"{unit(self.forward)} to each device forward, {unit(self.backward)} for "
                f"gradients",
            ),
            (
                "holds",
                f"{unit(self.held)} of keys and values that arrive; all of them are "
                f"{unit(self.whole)}",
            ),
        ]
        if self.work is not None:
            rows.append(("work", f"{self.work:.2f} = most over mean of devices"))
        for name, sentence in self.refusals.items():
            if name != self.strategy:
                rows.append((f"not {name}", sentence or "comes later in the order"))
        return rows

    def _layout(self) -> str:
        place, (queries, keys) = self.place, self.part
        text = f"{place.devices} along {written(place.axis)}: "
        text += f"{queries} queries and {keys} keys each"
        for letter, axes in (("B", place.batch), ("N", place.heads)):
            if axes:
                text += f"; {letter} over {written(axes)} ({place.count(axes)})"
        return text

    def _strategy(self) -> str:
        if not self.place.is_ring:
            return self.strategy
        inside = self.strategy == "exchange"
        name = "exchange inside a ring" if inside else self.strategy
        count = self.place.count(self.place.round)
        if self.turns is None:
            return f"{name}, how many of {count} turns is known when it runs"
        rest = "; the mask leaves the others empty" if self.turns < count else ""
        return f"{name}, {self.turns} of {count} turns{rest}"


def account(
    where: str,
    problem: Problem,
    operands: Operands | None,
    context: Context,
    platform: str,
    implementation,
) -> Devices:
    """Accounts for a call. Reads only those operands that decide what is skipped.

    Raises:
        ValueError: As the call would.
    """
    place, _ = settled(where, problem, operands, context, platform, implementation)
    strategy, sizes = place.strategy, problem.sizes
    needed = _turns(problem, operands, place) if place.is_ring else None
    spent = cost(problem, place, strategy, needed)
    heads = sizes.K // place.count(place.heads)
    width = problem.dtype.itemsize * (sizes.H + sizes.D)
    return Devices(
        strategy,
        place,
        (
            sizes.T // (place.count(place.axis) if place.rows or place.swapped else 1),
            sizes.S // place.devices,
        ),
        needed,
        *spent,
        whole=sizes.B // place.count(place.batch) * sizes.S * heads * width,
        work=_work(problem, operands, place),
        refusals=refusals(problem, place._replace(strategy=""), implementation),
    )


def _turns(problem: Problem, operands: Operands | None, place: Place) -> int | None:
    """Counts the turns of the ring that find anything, if all numbers are known."""
    if operands is None:
        return None
    found = turns(problem, operands, place.count(place.round))
    return None if isinstance(found, jax.core.Tracer) else int(found)


def _work(problem: Problem, operands: Operands | None, place: Place) -> float | None:
    """Divides the most blocks of a device that are not empty by the mean of devices."""
    if operands is None or not place.rows or not of_call.skips(problem, operands):
        return None
    devices = place.count(place.rows)
    sizes = problem.sizes
    block_q, block_kv = (_block(x, devices) for x in (sizes.T, sizes.S))
    kinds = of_call.block_table(problem, operands, block_q, block_kv)
    if isinstance(kinds, jax.core.Tracer):
        return None
    live = np.asarray(kinds) != of_call.EMPTY
    counts = -(-sizes.T // block_q), -(-sizes.S // block_kv)
    live = np.broadcast_to(live, (*live.shape[:2], *counts))
    work = live.sum(axis=(0, 1, 3)).reshape(devices, -1).sum(axis=1)
    return float(work.max() / work.mean()) if work.any() else 1.0


def _block(length: int, devices: int) -> int:
    """Says how many tokens to look at as one: of one device, and 1024 such at the most.

    A table of more would cost more than it tells; tiles are multiples of 128.
    """
    most = 128
    while length > 1024 * most:
        most *= 2
    return math.gcd(length // devices, most)


def gathered(query, key) -> list[tuple[str, str]]:
    """Says what XLA will gather of arrays that say how they lie, without a context."""
    found = []
    for name, array, letter in (("query", query, "T"), ("key", key, "S")):
        sharding = getattr(array, "sharding", None)
        if not isinstance(sharding, NamedSharding) or np.ndim(array) < 3:
            continue
        spec = [*sharding.spec, *[None] * np.ndim(array)][: np.ndim(array)]
        names = axes_of(spec[-3])
        count = math.prod(sharding.mesh.shape[axis] for axis in names)
        if count > 1:
            found.append((name, letter, names, count))
    if not found:
        return []
    name, letter, names, count = found[-1]
    axis = names[0] if len(names) == 1 else names
    return [
        (
            "devices",
            f"`{name}` is cut along {letter} over {count} devices: XLA gathers it, and "
            f"each device does all the work; give `context=jattn.Context({axis!r})`",
        )
    ]
