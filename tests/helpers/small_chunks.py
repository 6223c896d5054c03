"""Caches that go by small chunks, so that short sequences take every way."""

import jax
import pytest

from jattn.caches import store
from jattn.implementations import bounded, parts


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    """The shortest part has 4 slots, and a chunk 8; all lies as in a large cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "FIRST", 4)
        patch.setattr(parts, "CHUNK", 8)
        patch.setattr(store, "_more", lambda slots, kind: 3)
        patch.setattr(bounded, "LEAST", 1)
        jax.clear_caches()  # programs of other sizes
        yield
    jax.clear_caches()
