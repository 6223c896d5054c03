"""Attention for JAX: one definition, and everything fast equal to it.

Each module imports only from those above it:

`shapes`        the letters B T S N K H D, and the checks at the door
`meshes`        arrays on several devices: what their types say, kept out of the rest
`pytree`        frozen dataclasses that JAX sees as trees of arrays
`masks`         which keys a query may attend to: functions (b, n, t, s) → bool
`modifiers`     what happens to a logit: functions (logit, b, n, t, s) → logit
`dropout`       which weights drop: a pure function of the seed and (b, n, t, s)
`state`         how partial answers combine: (output, logsumexp) under merge
`definition`    what attention is: for one query in three steps, for many by vmap
`operations`    functions with their own derivatives that JAX transforms in every way
`call`          what is asked: one call, as data
`blocks`        which blocks count: a mask evaluated over intervals
`counted`       masks, modifiers and dropout of a whole, seen from one device's part
`implementations`  who computes: dense, blockwise, kernels; and which one runs
`views`         a look at the weights of any length
`explanation`   what a call would do
`api`           the public functions
`testing`       named cases and the checks that every implementation passes
`pictures`      masks and weights as small arrays and figures
`terminal`      pictures as text
`plot`          pictures of masks and weights, with matplotlib
`command`       what `python -m jattn` does
`adapters`      the same functions under other libraries' signatures

To read, begin with `definition`: what it imports, it explains.
"""

from jattn import counted as counted
from jattn import definition, masks, modifiers
from jattn.api import (
    attention,
    attention_logits,
    attention_state,
    attention_weights,
    explain,
)
from jattn.blocks.block_table import BlockTable, block_table
from jattn.dropout import Dropout
from jattn.explanation import Explanation
from jattn.state import EMPTY, State, merge
from jattn.views import (
    StrongestKeys,
    attention_entropy,
    attention_received,
    strongest_keys,
)

__version__ = "0.1.0"

__all__ = [
    "EMPTY",
    "BlockTable",
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
    "block_table",
    "definition",
    "explain",
    "masks",
    "merge",
    "modifiers",
    "strongest_keys",
]
