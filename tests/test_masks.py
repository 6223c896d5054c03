"""Masks: each beside its picture, and their algebra."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.masks import Causal, Explicit, Lengths, Mask, Prefix, Segments, Window, as_mask

PICTURES = {
    "causal": (Causal(), "1000 1100 1110 1111"),
    "causal_at_the_end": (Causal(2), "1110 1111"),
    "causal_before_the_start": (Causal(-1), "0000 1000 1100"),
    "window": (Window(1, 0), "1000 1100 0110 0011"),
    "window_to_both_sides": (Window(1, 2), "1110 1111 0111 0011"),
    "window_open_to_the_left": (Window(None, 0), "1000 1100 1110 1111"),
    "window_open_to_the_right": (Window(1, None), "1111 1111 0111"),
    "window_open_to_both_sides": (Window(None, None), "111 111"),
    "prefix": (Prefix(2), "1100 1100"),
    "prefix_of_nothing": (Prefix(0), "0000 0000"),
    "prefix_or_causal": (Prefix(2) | Causal(), "1100 1100 1110 1111"),
    "segments": (Segments(jnp.array([7, 7, 8, 8])), "1100 1100 0011 0011"),
    "segments_unsorted": (Segments(jnp.array([0, 1, 0])), "101 010 101"),
    "segments_across": (Segments(jnp.array([0, 1]), jnp.array([1, 0, 1])), "010 101"),
    "segments_with_padding": (
        Segments(jnp.array([1, 0, 0]), padding_id=0),
        "100 000 000",
    ),
    "lengths": (Lengths(2), "1100 1100"),
    "lengths_of_both": (Lengths(2, 1), "1100 0000"),
    "explicit": (Explicit(jnp.array([[1, 0], [0, 1]], bool)), "10 01"),
    "explicit_broadcast": (Explicit(jnp.array([[1, 0, 1]], bool)), "101 101"),
    "and": (Causal() & Window(1, 0), "1000 1100 0110 0011"),
    "or": (Window(0, 0) | Prefix(1), "1000 1100 1010 1001"),
    "not": (~Causal(), "0111 0011 0001 0000"),
    "a_function": (as_mask(lambda b, n, t, s: (t + s) % 2 == 0), "1010 0101 1010"),
    "a_mask_and_a_function": (Causal() & (lambda b, n, t, s: s > 0), "000 010 011"),
    "a_function_and_a_mask": ((lambda b, n, t, s: s > 0) & Causal(), "000 010 011"),
    "a_function_or_a_mask": ((lambda b, n, t, s: s == 2) | Causal(), "101 111 111"),
    "masks_called_inside_a_function": (
        as_mask(lambda b, n, t, s: ~(Causal() & Window(0, 0) | Prefix(1))(b, n, t, s)),
        "011 001 010",
    ),
}


def picture(mask, T, S, **options):
    """The mask as the library applies it, as rows of 0 and 1."""
    query, key = jnp.zeros((T, 1, 1)), jnp.zeros((S, 1, 1))
    logits = jattn.attention_logits(query, key, mask=mask, **options)
    return " ".join("".join(str(int(x)) for x in row) for row in np.isfinite(logits[0]))


@pytest.mark.parametrize("name", PICTURES)
def test_mask_is_its_picture(name):
    mask, expected = PICTURES[name]
    rows = expected.split()
    assert picture(mask, len(rows), len(rows[0])) == expected


def test_array_is_an_explicit_mask():
    array = jnp.array([[True, False], [True, True]])
    assert picture(array, 2, 2) == picture(Explicit(array), 2, 2) == "10 11"


def test_array_on_the_left_combines_with_a_mask():
    assert picture(jnp.array([[False, True, True]]) & Causal(), 3, 3) == "000 010 011"
    assert picture(np.array([[False, True, True]]) & Causal(), 3, 3) == "000 010 011"


def test_causal_moves_with_the_query_position():
    assert picture(Causal(), 2, 4, query_position=2) == picture(Causal(2), 2, 4)


def test_causal_moves_with_the_key_position():
    assert picture(Causal(), 3, 4, key_position=1) == picture(Causal(-1), 3, 4)


def test_lengths_count_columns_whatever_the_positions():
    assert picture(Lengths(2), 2, 4, key_position=100) == "1100 1100"


def test_function_sees_positions():
    document = jnp.array([9, 9, 5, 5, 5])
    mask = lambda b, n, t, s: document[t] == document[s]
    assert picture(mask, 2, 3, query_position=1, key_position=2) == "000 111"


def test_function_sees_example_and_head():
    query = jnp.zeros((2, 1, 3, 1))
    mask = lambda b, n, t, s: s == b + n
    logits = jattn.attention_logits(query, jnp.zeros((2, 5, 1, 1)), mask=mask)
    seen = np.argmax(np.isfinite(logits), axis=-1)[..., 0]
    np.testing.assert_array_equal(seen, [[0, 1, 2], [1, 2, 3]])


def test_example_counts_all_batch_axes_in_row_major_order():
    mask = lambda b, n, t, s: s == b
    query, key = jnp.zeros((2, 3, 1, 1, 1)), jnp.zeros((2, 3, 6, 1, 1))
    logits = jattn.attention_logits(query, key, mask=mask)
    seen = np.argmax(np.isfinite(logits), axis=-1).reshape(2, 3)
    np.testing.assert_array_equal(seen, [[0, 1, 2], [3, 4, 5]])


ATOMS = [Causal(), Causal(1), Window(1, 1), Prefix(2), Segments(jnp.array([0, 0, 1, 1]))]
masks = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a: ~a, inner),
    ),
    max_leaves=4,
)


@functools.lru_cache(None)
def dense(mask: Mask):
    rows = picture(mask, 4, 4).split()
    return np.array([[int(x) for x in row] for row in rows], bool)


few = hypothesis.settings(max_examples=15, deadline=None, database=None)


@few
@hypothesis.given(masks, masks)
def test_algebra_of_masks_is_that_of_their_pictures(a, b):
    np.testing.assert_array_equal(dense(a & b), dense(a) & dense(b))
    np.testing.assert_array_equal(dense(a | b), dense(a) | dense(b))


@few
@hypothesis.given(masks, masks)
def test_de_morgan_holds(a, b):
    np.testing.assert_array_equal(dense(~(a & b)), dense(~a | ~b))


def test_masks_are_pytrees_of_their_arrays():
    mask = Segments(jnp.array([1, 2])) & Causal(3)
    assert len(jax.tree.leaves(mask)) == 2
    doubled = jax.tree.map(lambda x: 2 * x, mask)
    assert doubled.right.offset == 6


@pytest.mark.parametrize("leaf", [None, "axis", object()])
def test_masks_hold_what_transformations_put_into_trees(leaf):
    filled = jax.tree.map(lambda _: leaf, Causal(2) & Window(1, 2) & Prefix(3))
    leaves = jax.tree.leaves(filled, is_leaf=lambda x: x is leaf)
    assert leaves == [leaf] * 4


def test_masks_pass_through_jit_as_arguments():
    query = jnp.zeros((4, 1, 1))
    logits = jax.jit(lambda mask: jattn.attention_logits(query, query, mask=mask))
    expected = jattn.attention_logits(query, query, mask=Causal(1))
    np.testing.assert_array_equal(logits(Causal(1)), expected)
