"""Which implementation runs, and why.

Each implementation gives a sentence that says why it refuses a problem, or None. If the
caller names no implementation, the first one that accepts runs, in the platform's order
below. If the caller names one, it runs, or its sentence is raised as an error: a named
implementation is never replaced by another one.
"""

import itertools
from typing import Any

from jattn.arrays.checks import check_word
from jattn.call.problem import Operands, Problem
from jattn.implementations import cudnn, run
from jattn.implementations.decode import Decode
from jattn.implementations.dense import Dense
from jattn.implementations.gpu.kernel import GPU
from jattn.implementations.kernel import Kernel, Plain
from jattn.implementations.sums import Sums
from jattn.implementations.tpu.kernel import TPU

IMPLEMENTATIONS: dict[str, Kernel | Plain] = {
    "blockwise": run.Blockwise(),
    "dense": Dense(),
    "tpu": TPU(),
    "cudnn": cudnn.CuDNN(),
    "gpu": GPU(),
    "decode": Decode(),
}

# The first implementation that accepts is used. Other platforms use DEFAULT_ORDER.
_GPU = ("cudnn", "gpu", "blockwise", "dense")
_SHORT_ON_GPU = ("gpu", "cudnn", "blockwise", "dense")
# Up to so many queries and keys the kernels take 0.4 to 0.8 of cuDNN's time forward and 0.5
# to 1.0 with gradients; with 4096 and gradients they take 1.13 of it (H200).
_SHORT = 2048
ORDER: dict[str, tuple[str, ...]] = {
    "tpu": ("tpu", "blockwise", "dense"),
    "gpu": _GPU,
    "cuda": _GPU,
    "cpu": ("decode", "blockwise", "dense"),
}
DEFAULT_ORDER = ("blockwise", "dense")


def names(platform: str) -> tuple[str, ...]:
    """Names the implementations that may run on a platform, in order of preference."""
    return ORDER.get(platform, DEFAULT_ORDER)


def _order(problem: Problem, platform: str) -> tuple[str, ...]:
    """Names the implementations that may compute a problem, in order of preference."""
    order, sizes = names(platform), problem.sizes
    is_short = sizes.are_known and max(sizes.T, sizes.S) <= _SHORT
    return _SHORT_ON_GPU if order is _GPU and is_short else order


def refusals(problem: Problem, platform: str) -> dict[str, str | None]:
    """Collects why each implementation does not run by itself, in order of preference."""
    order = _order(problem, platform)
    others = [name for name in IMPLEMENTATIONS if name not in order]
    return {name: _reason(name, problem, platform) for name in (*order, *others)}


def _reason(name: str, problem: Problem, platform: str) -> str | None:
    """Says why an implementation does not run by itself; None if it may."""
    found = IMPLEMENTATIONS[name]
    return found.refusal(problem, platform) or found.leaves(problem)


def choose(where: str, problem: Problem, platform: str, implementation=None) -> str:
    """Gives the name of the implementation that runs.

    Raises:
        ValueError: If the named one is unknown or refuses.
    """
    if implementation is None:
        answers = refusals(problem, platform)
        return next(name for name, sentence in answers.items() if sentence is None)
    check_word(where, "implementation", implementation, IMPLEMENTATIONS)
    sentence = IMPLEMENTATIONS[implementation].refusal(problem, platform)
    if sentence is not None:
        raise ValueError(f'{where}(implementation="{implementation}"): {sentence}')
    return implementation


def candidates(problem: Problem, name: str, is_named: bool) -> tuple[str, ...]:
    """Names the implementations that may run; `name` was chosen for the current platform.

    A program that is traced on one machine may be lowered for another platform, or for
    several. So a call that names no implementation keeps every kernel that accepts it on
    the kernel's own platform. When the program is lowered, each platform takes its own
    kernel, or blockwise if it has none.
    """
    if is_named or name == "dense":
        return (name,)
    own = [
        (platform, name)
        for platform in ORDER
        if platform != "gpu"  # the same as "cuda", which programs are lowered for
        for name in itertools.takewhile("blockwise".__ne__, _order(problem, platform))
    ]
    return tuple(
        name
        for platform, name in own
        if _can_be_lowered(name) and _reason(name, problem, platform) is None
    )


def _can_be_lowered(name: str) -> bool:
    return name != "cudnn" or cudnn.is_installed()


def attend(problem: Problem, operands: Operands, names: tuple[str, ...]) -> Sums:
    """Computes the output BTND and the sums of each row BTN, in the wide precision.

    `names` are the candidates, as `candidates` gives them.
    """
    found: list[Any] = [IMPLEMENTATIONS[name] for name in names]
    kernels = tuple(x for x in found if isinstance(x, Kernel))
    if kernels or not found:
        return run.attend(problem, operands, kernels)
    (only,) = found
    return only.attend(problem, operands)


def block_sizes(
    problem: Problem, operands: Operands | None, name: str, platform: str
) -> tuple[int, int] | None:
    """Gives the queries and keys of a block that `name` can skip; None if it skips none."""
    return IMPLEMENTATIONS[name].block_sizes(problem, operands, platform)
