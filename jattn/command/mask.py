"""`python -m jattn mask`: a mask as text, or as a picture."""

import argparse
import math
import shutil

import jax
import numpy as np

from jattn import page
from jattn.blocks.block_table import BlockTable, block_table
from jattn.blocks.kinds import shares, spread
from jattn.command.expression import parse
from jattn.command.files import (
    check_picture,
    check_target,
    is_page,
    replacing,
    save_picture,
)
from jattn.command.refusal import Refusal
from jattn.pictures.numbers import cells, grid

SUMMARY = "draw a mask"
_MOST_PAIRS = 2**34  # so many already take minutes
_MOST_BLOCKS = 2**24  # of the table, which is in memory as a whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command's arguments."""
    parser.add_argument("expression", metavar="EXPR", help="such as 'Causal() | Prefix(3)'")
    parser.add_argument(
        "--length", metavar="T", type=_count, required=True, help="the number of queries"
    )
    parser.add_argument(
        "--key-length", metavar="S", type=_count, help="the number of keys; T by default"
    )
    parser.add_argument(
        "--blocks",
        metavar="SIZE",
        type=_count,
        help="draw what is known of blocks of SIZE × SIZE pairs without asking each pair: "
        "which ones attention skips, and which need no mask",
    )
    parser.add_argument(
        "--plot",
        metavar="OUT.png",
        help="draw a picture instead; OUT.html is a page, down to single pairs",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file")


def run(arguments: argparse.Namespace) -> int:
    """Draws the mask."""
    T, S = arguments.length, arguments.key_length or arguments.length
    if arguments.blocks is None and T * S > _MOST_PAIRS:
        raise Refusal(f"{T} × {S} pairs are too many to draw; the most are 2³⁴.")
    try:
        mask = parse(arguments.expression)
        if arguments.blocks is not None:
            mask = _table(mask, T, S, arguments.blocks)
        if arguments.plot is not None:
            _plot(arguments, mask, T, S)
        else:
            _print(arguments.expression, mask, T, S)
    except ValueError as error:
        raise Refusal(str(error)) from None
    return 0


def _table(mask, T: int, S: int, size: int) -> BlockTable:
    """Makes the block table of a mask for one example and head."""
    # Whole numbers: Python cannot divide those of 300 digits into a float.
    if max(T, S) > 2**27 or -(-T // size) * -(-S // size) > _MOST_BLOCKS:
        raise Refusal(
            f"{T} × {S} pairs in blocks of {size} × {size} are too many; the most are 2²⁴ "
            f"blocks and 2²⁷ queries or keys."
        )
    query, key = (jax.ShapeDtypeStruct((length, 1, 1), "float32") for length in (T, S))
    return block_table(mask, query, key, block=min(size, max(T, S)))


def _print(expression: str, mask, T: int, S: int) -> None:
    width = shutil.get_terminal_size().columns
    block = block_size(T, S, width)
    if isinstance(mask, BlockTable):
        # A cell has a whole number of blocks, so that no block is divided.
        size = mask.blocks[0]
        block = size * math.ceil(block[0] / size), size * math.ceil(block[1] / size)
    drawn = cells(mask, T, S, block)
    legend = "█ may attend  · may not"
    if block != (1, 1):
        legend = "█ all may attend  ░ some  · none"
        legend += f"; one cell is {block[0]} queries × {block[1]} keys"
    print(f"{expression}: {T} queries (rows) × {S} keys (columns)")
    print(legend)
    if isinstance(mask, BlockTable):
        kinds = np.asarray(spread(mask.kinds, mask.lengths, mask.blocks))
        print(f"blocks of {mask.blocks[0]} × {mask.blocks[1]}: {', '.join(shares(kinds))}")
    print("\n".join(grid(drawn, block, width)))


def block_size(T: int, S: int, width: int) -> tuple[int, int]:
    """Computes how many queries and keys one cell has, in a text of this width."""
    room = max(width - len(str(T)) - 1, 8)
    if max(T, S) <= room:
        return (1, 1)
    # A block is two characters wide, so half as many fit.
    return math.ceil(2 * T / room), math.ceil(2 * S / room)


def _plot(arguments, mask, T: int, S: int) -> None:
    check_target(arguments.plot, arguments.force)
    check_picture(arguments.plot)
    if is_page(arguments.plot):
        with replacing(arguments.plot) as temporary:
            page.mask(mask, T, S, title=arguments.expression).save(temporary)
        print(f"wrote {arguments.plot}")
        return
    from jattn import plot

    figure = plot.mask(mask, T, S, title=arguments.expression)
    with replacing(arguments.plot) as temporary:
        save_picture(figure, arguments.plot, temporary)
    print(f"wrote {arguments.plot}")


def _count(text: str) -> int:
    """Reads a number of queries or keys."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)
