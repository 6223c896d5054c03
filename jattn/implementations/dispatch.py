"""Which implementation runs, and why.

Each implementation says in a sentence why it cannot take a problem, or None. Without a
name, the first that does not refuse runs, in the order written here for the platform; a
named one runs or its sentence is raised. Nothing falls back in silence.
"""

import types

from jattn.call.problem import Operands, Problem
from jattn.implementations import blockwise, cudnn, dense, tpu

IMPLEMENTATIONS: dict[str, types.ModuleType] = {
    "blockwise": blockwise,
    "dense": dense,
    "tpu": tpu,
    "cudnn": cudnn,
}

# The first that does not refuse is taken; a platform not listed takes DEFAULT_ORDER.
# A Mosaic GPU kernel would stand before or after cuDNN, by what is measured.
_GPU = ("cudnn", "blockwise", "dense")
ORDER: dict[str, tuple[str, ...]] = {
    "tpu": ("tpu", "blockwise", "dense"),
    "gpu": _GPU,
    "cuda": _GPU,
}
DEFAULT_ORDER = ("blockwise", "dense")

_BLOCKS = (512, 512)  # of an implementation that does not say


def names(platform: str) -> tuple[str, ...]:
    """The implementations that run on a platform, in its order."""
    return ORDER.get(platform, DEFAULT_ORDER)


def refusals(problem: Problem, platform: str) -> dict[str, str | None]:
    """What each implementation says of this problem, in the platform's order."""
    order = names(platform)
    others = [name for name in IMPLEMENTATIONS if name not in order]
    return {
        name: IMPLEMENTATIONS[name].refusal(problem, platform) for name in (*order, *others)
    }


def choose(where: str, problem: Problem, platform: str, implementation=None) -> str:
    """The name of the implementation that runs.

    Raises:
        ValueError: If the named one is unknown or refuses.
    """
    if implementation is None:
        answers = refusals(problem, platform)
        return next(name for name, sentence in answers.items() if sentence is None)
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(f'"{name}"' for name in IMPLEMENTATIONS)
        raise ValueError(
            f"{where}: `implementation` must be None or one of {names}, got "
            f"{implementation!r}."
        )
    sentence = IMPLEMENTATIONS[implementation].refusal(problem, platform)
    if sentence is not None:
        raise ValueError(f'{where}(implementation="{implementation}"): {sentence}')
    return implementation


def for_any_platform(problem: Problem, name: str) -> str:
    """The implementation to lower, where `name` was chosen for the default platform.

    What is traced on one machine may be lowered for another, or for several. The operation
    of cuDNN is that of the TPU's kernels wherever it is not lowered for CUDA, and that is
    blockwise wherever it is not lowered for TPU.
    """
    if name != "blockwise":
        return name
    if cudnn.refusal(problem, "cuda") is None and cudnn.is_installed():
        return "cudnn"
    if tpu.refusal(problem, "tpu") is None:
        return "tpu"
    return name


def block_sizes(
    problem: Problem, operands: Operands | None, name: str
) -> tuple[int, int] | None:
    """How many queries and keys are skipped at once, or None where nothing is.

    An implementation says so by a function `block_sizes(problem, operands)`.
    """
    ask = getattr(IMPLEMENTATIONS[name], "block_sizes", lambda *_: _BLOCKS)
    return ask(problem, operands)
