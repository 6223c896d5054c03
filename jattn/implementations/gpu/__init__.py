"""Attention on NVIDIA GPUs, by Pallas kernels, which tests emulate on any machine.

For Hopper, and for Ampere and Ada: one kernel, and two ways to copy and to multiply.
On Hopper they passed every case, on an H200. For 8.0, 8.6 and 8.9 they are compiled and
emulated, never run on one.

`schedule`      which blocks meet, in which order, as tables of integers
`pairs`         masks and modifiers evaluated on a tile inside a kernel
`finite`        NaN and ∞, kept from the pairs that a mask hides
`layout`        sizes of blocks, and arrays as the kernels read them
`machine`       the operations of a kernel, on the device and emulated
`program`       one program of the grid: what it reads, and its steps
`wgmma`         how Hopper copies and multiplies
`mma`           how Ampere and Ada copy and multiply
`call`          one call of a kernel: its arrays, its results and its memory
`tiles`         a tile inside a kernel: its logits, mask and dropout
`forward`       output, maximum and sum
`backward`      cotangents
`cotangents`    cotangents of operands, before and after the kernels
`refusal`       what the kernels refuse, in sentences
`kernel`        all of them as an implementation, and what it refuses
"""
