"""Attention block by block, in plain JAX: memory linear in T and S, on any device.

Queries and keys are cut into blocks. A tile is one block of queries with one block of
keys, and only the logits of one tile exist at a time, never all T × S. A table says which
tiles the mask leaves empty and which it leaves full. Empty tiles are skipped; full tiles
are computed without the mask.

`plan`          how much a tile holds
`slices`        arrays cut, written over and padded
`layout`        a call, laid out so that blocks can be cut from it
`strips`        a strip of a partial tile, where a mask cuts it
`schedule`      which tiles are visited, and in which order
`prepare`       a call as the operation takes it: one-sided work done once
`join`          an axis of `vmap` as part of the batch
`common`        what all keys, or all values, of a head have in common
`products`      products of queries and keys of one tile, and sums of values
`tiles`         one tile, and the loops over tiles
`rows`          sums over the tiles of each row, in loops as the device likes them
`forward`       the output, and the sums of each row, over the tiles of a query block
`cotangents`    cotangents of one tile
`backward`      cotangents, over the tiles of a key block
`tangent`       tangents, over the tiles of a query block
`whole_rows`    the same function plainly, for derivatives of higher order
`sweep`         the log weights of every tile, for views of the weights
`strongest`     the strongest keys of each query
"""
