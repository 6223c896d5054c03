"""`jax.nn.dot_product_attention`, argument for argument, with the meaning of `jattn`."""

import jax

from jattn.adapters import pairs
from jattn.api.attention import attention, attention_state
from jattn.arrays.checks import check_array, check_flag, check_word, known_number
from jattn.arrays.integers import check_lengths, check_whole, is_number, one_number
from jattn.implementations.dispatch import IMPLEMENTATIONS
from jattn.masks import Causal, Lengths, Mask, Window, as_mask

__all__ = ["dot_product_attention"]

WHERE = "jax_nn.dot_product_attention"


def dot_product_attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    implementation=None,
    return_residual=False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attends like `jax.nn.dot_product_attention`: change the import, and nothing else.

        output = softmax(scale · query keyᵀ + bias, over the keys that count) value

    A key counts if `mask`, `is_causal`, the lengths and the window all allow it.

    The differences from `jax.nn` (0.10 to 0.12) are:

    - A query that sees no key has output 0, residual −∞ and gradient 0. In `jax.nn` the
      output is the mean of the values, or NaN if a bias of −∞ hides the keys.
    - NaN or Inf in a key or value that no query sees changes no result.
    - For float64 inputs the softmax is in float64; in `jax.nn` it is in float32.
    - The residual is in float32 at least and has a gradient. In `jax.nn` it may be in
      bfloat16, and is a constant.
    - float16 runs under `jit` on every platform, strict dtype promotion works, and
      `jax.export` supports a window with symbolic lengths.
    - `value` may have another head size than `key`, which the output then has. There may be
      several batch axes. Lengths may have any integer dtype, or be one number for all.
    - Integer queries, keys and values, a Boolean `bias`, and negative windows are refused.

    Args:
        query: `BTNH` or `TNH`.
        key: `BSKH` or `SKH`; N is a multiple of K.
        value: `BSKD` or `SKD`.
        bias: Added to the logits; broadcasts to `BNTS`, leading axes may be left out.
        mask: Boolean, True = may attend; broadcasts to `BNTS` in the same way.
        scale: Multiplies the logits; 1/√H by default.
        is_causal: Whether query t sees only the keys s ≤ t, both counted from 0: for T ≠ S
            the diagonal starts at the top left, as in `jax.nn`.
        query_seq_lengths: How many queries of each example count, `B`; the output of other
            queries is 0.
        key_value_seq_lengths: How many keys of each example count, `B`.
        local_window_size: (left, right), or one number for both: query t sees the keys
            t − left ≤ s ≤ t + right.
        implementation: None lets jattn choose. `"xla"` is jattn's `"dense"`: all logits at
            once and no kernel, as in `jax.nn`. jattn's own names work too; `"cudnn"`
            refuses more calls here than in `jax.nn`.
        return_residual: Whether to return the logsumexp of the logits too.

    Returns:
        The output, `BTND` or `TND` like the query; with `return_residual` a pair of the
        output and the logsumexp, `BTN` or `TN`.

    Raises:
        ValueError: If an argument does not fit; the message says what to do.

    Example:
        >>> import jax.numpy as jnp
        >>> query, key = jnp.zeros((2, 1, 2)), jnp.zeros((2, 1, 2))
        >>> value = jnp.array([[[0.0, 3.0]], [[1.0, 5.0]]])
        >>> dot_product_attention(query, key, value, is_causal=True)
        Array([[[0. , 3. ]],
        <BLANKLINE>
               [[0.5, 4. ]]], dtype=float32)
    """
    is_causal = check_flag(WHERE, "is_causal", is_causal)
    return_residual = check_flag(WHERE, "return_residual", return_residual)
    query = check_array(WHERE, "query", query)
    key, value = (check_array(WHERE, *pair) for pair in (("key", key), ("value", value)))
    arrays = [_batched(x) for x in (query, key, value)]
    lengths = query_seq_lengths, key_value_seq_lengths
    masks = _masks(is_causal, lengths, local_window_size, *arrays[:2])
    if mask is not None:
        mask = pairs.by_last_axes(check_array(WHERE, "mask", mask), *arrays[:2])
        masks.append(as_mask(mask, WHERE))
    options = {
        "mask": pairs.joined(WHERE, masks),
        "bias": pairs.any_bias(WHERE, bias, *arrays[:2]),
        "scale": scale,
        "implementation": _name(implementation),
    }
    rows, D = query.shape[:-1], value.shape[-1]
    if not return_residual:
        return attention(*arrays, **options).reshape(*rows, D)
    output, logsumexp = attention_state(*arrays, **options)
    return output.reshape(*rows, D), logsumexp.reshape(rows)


def _masks(is_causal, lengths, window, query, key) -> list[Mask]:
    """Turns each of `jax.nn`'s arguments that hide keys into a mask."""
    masks: list[Mask] = [Causal()] if is_causal else []
    if window is not None:
        masks.append(Window(*_sides(window)))
    names = "query_seq_lengths", "key_value_seq_lengths"
    of_queries, of_keys = (
        x if x is None else check_lengths(WHERE, name, x, query.shape[:-3])
        for name, x in zip(names, lengths, strict=True)
    )
    if of_keys is not None or of_queries is not None:
        # If only queries have lengths, all keys count.
        masks.append(Lengths(key.shape[-3] if of_keys is None else of_keys, of_queries))
    return masks


def _sides(size) -> list:
    """Gives how far a window reaches to the left and to the right."""
    if is_number(size):
        size = size, size
    try:
        left, right = size
    except (TypeError, ValueError):
        raise ValueError(
            f"{WHERE}: `local_window_size` must be one whole number or a pair (left, "
            f"right), got {size!r}; give an `int` or two."
        ) from None
    return [None if side is None else _side(side) for side in (left, right)]


def _side(side):
    check_whole(WHERE, "local_window_size", side)
    one_number(WHERE, "local_window_size", side)
    number = known_number(side)
    if number is not None and number < 0:
        raise ValueError(
            f"{WHERE}: `local_window_size` must be ≥ 0 on each side, got {side}; a window "
            f"always holds the query's own position."
        )
    return side


def _batched(array: jax.Array) -> jax.Array:
    """Adds an axis of size 1 for each axis of BTNH that is left out."""
    return array.reshape(*(1,) * (4 - array.ndim), *array.shape)


def _name(implementation: str | None) -> str | None:
    """Translates `jax.nn`'s name of an implementation to jattn's."""
    check_word(WHERE, "implementation", implementation, (*IMPLEMENTATIONS, "xla"))
    return "dense" if implementation == "xla" else implementation
