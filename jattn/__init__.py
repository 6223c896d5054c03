"""Attention for JAX: one definition, and everything fast equal to it.

Each module imports only from those above it:

`shapes`        the letters B T S N K H D, and the checks at the door
`meshes`        arrays on several devices: what their types say, kept out of the rest
`pointwise`     masks and modifiers made into data that compare by structure
`masks`         which keys a query may attend to: functions (b, n, t, s) → bool
`modifiers`     what happens to a logit: functions (logit, b, n, t, s) → logit
`dropout`       which weights drop: a pure function of the seed and (b, n, t, s)
`state`         how partial answers combine: (output, logsumexp) under merge
`definition`    what attention is: for one query in three steps, for many by vmap
`tables`        which blocks of a mask are empty, partial or full, to keep and reuse
`counted`       masks, modifiers and dropout of a whole, seen from one device's part
`problem`       one call, taken apart: static facts and operands
`operation`     a function with its own derivatives that JAX transforms in every way
`varying`       functions of what differs from device to device, as operations
`split`         what of a mask or modifier reads one side, evaluated once for each row
`blocks`        a mask evaluated over intervals, a pair of blocks each
`skipping`      which blocks of a call can be skipped, for every implementation
`tabulate`      block tables made from a mask and shapes
`tile`          the logits of some queries by some keys
`dense`         attention in one tile
`blockwise`     attention in many tiles: forward, backward, tangent
`tpu`           attention on TPU, by Pallas kernels
`cudnn`         attention on NVIDIA GPUs by cuDNN, where it is the same function
`dispatch`      which implementation runs, and why
`views`         a look at the weights of any length
`explanation`   what a call would do
`api`           the public functions
`caches`        across time: keys and values of the tokens so far
`testing`       named cases and the checks that every implementation passes
`expression`    masks written as text
`picture`       masks and weights as small arrays, and as text
`terminal`      pictures as text
`panels`        empty panels for pictures
`paint`         colours in them, and what they mean
`text_figure`   a text as a picture
`plot`          pictures of masks and weights, with matplotlib
`command`       what `python -m jattn` does
`adapters`      the same functions under other libraries' signatures

To read, begin with `definition`: what it imports, it explains.
"""

from jattn import caches, definition, masks, modifiers
from jattn import counted as counted
from jattn.api import (
    attention,
    attention_logits,
    attention_state,
    attention_weights,
    explain,
)
from jattn.dropout import Dropout
from jattn.explanation import Explanation
from jattn.state import EMPTY, State, merge
from jattn.tables import BlockTable
from jattn.tabulate import block_table
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
    "caches",
    "definition",
    "explain",
    "masks",
    "merge",
    "modifiers",
    "strongest_keys",
]
