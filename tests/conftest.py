"""The sternest settings that JAX has, for every test."""

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(params=[False, True], ids=["x64_off", "x64_on"])
def x64(request):
    """Runs the test with 64-bit types off, then on."""
    with jax.enable_x64(request.param):
        yield request.param
