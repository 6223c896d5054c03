"""`keras.layers.MultiHeadAttention` with this library's attention inside.

Needs keras on its JAX backend: set `KERAS_BACKEND=jax` before keras is first imported.
"""

import math

import jax
import jax.numpy as jnp

from jattn import caches
from jattn.adapters import layer, pairs
from jattn.arrays.checks import check_flag
from jattn.masks import Causal, Window

WHERE = "jattn.adapters.keras"
ADVICE = (
    "pip install 'jattn[keras]', and set KERAS_BACKEND=jax before keras is first imported"
)

try:
    import keras
except ImportError as error:
    raise ImportError(
        f"{WHERE}: needs keras on its JAX backend, got: {error}; {ADVICE}."
    ) from error

__all__ = ["MultiHeadAttention"]


def _check_backend(backend: str) -> None:
    if backend != "jax":
        raise ImportError(
            f"{WHERE}: needs keras on its JAX backend, got {backend}; {ADVICE}."
        )


_check_backend(keras.backend.backend())


@keras.saving.register_keras_serializable(package="jattn")
class MultiHeadAttention(keras.layers.MultiHeadAttention):
    """`keras.layers.MultiHeadAttention`, parameter for parameter; change the import.

    It has the arguments, the weights and the names of keras, so that saved weights load.
    `attention_mask` may also be one of `jattn.masks` or a function (b, n, t, s) → bool.
    Masks are never spread to T × S here, and blocks that causal masks and sliding windows
    leave empty are skipped. The differences from keras (3.15) are:

    - A query that sees no key has output 0 and gradient 0. In keras this holds only if the
      layer drops or returns weights; otherwise the output is the mean of the values.
    - Dropout has the same probability, but drops other weights; it must be below 1.
    - Memory is linear in the lengths even without `flash_attention`, and weights can be
      returned even with it.
    - `value_dim` may differ from `key_dim`.
    - `use_causal_mask` and `sliding_window` work along the attention axis, whichever it is.
      With several attention axes there is no order, and they are refused.
    """

    def empty(self, batch_size: int, capacity: int, *, dtype=None, ragged=False):
        """Makes a cache for `extend`.

        Args:
            batch_size: B.
            capacity: How many tokens there is room for.
            dtype: See `jattn.caches.empty`; that of what the layer computes by default.
            ragged: Whether each example has a length of its own.
        """
        sizes = self._num_heads, self._key_dim, self._value_dim
        dtype = self.compute_dtype if dtype is None else dtype
        return caches.empty(batch_size, capacity, *sizes, dtype=dtype, ragged=ragged)

    def extend(self, x, kv, *, mask=None, count=None, **options):
        """Decodes: attends from new tokens to themselves and to those in a cache.

        Each token sees itself and those before it; with `sliding_window`, only the last so
        many of them. Pieces of any length give what one call with
        `use_causal_mask=True` gives for the whole sequence; nothing is dropped. The layer
        must have its weights: call it once before, or build it.

        Args:
            x: `BT` × features, one or more tokens.
            kv: The cache, of `empty` or of `jattn.caches`.
            mask: A further mask: a function (b, n, t, s) → bool of positions from the
                first token on, or one of `jattn.masks`.
            count: How many of the T tokens of each example count; all by default.
            **options: `modifier`, `sink`, `scale` and others of `jattn.attention`.

        Returns:
            `BT` × features, and the cache with the tokens.
        """
        if not self.built or len(self._axes) != 1:
            raise ValueError(
                f"{WHERE}: `extend` needs a layer that was built, with one attention axis, "
                f"got built={self.built} and `attention_axes={self._axes}`; call it once "
                f"before, or build it."
            )
        window = self._ordered(False, self._sliding_window)
        mask = pairs.joined(WHERE, (*window, mask))
        x = keras.ops.cast(x, self.compute_dtype)
        heads = self._query_dense(x), self._key_dense(x), self._value_dense(x)
        given = {"mask": mask, "count": count, "options": options}
        output, kv = layer.extend(WHERE, kv, *heads, **given)
        if self._use_gate:
            output = output * self._gate_dense(x)
        return self._output_dense(output), kv

    def _compute_attention_mask(
        self,
        query,
        value,
        query_mask=None,
        value_mask=None,
        key_mask=None,
        attention_mask=None,
        use_causal_mask=False,
    ) -> list:
        """Collects the masks of a call as they are; none of them is spread to T × S."""
        del query, value
        masks = [attention_mask]
        # A mask of queries holds for all keys, and a mask of keys for all queries.
        if query_mask is not None:
            masks.append(jnp.expand_dims(query_mask, -1))
        masks += [
            jnp.expand_dims(mask, -2) for mask in (value_mask, key_mask) if mask is not None
        ]
        masks += self._ordered(use_causal_mask, self._sliding_window)
        return [mask for mask in masks if mask is not None]

    def _compute_attention(
        self,
        query,
        key,
        value,
        attention_mask=None,
        training=None,
        return_attention_scores=False,
        use_causal_mask=False,
    ):
        """Computes the output BT…ND, and the weights BNT…S… if they are asked for."""
        masks = attention_mask if isinstance(attention_mask, list) else [attention_mask]
        masks = masks + self._ordered(use_causal_mask, None)
        is_asked = check_flag(WHERE, "return_attention_scores", return_attention_scores)
        heads = layer.one_batch(*(self._flatten(x) for x in (query, key, value)))
        lengths = [tuple(x.shape[i] for i in self._axes) for x in (query, key)]
        rank, weights = heads[0].ndim + 2 * len(self._axes) - 2, []
        output = layer.attend(
            WHERE,
            *heads,
            mask=pairs.joined(WHERE, [self._align(x, lengths, rank) for x in masks]),
            dropout=self._draw(training),
            sow=weights.append if is_asked else None,
            options={},
        )
        batch, N = output.shape[:-3], output.shape[-2]
        output = output.reshape(*batch, *lengths[0], *output.shape[-2:])
        output = jnp.moveaxis(
            output, range(len(batch), len(batch) + len(lengths[0])), self._axes
        )
        weights = [x.reshape(*batch, N, *lengths[0], *lengths[1]) for x in weights]
        return output, weights[0] if weights else None

    @property
    def _axes(self) -> tuple[int, ...]:
        """Gives the attention axes, which keras knows once the layer is built."""
        return tuple(self._attention_axes or ())

    def _ordered(self, is_causal: bool, window: int | None) -> list:
        """Makes the masks that need an order of positions, and so a single axis."""
        is_causal = check_flag(WHERE, "use_causal_mask", is_causal)
        if (is_causal or window is not None) and len(self._axes) > 1:
            raise ValueError(
                f"{WHERE}: `use_causal_mask` and `sliding_window` need one attention axis, "
                f"got `attention_axes={self._axes}`; give an `attention_mask`."
            )
        masks: list = [Causal()] if is_causal else []
        # In keras a window counts the query itself; here it counts the keys on each side.
        return masks if window is None else [*masks, Window(window - 1, window - 1)]

    def _draw(self, training):
        """Makes the dropout of this call, from the seeds of the layer's dropout."""
        if not layer.flag(WHERE, "training", training) or self._dropout == 0:
            return None
        seed = self._dropout_layer.seed_generator.next()
        return layer.dropout(
            WHERE, self._dropout, seed, deterministic=False, name="dropout"
        )

    def _flatten(self, array) -> jax.Array:
        """Moves the attention axes of BT…NH before N, and joins them into one axis."""
        axes = self._axes
        count = array.ndim - 2 - len(axes)
        array = jnp.moveaxis(array, axes, range(count, count + len(axes)))
        length = math.prod(array.shape[count:-2])
        return array.reshape(*array.shape[:count], length, *array.shape[-2:])

    def _align(self, mask, lengths, rank: int):
        """Gives a mask the axes BNTS; it may lack axes before its own T… and S…."""
        if mask is None or not hasattr(mask, "ndim"):
            return mask
        axes = len(self._axes)
        while mask.ndim < rank:
            mask = jnp.expand_dims(mask, -2 * axes - 1)
        if axes == 1:
            return mask
        lead = mask.shape[: -2 * axes]
        mask = jnp.broadcast_to(mask, (*lead, *lengths[0], *lengths[1]))
        return mask.reshape(*lead, *map(math.prod, lengths))
