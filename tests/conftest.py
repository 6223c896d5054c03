"""The sternest settings that JAX has, for every test; docstrings keep a user's."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(params=[False, True], ids=["x64_off", "x64_on"])
def x64(request):
    """Runs the test with 64-bit types off, then on."""
    with jax.enable_x64(request.param):
        yield request.param
