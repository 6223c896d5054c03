"""Functions with hand-written derivatives that JAX can still transform in every way.

`compiled`      functions that stay one program in every debugging mode
`operation`     a function of arrays, as an object, and the primitive that runs it
`join`          how the slices of a mapped axis become one call
`derivatives`   tangents and cotangents of an operation, as operations
`mapped`        an operation for each slice of a mapped axis
`lowering`      an operation as part of a compiled program
`rules`         what JAX does to an operation: run, differentiate, map, lower
`varying`       functions of arrays that differ from device to device, as operations
"""

# The import registers the rules, which the primitive needs before it runs.
from jattn.operations import rules as rules
