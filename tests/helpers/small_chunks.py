"""Caches that go by small chunks, so that short sequences take every way."""

import jax
import pytest

from jattn.caches import decode


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    """The shortest part has 4 slots, and a chunk 8."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "FIRST", 4)
        patch.setattr(decode, "CHUNK", 8)
        jax.clear_caches()  # programs of other sizes
        yield
    jax.clear_caches()
