"""`haiku.MultiHeadAttention` with this library's attention inside."""

from typing import Any

import haiku as hk
import jax

from jattn import caches
from jattn.adapters import layer, pairs
from jattn.arrays.integers import is_number

__all__ = ["MultiHeadAttention"]

WHERE = "haiku.MultiHeadAttention"


class MultiHeadAttention(hk.MultiHeadAttention):
    """`haiku.MultiHeadAttention`, parameter for parameter; change the import.

    Its parameters have the same names and shapes, so the parameters of one module work in
    the other. In addition it has grouped heads, any mask, any modifier and dropout. The
    differences from haiku are:

    - A query that sees no key has output 0 before the last projection, and gradient 0. In
      haiku the output is the mean of the values.
    - The softmax is in float32 at least.
    - A mask may have fewer axes than the logits, and axes of size 1.
    """

    def __init__(
        self, num_heads, key_size, w_init_scale=None, *, num_kv_heads=None, **rest
    ):
        """Makes the module.

        Args:
            num_heads: N, how many heads the queries have.
            key_size: H, the size of a head of queries and keys.
            w_init_scale: As in haiku, like all other arguments.
            num_kv_heads: K, how many heads the keys and values have; N must be a multiple
                of it; N by default.
            **rest: `w_init`, `with_bias`, `b_init`, `value_size`, `model_size`, `name`.
        """
        super().__init__(num_heads, key_size, w_init_scale, **rest)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if not is_number(self.num_kv_heads) or self.num_kv_heads < 1:
            raise ValueError(
                f"{WHERE}: `num_kv_heads` must be ≥ 1, got {num_kv_heads!r}; give an `int` "
                f"that divides N={num_heads}."
            )

    def __call__(
        self, query, key, value, mask=None, *, bias=None, dropout=None, **options
    ) -> jax.Array:
        """Projects, attends and projects back.

        Args:
            query: Queries, `…T` × features; any number of batch axes, or none.
            key: Keys, `…S` × features.
            value: Values, `…S` × features.
            mask: True = may attend: an array that broadcasts to `…NTS`, one of
                `jattn.masks`, or a function (b, n, t, s) → bool.
            bias: Added to the logits; broadcasts to `…NTS`.
            dropout: A `jattn.Dropout(rate, rng)`.
            **options: `modifier`, `sink`, `scale`, `query_position`, `key_position` and
                `implementation` of `jattn.attention`.

        Returns:
            `…T` × model_size.

        Raises:
            ValueError: If an argument does not fit; the message says what to do.
        """
        heads = layer.one_batch(*self._heads(query, key, value))
        output = layer.attend(
            WHERE,
            *heads,
            mask=pairs.any_mask(WHERE, mask, *heads[:2]),
            bias=bias,
            dropout=dropout,
            options=options,
        )
        return self._joined(output)

    @hk.name_like("__call__")  # so its parameters have the same names
    def extend(
        self, x, *, capacity=None, dtype=None, mask=None, count=None, **options
    ) -> jax.Array:
        """Decodes: attends from new tokens to themselves and to all that came before.

        The cache is state of haiku under the name "kv", so the function needs
        `hk.transform_with_state`. Each token sees itself and those before it. Pieces of any
        length give what one causal call gives for the whole sequence.

        Inside `hk.experimental.layer_stack`, `init` must get no tokens, `x[:, :0]`: haiku
        keeps the state after the layers have run there, with the tokens in the caches.

        Args:
            x: `…T` × features, one or more tokens.
            capacity: How many tokens the cache has room for; needed where it is made.
            dtype: That of the cache, of `jattn.caches.empty`; that of the keys by default.
            mask: A further mask: a function (b, n, t, s) → bool of positions from the
                first token on, or one of `jattn.masks`.
            count: How many of the T tokens count; all by default.
            **options: `modifier`, `sink`, `scale` and others of `jattn.attention`.

        Returns:
            `…T` × model_size.

        Raises:
            ValueError: If there is no cache and no `capacity`.
        """
        heads = self._heads(x, x, x)
        empty: Any = lambda *_: self._empty(heads, capacity, dtype)
        # Haiku wants a shape and a dtype, and hands them to `empty`, which needs neither.
        kv = hk.get_state("kv", (), heads[1].dtype, init=empty)
        given = {"mask": mask, "count": count, "options": options}
        output, after = layer.extend(WHERE, kv, *heads, **given)
        # What initialises a model only makes the cache; its tokens are no tokens.
        if not hk.running_init():
            hk.set_state("kv", after)
        return self._joined(output)

    @hk.transparent
    def _heads(self, query, key, value) -> list[jax.Array]:
        """Projects queries, keys and values to heads of one dtype."""
        heads = (
            self._project(query, self.num_heads, self.key_size, "query"),
            self._project(key, self.num_kv_heads, self.key_size, "key"),
            self._project(value, self.num_kv_heads, self.value_size, "value"),
        )
        dtype = jax.numpy.result_type(*heads)
        return [x.astype(dtype) for x in heads]

    @hk.transparent
    def _joined(self, output) -> jax.Array:
        """Joins the heads of the output, and projects them back."""
        output = output.reshape(*output.shape[:-2], self.num_heads * self.value_size)
        return self._linear(self.model_size)(output)

    def _empty(self, heads, capacity, dtype) -> caches.Cache:
        if capacity is None:
            raise ValueError(
                f"{WHERE}.extend: `capacity` must say how many tokens the cache has room "
                f"for, got None; give it where the cache is made."
            )
        batch, sizes = heads[1].shape[:-3], (self.key_size, self.value_size)
        dtype = heads[1].dtype if dtype is None else dtype
        return caches.empty(batch, capacity, self.num_kv_heads, *sizes, dtype=dtype)

    @hk.transparent
    def _project(self, array, heads: int, head_size: int, name: str) -> jax.Array:
        """Projects each position and splits its features into heads."""
        projected = self._linear(heads * head_size, name)(array)
        return projected.reshape(*array.shape[:-1], heads, head_size)

    @hk.transparent
    def _linear(self, size: int, name: str | None = None) -> hk.Linear:
        return hk.Linear(
            size,
            w_init=self.w_init,
            with_bias=self.with_bias,
            b_init=self.b_init,
            name=name,
        )
