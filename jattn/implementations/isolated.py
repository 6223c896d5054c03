"""The isolation of values, as an operation that JAX can transpose.

The output of attention is linear in the values. But to isolate them is not, as JAX sees it:
whether a number is finite is no linear function of it. For finite values the finite part is
the value itself, and the poison is 0. This is linear, and it is what
`jax.linear_transpose` transposes.
"""

import dataclasses

import jax

from jattn.implementations import shared
from jattn.operations.operation import Operation, retype


@dataclasses.dataclass(frozen=True)
class Isolated(Operation):
    """The operation that maps values `…D` to their finite part and the poison of rows."""

    @property
    def outputs(self) -> int:
        """Counts the outputs: the finite part and the poison."""
        return 2

    @property
    def linear_in(self) -> frozenset[int]:
        """Gives the index of the values."""
        return frozenset({0})

    def types(self, *types) -> list:
        """Gives the type of the values, and the same without the last axis."""
        (value,) = types
        rows = retype(value, value.shape[:-1], spec=value.sharding.spec[:-1])
        return [value, rows]

    def fast(self, *arrays, spread):
        """Computes both outputs."""
        del spread
        return self.reference(*arrays)

    def reference(self, *arrays):
        """Computes both outputs, by `shared.isolate`."""
        return shared.isolate(*arrays)


def isolate_values(value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes the finite part of the values and the poison of their rows.

    The result is that of `shared.isolate`, and JAX can transpose it.
    """
    finite, poison = Isolated()(value)
    return finite, poison
