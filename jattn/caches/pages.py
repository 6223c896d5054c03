"""The pages of each example as one run of slots."""

import jax
import jax.numpy as jnp
from jax import lax

from jattn.caches.store import Store
from jattn.implementations.tpu.decode.slots import Slots
from jattn.pytree import pytree


@pytree("store", "table")
class Pages:
    """The pages of each example one after the other, as a source of keys and values."""

    store: Store
    table: jax.Array

    batch = property(lambda self: self.table.shape[:1])
    num_heads = property(lambda self: self.store.num_heads)
    dtype = property(lambda self: self.store.dtype)
    value_dim = property(lambda self: self.store.value_dim)
    unit = property(lambda self: self.store.slots)
    mixes = property(lambda self: self.store.mixes)
    slots = property(lambda self: self.table.shape[1] * self.store.slots)

    def flat(self) -> "Pages":
        """Gives itself: there is one batch axis."""
        return self

    def apart(self) -> "Pages":
        """Gives itself."""
        return self

    def lies_ready(self, wide) -> bool:
        """Says no: pages have to be gathered."""
        del wide
        return False

    def arrays(self) -> Slots:
        """Gives the pages where they lie, and the table, as a kernel reads them."""
        return self.store.arrays()._replace(table=self.table)

    def cut(self, start, size: int) -> Store:
        """Gives the slots from `start` on, copied out of their pages."""
        blocks = lax.dynamic_slice_in_dim(
            self.table, start // self.unit, size // self.unit, axis=1
        )

        def gather(x, axis):
            x = jnp.take(x, jnp.maximum(blocks, 0), axis=0)  # B, pages and the axes of one
            x = jnp.moveaxis(x, 1, axis - 1)
            return x.reshape(*x.shape[: axis - 1], size, *x.shape[x.ndim + axis + 1 :])

        return self.store.map(gather)

    def whole(self) -> Store:
        """Gives all slots, copied out of their pages."""
        return self.cut(0, self.slots)

    def vectors(self, dtype):
        """Gives all keys and values, BSKH and BSKD."""
        return self.whole().vectors(dtype)
