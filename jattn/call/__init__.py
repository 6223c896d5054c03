"""What is asked: one call, as data.

`jaxprs`        one list of the calls in jaxprs, and one walk over their equations
`reading`       a trace of a function that reads arrays with explicit mesh axes
`plain`         a function of scalars as a jaxpr that says nothing of devices
`concrete`      the error of a rule that asks for a number while it is traced
`keys`          keys of traced functions: two functions with one key compute the same
`program`       masks and modifiers made into data that compare by structure
`widen`         modifiers of arrays in half precision, computed as wide as logits
`options`       the options of a call, by name and type
`problem`       one call, taken apart: static facts and operands
`pose`          the arguments of a public function, checked and taken apart
`hoist`         parts of a mask or modifier that read one side, evaluated once for each row
"""
