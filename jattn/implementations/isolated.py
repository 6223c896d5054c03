"""The sums of values where a mask is, as an operation that JAX can transpose.

The output of attention is linear in the values. But to leave out values that are not finite
is not, as JAX sees it: whether a number is finite is no linear function of it. For finite
values the sums are linear, and that is what `jax.linear_transpose` transposes.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jattn.implementations import shared
from jattn.operations.mapped import cond_any
from jattn.operations.operation import Operation, retype


@dataclasses.dataclass(frozen=True)
class Isolated(Operation):
    """The operation that sums up values BSKD with weights BNTS, as a mask BNTS allows."""

    @property
    def outputs(self) -> int:
        """Counts the outputs: the sums."""
        return 1

    @property
    def linear_in(self) -> frozenset[int]:
        """Gives the index of the values."""
        return frozenset({2})

    def types(self, *types) -> list:
        """Gives the type of the sums, BTND."""
        weights, _, value = types
        B, N, T, _ = weights.shape
        b, n, t, _ = weights.sharding.spec
        spec = b, t, n, value.sharding.spec[3]
        return [retype(weights, (B, T, N, value.shape[3]), spec=spec)]

    def fast(self, *arrays, spread):
        """Computes the sums."""
        del spread
        return self.reference(*arrays)

    def reference(self, *arrays):
        """Computes the sums of what is finite, then adds what is not."""
        weights, allowed, value = arrays
        finite, poison = shared.isolate_with_slope(value)
        total = shared.sums(weights, finite)

        def spoil(total):
            B, N, T, S = weights.shape
            K, D = value.shape[2:]
            rows = lambda x: jnp.broadcast_to(x, weights.shape).reshape(B, K, N // K * T, S)
            values = jnp.moveaxis(value, 2, 1)
            found = shared.spoiled(rows(weights), values, rows(allowed))
            return total + jnp.moveaxis(found.reshape(B, N, T, D), 1, 2)

        return [cond_any(jnp.any(jnp.isnan(poison)), spoil, lambda total: total, total)]

    def pull(self, active, primals, outputs, cotangents, spread):
        """Pulls back; a cotangent that is not finite reaches the values that its row sees.

        A product would bring it to all of them, because 0 · NaN is NaN.
        """
        call = primals, outputs, cotangents, spread
        if not active[2]:
            return super().pull(active, *call)
        others = super().pull((*active[:2], False), *call)
        (weights, allowed, value), (cotangent,) = primals, cotangents
        finite = jnp.isfinite(cotangent)
        back = jax.linear_transpose(lambda value: shared.sums(weights, value), value)

        def careful(cotangent):
            (d_value,) = back(jnp.where(finite, cotangent, 0))
            pairs = jnp.broadcast_to(allowed, weights.shape).astype(weights.dtype)
            count = jax.linear_transpose(lambda value: shared.sums(pairs, value), value)
            (lost,) = count((~finite).astype(cotangent.dtype))
            return jnp.where(lost > 0, jnp.nan * d_value, d_value)  # derivatives too

        plain = lambda cotangent: back(cotangent)[0]
        d_value = cond_any(~jnp.all(finite), careful, plain, cotangent)
        return (*others, d_value)


def isolated_sums(weights: jax.Array, allowed: jax.Array, value: jax.Array) -> jax.Array:
    """Sums up values BSKD with weights BNTS to BTND, where the mask `allowed` says so.

    The result is linear in the values for JAX to transpose. A value that is not finite
    reaches those only who see it.
    """
    (sums,) = Isolated()(weights, allowed, value)
    return sums
