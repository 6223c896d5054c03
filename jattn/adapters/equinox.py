"""`equinox.nn.MultiheadAttention` with this library's attention inside."""

import equinox as eqx
import jax

from jattn import caches
from jattn.adapters import layer, pairs
from jattn.arrays.integers import is_number

__all__ = ["MultiheadAttention"]

WHERE = "equinox.MultiheadAttention"


class MultiheadAttention(eqx.nn.MultiheadAttention):
    """`equinox.nn.MultiheadAttention`, parameter for parameter; change the import.

    It has the same leaves in the same order. So `tree_deserialise_leaves` reads into one of
    the two layers what `tree_serialise_leaves` wrote of the other. In addition it has
    grouped heads, any mask and any modifier. The differences from equinox are:

    - A query that sees no key has output 0 before the last projection, and gradient 0. In
      equinox the output is the mean of the values.
    - The weights are not rounded to the dtype of half precision inputs.
    - Dropout has the same probability, but drops other weights; it must be below 1.
    - A mask may have axes of size 1, and consist of ones and zeros.
    """

    num_kv_heads: int = eqx.field(static=True)

    def __init__(self, num_heads, query_size, *sizes, num_kv_heads=None, key, **options):
        """Makes the parameters of `equinox.nn.MultiheadAttention`.

        Args:
            num_heads: N, how many heads the queries have.
            query_size: How many features a query has.
            *sizes: As in equinox, like all other arguments.
            num_kv_heads: K, how many heads the keys and values have; N must be a multiple
                of it; N by default.
            key: The random key of the parameters.
            **options: See equinox.
        """
        super().__init__(num_heads, query_size, *sizes, key=key, **options)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads == num_heads:
            return
        is_whole = is_number(self.num_kv_heads) and self.num_kv_heads >= 1
        if not is_whole or num_heads % self.num_kv_heads:
            raise ValueError(
                f"{WHERE}: num_heads={num_heads} must be a multiple of `num_kv_heads`, got "
                f"{num_kv_heads!r}; give an `int` that divides it."
            )
        # Two projections are made again with fewer heads, from the keys that equinox uses.
        _, key_rng, value_rng, _ = jax.random.split(key, 4)
        linear = lambda size, head_size, has_bias, like, rng: eqx.nn.Linear(
            size,
            self.num_kv_heads * head_size,
            use_bias=has_bias,
            dtype=like.weight.dtype,
            key=rng,
        )
        self.key_proj = linear(
            self.key_size, self.qk_size, self.use_key_bias, self.key_proj, key_rng
        )
        self.value_proj = linear(
            self.value_size, self.vo_size, self.use_value_bias, self.value_proj, value_rng
        )

    def __call__(
        self,
        query,
        key_,
        value,
        mask=None,
        *,
        key=None,
        inference=None,
        deterministic=None,
        process_heads=None,
        bias=None,
        **options,
    ) -> jax.Array:
        """Projects, attends and projects back, for one example; `jax.vmap` for more.

        Args:
            query: T × query_size.
            key_: S × key_size.
            value: S × value_size.
            mask: True = may attend: an array that broadcasts to `NTS`, one of
                `jattn.masks`, or a function (b, n, t, s) → bool; b is 0 under `jax.vmap`.
            key: The random key of dropout.
            inference: Whether nothing is dropped; by default the setting of the layer.
            deterministic: Equinox's older name of `inference`.
            process_heads: Maps query, key and value heads to new ones of the same shapes.
            bias: Added to the logits; broadcasts to `NTS`.
            **options: `modifier`, `sink`, `scale`, `query_position`, `key_position` and
                `implementation` of `jattn.attention`.

        Returns:
            T × output_size.

        Raises:
            ValueError: If an argument does not fit; the message says what to do.
        """
        heads = self._heads(query, key_, value)
        if process_heads is not None:
            processed = tuple(process_heads(*heads))
            shapes = [tuple(x.shape for x in arrays) for arrays in (processed, heads)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{WHERE}: `process_heads` must keep the shapes of the heads "
                    f"{shapes[1]}, got {shapes[0]}."
                )
            heads = processed
        heads = _alike(heads)
        # Of both names, the older one counts, as in equinox.
        choices = deterministic, inference, self.dropout.inference
        inference = layer.flag(WHERE, "inference", *choices)
        output = layer.attend(
            WHERE,
            *heads,
            mask=pairs.any_mask(WHERE, mask, *heads[:2]),
            bias=bias,
            dropout=layer.dropout(WHERE, self.dropout.p, key, inference, name="dropout_p"),
            options=options,
        )
        return self._joined(output)

    def empty(self, capacity: int, *, dtype=None, **options) -> caches.Cache:
        """Makes the cache of one example, for `extend`; `jax.vmap` makes that of more.

        Args:
            capacity: How many tokens there is room for.
            dtype: See `jattn.caches.empty`; that of the weights by default.
            **options: See `jattn.caches.empty`.
        """
        sizes = self.num_kv_heads, self.qk_size, self.vo_size
        dtype = self.key_proj.weight.dtype if dtype is None else dtype
        return caches.empty((), capacity, *sizes, dtype=dtype, **options)

    def extend(self, x, kv, *, mask=None, count=None, **options):
        """Decodes: attends from new tokens to themselves and to those in a cache.

        Each token sees itself and those before it. Pieces of any length give what one
        causal call gives for the whole sequence; nothing is dropped.

        Args:
            x: T × query_size, one or more tokens.
            kv: The cache, of `empty` or of `jattn.caches`.
            mask: A further mask: a function (b, n, t, s) → bool of positions from the
                first token on, or one of `jattn.masks`.
            count: How many of the T tokens count; all by default.
            **options: `modifier`, `sink`, `scale` and others of `jattn.attention`.

        Returns:
            T × output_size, and the cache with the tokens.
        """
        given = {"mask": mask, "count": count, "options": options}
        output, kv = layer.extend(WHERE, kv, *_alike(self._heads(x, x, x)), **given)
        return self._joined(output), kv

    def _heads(self, query, key, value) -> tuple[jax.Array, ...]:
        """Projects queries, keys and values of one example."""
        return (
            _project(self.query_proj, query, self.num_heads),
            _project(self.key_proj, key, self.num_kv_heads),
            _project(self.value_proj, value, self.num_kv_heads),
        )

    def _joined(self, output) -> jax.Array:
        """Joins the heads of the output, and projects them back."""
        rows = output.reshape(len(output), self.num_heads * self.vo_size)
        return jax.vmap(self.output_proj)(rows)


def _alike(heads) -> list[jax.Array]:
    """Converts arrays to the dtype that they promote to."""
    dtype = jax.numpy.result_type(*heads)
    return [x.astype(dtype) for x in heads]


def _project(linear, array, heads: int) -> jax.Array:
    """Projects each position and splits its features into heads."""
    rows = jax.vmap(linear)(array)
    return rows.reshape(len(rows), heads, rows.shape[1] // heads)
