"""Arguments as Python and NumPy make them: constants, byte orders, wrong callables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import caches, definition, masks, modifiers, page, plot, terminal
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
STATE = jattn.attention_state(X, X, X)
PICTURES = (terminal, plot, page)
ENTROPY = {f"{x.__name__[6:]}.entropy": x.entropy for x in PICTURES}
RECEIVED = {f"{x.__name__[6:]}.received": x.received for x in PICTURES}
NUMBERS = (
    "abc",
    None,
    {0: 1},
    np.array([1, 2], "datetime64[s]"),
    np.array([1, 2], "timedelta64[s]"),
    np.ones(2) * 1j,
    np.zeros(2, [("a", "f4")]),
    np.ones(2, object),
    jax.random.key(0),
)
TOKENS = (3, 3.5, np.array(3), True, b"ab", object(), iter("ab"))
NAMES = (0, "", [], False, 0.0, "none", ["dense"], np.arange(3), np.array(["dense"] * 2))


def filled() -> caches.Cache:
    """A cache of three tokens."""
    return caches.empty(1, 4, 2, 4).append(X, X)


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
    "implementation": {
        "caches.attend": lambda bad: filled().attend(X, implementation=bad),
        "attention": lambda bad: jattn.attention(X, X, X, implementation=bad),
        "explain": lambda bad: jattn.explain(X, X, X, implementation=bad),
    },
    "platform": {"explain": lambda bad: jattn.explain(X, X, X, platform=bad)},
    "strategy": {"Context": lambda bad: jattn.Context("x", strategy=bad)},
    "weights": {
        "terminal.weights": terminal.weights,
        "plot.weights": plot.weights,
    },
    "received": RECEIVED,
    "entropies": ENTROPY,
    "query_tokens": {
        "terminal.weights": lambda bad: terminal.weights(WEIGHTS, query_tokens=bad),
        "plot.weights": lambda bad: plot.weights(WEIGHTS, query_tokens=bad),
    },
    "tokens": {
        "page.weights": lambda bad: page.weights(X[0], X[0], bad),
        "page.mask": lambda bad: page.mask(Causal(), 4, tokens=bad),
        "page.entropy": lambda bad: page.entropy(X[0, :, :, 0], bad),
        "terminal.received": lambda bad: terminal.received(X[0, :, 0, 0], bad),
        "plot.received": lambda bad: plot.received(X[0, :, 0, 0], bad),
    },
    "function": {
        "masks.Pointwise": masks.Pointwise,
        "modifiers.Pointwise": modifiers.Pointwise,
    },
    "k": {"strongest_keys": lambda bad: jattn.strongest_keys(X, X, bad)},
    "rows": {
        "attention_weights": lambda bad: jattn.attention_weights(X, X, rows=bad),
        "attention_logits": lambda bad: jattn.attention_logits(X, X, rows=bad),
    },
}
BAD = {
    "width": (0, 80.5, "80", None),
    "megabytes": (0, np.nan, "10", None),
    "path": (None, 5, ["seen.html"]),
    "dtype": (3, [1], "int9", None),
    "implementation": NAMES,
    "platform": NAMES,
    "strategy": NAMES,
    "weights": (3, [[1.0], [1.0, 2.0]], *NUMBERS),
    "received": (3, [[1.0], [1.0, 2.0]], *NUMBERS),
    "entropies": (3, [None], [["a"]], *NUMBERS),
    "query_tokens": TOKENS,
    "tokens": TOKENS,
    "function": (3, None, "causal", np.ones((2, 2), bool)),
    "k": (0, 1.5, "2", None),
    "rows": (3, [-4], 0.5, [[0]]),
}


@pytest.mark.parametrize(
    ("name", "where"), [(name, where) for name in CALLS for where in CALLS[name]]
)
def test_a_value_of_another_kind_is_refused_in_a_sentence(name, where):
    for bad in BAD[name]:
        with pytest.raises(
            ValueError, match=rf"^{where}: `{name}` must (.|\n)*; \w+ .*\.$"
        ):
            CALLS[name][where](bad)


def test_a_field_of_a_state_may_be_a_list_and_must_hold_real_numbers():
    lists = jattn.State(*(np.asarray(x).tolist() for x in STATE))
    jax.tree.map(
        np.testing.assert_array_equal, jattn.merge(STATE, lists), jattn.merge(STATE, STATE)
    )
    for name, bad in {"output": ("abc", None, {}), "logsumexp": ("abc", 1j, None)}.items():
        for x in bad:
            with pytest.raises(ValueError, match=f"^merge: `{name}` must "):
                jattn.merge(STATE, STATE._replace(**{name: x}))
    with pytest.raises(ValueError, match=r"^merge: states must have outputs"):
        jattn.merge(STATE, jattn.State([1.0], STATE.logsumexp))


@pytest.mark.parametrize("block", [7, 10**30])
def test_a_block_beyond_the_mask_takes_no_room(block):
    table = jattn.block_table(Causal(), X, X, block=2)
    for mask in (Causal(), table):
        assert plot.mask(mask, 3, block=block).axes
    assert (
        page.mask(Causal(), 3, 5, block=block).html
        == page.mask(Causal(), 3, 5, block=5).html
    )


def test_a_short_mask_of_many_keys_takes_no_room():
    assert terminal.mask(Causal(), 2, 10**6).count("\n") == 2


def test_numbers_of_any_width_are_drawn():
    for dtype in ("bool", "int4", "bfloat16", "float8_e4m3fn", "float16"):
        ones = jnp.ones((2, 2), dtype)
        assert terminal.weights(ones) == terminal.weights(np.ones((2, 2)))
        assert page.received(ones).html == page.received(np.ones((2, 2))).html
    layers = ([1.0], [2.0, 3.0])
    assert terminal.entropy(iter(layers)) == terminal.entropy(layers)
