"""What has slots to attend to, and a call cut to some of them.

A buffer of keys and values is a source, and so are caches of every kind.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from jattn.call.problem import Operands, Problem


class Part(Protocol):
    """The keys and values of some slots, ready for the two products."""

    @property
    def slots(self) -> int:
        """Says how many slots these are."""

    @property
    def num_heads(self) -> int:
        """Gives K."""

    def products(self, rows, wide) -> jax.Array:
        """Multiplies rows BKRH by the keys, BKRS."""

    def sums(self, weights, wide) -> jax.Array:
        """Sums up the values, each times its weight BKRS, to BKRD."""

    def vectors_of_values(self, wide) -> jax.Array:
        """Gives the values, BKSD."""


class Source(Protocol):
    """Where keys and values are; a pytree of arrays."""

    @property
    def slots(self) -> int:
        """Says how many tokens there is room for."""

    @property
    def unit(self) -> int:
        """Says how many slots are cut together."""

    @property
    def mixes(self) -> bool:
        """Says whether a NaN of one head may reach another; not `apart`."""

    def apart(self) -> Any:
        """Gives a source of the same slots that does not mix."""

    def cut(self, start, size: int) -> Any:
        """Gives the slots from `start` on, a multiple of the unit, as a `Part`."""

    def whole(self) -> Any:
        """Gives all slots as a `Part`, which may have more at its end that hold nothing."""

    def vectors(self, dtype) -> tuple[jax.Array, jax.Array]:
        """Gives all keys and values, BSKH and BSKD."""

    def lies_ready(self, wide) -> bool:
        """Says whether all slots can be multiplied where they lie."""


def cut(problem: Problem, operands: Operands, start, size: int):
    """Gives the same call for the slots from `start` on."""
    if size == problem.sizes.S:
        return problem, operands
    along = lambda x, axis: lax.dynamic_slice_in_dim(x, start, size, axis)
    aligned = lambda x: x if x.shape[3] == 1 else along(x, 3)
    arrays = lambda x: x._replace(aligned=tuple(map(aligned, x.aligned)))
    position = operands.key_position
    if position is None or position.ndim == 0:
        position = start if position is None else position + start
        position = jnp.asarray(position, jnp.int32)
    else:
        position = along(position, 1)
    rng = operands.rng and (operands.rng[0], aligned(operands.rng[1]))
    operands = operands._replace(
        bias=None if operands.bias is None else aligned(operands.bias),
        mask=arrays(operands.mask),
        modifier=arrays(operands.modifier),
        key_position=position,
        rng=rng,
    )
    sizes = dataclasses.replace(problem.sizes, S=size)
    return dataclasses.replace(problem, sizes=sizes), operands


def scaled_products(problem: Problem, operands: Operands, part: Part) -> jax.Array:
    """Gives the scaled products of queries and keys of all slots of a part, BKRS."""
    B, N, T, _ = problem.sizes.BNTS
    query = operands.query.astype(problem.wide)
    K, H = part.num_heads, query.shape[-1]
    rows = jnp.moveaxis(query.reshape(B, T, K, N // K, H), 1, 3)
    rows = rows.reshape(B, K, N // K * T, H)  # H may be 0, so nothing is left to guess
    return operands.scale * part.products(rows, problem.wide)


def longer(array: jax.Array, slots: int, value=0, axis: int = -1) -> jax.Array:
    """Gives an array with as many slots along an axis, the new ones of one value."""
    more = slots - array.shape[axis]
    axes = [(0, 0)] * array.ndim
    axes[axis] = 0, more
    return jnp.pad(array, axes, constant_values=value) if more else array
