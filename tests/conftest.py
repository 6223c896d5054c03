"""The sternest settings that JAX has, for every test; docstrings keep a user's."""

import pathlib

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


# Most tests ask what is computed, and spend their time on compiling it: XLA leaves out
# most of its optimizations for them. These measure errors, memory or compiling itself.
OPTIMIZED = {
    "test_blockwise",
    "test_implementations",
    "test_gradients",
    "test_exactness",
    "test_bench",
    "test_caches_memory",
}


# Names of tests that take long; `python -m tests.helpers.slow` writes it.
LISTED = (pathlib.Path(__file__).parent / "slow.txt").read_text().splitlines()


@pytest.hookimpl(tryfirst=True)  # before those that are not asked for are left out
def pytest_collection_modifyitems(items):
    listed = set(LISTED)
    for item in items:
        if item.nodeid.partition("@")[0] in listed:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def quick_to_compile(request):
    name = "jax_disable_most_optimizations"
    asked = jax.config.read(name)
    module = request.module.__name__.rpartition(".")[2] if request.module else ""
    jax.config.update(name, module not in OPTIMIZED)
    yield
    jax.config.update(name, asked)


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(params=[False, True], ids=["x64_off", "x64_on"])
def x64(request):
    """Runs the test with 64-bit types off, then on."""
    with jax.enable_x64(request.param):
        yield request.param
