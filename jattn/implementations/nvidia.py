"""What kernels for NVIDIA GPUs ask of the device that is here, and of the precision."""

from collections.abc import Callable

import jax

from jattn.call.problem import Problem

PLATFORMS = ("gpu", "cuda")  # JAX has two names for this platform


def lacking(lacks: Callable[[str], str | None]) -> str | None:
    """Says what the default device lacks, if it is a GPU; None if it lacks nothing.

    `lacks` says it of a compute capability, such as "9.0".
    """
    if jax.default_backend() != "gpu":
        return None  # the GPU is elsewhere: the call is only described or lowered here
    device = jax.local_devices()[0]
    if "cuda" not in device.client.platform_version:
        return "runs on NVIDIA GPUs only, and this one is not."
    return lacks(device.compute_capability)


def objection_to_precision(problem: Problem) -> str | None:
    """Says that products are asked for that are more precise than those of a kernel."""
    if not problem.is_precise:
        return None
    return (
        f"rounds the weights to the dtype of the inputs, and the precision of products is "
        f"to be {problem.precision}."
    )


def capability() -> str | None:
    """Gives the compute capability of the default device; None if it is no NVIDIA GPU."""
    found: list[str] = []
    lacking(lambda capability: found.append(capability))
    return found[0] if found else None
