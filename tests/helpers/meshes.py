"""One small call, and meshes of devices for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from tests.helpers.draws import normal

P = PartitionSpec
B, T, N, K, H = 4, 8, 4, 2, 8
RNG = jax.random.key(0)
QUERY = normal(1, (B, T, N, H))
KEY, VALUE = (normal(i, (B, T, K, H)) for i in (2, 3))
IDS = jnp.asarray(np.random.default_rng(4).integers(0, 2, (B, T)), jnp.int32)
LENGTHS = jnp.array([3, 8, 7, 1])
SLOPES = jnp.linspace(0.1, 0.5, N)
BIAS = normal(5, (B, N, T, T))
TABLE = normal(6, (2 * T,))
INPUTS = {"query": QUERY, "key": KEY, "value": VALUE}


def far(t, s):
    return jnp.abs(t - s).astype(jnp.float32)


def mesh_of(kind):
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2)


def close(got, want, bound=2e-5):
    compare = functools.partial(np.testing.assert_allclose, atol=bound, rtol=bound)
    jax.tree.map(compare, jax.device_get(got), jax.device_get(want))
