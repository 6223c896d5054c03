"""Attention on TPU, by Pallas kernels; nothing here needs a TPU to be read or tested.

`pairs`         masks and modifiers evaluated on a tile inside a kernel
`schedule`      which blocks meet, in which order, as one integer a step
`layout`        arrays as the kernels read them
`call`, `tiles` how blocks and parts of them are cut
`forward`       output and logsumexp
`backward`      cotangents
`attention`     all of them as one operation, and what it refuses
"""

from jattn.tpu.attention import attention_state as attention_state
from jattn.tpu.attention import block_sizes as block_sizes
from jattn.tpu.attention import refusal as refusal
