"""Which blocks of a mask are empty, partial or full, from its jaxpr alone.

`intervals`     what a primitive does to a range of values: a table of rules
`rules`         the rules of logic and arithmetic
`rearrange`     the rules of types, shapes, reductions and indexing
`graph`         a jaxpr as a graph, in which what sees one side is computed at once
`formulas`      Booleans as disjunctions of conjunctions, where these are short
`bounds`        bounds that a conjunction sets on t − s
`decide`        Booleans decided on all blocks at once
`table`         the table, for a grid of blocks
"""
