"""Which keys a query may attend to: functions (b, n, t, s) → bool, with `&`, `|`, `~`.

A mask sees one query and one key: the example b, the query head n, and the positions
t and s. True means *may attend*. Any function of these scalars is a mask, alone or
combined with the masks below: `Causal() & (lambda b, n, t, s: doc[t] == doc[s])`.

Masks are frozen dataclasses and JAX pytrees: their arrays may be traced and batched.
A mask may also read arrays by row and column instead of by position. `aligned` gives
these arrays, as any pytree, and `allows` gets a tree of the same structure that holds
their elements for its pair.

    `mask`          what a mask is, and masks made of functions, arrays and other masks
    `named`         causal, windows, prefixes, segments, lengths
"""

from jattn.masks.mask import Explicit, Mask, Pointwise, as_mask
from jattn.masks.named import Causal, Lengths, Prefix, Segments, Window

__all__ = [
    "Causal",
    "Explicit",
    "Lengths",
    "Mask",
    "Pointwise",
    "Prefix",
    "Segments",
    "Window",
    "as_mask",
]
