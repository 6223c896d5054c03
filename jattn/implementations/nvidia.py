"""What a kernel for NVIDIA GPUs asks of the device that is here."""

from collections.abc import Callable

import jax

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


def capability() -> str | None:
    """Gives the compute capability of the default device; None if it is no NVIDIA GPU."""
    found: list[str] = []
    lacking(lambda capability: found.append(capability))
    return found[0] if found else None
