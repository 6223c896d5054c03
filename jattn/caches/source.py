"""What has slots to attend to, and a call cut to some of them."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from jattn.caches.store import Store
from jattn.call.problem import Operands, Problem
from jattn.implementations.tpu.decode.slots import Slots


class Source(Protocol):
    """Where keys and values are: a `Store`, or pages of one. A pytree of arrays."""

    @property
    def slots(self) -> int:
        """Says how many tokens there is room for."""

    @property
    def dtype(self) -> str:
        """Names the dtype of the numbers, which may be stored in another one."""

    @property
    def unit(self) -> int:
        """Says how many slots are cut together."""

    def cut(self, start, size: int) -> Store:
        """Gives the slots from `start` on, a multiple of the unit, BKHS and BKSD."""

    def vectors(self, dtype) -> tuple[jax.Array, jax.Array]:
        """Gives all keys and values, BSKH and BSKD."""

    def lies_ready(self, wide) -> bool:
        """Says whether all slots can be multiplied where they lie."""

    def arrays(self) -> Slots:
        """Gives the arrays where they lie, as a kernel reads them."""


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
