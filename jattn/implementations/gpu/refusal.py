"""What the kernels refuse, in sentences."""

import functools
import importlib.util

import jax

from jattn.call.hoist import joint_equations
from jattn.call.problem import Problem
from jattn.implementations.gpu.pairs import objection

PLATFORMS = ("gpu", "cuda")  # JAX has two names for this platform
OLDEST = (0, 11, 2)  # of jax: earlier ones call and emulate these kernels in another way
CAPABILITY = "9.0"  # of Hopper, which alone has wgmma


def refusal(problem: Problem, platform: str, is_emulated: bool) -> str | None:
    """Says why no kernel can be written for a problem, or run; None if it can."""
    if platform not in PLATFORMS and not is_emulated:
        return f"runs on NVIDIA GPUs only, and the platform is {platform}."
    return _objection(problem) or _missing() or (None if is_emulated else _device())


@functools.lru_cache(maxsize=1024)
def _objection(problem: Problem) -> str | None:
    if problem.dtype.name not in ("bfloat16", "float16"):
        return (
            f"takes bfloat16 and float16, which tensor cores multiply, got {problem.dtype}."
        )
    sizes = problem.sizes
    if not all(isinstance(size, int) for size in (*sizes.BNTS, sizes.K)):
        return "needs sizes that are numbers; these are symbols."
    if 0 in (*sizes.BNTS, sizes.H, sizes.D):
        return "needs at least one query, key and number in each."
    if max(sizes.H, sizes.D) > 256:
        return f"takes head sizes up to 256, got H={sizes.H} and D={sizes.D}."
    if problem.precision not in (None, "default"):
        return (
            f"rounds the weights to the dtype of the inputs, and the precision of "
            f"products is to be {problem.precision}."
        )
    for name in ("mask", "modifier"):
        program = getattr(problem, name)
        if program is not None:
            found = objection(joint_equations(program, logit=name == "modifier"))
            if found:
                return (
                    f"the {name} joins queries and keys by {found}, which a kernel cannot "
                    f"evaluate; it can where only queries or only keys are indexed."
                )
    return None


def _missing() -> str | None:
    """Says what a kernel needs and JAX does not bring; None if all is here."""
    if jax.__version_info__ < OLDEST:
        return f"needs jax {'.'.join(map(str, OLDEST))}, and this is {jax.__version__}."
    if importlib.util.find_spec("absl") is None:
        return "needs a package that Pallas imports: `pip install absl-py`."
    return None


def _device() -> str | None:
    """Says what the default device lacks, if it is a GPU; None if it lacks nothing."""
    if jax.default_backend() != "gpu":
        return None  # the GPU is elsewhere: the call is only described or lowered here
    device = jax.local_devices()[0]
    if "cuda" not in device.client.platform_version:
        return "runs on NVIDIA GPUs only, and this one is not."
    if device.compute_capability != CAPABILITY:
        return (
            f"needs compute capability {CAPABILITY}, that of Hopper, and this device has "
            f"{device.compute_capability}."
        )
    return None
