"""Checks random masks for as long as asked: `python -m tests.soundness 20000`.

A block called empty must have no True in the dense evaluation, and one called full no
False. `--traced 3000` makes that many of them under `jax.jit`, where arrays and positions
are traced; each of these compiles, and takes longer.
"""

import argparse
import functools
import time

import hypothesis

from tests import test_blocks
from tests.helpers import random_masks
from tests.helpers.room import make_room


def check(function, examples: int, seed: int | None) -> None:
    """Runs one check on that many random masks."""
    start = time.perf_counter()

    @functools.wraps(function)
    def with_room(problem):
        make_room()
        function(problem)

    test = hypothesis.given(random_masks.problems())(with_room)
    test = test_blocks.fuzz(max_examples=examples)(test)
    if seed is not None:
        test = hypothesis.seed(seed)(test)
    test()
    seconds = time.perf_counter() - start
    print(f"{function.__name__}: {examples} masks, {seconds:.0f} s", flush=True)  # noqa: T201


def main(arguments=None) -> None:
    """Reads the command line and checks."""
    parser = argparse.ArgumentParser(prog="python -m tests.soundness", description=__doc__)
    parser.add_argument("examples", type=int, help="how many masks")
    parser.add_argument(
        "--traced", type=int, default=0, help="how many of them under jax.jit"
    )
    parser.add_argument("--seed", type=int, help="repeats a run")
    chosen = parser.parse_args(arguments)
    concrete = chosen.examples - chosen.traced
    if chosen.traced < 0 or concrete < 0:
        parser.error("--traced must be between 0 and the number of masks")
    if concrete:
        check(test_blocks.check_soundness, concrete, chosen.seed)
    if chosen.traced:
        check(test_blocks.check_soundness_traced, chosen.traced, chosen.seed)


if __name__ == "__main__":
    main()
