"""Numbers for tests, drawn by NumPy: JAX would compile a program for each shape.

One such program takes XLA seconds on a CPU, more than the test that asks for the numbers.
"""

import jax.numpy as jnp
import numpy as np


def normal(seed: int, shape, dtype="float32"):
    """Draws from a normal distribution."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)
