"""What each strategy refuses, moves and holds, and which one runs.

With P devices, x = T / P tokens a device, e bytes a number; received by each, forward:

    gather      (P − 1) S/P · K (H + D) e     and then holds all keys and values
    ring        turns · S/P · K (H + D) e     and holds two shards of them
    exchange    (P − 1)/P · (T/P · N + S/P · K') (H + D) e    K' = K copied for P devices
    merge       T N (D + 2) wide              whatever the number of keys

Backward, ring and gather receive the keys again, and their cotangents in the wide
precision; exchange as much again as forward.
"""

from typing import NamedTuple

from jattn.call.problem import Problem
from jattn.context.exchange import copies
from jattn.context.place import Axes, Place, find, written
from jattn.context.turns import known_turns

__all__ = ["Cost", "cost", "refusals", "settled"]

# Bytes of memory that a device has, at least, of those that are in use: v5e's 16 GB,
# and a GPU of 40 GB. Whole keys with their cotangents may take a sixteenth.
MEMORY = {"tpu": 16e9, "gpu": 40e9, "cuda": 40e9, "rocm": 40e9}
SHARE = 16


class Cost(NamedTuple):
    """What a strategy costs each device, in bytes."""

    forward: int  # received
    backward: int  # received for gradients of query, key and value
    held: int  # of keys and values that are there at once, beside its own


def check(where: str, problem: Problem, place: Place) -> None:
    """Checks that devices divide the sizes.

    Raises:
        ValueError: Naming the axis, the size and what to do.
    """
    sizes = problem.sizes
    if not sizes.are_known or 0 in (*sizes.BNTS, sizes.K):
        raise ValueError(
            f"{where}: `context` needs sizes that are known and not 0, got BNTS = "
            f"{sizes.BNTS}; leave `context` out."
        )
    _check_divides(where, place, place.axis, S=sizes.S)
    if not _is_decoding(problem, place):
        _check_divides(where, place, place.axis, T=sizes.T)
    _check_divides(where, place, place.batch, B=sizes.B)
    _check_divides(where, place, place.heads, N=sizes.N, K=sizes.K)


def _check_divides(where: str, place: Place, axes: Axes, **sizes: int) -> None:
    count = place.count(axes)
    for letter, size in sizes.items():
        if size % count:
            more = -(-size // count) * count
            advice = {
                "T": f"pad to {more}, and drop what comes of the rest",
                "S": f"pad to {more}, and hide the rest with `masks.Lengths`",
            }.get(letter, "cut this axis along fewer devices, or not at all")
            raise ValueError(
                f"{where}: context axis {written(axes)} has {count} devices, which must "
                f"divide {letter}={size}; {advice}."
            )


def refusals(problem: Problem, place: Place, implementation) -> dict[str, str | None]:
    """Says of each strategy why it cannot run, a sentence "It …"; None where it can."""
    heads = problem.sizes.N // place.count(place.heads)
    inner = place.axis[-1:]
    count = place.count(inner)
    parts = rows = exchange = None
    if implementation in ("dense", "cudnn"):
        parts = f'needs a rule that parts share, which "{implementation}" has not.'
    if _is_decoding(problem, place):
        rows = (
            f"needs queries on every device, and there are T={problem.sizes.T} for "
            f"{place.devices} devices."
        )
    if heads % count:
        exchange = (
            f"needs N={heads} query heads to be a multiple of the {count} devices of "
            f"{written(inner)}."
        )
    rows = rows or parts
    exchange = rows or exchange
    return {"ring": rows, "gather": rows, "exchange": exchange, "merge": parts}


def choose(
    where: str, problem: Problem, place: Place, turns, platform: str, implementation
) -> str:
    """Chooses the strategy that runs; `turns` of a ring are an int where they are known.

    | if                                                     | then                   |
    |--------------------------------------------------------|------------------------|
    | a strategy is named                                    | it, or its refusal     |
    | there are fewer queries than devices: decoding         | merge                  |
    | the mask needs at most half of the turns               | ring                   |
    | two axes are given, and heads divide along the inner   | exchange inside ring   |
    | whole keys and their cotangents fill > 1/16 of memory  | ring                   |
    | heads divide, and it moves less, or on a GPU           | exchange               |
    | else                                                   | gather                 |

    On a GPU the devices are behind a switch, where an exchange moves the least, and it has
    whole rows on each device, as kernels want them. Where a mask is traced its turns are
    not known, and count as all. The thresholds are judged, not measured.

    Raises:
        ValueError: If the named strategy refuses, or all do.
    """
    answers = refusals(problem, place, implementation)
    if place.strategy:
        sentence = answers[place.strategy]
        if sentence is not None:
            others = [f'"{name}"' for name, answer in answers.items() if answer is None]
            advice = f"; use {' or '.join(others)}" if others else ""
            raise ValueError(
                f'{where}: context strategy "{place.strategy}" '
                f"{sentence.removesuffix('.')}{advice}."
            )
        return place.strategy
    for name in preferred(problem, place, turns, platform):
        if answers[name] is None:
            return name
    raise ValueError(f"{where}: `context` with this `implementation` {answers['ring']}")


def preferred(problem: Problem, place: Place, turns, platform: str) -> tuple[str, ...]:
    """Orders the strategies by the table of `choose`."""
    if _is_decoding(problem, place):
        return ("merge",)
    if isinstance(turns, int) and 2 * turns <= place.devices:
        return ("ring",)
    if len(place.axis) > 1:
        return "exchange", "ring"
    whole = cost(problem, place, "gather", turns).held
    # With cotangents in the wide precision.
    whole += whole * problem.wide.itemsize // problem.dtype.itemsize
    is_gpu = platform in ("gpu", "cuda", "rocm")
    if whole > MEMORY.get(platform, 16e9) / SHARE:
        return ("exchange", "ring") if is_gpu else ("ring",)
    moves = {x: cost(problem, place, x, turns).forward for x in ("gather", "exchange")}
    if is_gpu or moves["exchange"] < moves["gather"]:
        return "exchange", "gather"
    return ("gather",)


def cost(problem: Problem, place: Place, strategy: str, turns) -> Cost:
    """Counts what a strategy costs each device; unknown `turns` count as all."""
    sizes, item, wide = problem.sizes, problem.dtype.itemsize, problem.wide.itemsize
    P, B = place.devices, sizes.B // place.count(place.batch)
    N, K = (x // place.count(place.heads) for x in (sizes.N, sizes.K))
    width = sizes.H + sizes.D
    shard = B * (sizes.S // P) * K * width  # numbers in the keys and values of a device
    if strategy == "gather":
        return Cost(
            (P - 1) * shard * item, (P - 1) * shard * (item + wide), P * shard * item
        )
    if strategy == "merge":
        moved = B * sizes.T * N * (sizes.D + 2) * wide
        return Cost(moved, moved, 0)
    if strategy == "ring":
        return _of_ring(shard, turns if isinstance(turns, int) else P, item, wide)
    inner = place.count(place.axis[-1:])
    # After an exchange a device has as many numbers as before, but for copied heads.
    shard *= copies(K, inner)
    numbers = B * (sizes.T // P) * N * width + shard
    moved = numbers * item * (inner - 1) // inner
    if inner == P:
        return Cost(moved, moved, shard * item)
    forward, backward, held = _of_ring(shard, P // inner, item, wide)
    return Cost(moved + forward, moved + backward, shard * item + held)


def _of_ring(shard: int, turns: int, item: int, wide: int) -> Cost:
    """Counts what a ring costs; going backward, cotangents travel too, and then home."""
    home = shard * wide if turns > 1 else 0
    backward = turns * shard * (item + wide) + home
    return Cost(turns * shard * item, backward, shard * item)


def settled(
    where: str, problem: Problem, operands, context, platform: str, implementation
) -> tuple[Place, int | None]:
    """Settles the place of a call with its strategy, and the turns of its ring, if known.

    The turns that only the numbers in arrays could tell choose nothing: a program under
    `jit` would not know them, and is to be the same.

    Raises:
        ValueError: If the context does not fit the call or the mesh.
    """
    place = find(where, context)
    check(where, problem, place)
    known = lambda axes: _known(problem, operands, place.count(axes))
    strategy = choose(where, problem, place, known(place.axis), platform, implementation)
    place = place._replace(strategy=strategy)
    return place, known(place.round) if place.is_ring else None


def _known(problem: Problem, operands, devices: int) -> int | None:
    if operands is None or problem.sizes.T % devices:
        return None
    return known_turns(problem, operands, devices)


def _is_decoding(problem: Problem, place: Place) -> bool:
    return place.strategy == "merge" or place.devices > problem.sizes.T
