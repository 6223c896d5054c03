"""Mask expressions mean what Python would make of them, and nothing else gets through."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jattn import masks
from jattn.command.expression import MASKS, parse, signature
from jattn.masks import Causal, Lengths, Prefix, Segments, Window, as_mask
from jattn.pictures.numbers import allowed

SAME = {
    "Causal()": Causal(),
    " Causal ( -1 ) ": Causal(-1),
    "Causal(offset=2)": Causal(2),
    "Window(2, None)": Window(2, None),
    "Window(right=1, left=0)": Window(0, 1),
    "Segments([0, 0, 1, 1, -1, -1], padding_id=-1)": Segments(
        np.array([0, 0, 1, 1, -1, -1]), None, -1
    ),
    "Lengths(4, query_lengths=None)": Lengths(4),
    "~Prefix(2) & Causal() | Window(0, 0)": (~Prefix(2) & Causal()) | Window(0, 0),
    "~(Prefix(2) & (Causal() | Window(0, 0)))": ~(Prefix(2) & (Causal() | Window(0, 0))),
    "Causal()\n& Prefix(2)": Causal() & Prefix(2),
}

REFUSED = {
    "": "column 1: nothing is written. Allowed: Causal(offset=0), Window(left, right)",
    "Causal": "column 1: `Causal` is not a mask (write Causal(offset=0))",
    "Causal() & Casual()": "column 12: `Casual()` is not a mask. Allowed: Causal(",
    "  ü & Causal()": "column 3: `ü` is not a mask",
    "Causal() and Prefix(3)": "(write & for `and`, | for `or`)",
    "not Causal()": "(write ~ for `not`)",
    "-Causal()": "`-Causal()` is not a mask",
    "Causal() if 1 else 2": "`Causal() if 1 else 2` is not a mask",
    "lambda b, n, t, s: t > s": "is not a mask",
    "masks.Causal()": "`masks.Causal()` is not a mask",
    "Explicit([1])": "`Explicit([1])` is not a mask",
    "__import__('os').system('true')": "is not a mask",
    "Causal() Causal()": "column 10: invalid syntax",
    "Causal(": "column 7: '(' was never closed",
    "~" * 100_000 + "Causal()": "cannot be read as Python",
    " & ".join(["Causal()"] * 102): "more than 100 operators",
    "Window(1)": "column 1: Window(left, right): missing a required argument: 'right'",
    "Window(1, 0, right=2)": "multiple values for argument 'right'",
    "Window(1, right=2, right=3)": "an argument is named twice",
    "Causal(off=1)": "unexpected keyword argument 'off'",
    "Causal(1.5)": "column 8: an argument must be a whole number, None or a list",
    "Causal(True)": "got `True`",
    "Causal(1 + 1)": "got `1 + 1`",
    "Causal(*[1])": "got `*[1]`",
    "Causal(2147483648)": "column 8: `2147483648` does not fit into 32 bits",
    "Causal(None)": "`offset` must be a whole number, got None",
    "Causal([1])": "`offset` must be a whole number, got a list of whole numbers",
    "Segments([1, 2.5])": "column 14: an argument must be a whole number, got `2.5`",
    "Segments(3)": "`query_ids` must be a list of whole numbers, got a whole number",
    "Window(-1, 0)": "masks.Window: `left` must be ≥ 0",
}

NAMED = st.sampled_from(
    ["Causal()", "Causal(-1)", "Window(1, 0)", "Window(None, 2)", "Prefix(2)", "Lengths(3)"]
)
EXPRESSIONS = st.recursive(
    NAMED,
    lambda inner: (
        inner.map(lambda x: f"~{x}")
        | inner.map(lambda x: f"({x})")
        | st.tuples(inner, st.sampled_from("&|"), inner).map(" ".join)
    ),
    max_leaves=5,
)


@pytest.mark.parametrize("text", SAME)
def test_expression_is_the_mask_that_python_makes_of_it(text):
    np.testing.assert_array_equal(allowed(parse(text), 6), allowed(SAME[text], 6))


@given(EXPRESSIONS)
@settings(max_examples=25, deadline=None)
def test_any_expression_of_masks_is_what_python_makes_of_it(text):
    mask = eval(text, {name: getattr(masks, name) for name in MASKS})
    np.testing.assert_array_equal(allowed(parse(text), 5, 4), allowed(mask, 5, 4))


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: repr(text[:30]))
def test_anything_else_is_refused_in_one_line(text):
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the table has the sentences
        parse(text)
    assert REFUSED[text] in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(alphabet="Causl()&|~[],-1 'x.:λ\\\n\x00", max_size=30))
@settings(max_examples=300, deadline=None)
def test_text_is_read_or_refused_and_never_fails_otherwise(text):
    with contextlib.suppress(ValueError):
        assert isinstance(parse(text), masks.Mask)


@pytest.mark.parametrize("name", MASKS)
def test_every_argument_of_a_mask_can_be_written(name):
    fields = [field.name for field in dataclasses.fields(getattr(masks, name))]
    assert list(MASKS[name]) == fields


def test_signature_shows_the_defaults():
    assert signature("Lengths") == "Lengths(key_lengths, query_lengths=None)"


WRITTEN = (
    "Causal()",
    "Causal(-2) & Window(4, None)",
    "Prefix([1, 2]) | Causal() & ~Window(1, 1)",
    "(Causal() | Prefix(3)) & (Window(4, 0) & Lengths([3, 4], [1, 2]))",
    "~(Causal() & Causal(1)) | (Prefix(1) | Prefix(2))",
    "Segments([0, 0, 1], padding_id=0) & Segments([1, 2], [3, 4, 5])",
)


@pytest.mark.parametrize("text", WRITTEN)
def test_a_mask_prints_as_one_writes_it(text):
    mask = parse(text)
    assert repr(mask) == text
    assert parse(repr(mask)) == mask


whole = st.integers(-3, 9)
numbers = st.lists(whole, min_size=1, max_size=4).map(lambda x: np.array(x, np.int32))
side = st.integers(0, 9) | st.none()
NAMED = st.one_of(
    st.builds(Causal, whole),
    st.builds(Window, side, side),
    st.builds(Prefix, whole | numbers),
    st.builds(Segments, numbers, st.none() | numbers, st.none() | whole),
    st.builds(Lengths, whole | numbers, st.none() | whole | numbers),
)
combined = lambda inner: st.one_of(
    st.builds(lambda x, y: x & y, inner, inner),
    st.builds(lambda x, y: x | y, inner, inner),
    st.builds(lambda x: ~x, inner),
)


@given(st.recursive(NAMED, combined, max_leaves=6))
def test_what_a_mask_prints_is_that_mask(mask):
    assert parse(repr(mask)) == mask


def test_long_arrays_and_functions_are_named():
    ids = jnp.zeros(4096, jnp.int32)
    assert repr(Segments(ids) & Causal()) == "Segments(int32[4096]) & Causal()"
    assert repr(jax.eval_shape(lambda: Prefix(jnp.int32(2)))) == "Prefix(int32[])"
    assert repr(as_mask(_sees_all)) == "Pointwise(_sees_all)"


def _sees_all(b, n, t, s):
    return t == t
