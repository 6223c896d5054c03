"""The sternest settings that JAX has, for every test; docstrings keep a user's."""

import pathlib
import zlib

import jax
import pytest

from tests.helpers.room import make_room

jax.config.update("jax_num_cpu_devices", 8)


def pytest_configure(config):
    """Keeps compiled programs, so that a second run compiles only what has changed."""
    if hasattr(config, "cache"):  # not with `-p no:cacheprovider`
        folder = config.cache.mkdir("jax")
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# Most tests ask what is computed, and spend their time on compiling it: XLA leaves out
# most of its optimizations for them. These measure errors, memory or compiling itself.
OPTIMIZED = {
    "test_blockwise",
    "test_implementations",
    "test_gradients",
    "test_exactness",
    "test_sums",
    "test_flat",
    "test_bench",
    "test_caches_memory",
    "test_on_gpu",
}


# Names of tests that take long; `python -m tests.helpers.slow` writes it.
LISTED = (pathlib.Path(__file__).parent / "slow.txt").read_text().splitlines()


def pytest_addoption(parser):
    parser.addoption(
        "--part", metavar="K/N", default="1/1", help="run the Kth of N parts of the tests"
    )


@pytest.hookimpl(tryfirst=True)  # before those that are not asked for are left out
def pytest_collection_modifyitems(config, items):
    listed, kept, others = set(LISTED), [], []
    part, parts = map(int, config.getoption("--part").split("/"))
    for item in items:
        name = item.nodeid.partition("@")[0]
        if name in listed:
            item.add_marker(pytest.mark.slow)
        # Tests of one group share what they compile, so they are in one part.
        group = item.get_closest_marker("xdist_group")
        number = zlib.crc32((group.args[0] if group else name).encode())
        (kept if number % parts == part - 1 else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Lets no module of tests go missing.

    The docstrings of an adapter need no test where its framework is not installed. So
    `--doctest-ignore-import-errors` is on, and with it pytest 9.1 skips a module of tests
    too, all of it, that cannot be imported.
    """
    report = yield
    if report.skipped and "unable to import module" in str(report.longrepr):
        report.outcome = "failed"
    return report


@pytest.fixture(autouse=True)
def quick_to_compile(request):
    name = "jax_disable_most_optimizations"
    asked = jax.config.read(name)
    module = request.module.__name__.rpartition(".")[2] if request.module else ""
    jax.config.update(name, module not in OPTIMIZED)
    yield
    jax.config.update(name, asked)


@pytest.fixture(autouse=True)
def room_for_programs():
    yield
    make_room()


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(params=[False, True], ids=["x64_off", "x64_on"])
def x64(request):
    """Runs the test with 64-bit types off, then on."""
    with jax.enable_x64(request.param):
        yield request.param
