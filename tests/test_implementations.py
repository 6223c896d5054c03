"""Every implementation, on every case, equals the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.implementations.dispatch import DEFAULT_ORDER
from jattn.testing import CASES, assert_matches_definition, errors
from tests.helpers import small_tiles
from tests.helpers.params import quick_and_slow

TELLING = ("everything", "segments_with_padding", "captured", "large_logits")
named = {case.name: case for case in CASES}
# Cases of one name go to one process, where they share what is compiled.
telling = quick_and_slow([named[name] for name in TELLING], TELLING, group=True)
most_telling = quick_and_slow([named[name] for name in TELLING], TELLING[:1], group=True)
IN_TILES = "blockwise_in_small_tiles"
EVERY = [(case, name) for case in CASES for name in ("dense", IN_TILES)]
every = pytest.mark.parametrize("implementation", DEFAULT_ORDER)


def state(implementation):
    return _STATES[implementation]


_STATES = {
    name: functools.partial(jattn.attention_state, implementation=name)
    for name in DEFAULT_ORDER
} | {"blockwise_in_small_tiles": small_tiles.attention_state}


# At these sizes blockwise has one tile, as dense has, unless tiles are small.
QUICK = {(name, IN_TILES) for name in TELLING[:2]}


@pytest.mark.parametrize(
    ("case", "implementation"), quick_and_slow(EVERY, QUICK, group=True)
)
def test_implementation_equals_definition(case, implementation):
    assert_matches_definition(state(implementation), case)


@pytest.mark.parametrize("case", telling)
def test_blockwise_in_one_tile_equals_definition(case):
    assert_matches_definition(state("blockwise"), case)


@pytest.mark.parametrize("name", ["ungrouped", "one_query"])
def test_blockwise_with_few_queries_equals_definition(name):
    """Forward multiplies all heads at once there; tangents and cotangents do not."""
    assert_matches_definition(state("blockwise"), named[name])


@every
@pytest.mark.parametrize("dtype", quick_and_slow(["float16", "bfloat16"], ["bfloat16"]))
@pytest.mark.parametrize("case", most_telling)
def test_implementation_equals_definition_in_half_precision(case, dtype, implementation):
    assert_matches_definition(state(implementation), case, dtype)


@every
@pytest.mark.parametrize("case", most_telling)
def test_implementation_equals_definition_in_double_precision(case, implementation):
    with jax.enable_x64(True):
        assert_matches_definition(state(implementation), case, "float64")


@every
@pytest.mark.parametrize("case", quick_and_slow([named[TELLING[-1]]], TELLING))
def test_implementation_equals_definition_with_x64_on(case, implementation):
    with jax.enable_x64(True):
        assert_matches_definition(state(implementation), case, "float32")


def test_a_wrong_implementation_is_caught():
    def wrong(query, key, value, **options):
        output, logsumexp = jattn.attention_state(query, key, value, **options)
        return jattn.State(output * (1 + 1e-5), logsumexp)

    with pytest.raises(AssertionError, match=r"plain, float32: `\w+` is off by"):
        assert_matches_definition(wrong, CASES[0])


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", ["float64", np.float64, jnp.float64, float])
def test_double_precision_is_exact_however_it_is_named(dtype, x64):
    def wrong(query, key, value, **options):
        output, logsumexp = jattn.attention_state(query, key, value, **options)
        return jattn.State(output * (1 + 1e-9), logsumexp)

    with jax.enable_x64(x64):
        assert_matches_definition(_STATES["dense"], CASES[0], dtype)
        with pytest.raises(AssertionError, match=r"plain, float64: `\w+` is off by"):
            assert_matches_definition(wrong, CASES[0], dtype)


def test_a_number_does_not_pass_for_the_logsumexp_of_a_row_that_sees_nothing():
    def wrong(query, key, value, **options):
        output, logsumexp = jattn.attention_state(query, key, value, **options)
        return jattn.State(output, jnp.where(logsumexp == -jnp.inf, 0, logsumexp))

    case = next(case for case in CASES if case.name == "causal_with_empty_rows")
    with pytest.raises(AssertionError, match="`empty` is off by 1"):
        assert_matches_definition(wrong, case)


def test_errors_name_value_logsumexp_gradients_and_tangents():
    found = errors(CASES[0], _STATES["dense"])
    names = {"output", "logsumexp", "empty", "d_output", "d_logsumexp"}
    assert set(found) == names | {"d_query", "d_key", "d_value"}


@every
@pytest.mark.parametrize("case", telling)
def test_weights_times_values_are_the_output(case, implementation):
    inputs = jattn.testing.random_inputs(case)
    options = case.options(inputs)
    weights = jattn.attention_weights(inputs["query"], inputs["key"], **options)
    groups = weights.shape[-3] // inputs["value"].shape[-2]
    value = jnp.repeat(inputs["value"], groups, axis=-2)
    expected = jnp.einsum("...nts,...snd->...tnd", weights, value)
    output = case.call(state(implementation), inputs).output
    np.testing.assert_allclose(output, expected, atol=2e-6)


@pytest.mark.parametrize("case", telling)
def test_weights_equal_definition(case):
    inputs = jattn.testing.random_inputs(case)
    run = lambda function: function(inputs["query"], inputs["key"], **case.options(inputs))
    got, expected = run(jattn.attention_weights), run(jattn.definition.attention_weights)
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("case", telling)
def test_chosen_rows_of_weights_are_rows_of_all_weights(case):
    inputs = jattn.testing.random_inputs(case)
    options = case.options(inputs)
    rows = jnp.array([5, 0, -2])
    some = jattn.attention_weights(inputs["query"], inputs["key"], rows=rows, **options)
    every = jattn.attention_weights(inputs["query"], inputs["key"], **options)
    np.testing.assert_allclose(some, every[..., rows, :], atol=1e-6)


@pytest.mark.parametrize("case", telling)
def test_softmax_of_logits_is_weights_without_sink_and_dropout(case):
    inputs = jattn.testing.random_inputs(case)
    options = case.options(inputs)
    options.pop("sink", None), options.pop("dropout", None)
    logits = jattn.attention_logits(inputs["query"], inputs["key"], **options)
    weights = jattn.attention_weights(inputs["query"], inputs["key"], **options)
    seen = (logits > -jnp.inf).any(-1)
    np.testing.assert_allclose(
        weights[seen], jax.nn.softmax(logits, axis=-1)[seen], atol=1e-6
    )
    np.testing.assert_array_equal(weights[~seen], 0)
