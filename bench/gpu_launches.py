"""How many kernels a compiled program launches on a GPU, counted in its text.

Each instruction of the program is one kernel, or one call of a library, except for those
that only name pieces of memory. A loop counts as its body times its turns. Where XLA does
not know the number of turns, the host waits in each of them for a number of the device.
Of a condition its shorter branch counts: the longer ones of jattn mend a hidden NaN.
"""

import dataclasses
import re

# Instructions for which a GPU is given nothing to do.
_FREE = {
    "after-all",
    "bitcast",
    "constant",
    "copy-done",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = .*?\s([a-z][a-z0-9\-]*)\((.*)$")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(
    r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Launches:
    """What the host does for one run of a program."""

    kernels: int  # launched; a loop of unknown length counts as one turn
    waits: int  # loops of unknown length and branches: the host waits for a number

    def __add__(self, other: "Launches") -> "Launches":
        return Launches(self.kernels + other.kernels, self.waits + other.waits)

    def __mul__(self, times: int) -> "Launches":
        return Launches(self.kernels * times, self.waits * times)


def count(text: str) -> Launches:
    """Counts the launches of a compiled program, given as `compiled.as_text()`."""
    computations, entry = _computations(text)
    return _of(entry, computations)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Splits a program into its computations; also names the one where it starts."""
    found, current, entry = {}, [], ""
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            current = found[head[2]] = []
            entry = head[2] if head[1] else entry
        else:
            current.append(line)
    return found, entry


def _of(name: str, computations: dict[str, list[str]]) -> Launches:
    """Counts the launches of one computation."""
    total = Launches(0, 0)
    for line in computations[name]:
        found = _INSTRUCTION.match(line)
        if found:
            total += _of_instruction(found[1], line, computations)
    return total


def _of_instruction(kind: str, line: str, computations) -> Launches:
    """Counts the launches of one instruction, and of what it runs."""
    called = _CALLED.findall(line)
    if kind == "while":
        (body,) = called
        known = _TURNS.search(line)
        waits = Launches(0, 0 if known else 1)
        return _of(body, computations) * (int(known[1]) if known else 1) + waits
    if kind == "conditional":
        branches = _BRANCHES.search(line)
        names = branches[1].replace("%", "").split(", ") if branches else called
        costs = (_of(name, computations) for name in names)
        return min(costs, key=lambda x: x.kernels) + Launches(0, 1)
    if kind == "call":
        return _of(called[0], computations)
    if kind in _FREE or kind.endswith("-done"):
        return Launches(0, 0)
    return Launches(1, 0)
