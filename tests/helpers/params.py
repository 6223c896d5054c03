"""Parameters of tests: some always, the rest where slow tests are asked for."""

import pytest


def quick_and_slow(names, quick, group=False):
    """Marks as slow the parameters that are not in `quick`.

    Args:
        names: Names, or objects with a `name`, or pairs of such.
        quick: Those that run in every run.
        group: Whether parameters of one name share a process, and what it compiled.
    """
    found = []
    for item in names:
        parts = item if isinstance(item, tuple) else (item,)
        parts = tuple(getattr(x, "name", x) for x in parts)
        key = parts if len(parts) > 1 else parts[0]
        marks = [] if key in quick else [pytest.mark.slow]
        marks += [pytest.mark.xdist_group(parts[0])] if group else []
        values = item if isinstance(item, tuple) else (item,)
        found.append(pytest.param(*values, id="-".join(map(str, parts)), marks=marks))
    return found
