"""Caches that go by small chunks, so that short sequences take every way."""

import jax
import pytest

from jattn.caches import store
from jattn.implementations import parts


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    """The shortest part has 4 slots, and a chunk 8; keys lie as in a large cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "FIRST", 4)
        patch.setattr(parts, "CHUNK", 8)
        patch.setattr(store, "_row", lambda slots, kind: slots + 3)
        jax.clear_caches()  # programs of other sizes
        yield
    jax.clear_caches()
