"""Who computes: every implementation of attention, and which one runs.

`sums`          partial answers whose maximum and sum stay apart
`kernel`        the contract of an implementation, with its laws
`shared`        what they share: the logits of some queries by some keys
`isolated`      the isolation of values, which JAX can transpose
`source`        what has slots to attend to, and a call cut to some of them
`bounded`       a few queries by all slots at once, in one pass of XLA:CPU
`parts`         a few queries by the slots that count
`joint`         what joins queries and keys, as kernels read it
`nvidia`        what a kernel for NVIDIA GPUs asks of the device
`dense`         attention in one tile
`decode`        a few queries by a long buffer, on CPU
`blockwise`     attention in many tiles: forward, backward, tangent
`tpu`           attention on TPU, by Pallas kernels
`gpu`           attention on NVIDIA GPUs, by Pallas kernels: named only
`cudnn`         attention on NVIDIA GPUs by cuDNN, where it is the same function
`processor`     what the processor of this machine can do
`agree`         what makes the results of a kernel and blockwise ones fit together
`attention`     the operation: a kernel where there is one, blockwise for all the rest
`run`           a call by the operation, with or without kernels
`normalize`     what turns logits into log weights, for views of the weights
`surprise`      −weight · log weight, and its sums
`summaries`     entropy and what each key receives
`dispatch`      which implementation runs, and why
"""
