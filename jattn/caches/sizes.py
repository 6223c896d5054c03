"""What a cache is made with: sizes and a dtype, or a sentence that names the wrong one."""

import jax
import jax.numpy as jnp

from jattn.arrays.checks import check_flag
from jattn.arrays.integers import is_number
from jattn.arrays.shapes import FLOATS
from jattn.caches.rounding import LARGEST


def batch_axes(where: str, batch_size) -> tuple[int, ...]:
    """Gives the axes of examples, from one number or from several."""
    several = isinstance(batch_size, tuple | list)
    axes = tuple(batch_size) if several else (batch_size,)
    return tuple(x for size in axes for x in check_sizes(where, batch_size=(size, 0)))


def check_sizes(where: str, **sizes) -> list[int]:
    """Gives sizes as numbers of Python: sums of small ones of NumPy would wrap.

    Args:
        where: The public function.
        **sizes: By the name of its argument, each size and the least that it can be.

    Raises:
        ValueError: For a size that is no whole number, or is less than it can be.
    """
    for name, (size, least) in sizes.items():
        if not is_number(size) or size < least:
            raise ValueError(
                f"{where}: `{name}` must be a whole number, at least {least}, got "
                f"{size!r}; memory is laid out before a program runs, so give a number "
                f"of Python."
            )
    return [int(size) for size, _ in sizes.values()]


def no_tokens(where: str, batch: tuple[int, ...], ragged) -> jax.Array:
    """Gives the length of a new cache: one number, or one of each example."""
    return jnp.zeros(batch if check_flag(where, "ragged", ragged) else (), jnp.int32)


def check_vectors(where: str, num_kv_heads, head_dim, value_head_dim, dtype):
    """Checks what keys and values are; gives K, H, D and the dtype's name."""
    value_dim = head_dim if value_head_dim is None else value_head_dim
    K, H = check_sizes(where, num_kv_heads=(num_kv_heads, 0), head_dim=(head_dim, 0))
    (D,) = check_sizes(where, value_head_dim=(value_dim, 0))
    return K, H, D, check_dtype(where, dtype)


def check_dtype(where: str, dtype, known=(*FLOATS, *LARGEST)) -> str:
    """Gives the name of a dtype that a cache can have, one of `known`."""
    try:  # NumPy takes None for float64
        name = str(dtype) if isinstance(dtype, str | None) else jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            f"{where}: `dtype` float64 needs JAX's `jax_enable_x64`, which is off; switch "
            f"it on, or use float32."
        )
    if name not in known:
        raise ValueError(
            f"{where}: `dtype` must be one of {', '.join(known)}, got {name}; convert what "
            f"you append."
        )
    return name
