"""A case in the words that peers have: a causal flag, dense masks and biases, a scale."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jattn
from bench.measure import Work
from jattn.masks import Causal
from jattn.modifiers import ALiBi, Bias, RelativeBias, SoftCap
from jattn.modifiers.modifier import Compose


class Plain(NamedTuple):
    """What a peer is told."""

    is_causal: bool
    mask: jax.Array | None  # Boolean, four axes that broadcast to BNTS
    bias: jax.Array | None  # likewise
    scale: float | None
    soft_cap: float | None


def plainly(work: Work) -> Plain | None:
    """Says the case in these words; None where they cannot say it."""
    options = work.options
    if "sink" in options or "dropout" in options:
        return None
    where = {name: x for name, x in options.items() if name.endswith("_position")}
    mask, is_causal = options.get("mask"), _is_causal(options)
    if mask is not None:
        mask = None if is_causal else _shrunk(_dense(work, mask=mask, **where) == 0)
    bias, soft_cap = options.get("bias"), None
    modifier = options.get("modifier")
    if isinstance(modifier, SoftCap) and bias is None:
        soft_cap = float(modifier.cap)
    elif modifier is not None:
        if not _only_adds(modifier):
            return None
        bias = _shrunk(_dense(work, modifier=modifier, bias=bias, **where))
    if bias is not None:
        bias = bias.reshape(*(1,) * (4 - bias.ndim), *bias.shape).astype(work.dtype)
    scale = options.get("scale")
    return Plain(is_causal, mask, bias, None if scale is None else float(scale), soft_cap)


def mask_and_bias(plain: Plain, work: Work) -> np.ndarray | None:
    """Joins both in one array, Boolean or floating, for who takes them as one argument.

    A causal flag beside a bias is in it too; alone, it is left to be a flag.
    """
    if plain.bias is None:
        return None if plain.mask is None else np.asarray(plain.mask)
    mask = np.asarray(True if plain.mask is None else plain.mask)
    if plain.is_causal:
        mask = np.tri(work.sizes.T, work.sizes.S, dtype=np.bool_)
    return np.where(mask, np.asarray(plain.bias, np.float64), -np.inf)


def _is_causal(options) -> bool:
    mask = options.get("mask")
    if not isinstance(mask, Causal) or any(name.endswith("_position") for name in options):
        return False
    return isinstance(mask.offset, int) and mask.offset == 0


def _dense(work: Work, **options) -> jax.Array:
    """Gives what the options make of logits that are 0, BNTS."""
    sizes = work.sizes
    query = jnp.zeros((*sizes.batch, sizes.T, sizes.N, 1))
    key = jnp.zeros((*sizes.batch, sizes.S, 1, 1))
    return jattn.attention_logits(query, key, **options)


def _shrunk(array: jax.Array) -> jax.Array:
    """Shrinks the array to one example or one head, where all are equal."""
    for axis in (0, 1):
        first = jax.lax.slice_in_dim(array, 0, 1, axis=axis)
        if jnp.all(array == jnp.broadcast_to(first, array.shape)):
            array = first
    return array


def _only_adds(modifier: Any) -> bool:
    """Says whether a modifier is a bias in other words."""
    if isinstance(modifier, Compose):
        return _only_adds(modifier.first) and _only_adds(modifier.second)
    return isinstance(modifier, ALiBi | Bias | RelativeBias)
