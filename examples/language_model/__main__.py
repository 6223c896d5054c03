"""Trains a small language model on text that every Python ships, and lets it write.

The text is that of `pydoc_data.topics`, whose documents are packed several to a row; the
model is a transformer in flax with `jattn` inside. Two cores need two to three minutes. All
that a run makes goes into one folder: checkpoints, from which the same command goes on
after Ctrl-C, and two pictures.
"""

import argparse
import dataclasses
import sys

from examples import command
from examples.command import count, positive, whole
from examples.language_model.settings import Plan, Sizes

NEEDED = ("flax", "optax", "orbax", "tqdm", "matplotlib")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 0 if it went to the end, 2 if it refused, 130 if it was stopped."""
    return command.run("language_model", parser(), argv, train)


def train(arguments: argparse.Namespace) -> int:
    """Trains or goes on, and shows what was learnt."""
    command.check_installed(NEEDED, "examples")
    from examples.language_model.run import run

    sizes, plan = (_filled(kind, arguments) for kind in (Sizes, Plan))
    return run(sizes, plan, arguments)


def parser() -> argparse.ArgumentParser:
    """Makes the parser of the command."""
    made = command.empty_parser("examples.language_model", __doc__)
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


# Name, type, what it is called, default, help.
SHOWING = (
    ("--out", str, "FOLDER", "language_model_run",
     "where everything goes: a new folder, or that of a run to go on with"),
    ("--prompt", str, "TEXT", 'The "while" statement', "what the model continues"),
    ("--tokens", count, "N", 200, "how many it writes at most"),
    ("--temperature", positive, "X", 0.7,
     "how freely it writes; 0 takes the likeliest token each time"),
    ("--word", str, "WORD", "exception", "of which to draw what it attends to"),
    ("--layer", count, "N", None, "in which layer; by default in the middle"),
    ("--rounds", count, "N", 8,
     "batches for measuring a step with and without document skipping; 0 leaves it out"),
    ("--devices", whole, "N", 1,
     "a part of each row on each of so many; on a CPU they share its cores"),
    ("--save-every", positive, "SECONDS", 30.0, "a checkpoint at least so often"),
)  # fmt: skip

# The same without a default: those are in `settings.py`.
TRAINING = (
    ("--steps", whole, "N", "of training"),
    ("--rows", whole, "B", "of each step"),
    ("--length", whole, "T", "of a row, in tokens"),
    ("--rate", positive, "X", "of learning, at its highest"),
    ("--seed", count, "N", "decides the start, the order of the text and what is written"),
    ("--vocabulary", whole, "N", "tokens at most; 257 are bytes and the document's mark"),
    ("--layers", whole, "N", "of the model"),
    ("--width", whole, "N", "of each layer"),
    ("--heads", whole, "N", "of the queries"),
    ("--kv-heads", whole, "K", "of the keys and values"),
)


if __name__ == "__main__":
    sys.exit(main())
