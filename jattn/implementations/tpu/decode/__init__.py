"""A few queries by the slots of a cache, where they lie, on TPU.

`slots`         the arrays of a cache, and how many slots a step of the kernel reads
`steps`         which slots each example reads, in which order
`rows`          queries, and the arrays of masks and modifiers, as rows of a tile
`tile`          masks and modifiers evaluated on rows by slots
`kernel`        output, maximum and sum, step by step
`decoder`       all of it as one function, and what it refuses
"""
