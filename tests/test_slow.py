"""The list of slow tests names tests that there are, and is read as it is written."""

import ast
import pathlib

from tests.helpers.slow import LIST, durations, slow

PRINTED = """
7.50s call     tests/test_a.py::test_long[jvp of grad]@group
1.50s setup    tests/test_a.py::test_two_parts
1.00s call     tests/test_a.py::test_two_parts
0.90s teardown tests/test_a.py::test_two_parts
0.10s call     tests/test_a.py::test_short
9.00s call     tests/test_b.py::test_alone
"""


def test_a_slow_test_takes_long_and_is_not_the_only_one_of_its_file():
    found = durations(PRINTED)
    assert found["tests/test_a.py::test_two_parts"] == 2.5
    long, parts = (
        "tests/test_a.py::test_long[jvp of grad]",
        "tests/test_a.py::test_two_parts",
    )
    assert slow(found, 2.5) == [long]
    assert slow(found, 2.4) == [long, parts]
    # The only one of its file has to go where it takes more than four times as long.
    assert slow(found, 2) == [long, parts, "tests/test_b.py::test_alone"]


def test_every_name_in_the_list_is_that_of_a_test():
    names = [x for x in LIST.read_text().splitlines() if not x.startswith("#")]
    for file in {x.partition("::")[0] for x in names}:
        path = pathlib.Path(__file__).parents[1] / file
        if path.suffix != ".py":
            continue
        tree = ast.walk(ast.parse(path.read_text()))
        there = {x.name for x in tree if isinstance(x, ast.FunctionDef | ast.ClassDef)}
        listed = [x.partition("::")[2] for x in names if x.startswith(f"{file}::")]
        listed = [x.partition("[")[0].partition("::")[0] for x in listed]
        assert {x.rpartition(".")[2] for x in listed} <= there, file  # doctests have dots
