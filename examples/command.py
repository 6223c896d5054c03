"""What the commands of the examples share: numbers, refusals, and how a command ends."""

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable, Iterable


class Refusal(Exception):
    """What was asked cannot be done, in one sentence."""


def run(
    name: str,
    parser: argparse.ArgumentParser,
    arguments: list[str] | None,
    do: Callable[[argparse.Namespace], int],
    stopped: str = "stopped.",
) -> int:
    """Runs a command, and gives its exit code.

    Args:
        name: What the command calls itself on stderr.
        parser: Reads the arguments.
        arguments: What was typed; None for `sys.argv`.
        do: Does what was asked, and gives 0, or 130 if it was stopped.
        stopped: Said after Ctrl-C.

    Returns:
        What `do` gives; 2 if it refused, 130 after Ctrl-C.
    """
    try:
        chosen = parser.parse_args(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return do(chosen)
    except Refusal as refusal:
        print(f"{name}: {refusal}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{name}: {stopped}", file=sys.stderr)
        return 130


def empty_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Makes a parser without options, with the defaults in its help."""
    return argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )


def check_installed(names: Iterable[str], extra: str) -> None:
    """Raises a Refusal for packages that are not installed, and names their extra."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise Refusal(f"{', '.join(missing)} missing; pip install '.[{extra}]'.")


def whole(text: str) -> int:
    """Reads a whole number above 0."""
    return number(int, text, lambda x: x >= 1, "a whole number above 0")


def count(text: str) -> int:
    """Reads a whole number from 0 on."""
    return number(int, text, lambda x: x >= 0, "a whole number from 0 on")


def positive(text: str) -> float:
    """Reads a number from 0 on."""
    return number(float, text, lambda x: 0 <= x < math.inf, "a number from 0 on")


def number(kind, text: str, fits: Callable, what: str):
    """Reads a number that fits; `what` says which do."""
    try:
        found = kind(text)
    except ValueError:
        found = None
    if found is None or not fits(found):
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
    return found
