"""Lists the tests that take long, from what pytest printed.

    pytest -m "slow or not slow" --durations=0 --durations-min=0.1 > durations.txt
    python -m tests.helpers.slow durations.txt --seconds 2

A test that takes more than `--seconds` enters `tests/slow.txt`. From then on only
`pytest -m slow` runs it. Two kinds of tests do not enter:

    the quickest test of each file, if it takes at most four times `--seconds`
    the tests of KEPT, which have marks of their own where some of them are slow

A test that is in the list stays there; to let one out, delete its line first.
"""

import argparse
import collections
import pathlib
import re

LIST = pathlib.Path(__file__).parents[1] / "slow.txt"
HEADER = """# Tests that take long; `pytest -m slow` runs them, as .ci/run does.
# Written by `python -m tests.helpers.slow`, which says how.
"""
KEPT = (  # the comparison that all else rests on
    "tests/test_implementations.py::test_implementation_equals_definition[",
    "tests/test_implementations.py::test_blockwise_in_one_tile_equals_definition[",
)
ROW = re.compile(r"^([\d.]+)s (?:call|setup) +(.+?)(?:@\w+)?$", re.MULTILINE)


def durations(text: str) -> dict[str, float]:
    """Reads how many seconds each test took, with what was set up for it."""
    found: dict[str, float] = collections.defaultdict(float)
    for seconds, name in ROW.findall(text):
        found[name.rstrip()] += float(seconds)
    return dict(found)


def slow(found: dict[str, float], seconds: float) -> list[str]:
    """Picks the tests that take longer, but for the quickest of each file."""
    quickest: dict[str, str] = {}
    for name in sorted(found, key=found.__getitem__, reverse=True):
        if name.startswith("tests/"):
            quickest[name.partition("::")[0]] = name
    # Where even the quickest takes this long, the file waits for what is slow.
    most = 4 * seconds
    kept = {x for x in quickest.values() if found[x] <= most} | {"README.md::README.md"}
    long = (x for x, took in found.items() if took > seconds and x not in kept)
    return sorted(x for x in long if not x.startswith(KEPT))


def main() -> None:
    """Reads the command line and writes the list."""
    parser = argparse.ArgumentParser(
        "python -m tests.helpers.slow", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("durations", nargs="+", type=pathlib.Path, help="what was printed")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="above which one is slow"
    )
    chosen = parser.parse_args()
    found: dict[str, float] = {}
    for path in chosen.durations:
        found |= durations(path.read_text())
    listed = {x for x in LIST.read_text().splitlines() if not x.startswith("#")}
    listed |= set(slow(found, chosen.seconds))
    LIST.write_text(HEADER + "".join(f"{x}\n" for x in sorted(listed)))


if __name__ == "__main__":
    main()
