"""Attention across devices: queries and keys cut along mesh axes, each device its part.

`place`         what a caller says of the mesh, and where the arrays of a call lie
`types`         the context that types say, on a mesh with explicit axes
`merge`         one state from those of many devices
`ways`          what each operand does: it stays, it travels, or its columns are cut
`spread`        an operation whose keys lie on many devices
`ring`          keys go round, and their derivatives after them
`gather`        every device collects all keys
`exchange`      heads for sequence: a device gets some heads, of all queries and keys
`turns`         how many turns of a ring the mask leaves anything to do
`balance`       an order of tokens in which every device has as much to do
`choose`        what each strategy moves and holds, why it refuses, and which one runs
`account`       what a call on many devices moves, holds and does
`shards`        a call cut into shards, and run on each device
"""
