"""The two products of a decoding step with what a store holds.

What is rounded has a scale for each token and head. Scales multiply logits and weights,
not the vectors: then no vector has to be copied.
"""

from typing import Any

import jax
import jax.numpy as jnp


class Products:
    """The products of a store; see `implementations.source.Part`."""

    @property
    def mixes(self) -> bool:
        """Says no: each head is multiplied apart."""
        return False

    def apart(self) -> Any:
        """Gives itself."""
        return self

    def products(self: Any, rows, wide) -> jax.Array:
        """Multiplies rows BKRH by the keys, BKRS."""
        products, first = jnp.zeros((), wide), 0
        for keys in self.wide_keys(wide):  # parts of H
            part = rows[..., first : first + keys.shape[2]]
            products += jnp.einsum("BKRH,BKHS->BKRS", part, keys)
            first += keys.shape[2]
        scales = self.scales(wide)
        return products if scales is None else products * scales[0][:, :, None]

    def sums(self: Any, weights, wide) -> jax.Array:
        """Sums up the values, each times its weight BKRS, to BKRD."""
        scales = self.scales(wide)
        weights = weights if scales is None else weights * scales[1][:, :, None]
        values = self.wide_values(wide)  # parts of D
        parts = [jnp.einsum("BKRS,BKSD->BKRD", weights, x) for x in values]
        whole = parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1)
        return whole[..., : self.value_dim]

    def vectors_of_values(self: Any, wide) -> jax.Array:
        """Gives the values with their scales, BKSD."""
        values = jnp.concatenate(self.wide_values(wide), -1)[..., : self.value_dim]
        scales = self.scales(wide)
        return values if scales is None else values * scales[1][..., None]
