"""Latent attention: one short vector for each token, which all heads read.

Multi-head latent attention keeps of each token a latent vector c and a rotary key r, and
makes keys and values of it: key = [W_k c, r], value = W_v c. The matrices can be absorbed
into the queries and the outputs instead, and then the cache alone is read:

    query · key       = [W_kᵀ q, q_r] · [c, r]
    Σ weight · value  = W_v Σ weight · c

So it is attention with one key head, and each value is the first part of its key. One
array holds both.

Reference:
    DeepSeek-AI, 2024, arXiv:2405.04434, section 2.1.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jattn.arrays.meshes import methods_across
from jattn.caches import asked
from jattn.caches.cache import Cache
from jattn.caches.sizes import batch_axes, check_dtype, check_sizes, no_tokens
from jattn.caches.store import blank
from jattn.pytree import pytree
from jattn.state import State


@pytree("cache")
@methods_across
class LatentCache:
    """Latent vectors and rotary keys of the tokens so far; `latent` makes one.

    Attributes:
        cache: A `Cache` of one key head, whose values are the first part of the keys.
    """

    cache: Cache

    @property
    def batch(self) -> tuple[int, ...]:
        """Gives the axes of examples."""
        return self.cache.batch

    @property
    def length(self) -> jax.Array:
        """Says how many tokens were appended: one number, or one of each example."""
        return self.cache.length

    @property
    def capacity(self) -> int:
        """Says how many tokens there is room for in all."""
        return self.cache.capacity

    @property
    def room(self) -> jax.Array:
        """Says how many more tokens fit."""
        return self.cache.room

    @property
    def latent(self) -> jax.Array:
        """Gives the latent vectors, `BSC`."""
        return self.cache.value[..., 0, :]

    @property
    def rotary(self) -> jax.Array:
        """Gives the rotary keys, `BSR`."""
        return self.cache.key[..., 0, self.cache.store.value_dim :]

    def append(self, latent, rotary, *, count=None) -> "LatentCache":
        """Adds T tokens.

        Args:
            latent: `BTC`.
            rotary: `BTR`.
            count: See `Cache.append`.
        """
        where, store = "caches.append", self.cache.store
        sizes = (store.value_dim,), (store.head_dim - store.value_dim,)
        tokens = {"latent": (latent, sizes[0]), "rotary": (rotary, sizes[1])}
        parts = asked.check_tokens(where, store, **tokens)
        if store.is_rounded:  # which takes any dtype, and two of them
            parts = [x.astype(jnp.float32) for x in parts]
        joined = jnp.concatenate(parts, axis=-1)
        cache = self.cache.appended(where, joined[..., None, :], None, count)
        return LatentCache(cache)

    def attend(self, query, *, scale, count=None, **options) -> jax.Array:
        """Attends from absorbed queries.

        Args:
            query: `BTN(C+R)`: the absorbed part, then the rotary part.
            scale: Multiplies the products: 1/√ of the head size before it was absorbed,
                which nothing here can know.
            count: See `Cache.attend`.
            **options: See `Cache.attend`.

        Returns:
            Sums of latent vectors, `BTNC`, for W_v to make outputs of.
        """
        return self.cache.attend(query, count=count, scale=_given(scale), **options)

    def attend_state(self, query, *, scale, count=None, **options) -> State:
        """Attends like `attend`, and also gives the logsumexp."""
        return self.cache.attend_state(query, count=count, scale=_given(scale), **options)

    def extend(self, query, latent, rotary, *, scale, count=None, **options):
        """Appends tokens and attends from them; see `append` and `attend`.

        Args:
            query: `BTN(C+R)`.
            latent: `BTC`.
            rotary: `BTR`.
            scale: See `attend`.
            count: See `Cache.append`.
            **options: See `Cache.attend`.

        Returns:
            Sums of latent vectors, `BTNC`, and the cache with the tokens.
        """
        after = self.append(latent, rotary, count=count)
        asked.check_rows("caches.extend", query, jnp.shape(latent)[len(self.batch)])
        return after.attend(query, count=count, scale=scale, **options), after

    def truncate(self, length) -> "LatentCache":
        """Forgets all tokens after the first `length`; see `Cache.truncate`."""
        return LatentCache(self.cache.truncate(length))

    def take(self, indices) -> "LatentCache":
        """Gives the examples `indices`, in this order."""
        return LatentCache(self.cache.take(indices))

    def dequantize(self, dtype="float32") -> "LatentCache":
        """Gives the same tokens without rounding."""
        return LatentCache(self.cache.dequantize(dtype))


def _given(scale):
    if scale is None:
        raise ValueError(
            "caches.attend: `scale` must be given, for the cache cannot know it, got None; "
            "give 1/√ of the head size before it was absorbed."
        )
    return scale


def latent(
    batch_size: int | tuple[int, ...],
    capacity: int,
    latent_dim: int,
    rope_dim: int,
    *,
    dtype: Any = "float32",
    ragged: bool = False,
) -> LatentCache:
    """Makes a cache of latent vectors without tokens.

    Args:
        batch_size: B, or several axes, or `()` for none.
        capacity: How many tokens there is room for, of each example.
        latent_dim: C, the size of the latent vectors.
        rope_dim: R, that of the rotary keys; may be 0.
        dtype: See `empty`.
        ragged: Whether each example has a length of its own.

    Example:
        >>> import jax.numpy as jnp
        >>> kv = latent(1, 8, 4, 2)
        >>> kv = kv.append(jnp.ones((1, 3, 4)), jnp.zeros((1, 3, 2)))
        >>> kv.attend(jnp.zeros((1, 1, 2, 6)), scale=0.5).shape
        (1, 1, 2, 4)
    """
    where, batch = "caches.latent", batch_axes("caches.latent", batch_size)
    sizes = {"capacity": capacity, "latent_dim": latent_dim, "rope_dim": rope_dim}
    slots, C, R = check_sizes(where, **{name: (x, 0) for name, x in sizes.items()})
    dtype = check_dtype(where, dtype)
    store = blank(batch, slots, 1, C + R, C, dtype, shared=True)
    return LatentCache(Cache(store, no_tokens(where, batch, ragged)))
