"""Which pages are free, and how many own each, in arrays of a compiled program.

A free list without a host. `free` is a stack of page numbers; its first `num_free`
numbers are those of free pages. `owners` counts who has a page, as several share a
forked prompt.

    take n pages       the top n of the stack; each claimant's share begins where the sum
                       of the shares before it ends
    give pages back    owners − 1; those that nobody owns go to the top of the stack
"""

import dataclasses

import jax
import jax.numpy as jnp

from jattn.pytree import pytree


@pytree("free", "num_free", "owners")
class Pool:
    """Which of P pages are free.

    Attributes:
        free: Page numbers, `P`; the first `num_free` are free, the others mean nothing.
        num_free: How many are free.
        owners: How many own each page, `P`.
    """

    free: jax.Array
    num_free: jax.Array
    owners: jax.Array

    def claim(self, counts) -> tuple["Pool", jax.Array, jax.Array]:
        """Gives pages to claimants in order, to each all that it asks for or none.

        Args:
            counts: How many pages each claims, of one axis.

        Returns:
            The pool; where each share begins on the stack, counted from its top; and who
            was granted a share. `page_of` finds a page by its place.
        """

        def grant(used, count):
            fits = used + count <= self.num_free
            return jnp.where(fits, used + count, used), (used, fits)

        used, (start, granted) = jax.lax.scan(grant, jnp.zeros_like(self.num_free), counts)
        return dataclasses.replace(self, num_free=self.num_free - used), start, granted

    def page_of(self, place) -> jax.Array:
        """Gives the page at a place of the stack, counted from its top before a claim."""
        return jnp.take(self.free, self.num_free - 1 - place, mode="clip")

    def owned(self, pages) -> "Pool":
        """Counts one owner more of each page; −1 is none."""
        at = jnp.where(pages >= 0, pages, self.owners.size).reshape(-1)
        return dataclasses.replace(self, owners=self.owners.at[at].add(1, mode="drop"))

    def released(self, pages) -> "Pool":
        """Counts one owner less of each page; −1 is none."""
        P = self.owners.size
        at = jnp.where(pages >= 0, pages, P).reshape(-1)
        owners = self.owners.at[at].add(-1, mode="drop")
        freed = (self.owners > 0) & (owners == 0)
        place = self.num_free + jnp.cumsum(freed.astype(jnp.int32)) - 1
        place = jnp.where(freed, place, P)
        numbers = jnp.arange(P, dtype=jnp.int32)
        free = self.free.at[place].set(numbers, mode="drop")
        return Pool(free, self.num_free + jnp.sum(freed, dtype=jnp.int32), owners)


def full_pool(num_pages: int) -> Pool:
    """Gives a pool in which all pages are free; page 0 is taken first."""
    free = jnp.arange(num_pages, dtype=jnp.int32)[::-1]
    return Pool(free, jnp.int32(num_pages), jnp.zeros(num_pages, jnp.int32))
