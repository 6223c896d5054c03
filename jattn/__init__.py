"""Attention for JAX: one definition, and fast implementations that equal it.

Each module imports only from the modules above it:

`arrays`        arrays as they come in: shapes, integers, positions, meshes
`pytree`        frozen dataclasses that JAX sees as trees of arrays
`masks`         which keys a query may attend to: functions (b, n, t, s) → bool
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
`api`           the public functions: attention, looks at its weights, what a call would do
`caches`        across time: keys and values of the tokens so far
`testing`       named cases and the checks that every implementation passes
`pictures`      masks and weights as small arrays and figures
`terminal`      pictures as text
`plot`          pictures of masks and weights, with matplotlib
`page`          pages of weights and masks, for a browser
`command`       what `python -m jattn` does
`adapters`      the same functions under other libraries' signatures

Begin reading with `definition`: it explains the modules that it imports.
"""

import importlib
from typing import Any

from jattn import caches, counted, definition, masks, modifiers
from jattn.api.attention import attention, attention_state
from jattn.api.explain import explain
from jattn.api.explanation import Explanation
from jattn.api.strongest import StrongestKeys, strongest_keys
from jattn.api.views import attention_entropy, attention_received
from jattn.api.weights import attention_logits, attention_weights
from jattn.blocks.block_table import BlockTable, block_table
from jattn.context.balance import balanced
from jattn.context.merge import merge_over
from jattn.context.place import Context
from jattn.dropout import Dropout
from jattn.state import EMPTY, State, merge

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
