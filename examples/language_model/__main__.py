"""Trains a small language model on text that every Python ships, and lets it write.

The text is that of `pydoc_data.topics`, whose documents are packed several to a row; the
model is a transformer in flax with `jattn` inside. Two cores need two to three minutes. All
that a run makes goes into one folder: checkpoints, from which the same command goes on
after Ctrl-C, and two pictures.
"""

import argparse
import dataclasses
import importlib.util
import math
import sys

from examples.language_model.settings import Plan, Refusal, Sizes

NEEDED = ("flax", "optax", "orbax", "tqdm", "matplotlib")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 0 if it went to the end, 2 if it refused, 130 if it was stopped."""
    try:
        arguments = parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
            raise Refusal(f"{', '.join(missing)} missing; pip install '.[examples]'.")
        from examples.language_model.run import run

        sizes, plan = (_filled(kind, arguments) for kind in (Sizes, Plan))
        return run(sizes, plan, arguments)
    except Refusal as refusal:
        print(f"language_model: {refusal}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nlanguage_model: stopped.", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """Makes the parser of the command."""
    made = argparse.ArgumentParser(
        prog="python -m examples.language_model",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    for name, kind, metavar, default, text in SHOWING:
        add(name, type=kind, metavar=metavar, default=default, help=text)
    add = made.add_argument_group("training", "A run goes on only with the same of these.")
    for name, kind, metavar, text in TRAINING:
        default = _default(name.removeprefix("--").replace("-", "_"))
        add.add_argument(name, type=kind, metavar=metavar, default=default, help=text)
    return made


def _default(name: str):
    return next(getattr(kind, name) for kind in (Sizes, Plan) if hasattr(kind, name))


def _filled(kind, arguments: argparse.Namespace):
    """Fills the settings of a kind from the options of the same names."""
    names = (field.name for field in dataclasses.fields(kind))
    return kind(**{name: getattr(arguments, name) for name in names})


def _whole(text: str) -> int:
    return _number(int, text, 1, "a whole number above 0")


def _count(text: str) -> int:
    return _number(int, text, 0, "a whole number from 0 on")


def _positive(text: str) -> float:
    return _number(float, text, 0.0, "a number from 0 on")


def _number(kind, text: str, least, what: str):
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not least <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
    return number


# Name, type, what it is called, default, help.
SHOWING = (
    ("--out", str, "FOLDER", "language_model_run",
     "where everything goes: a new folder, or that of a run to go on with"),
    ("--prompt", str, "TEXT", 'The "while" statement', "what the model continues"),
    ("--tokens", _count, "N", 200, "how many it writes at most"),
    ("--temperature", _positive, "X", 0.7,
     "how freely it writes; 0 takes the likeliest token each time"),
    ("--word", str, "WORD", "exception", "of which to draw what it attends to"),
    ("--layer", _count, "N", None, "in which layer; by default in the middle"),
    ("--rounds", _count, "N", 8,
     "batches for measuring a step with and without document skipping; 0 leaves it out"),
    ("--devices", _whole, "N", 1,
     "a part of each row on each of so many; on a CPU they share its cores"),
    ("--save-every", _positive, "SECONDS", 30.0, "a checkpoint at least so often"),
)  # fmt: skip

# The same without a default: those are in `settings.py`.
TRAINING = (
    ("--steps", _whole, "N", "of training"),
    ("--rows", _whole, "B", "of each step"),
    ("--length", _whole, "T", "of a row, in tokens"),
    ("--rate", _positive, "X", "of learning, at its highest"),
    ("--seed", _count, "N", "decides the start, the order of the text and what is written"),
    ("--vocabulary", _whole, "N", "tokens at most; 257 are bytes and the document's mark"),
    ("--layers", _whole, "N", "of the model"),
    ("--width", _whole, "N", "of each layer"),
    ("--heads", _whole, "N", "of the queries"),
    ("--kv-heads", _whole, "K", "of the keys and values"),
)


if __name__ == "__main__":
    sys.exit(main())
