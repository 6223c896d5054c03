"""`python -m jattn attend`: attention on the user's own arrays."""

import argparse
import contextlib
import math
import os

import jax
import numpy as np

import jattn
from jattn import page
from jattn.call.pose import pose
from jattn.command.expression import parse
from jattn.command.files import (
    check_picture,
    check_target,
    is_page,
    read,
    read_words,
    replacing,
    save_picture,
)
from jattn.command.refusal import Refusal
from jattn.pictures.numbers import bar

SUMMARY = "attend with your own arrays"
_NAMES = ("query", "key", "value")
_QUERIES, _HEADS, _STRONGEST = 16, 4, 3  # printed at most, so that the output stays short
_NEXT_TO_NOTHING = 0.0005  # prints as 0.000 below this; shown only if no weight is larger
_WEIGHTS_AT_ONCE = 2**24  # evaluated at a time, so that little memory is needed
_MOST_BYTES = 2**32  # of all weights, 4 GiB; --out and --plot hold them all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describes the command's arguments."""
    parser.add_argument("file", metavar="FILE.npz", help="arrays query, key and value")
    parser.add_argument("--mask", metavar="EXPR", help="such as 'Causal() & Window(4, 0)'")
    parser.add_argument("--scale", metavar="X", type=_finite, help="1/√H by default")
    parser.add_argument(
        "--out", metavar="OUT.npz", help="write output, weights and logsumexp here"
    )
    parser.add_argument(
        "--plot",
        metavar="OUT.png",
        help="draw the weights here; OUT.html is a page to look around in, of any length",
    )
    parser.add_argument("--force", action="store_true", help="replace existing files")


def run(arguments: argparse.Namespace) -> int:
    """Attends, writes the requested files, and prints each query's strongest weights."""
    _check_targets(arguments)
    arrays, unused = read(arguments.file, _NAMES)
    tokens = None
    if is_page(arguments.plot) and "tokens" in unused:
        tokens = read_words(arguments.file, "tokens")
        unused.remove("tokens")
    one_head = all(array.ndim == 2 for array in arrays)
    if one_head:
        arrays = [array[:, None] for array in arrays]
    # Without x64, JAX would convert float64 to float32, and messages would name int32
    # where the file has int64.
    wide = jax.config.read("jax_enable_x64") or any(x.dtype.itemsize > 4 for x in arrays)
    with jax.enable_x64(wide):
        _attend(arguments, arrays, one_head, tokens, unused)
    return 0


def _attend(arguments, arrays, one_head, tokens, unused) -> None:
    query, key, value = arrays
    options = {"mask": _mask(arguments.mask), "scale": arguments.scale}
    sizes = _check(arguments, arrays, options)
    if tokens is not None and len(tokens) != sizes.T:
        raise Refusal(f"{arguments.file}: there are {len(tokens)} tokens, and T={sizes.T}.")
    state = jattn.attention_state(query, key, value, **options)
    weights = None
    if _needs_all_weights(arguments):
        weights = _all_weights(query, key, options, sizes)
    # Of the batch; its size is not left to NumPy, which finds none in an empty array.
    one_axis = lambda array: array.reshape(sizes.B, *array.shape[-3:])
    page_of = {"query": one_axis(query), "key": one_axis(key), "tokens": tokens, **options}
    _write(arguments, state, weights, one_head, page_of)
    _print_summary(arguments, arrays, options, one_head, unused)
    _print_strongest(query, key, options, sizes, one_head)
    for path in filter(None, (arguments.out, arguments.plot)):
        print(f"\nwrote {path}", end="")
    print()


def _check_targets(arguments) -> None:
    targets = [path for path in (arguments.out, arguments.plot) if path is not None]
    for path in targets:
        check_target(path, arguments.force, arguments.file)
    if len({os.path.realpath(path) for path in targets}) < len(targets):
        raise Refusal("--out and --plot name the same file; give two.")
    if arguments.plot:
        check_picture(arguments.plot)


def _mask(expression: str | None):
    try:
        return None if expression is None else parse(expression)
    except ValueError as error:
        raise Refusal(f"--mask: {error}") from None


def _check(arguments, arrays, options):
    """Finds every fault of the arrays before computing; gives the sizes of the call."""
    try:
        problem, _ = pose(arguments.file, *arrays, **options)
    except ValueError as error:
        raise Refusal(str(error)) from None
    size = math.prod(problem.sizes.BNTS) * problem.wide.itemsize
    if arguments.plot and size == 0:
        raise Refusal(f"{arguments.file}: there are no weights to draw.")
    if is_page(arguments.plot) and problem.sizes.B != 1:
        raise Refusal(
            f"{arguments.file}: a page shows one example, and there are "
            f"{problem.sizes.B}; write them to files of their own."
        )
    if _needs_all_weights(arguments) and size > _MOST_BYTES:
        raise Refusal(
            f"{arguments.file}: all weights, BNTS = {problem.sizes.BNTS}, take "
            f"{size / 2**30:.0f} GiB; --out and --plot take up to {_MOST_BYTES >> 30}."
        )
    return problem.sizes


def _needs_all_weights(arguments) -> bool:
    """Says whether all weights are needed; a page is made without them."""
    return bool(arguments.out or (arguments.plot and not is_page(arguments.plot)))


def _all_weights(query, key, options, sizes) -> np.ndarray:
    """Computes the weights some rows at a time."""
    step = max(_WEIGHTS_AT_ONCE // max(sizes.B * sizes.N * sizes.S, 1), 1)
    parts = [
        np.asarray(jattn.attention_weights(query, key, rows=np.arange(*rows), **options))
        for rows in ((i, min(i + step, sizes.T)) for i in range(0, max(sizes.T, 1), step))
    ]
    return np.concatenate(parts, axis=-2)


def _write(arguments, state, weights, one_head, page_of) -> None:
    """Writes both files or neither; `page_of` has the arguments of a page."""
    title = os.path.basename(arguments.file)
    with contextlib.ExitStack() as stack:
        if arguments.out:
            output, logsumexp = map(np.asarray, state)
            if one_head:
                output, logsumexp = output[:, 0], logsumexp[:, 0]
            temporary = stack.enter_context(replacing(arguments.out))
            with open(temporary, "wb") as file:
                written = weights[0] if one_head else weights
                np.savez(file, output=output, weights=written, logsumexp=logsumexp)
        if is_page(arguments.plot):
            temporary = stack.enter_context(replacing(arguments.plot))
            page.weights(**page_of, title=title).save(temporary)
        elif arguments.plot:
            from jattn import plot

            temporary = stack.enter_context(replacing(arguments.plot))
            figure = plot.weights(weights, title=title)
            save_picture(figure, arguments.plot, temporary)


def _print_summary(arguments, arrays, options, one_head, unused) -> None:
    plan = jattn.explain(*arrays, **options)
    sizes = " ".join(f"{letter}={size}" for letter, size in plan.shapes.items())
    where = f"{plan.implementation} on {plan.platform}"
    print(f"{arguments.file}: {sizes}, {plan.dtype}; {where}")
    if one_head:
        print("two axes, T×H, are taken as one head")
    if arguments.mask is not None:
        print(f"mask {arguments.mask}")
    if unused:
        print(f"not used: {', '.join(unused)}")


def _print_strongest(query, key, options, sizes, one_head) -> None:
    """Prints each query's strongest weights: index of the key, bar, weight."""
    half = _QUERIES // 2
    rows = np.arange(sizes.T)
    if sizes.T > _QUERIES:
        rows = np.concatenate([rows[:half], rows[-half:]])
    weights = jattn.attention_weights(query, key, rows=rows, **options)
    weights = np.asarray(weights).reshape(sizes.B * sizes.N, len(rows), sizes.S)
    for head, shown in enumerate(weights[:_HEADS]):
        example = f"example {head // sizes.N}, " if sizes.B > 1 else ""
        print(f"\n{'' if one_head else f'{example}head {head % sizes.N}: '}", end="")
        print("query, then its strongest keys with their weights")
        for place, (row, line) in enumerate(zip(rows, shown, strict=True)):
            if place == half and sizes.T > _QUERIES:
                print(f"      … {sizes.T - _QUERIES} more queries")
            print(f"{row:>6}  {_strongest(line)}".rstrip())
    if len(weights) > _HEADS:
        print(f"\n… {len(weights) - _HEADS} more heads")


def _strongest(line: np.ndarray) -> str:
    """Writes the strongest weights of one query."""
    if np.isnan(line).any():
        return "not a number"
    order = np.argsort(-line, kind="stable")[:_STRONGEST]
    order = [s for s in order if line[s] >= min(_NEXT_TO_NOTHING, line.max()) > 0]
    found = [f"{s:>6} {bar(line[s], 8):<8} {line[s]:.3f}" for s in order]
    return "  ".join(found) or "     sees no key"


def _finite(text: str) -> float:
    """Reads a finite number, for --scale."""
    with contextlib.suppress(ValueError):
        if math.isfinite(float(text)):
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
