"""Attention for JAX: one definition, and fast implementations that equal it.

Each module imports only from the modules above it:

`shapes`        the letters B T S N K H D, and which shapes fit each other
`arrays`        arrays as a caller gives them: checked and aligned
`positions`     where queries and keys stand, in int32
`meshes`        arrays on several devices: what their types say, kept out of the rest
`pytree`        frozen dataclasses that JAX sees as trees of arrays
`mask`          what a mask is: a function (b, n, t, s) → bool, and `&`, `|`, `~` of masks
`integers`      the numbers and ids of masks: used in full, or refused with their name
`masks`         which keys a query may attend to: causal, windows, segments, lengths
`buckets`       which column of a table a distance reads
`modifiers`     what happens to a logit: functions (logit, b, n, t, s) → logit
`dropout`       which weights drop: a pure function of the seed and (b, n, t, s)
`state`         how partial answers combine: (output, logsumexp) under merge
`definition`    what attention is: for one query in three steps, for many by vmap
`operations`    functions with their own derivatives that JAX transforms in every way
`call`          what is asked: one call, as data
`blocks`        which blocks count: a mask evaluated over intervals
`counted`       masks, modifiers and dropout of a whole call, seen from one device's part
`implementations`  who computes: dense, blockwise, kernels; and which one runs
`context`       across devices: queries and keys along mesh axes, each device its part
`weights`       the logits and weights themselves, or some rows of them
`views`         a look at the weights of any length
`strongest`     the strongest keys of each query
`explanation`   what a call would do
`api`           the public functions
`caches`        across time: keys and values of the tokens so far
`testing`       named cases and the checks that every implementation passes
`pictures`      masks and weights as small arrays and figures
`terminal`      pictures as text
`plot`          pictures of masks and weights, with matplotlib
`pages`         the parts of a page, and its templates
`page`          pages of weights and masks, for a browser
`command`       what `python -m jattn` does
`adapters`      the same functions under other libraries' signatures

Begin reading with `definition`: it explains the modules that it imports.
"""

import importlib
from typing import Any

from jattn import caches, counted, definition, masks, modifiers
from jattn.api import attention, attention_state
from jattn.blocks.block_table import BlockTable, block_table
from jattn.context.balance import balanced
from jattn.context.merge import merge_over
from jattn.context.place import Context
from jattn.dropout import Dropout
from jattn.explanation import Explanation, explain
from jattn.state import EMPTY, State, merge
from jattn.strongest import StrongestKeys, strongest_keys
from jattn.views import attention_entropy, attention_received
from jattn.weights import attention_logits, attention_weights

__version__ = "0.2.0"

__all__ = [
    "EMPTY",
    "BlockTable",
    "Context",
    "Dropout",
    "Explanation",
    "State",
    "StrongestKeys",
    "attention",
    "attention_entropy",
    "attention_logits",
    "attention_received",
    "attention_state",
    "attention_weights",
    "balanced",
    "block_table",
    "caches",
    "counted",
    "definition",
    "explain",
    "masks",
    "merge",
    "merge_over",
    "modifiers",
    "strongest_keys",
]

# Imported at the first access: each of them needs more modules than attention does.
_LATER = ("adapters", "page", "plot", "terminal", "testing")


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return importlib.import_module(f"jattn.{name}")
    raise AttributeError(f"module 'jattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted((*__all__, *_LATER))
