"""What the kernels refuse, in sentences."""

import functools
import importlib.util

import jax

from jattn.call.problem import Problem
from jattn.implementations import joint, nvidia
from jattn.implementations.gpu.pairs import objection

OLDEST = (0, 11, 2)  # of jax: earlier ones call and emulate these kernels in another way
HOPPER = "9.0"  # the compute capability that alone has wgmma
_AMPERE = "8."  # what those of Ampere and Ada begin with


def refusal(problem: Problem, platform: str, is_emulated: bool) -> str | None:
    """Says why no kernel can be written for a problem, or run; None if it can."""
    if platform not in nvidia.PLATFORMS and not is_emulated:
        return f"runs on NVIDIA GPUs only, and the platform is {platform}."
    return _objection(problem) or _missing() or (None if is_emulated else _device())


@functools.lru_cache(maxsize=1024)
def _objection(problem: Problem) -> str | None:
    if problem.dtype.name not in ("bfloat16", "float16"):
        return (
            f"takes bfloat16 and float16, which tensor cores multiply, got {problem.dtype}."
        )
    return (
        joint.objection_to_sizes(problem)
        or nvidia.objection_to_precision(problem)
        or joint.objection_to_programs(problem, objection)
    )


def _missing() -> str | None:
    """Says what a kernel needs and JAX does not bring; None if all is here."""
    if jax.__version_info__ < OLDEST:
        return f"needs jax {'.'.join(map(str, OLDEST))}, and this is {jax.__version__}."
    if importlib.util.find_spec("absl") is None:
        return "needs a package that Pallas imports: `pip install absl-py`."
    return None


def _device() -> str | None:
    """Says what the default device lacks, if it is a GPU; None if it lacks nothing."""

    def lacks(capability: str) -> str | None:
        if capability == HOPPER or capability.startswith(_AMPERE):
            return None
        return (
            f"needs compute capability {HOPPER}, that of Hopper, or 8.0 to 8.9, those of "
            f"Ampere and Ada, and this device has {capability}."
        )

    return nvidia.lacking(lacks)
