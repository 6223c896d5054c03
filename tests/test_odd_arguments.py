"""Arguments as Python and NumPy make them: constants, byte orders, wrong callables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import caches, definition, page, terminal
from jattn.masks import Causal, Segments

X = np.random.default_rng(0).standard_normal((1, 3, 2, 4)).astype(np.float32)


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
@pytest.mark.parametrize("result", [True, np.False_])
def test_a_mask_may_be_a_constant(result, implementation):
    options = {"mask": lambda b, n, t, s: result}
    found = jattn.attention(X, X, X, implementation=implementation, **options)
    np.testing.assert_allclose(found, definition.attention(X, X, X, **options), atol=1e-6)


@pytest.mark.parametrize("modifier", [lambda *_: 0.0, lambda *_: np.float32(2)])
def test_a_modifier_may_be_a_constant(modifier):
    alike = jattn.modifiers.as_modifier(modifier) >> (lambda logit, b, n, t, s: logit + 1)
    mean = np.broadcast_to(X.mean(1, keepdims=True), X.shape)
    for attention in (jattn.attention, definition.attention):
        for given in (modifier, alike):
            np.testing.assert_allclose(attention(X, X, X, modifier=given), mean, atol=1e-6)
    assert (jattn.attention_logits(X, X, modifier=alike) == modifier() + 1).all()


def test_any_byte_order_will_do():
    swap = lambda x: x.astype(x.dtype.newbyteorder())
    ids, place = np.array([0, 0, 1]), np.arange(3)
    want = jattn.attention(X, X, X, mask=Segments(ids) & Causal(), query_position=place)
    mask = Segments(swap(ids)) & Causal(swap(np.array(0)))
    found = jattn.attention(*[swap(X)] * 3, mask=mask, query_position=swap(place))
    np.testing.assert_array_equal(found, want)


def test_a_function_of_other_arguments_is_refused_in_a_sentence():
    with pytest.raises(
        ValueError, match=r"`mask` must be a function of \(b, n, t, s\), got"
    ):
        jattn.attention(X, X, X, mask=lambda t, s: t >= s)
    with pytest.raises(ValueError, match=r"`modifier` must be a function of .*too many"):
        jattn.attention(X, X, X, modifier=lambda logit, t, s: logit)
    varying = jattn.attention(X, X, X, mask=lambda *at: at[2] >= at[3])
    np.testing.assert_array_equal(varying, jattn.attention(X, X, X, mask=Causal()))


def test_a_name_that_is_no_text_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="`implementation` must be None or one of"):
        jattn.attention(X, X, X, implementation=["dense"])


def test_a_raw_key_of_another_length_is_refused_in_a_sentence():
    dropout = jattn.Dropout(0.5, jnp.zeros(3, jnp.uint32))
    with pytest.raises(ValueError, match="must have one random key as `rng`"):
        jattn.attention(X, X, X, dropout=dropout)


def test_only_states_of_floats_are_merged():
    whole = jattn.State(jnp.ones((1, 1, 2), jnp.int32), jnp.zeros((1, 1)))
    with pytest.raises(ValueError, match="outputs must be floating, got int32"):
        jattn.merge(whole, whole)
    with pytest.raises(ValueError, match="takes states, got tuple"):
        jattn.merge((1.0, 2.0))


def test_an_infinite_sink_takes_all_weight_when_it_is_merged():
    state = jattn.attention_state(X, X, X)
    merge = lambda sink: jattn.merge(state, jattn.State(0.0, sink))
    output, logsumexp = merge(jnp.inf)
    np.testing.assert_array_equal(output, np.zeros_like(X))
    assert np.isposinf(logsumexp).all()
    assert np.all(jax.grad(lambda sink: merge(sink).output.sum())(jnp.inf) == 0)
    jax.tree.map(np.testing.assert_allclose, merge(-jnp.inf), state)


def test_an_infinite_sink_takes_all_weight_from_large_logits_in_the_definition():
    weights = definition.softmax(jnp.array([100.0, 200.0, -jnp.inf]), jnp.inf)
    np.testing.assert_array_equal(weights, np.zeros(3))


WEIGHTS = np.ones((1, 2, 2), np.float32) / 2
CALLS = {
    "width": {
        "terminal.weights": lambda bad: terminal.weights(WEIGHTS, width=bad),
        "terminal.mask": lambda bad: terminal.mask(Causal(), 4, width=bad),
        "terminal.entropy": lambda bad: terminal.entropy([[1.0]], width=bad),
        "terminal.received": lambda bad: terminal.received([1.0], width=bad),
    },
    "megabytes": {"page.weights": lambda bad: page.weights(X[0], X[0], megabytes=bad)},
    "path": {"Page.save": lambda bad: page.mask(Causal(), 4).save(bad)},
    "dtype": {"caches.empty": lambda bad: caches.empty(1, 4, 1, 2, dtype=bad)},
}
BAD = {
    "width": (0, 80.5, "80", None),
    "megabytes": (0, np.nan, "10", None),
    "path": (None, 5, ["seen.html"]),
    "dtype": (3, [1], "int9", None),
}


@pytest.mark.parametrize(
    ("name", "where"), [(name, where) for name in CALLS for where in CALLS[name]]
)
def test_a_value_of_another_kind_is_refused_in_a_sentence(name, where):
    for bad in BAD[name]:
        with pytest.raises(
            ValueError, match=f"^{where}: `{name}` must .*; (give|convert) "
        ):
            CALLS[name][where](bad)
