"""Named cases, and the checks that every implementation passes on each case.

`makers`        makers of inputs
`cases`         inputs and options of calls that have a name
`checks`        values, gradients and tangents against the definition in float64
"""

from jattn.testing.cases import CASES, Case, random_inputs
from jattn.testing.checks import (
    assert_matches_definition,
    check_gradients,
    derivatives,
    errors,
)

__all__ = [
    "CASES",
    "Case",
    "assert_matches_definition",
    "check_gradients",
    "derivatives",
    "errors",
    "random_inputs",
]
