"""Attention block by block, in plain JAX: memory linear in T and S, on any device.

`layout`        a call, laid out so that blocks can be cut from it; what is visited
`join`          an axis of `vmap` as part of the batch
`tiles`         one tile, and the loops over tiles
`forward`       output and logsumexp
`backward`      cotangents
`tangent`       tangents
`whole_rows`    the same function plainly, for derivatives of higher order
`attention`     all of them as one operation
`summaries`     entropy and what each key receives
`strongest`     the strongest keys of each query
"""

from jattn.implementations.blockwise.attention import attention_state as attention_state
from jattn.implementations.blockwise.attention import block_sizes as block_sizes
from jattn.implementations.blockwise.attention import refusal as refusal
from jattn.implementations.blockwise.layout import decided as decided
