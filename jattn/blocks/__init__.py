"""Which blocks of a mask are empty, partial or full, found from its jaxpr.

`intervals`     what a primitive does to a range of values: a table of rules
`arithmetic`    the rules of sums and products
`division`      the rules of quotients, remainders and shifts
`rules`         the rules of comparisons, logic and selection
`rearrange`     the rules of types, shapes and reductions
`ranges`        the least and the greatest value over ranges of an array
`indexing`      the rules of indexing
`graph`         a jaxpr as a graph, in which values that see one side are computed at once
`infinite`      which functions may answer −∞
`formulas`      Booleans as disjunctions of conjunctions, where these are short
`sums`          sums and differences, written in the values that they are made of
`bounds`        bounds that a conjunction sets on t − s
`select`        the rows and columns that one-sided facts select
`decide`        Booleans decided on all blocks at once
`classify`      the kinds of the blocks of a grid
`kinds`         empty, partial or full, as small arrays
`of_call`       which blocks of a call can be skipped, for every implementation
`block_table`   a table of a mask's blocks, made once for many calls
"""
