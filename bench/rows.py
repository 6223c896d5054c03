"""What is measured, row by row: a case of `jattn.testing.CASES` at a shape."""

import dataclasses

import jattn
from jattn.arrays.shapes import Sizes
from jattn.testing import CASES, Case, random_inputs

LETTERS = "BTNHKSD"  # of a shape; the last three may be left out

# Some minutes on a laptop.
ROWS = (
    ("plain", (1, 1024, 8, 64)),
    ("plain", (8, 256, 8, 64)),
    ("causal", (1, 1024, 8, 64)),
    ("causal", (1, 2048, 8, 64, 2)),
    ("causal", (1, 2048, 1, 128)),
    ("window", (1, 2048, 4, 64)),
    ("documents", (2, 1024, 8, 64)),
    ("lengths", (4, 512, 8, 64)),
    ("bias", (1, 1024, 8, 64)),
    ("alibi", (1, 1024, 8, 64)),
    ("soft_cap", (1, 1024, 8, 64)),
    ("sink", (1, 1024, 8, 64)),
    ("one_query", (8, 1, 8, 64, 2, 4096)),
)

# A minute.
QUICK = (
    ("plain", (1, 512, 4, 64)),
    ("causal", (1, 512, 8, 64, 2)),
    ("documents", (2, 512, 4, 64)),
    ("alibi", (1, 512, 4, 64)),
    ("one_query", (4, 1, 8, 64, 2, 2048)),
)

DEFAULT_SHAPE = (1, 512, 8, 64)  # of a case that the table does not have

BY_NAME: dict[str, Case] = {case.name: case for case in CASES}


def find_case(name: str) -> Case:
    """Finds the case of this name."""
    if name not in BY_NAME:
        raise ValueError(f"no case {name!r}; the cases are {', '.join(BY_NAME)}")
    return BY_NAME[name]


def parse_shape(text: str) -> tuple[int, ...]:
    """Reads a shape from B,T,N,H[,K[,S[,D]]]."""
    numbers = text.split(",")
    if not 4 <= len(numbers) <= len(LETTERS) or not all(x.isdecimal() for x in numbers):
        raise ValueError(f"a shape is B,T,N,H[,K[,S[,D]]] in whole numbers, got {text!r}")
    shape = tuple(map(int, numbers))
    _, _, N, _, K = (*shape, shape[2])[:5]
    if 0 in shape or N % K:
        raise ValueError(f"a shape needs sizes ≥ 1 and N a multiple of K, got {text!r}")
    return shape


def sizes_of(shape: tuple[int, ...]) -> Sizes:
    """Gives the sizes of a shape: K is N, S is T and D is H where left out."""
    B, T, N, H = shape[:4]
    K, S, D = (*shape[4:], *(N, T, H)[len(shape) - 4 :])
    return Sizes(batch=(B,), T=T, S=S, N=N, K=K, H=H, D=D)


def choose(cases=None, shapes=None, quick: bool = False) -> list[tuple[Case, Sizes]]:
    """Chooses what to measure: the rows of the table, or these cases at these shapes.

    Without shapes, a case keeps those that it has in the table.
    """
    table = QUICK if quick else ROWS
    if cases is None:
        cases = list(dict.fromkeys(name for name, _ in table))
    chosen = []
    for name in cases:
        own = [shape for case, shape in table if case == name] or [DEFAULT_SHAPE]
        chosen += [(find_case(name), sizes_of(shape)) for shape in shapes or own]
    for case, sizes in chosen:
        _check_fit(case, sizes)
    return chosen


def _check_fit(case: Case, sizes: Sizes) -> None:
    """Raises where a case cannot have such a shape; tried at a short length."""
    short = dataclasses.replace(sizes, batch=(1,), T=2, S=2 if sizes.S == sizes.T else 3)
    inputs = random_inputs(case, sizes=short)
    try:
        case.call(jattn.explain, inputs)
    except ValueError as error:
        raise ValueError(
            f"case {case.name!r} does not fit T={sizes.T}, S={sizes.S}, N={sizes.N}, "
            f"K={sizes.K}: {error}"
        ) from None
