"""An operation whose keys lie on many devices: what ring and gather have in common.

The whole is the merge of the parts, and each derivative of the whole is the sum over parts
of the part's own rule, given the output, maximum and sum of the whole. So an operation
around the one that exists serves every implementation, and needs no kernel of its own:

    forward      keys come by, and parts merge                    keys travel
    tangents     JAX's of the forward pass, part by part           and their tangents
    cotangents   keys come by again, each part by its own rule     and their cotangents
    further      JAX's of a plain loop over parts
"""

import dataclasses

import jax
from jax import lax

from jattn.arrays.meshes import varying
from jattn.context.ways import CUT
from jattn.operations.operation import Around

__all__ = ["Spread"]


@dataclasses.dataclass(frozen=True)
class Spread(Around):
    """Attention of this device's queries to the keys of all devices of a mesh axis.

    Attributes:
        operation: The operation for some of the keys, as many as a device has.
        axis: The mesh axis.
        devices: How many it has.
        ways: What each argument does: see `ways`.
    """

    axis: tuple[str, ...]
    devices: int
    ways: tuple

    @property
    def elements(self):
        """Asks the operation on each part."""
        return self.operation.elements

    @property
    def collective(self):
        """Says that the devices send each other keys."""
        return True

    @property
    def wide(self):
        """Gives the precision of sums."""
        return self.operation.problem.wide

    @property
    def columns(self) -> int:
        """Counts the keys of a device."""
        return self.operation.problem.sizes.S

    def types(self, *types):
        """Asks the operation on each part."""
        return self.operation.types(*types)

    def widened(self, arrays) -> list[jax.Array]:
        """Gives the arguments of a part so that their cotangents are not rounded yet."""
        wide = self.operation.may_be_wide
        return [x.astype(self.wide) if i in wide else x for i, x in enumerate(arrays)]

    def alike(self, arrays, like=()) -> list[jax.Array]:
        """Makes the arrays vary over the axis and over all that any of them varies over."""
        return varying([*arrays, *like], frozenset(self.axis))[: len(arrays)]

    def travelling(self, arrays) -> list[jax.Array]:
        """Picks the arrays that travel."""
        pairs = zip(arrays, self.ways, strict=True)
        return [x for x, way in pairs if isinstance(way, int)]

    def at(self, arrays, travelling, source) -> list[jax.Array]:
        """Gives the arguments for the keys at hand, which are of the device `source`."""
        travelling = iter(travelling)
        found = []
        for x, way in zip(arrays, self.ways, strict=True):
            if isinstance(way, int):
                x = next(travelling)
            elif way == CUT:
                x = lax.dynamic_slice_in_dim(x, source * self.columns, self.columns, 3)
            found.append(x)
        return found
