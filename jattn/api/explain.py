"""The explanation of a call, found without running it."""

import dataclasses
from typing import Any, Unpack

import jax
import numpy as np
from jax.typing import ArrayLike

from jattn.api.explanation import Blocks, Explanation
from jattn.arrays.checks import is_word
from jattn.arrays.meshes import across
from jattn.blocks import of_call
from jattn.blocks.kinds import EMPTY, PARTIAL, spread
from jattn.call.options import Implementation, Options, checked
from jattn.call.pose import by_name, check_bias, check_sink, pose, pose_mask
from jattn.call.problem import Operands, Problem, asking_logsumexp
from jattn.context.account import account, gathered
from jattn.context.place import Context
from jattn.context.types import told_by_types
from jattn.implementations.dispatch import block_sizes, choose, refusals


@told_by_types
@across("")
def explain(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    context: Context | None = None,
    implementation: Implementation | None = None,
    platform: str | None = None,
    **options: Unpack[Options],
) -> Explanation:
    """Says what `attention` would do with these arguments, without running it.

    Takes the arguments of `attention`. Arrays may be `jax.ShapeDtypeStruct`s, also inside
    masks and modifiers.

    Args:
        query: `BTNH`, an array or its shape and dtype.
        key: `BSKH`, likewise.
        value: `BSKD`, likewise.
        context: See `attention`.
        implementation: See `attention`.
        platform: Where it would run: `"cpu"`, `"gpu"` or `"tpu"`; by default the platform
            on which JAX runs here. The device need not be present.
        **options: The options of `attention`.

    Returns:
        An `Explanation`, which prints as a short table.

    Raises:
        ValueError: As `attention` would.
    """
    where, platform = "explain", jax.default_backend() if platform is None else platform
    if not is_word(platform, ("cpu", "gpu", "cuda", "rocm", "tpu")):
        raise ValueError(
            f'{where}: `platform` must be "cpu", "gpu" or "tpu", got {platform!r}; give '
            f"one of these names, or leave it out."
        )
    given = checked(where, options, Options)
    problem = _posed(where, query, key, value, given)
    operands = _decisive(where, problem, given)
    found = _explain(where, problem, operands, platform, implementation)
    if context is None:
        return dataclasses.replace(found, gathered=tuple(gathered(query, key)))
    devices = account(where, problem, operands, context, platform, implementation)
    return dataclasses.replace(found, devices=devices)


def _is_shape(leaf) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _posed(where: str, query, key, value, given: dict[str, Any]) -> Problem:
    """Poses the problem, where some arrays may be shapes alone, without numbers."""
    leaves, tree = jax.tree.flatten((query, key, value, given))
    problems = []

    # Shapes are replaced by tracers of `eval_shape`, so `pose` runs without any numbers;
    # the list brings the problem out of the trace.
    def posed(shapes):
        shapes = iter(shapes)
        filled = [next(shapes) if _is_shape(leaf) else leaf for leaf in leaves]
        query, key, value, posable = tree.unflatten(filled)
        sink = posable.pop("sink", None)
        problem, _ = pose(where, query, key, value, **posable)
        problem = by_name(problem, posable.get("mask"))
        sink = check_sink(where, sink, problem.sizes)
        problems.append(problem if sink is None else asking_logsumexp(problem))

    jax.eval_shape(posed, list(filter(_is_shape, leaves)))
    (problem,) = problems
    return problem


def _decisive(where: str, problem: Problem, given: dict[str, Any]) -> Operands | None:
    """Gives the operands that decide which blocks are skipped; None if one is a shape."""
    names = ("mask", "modifier", "query_position", "key_position")
    decisive: dict[str, Any] = {name: given.get(name) for name in names}
    if any(map(_is_shape, jax.tree.leaves(decisive))):
        return None
    _, operands = pose_mask(where, problem.sizes, problem.dtype, **decisive)
    bias = given.get("bias")
    if bias is None or _is_shape(bias):
        return operands
    return operands._replace(bias=check_bias(where, bias, problem.sizes))


def _explain(
    where: str, problem: Problem, operands: Operands | None, platform: str, implementation
) -> Explanation:
    """Explains a problem.

    Reads only those operands that decide which blocks are skipped. None for the operands
    says that these are not known.
    """
    sizes = problem.sizes
    B, T, S, N, K, H, D = (getattr(sizes, letter) for letter in "BTSNKHD")
    # q·k takes 2H operations for each pair, and weight·v takes 2D.
    item = problem.dtype.itemsize
    name = choose(where, problem, platform, implementation)
    blocks = _blocks(problem, operands, name, platform)
    pairs = None if blocks is None else blocks.pairs
    return Explanation(
        implementation=name,
        platform=platform,
        shapes={letter: getattr(sizes, letter) for letter in "BTSNKHD"},
        dtype=problem.dtype.name,
        refusals=refusals(problem, platform),
        flops=2 * B * N * T * S * (H + D),
        bytes_moved=item * B * (T * N * (H + D) + S * K * (H + D)),
        logits_bytes=problem.wide.itemsize * B * N * T * S,
        blocks=blocks,
        flops_visited=None if pairs is None else 2 * pairs * (H + D),
    )


def _blocks(
    problem: Problem, operands: Operands | None, name: str, platform: str
) -> Blocks | None:
    """Gives the blocks that are skipped; None where no block can be skipped."""
    B, N, T, S = problem.sizes.BNTS
    if not of_call.skips(problem, operands) or 0 in (B, N, T, S):
        return None
    sizes = block_sizes(problem, operands, name, platform)
    if sizes is None:
        return None
    counts = -(-T // sizes[0]), -(-S // sizes[1])
    kinds = None if operands is None else of_call.block_table(problem, operands, *sizes)
    if kinds is None or isinstance(kinds, jax.core.Tracer):
        return Blocks(sizes, counts)
    kinds = spread(np.asarray(kinds), (T, S), sizes)
    if problem.mask is None and not np.any(kinds == EMPTY):
        return None  # no block is skipped and no mask is asked: nothing to report
    # The last block of a side may be shorter than the others.
    rows, columns = (
        np.minimum(size, length - size * np.arange(count))
        for size, length, count in zip(sizes, (T, S), counts, strict=True)
    )
    pairs = int(np.sum((kinds != EMPTY) * rows[:, None] * columns))
    return Blocks(
        sizes,
        counts,
        empty=float(np.mean(kinds == EMPTY)),
        partial=float(np.mean(kinds == PARTIAL)),
        pairs=pairs * (B // kinds.shape[0]) * (N // kinds.shape[1]),
    )
