"""How a call is laid out for the kernels.

A program of the grid computes 128 rows of one head: two groups of threads compute 64 rows
each, and blocks of the other side are copied into shared memory. The kernels read queries,
keys and values as the caller gives them, B × T × N × H. Only sizes that are not whole
blocks are padded:

    T and S to multiples of 128     H and D to multiples of 64, as the swizzle asks
    numbers    examples × heads                arrays that neither side of a pair changes
    rows       examples × heads × T            columns    examples × heads × S
    tiles      examples × heads × T × S        bias of both sides
"""

from typing import NamedTuple

import jax.numpy as jnp

from jattn.call.problem import Operands, Problem
from jattn.implementations.gpu.pairs import LOG2_E
from jattn.implementations.joint import Extras, Pairs, extras, kind

GROUPS = 2  # groups of threads that compute
ROWS = 64  # rows that a group computes: one `wgmma` has 64, and `mma` 16 in each of 4 warps
BLOCK = GROUPS * ROWS  # rows that a program of the grid computes
_HEAD = 64  # a head size in bytes is then a multiple of the 128 bytes of a swizzle
_WIDTH = 2  # bytes of float16 and bfloat16


class Plan(NamedTuple):
    """Sizes of a kernel."""

    inner: int  # rows of a block that is copied
    stages: int  # blocks that shared memory has room for


class Limits(NamedTuple):
    """What the blocks of a device may be.

    Attributes:
        shared: Bytes of shared memory that a program can have for blocks.
        forward: The plans of forward, the best one first.
        backward: Those of backward.
    """

    shared: int
    forward: tuple[Plan, ...]
    backward: tuple[Plan, ...]


# Hopper has 227 KiB, less 3 KiB for the barriers. Backward has blocks of 64 rows, which
# wgmma needs.
HOPPER = Limits(224 * 1024, (Plan(128, 2), Plan(64, 2)), (Plan(64, 2), Plan(64, 1)))
# Ada and Ampere 8.6 have 99 KiB, less 1 KiB for a barrier. The A100 has 163, but nobody
# could measure yet whether a plan of its own would be faster. A block is copied while
# another one is read, so there are two.
AMPERE = Limits(
    98 * 1024, (Plan(64, 2), Plan(32, 2), Plan(16, 2)), (Plan(64, 2), Plan(32, 2))
)


def forward_plan(H: int, D: int, limits: Limits) -> Plan:
    """Chooses as many keys for a block as shared memory has room for."""
    H, D = round_up(H, _HEAD), round_up(D, _HEAD)
    for plan in limits.forward:
        if _WIDTH * (BLOCK * H + plan.stages * plan.inner * (H + D)) <= limits.shared:
            return plan
    raise ValueError(f"forward_plan: H={H} and D={D} must be at most 256.")


def backward_plan(H: int, D: int, limits: Limits) -> Plan | None:
    """Chooses likewise; None if shared memory has no room."""
    size = round_up(H, _HEAD) + round_up(D, _HEAD)
    for plan in limits.backward:
        if _WIDTH * (BLOCK + plan.stages * plan.inner) * size <= limits.shared:
            return plan
    return None


def round_up(size: int, unit: int) -> int:
    """Rounds up to whole units."""
    return -(-size // unit) * unit


def padded(array):
    """Pads B × T × N × H with zeros, to whole blocks of rows and of numbers."""
    T, H = round_up(array.shape[1], BLOCK), round_up(array.shape[3], _HEAD)
    widths = [(0, 0), (0, T - array.shape[1]), (0, 0), (0, H - array.shape[3])]
    return jnp.pad(array, widths) if (array.shape[1], array.shape[3]) != (T, H) else array


def rows(array, fill=0):
    """Rearranges BTN to BNT, padded with `fill` to whole blocks of rows."""
    return _pad(jnp.swapaxes(array, 1, 2), 2, constant_values=fill)


def unrows(array, length: int):
    """Rearranges BNT back to BTN, without padding."""
    return jnp.swapaxes(array[:, :, :length], 1, 2)


def read(problem: Problem, operands: Operands) -> tuple[Pairs, Extras]:
    """Gives the programs that join queries and keys, and the arrays that they read."""
    pairs, found = extras(problem, operands)
    if operands.query_position is None:  # the kernel counts queries as it counts keys
        found = found._replace(index=(*found.index[:2], None, found.index[3]))
    return pairs, found


def form(array) -> str:
    """Says what an array aligned with BNTS is: a number, row, column or tile."""
    found = kind(array)
    return "number" if found == "row" and array.shape[2] == 1 else found


def arrange(array, by_query: bool = True):
    """Arranges an array aligned with BNTS for the kernels, in a dtype that they read.

    Padding repeats the last number, so that modifiers see nothing there that they do not
    see elsewhere.
    """
    what = form(array)
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.int8 if what == "tile" else jnp.int32)
    if array.dtype in (jnp.bfloat16, jnp.float16):
        array = array.astype(jnp.float32)
    if what == "number":
        return array[:, :, 0, 0]
    if what == "row":
        return _pad(array[..., 0], 2, mode="edge")
    if what == "column":
        return _pad(array[:, :, 0], 2, mode="edge")
    array = _pad(_pad(array, 2, mode="edge"), 3, mode="edge")
    return array if by_query else jnp.swapaxes(array, 2, 3)


def _pad(array, axis: int, **how):
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, round_up(array.shape[axis], BLOCK) - array.shape[axis])
    return jnp.pad(array, widths, **how) if widths[axis][1] else array


def numbers(problem: Problem, operands: Operands):
    """Computes the sign of the scale, the factors of products and exponents, and the unit.

    The sign multiplies the queries, so that the largest product is the largest logit. The
    size of the scale multiplies the products, or the exponents of a forward pass without
    modifier and bias; it is the unit there, and 1 elsewhere. XLA removes the multiplication
    by a sign that it knows to be 1.
    """
    scale = operands.scale
    sign, size = jnp.sign(scale), jnp.where(scale == 0, 1, jnp.abs(scale))
    plain = problem.modifier is None and operands.bias is None
    unit = size if plain else jnp.ones_like(size)
    return sign, jnp.stack([size, unit * LOG2_E]), unit
