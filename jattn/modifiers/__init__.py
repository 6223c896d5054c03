"""What happens to a logit before the softmax: functions (logit, b, n, t, s) → logit.

A modifier acts on the scaled product of one query and one key, before `bias` and `mask`.
It is one of the classes that this package exports, or any function of five scalars: the
product `logit`, and the numbers of its example `b`, head `n`, query `t` and key `s`. The
operator `>>` joins two: `SoftCap(50.0) >> ALiBi()` applies the soft cap first, and
`>> (lambda logit, b, n, t, s: logit * heat[n])` adds a function. Gradients reach the
arrays that a modifier holds, and those that a function reads from outside.

Modifiers are frozen dataclasses and JAX pytrees. As with masks, `aligned` gives arrays
that are read by row and column, and `modify` gets their elements for its pair.

    `modifier`      what a modifier is, and modifiers made of functions and other modifiers
    `buckets`       which column of a table a distance reads
    `cap`           the smooth cap, with its derivatives
    `named`         biases, a cap, ALiBi, relative positions
"""

from jattn.modifiers.buckets import distance, log_bucket
from jattn.modifiers.modifier import Modifier, Pointwise, as_modifier
from jattn.modifiers.named import ALiBi, Bias, RelativeBias, SoftCap, alibi_slopes

__all__ = [
    "ALiBi",
    "Bias",
    "Modifier",
    "Pointwise",
    "RelativeBias",
    "SoftCap",
    "alibi_slopes",
    "as_modifier",
    "distance",
    "log_bucket",
]
