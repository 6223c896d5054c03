"""Attention on TPU, by Pallas kernels, which tests emulate on any machine.

`schedule`      which blocks meet, in which order, as one integer a step
`pairs`         masks and modifiers evaluated on a tile inside a kernel
`layout`        arrays as the kernels read them
`call`          how blocks are cut from them, and a kernel is called
`tiles`         a part of a block inside a kernel
`forward`       output and logsumexp
`backward`      cotangents
`segments`      cotangents in several kernels, for more queries than one kernel can hold
`kernel`        all of them as an implementation, and what it refuses
`decode`        a few queries by the slots of a cache
"""
