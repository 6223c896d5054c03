"""Random shapes, masks and modifiers against the definition."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.masks import Causal, Lengths, Prefix, Segments, Window
from jattn.modifiers import ALiBi, SoftCap
from tests.helpers import small_tiles

dense = functools.partial(jattn.attention_state, implementation="dense")

sizes = st.fixed_dictionaries(
    {
        "B": st.integers(1, 3),
        "T": st.integers(0, 9),
        "S": st.integers(0, 9),
        "K": st.integers(1, 3),
        "G": st.integers(1, 3),
        "H": st.sampled_from([1, 3, 8]),
        "D": st.sampled_from([1, 5]),
    }
)
small = st.integers(0, 4)
masks = st.recursive(
    st.one_of(
        st.builds(Causal, st.integers(-3, 3)),
        st.builds(Window, st.none() | small, st.none() | small),
        st.builds(Prefix, small),
        st.builds(Lengths, small, st.none() | small),
        st.builds(lambda m: lambda b, n, t, s: (t * 3 + s + n) % (m + 1) == b, small),
    ),
    lambda inner: st.one_of(
        st.builds(lambda a, b: jattn.masks.as_mask(a) & b, inner, inner),
        st.builds(lambda a, b: jattn.masks.as_mask(a) | b, inner, inner),
        st.builds(lambda a: ~jattn.masks.as_mask(a), inner),
    ),
    max_leaves=4,
)
modifiers = st.sampled_from(
    [
        None,
        SoftCap(2.0),
        ALiBi(),
        ALiBi() >> SoftCap(1.0),
        lambda logit, b, n, t, s: jnp.where(t > s, logit, -logit),
        lambda logit, b, n, t, s: jnp.where(s % 3 == 0, -jnp.inf, logit),
    ]
)


@pytest.mark.parametrize("function", [dense, small_tiles.attention_state])
@hypothesis.settings(max_examples=4, deadline=None, database=None, derandomize=True)
@hypothesis.given(sizes, st.none() | masks, modifiers, st.integers(-2, 5))
def test_any_call_equals_the_definition(function, sizes, mask, modifier, position):
    B, T, S, K, G, H, D = (sizes[letter] for letter in "BTSKGHD")
    rng = np.random.default_rng(T * 10 + S)
    query = jnp.float32(rng.standard_normal((B, T, K * G, H)))
    key = jnp.float32(rng.standard_normal((B, S, K, H)))
    value = jnp.float32(rng.standard_normal((B, S, K, D)))
    options = {"mask": mask, "modifier": modifier, "query_position": position}

    def loss(function):
        def total(query, key, value):
            output, logsumexp = function(query, key, value, **options)
            seen = jnp.where(logsumexp == -jnp.inf, 0, logsumexp)
            return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.cos(seen)), (output, logsumexp)

        return jax.value_and_grad(total, (0, 1, 2), has_aux=True)

    got = loss(function)(query, key, value)
    want = loss(jattn.definition.attention_state)(query, key, value)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-4), got, want
    )


@hypothesis.settings(max_examples=15, deadline=None, database=None, derandomize=True)
@hypothesis.given(st.lists(st.integers(0, 3), min_size=1, max_size=8), small)
def test_segments_equal_the_function_that_compares_ids(ids, padding):
    ids = jnp.asarray(ids, jnp.int32)
    query = jnp.zeros((ids.size, 1, 1))
    by_function = lambda b, n, t, s: (ids[t] == ids[s]) & (ids[t] != padding)
    for mask in (Segments(ids, padding_id=padding), Segments(ids, ids, padding)):
        np.testing.assert_array_equal(
            jattn.attention_logits(query, query, mask=mask),
            jattn.attention_logits(query, query, mask=by_function),
        )
