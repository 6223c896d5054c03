"""The page that everything else is measured by."""

import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import definition
from jattn.definition import attend, logsumexp, scores, softmax, weighted_sum
from tests.helpers.draws import normal

EMBEDDING = jnp.arange(1, 16, dtype=jnp.float32).reshape(5, 3) / 10
QUERY = jnp.full(3, 0.5)
WEIGHTS = [0.06695687, 0.10500927, 0.16468731, 0.25828112, 0.40506543]
OUTPUT = [0.9488467, 1.0488467, 1.1488467]


def test_attend_gives_the_seed_weights_and_output():
    answer = attend(QUERY, EMBEDDING, EMBEDDING, scale=1)
    np.testing.assert_allclose(answer.weights, WEIGHTS, rtol=1e-6)
    np.testing.assert_allclose(answer.output, OUTPUT, rtol=1e-6)


def test_the_three_steps_compose_to_attend():
    weights = softmax(scores(QUERY, EMBEDDING))
    np.testing.assert_allclose(weights, WEIGHTS, rtol=1e-6)
    np.testing.assert_allclose(weighted_sum(weights, EMBEDDING), OUTPUT, rtol=1e-6)


def test_attention_gives_the_seed_output():
    query, keys = QUERY.reshape(1, 1, 3), EMBEDDING.reshape(5, 1, 3)
    output = jattn.attention(query, keys, keys, scale=1.0)
    np.testing.assert_allclose(output.ravel(), OUTPUT, rtol=1e-6)


def test_logits_zero_and_one_give_the_logistic_weights():
    e = np.exp(1)
    expected = [1 / (1 + e), e / (1 + e)]
    np.testing.assert_allclose(softmax(jnp.array([0.0, 1.0])), expected, rtol=1e-6)


@pytest.mark.parametrize("shift", [-1e4, 0.0, 1e4])
def test_softmax_does_not_see_a_shift_of_all_logits(shift):
    logits = jnp.array([0.0, 1.0, 3.0])
    np.testing.assert_allclose(softmax(logits + shift), softmax(logits), rtol=1e-6)


def test_softmax_of_nothing_is_zero_and_its_logsumexp_minus_infinity():
    nothing = jnp.full(3, -jnp.inf)
    np.testing.assert_array_equal(softmax(nothing), 0)
    assert logsumexp(nothing) == -jnp.inf


def test_logsumexp_is_the_logarithm_of_the_sum_of_exponentials():
    logits = jnp.array([0.5, -1.0, 2.0])
    expected = np.log(np.sum(np.exp(np.asarray(logits, np.float64))))
    np.testing.assert_allclose(logsumexp(logits), expected, rtol=1e-6)


def test_sink_takes_its_share_of_the_weight():
    weights = softmax(jnp.array([0.0, 0.0, 0.0]), sink=jnp.log(3.0))
    np.testing.assert_allclose(weights, 1 / 6, rtol=1e-6)


def test_equal_scores_give_the_mean_of_the_values():
    output = attend(jnp.zeros(3), EMBEDDING, EMBEDDING).output
    np.testing.assert_allclose(output, EMBEDDING.mean(0), rtol=1e-6)


def test_large_scale_gives_the_value_of_the_best_key():
    output = attend(QUERY, EMBEDDING, EMBEDDING, scale=1e4).output
    np.testing.assert_allclose(output, EMBEDDING[-1], rtol=1e-6)


def test_output_is_a_convex_combination_of_the_visible_values():
    key = normal(0, (6, 3))
    value = normal(1, (6, 2))
    mask = jnp.array([1, 0, 1, 1, 0, 1], bool)
    output = attend(QUERY, key, value, mask=mask).output
    assert np.all(output <= value[mask].max(0))
    assert np.all(output >= value[mask].min(0))


def test_order_of_keys_does_not_matter():
    order = jnp.array([3, 1, 4, 0, 2])
    shuffled = attend(QUERY, EMBEDDING[order], EMBEDDING[order], scale=1)
    np.testing.assert_allclose(shuffled.output, OUTPUT, rtol=1e-6)
    np.testing.assert_allclose(shuffled.weights, np.array(WEIGHTS)[order], rtol=1e-6)


def test_masking_a_key_equals_leaving_it_out():
    mask = jnp.array([1, 1, 1, 0, 0], bool)
    masked = attend(QUERY, EMBEDDING, EMBEDDING, mask=mask)
    short = attend(QUERY, EMBEDDING[:3], EMBEDDING[:3])
    np.testing.assert_allclose(masked.output, short.output, rtol=1e-6)
    np.testing.assert_allclose(masked.logsumexp, short.logsumexp, rtol=1e-6)


def test_attention_is_attend_at_each_query():
    query = normal(0, (2, 3, 4, 5))
    key = normal(1, (2, 6, 2, 5))
    value = normal(2, (2, 6, 2, 7))
    output = definition.attention(query, key, value)
    b, t, n = 1, 2, 3  # head 3 of 4 reads key/value head 1 of 2
    one = attend(query[b, t, n], key[b, :, 1], value[b, :, 1])
    np.testing.assert_allclose(output[b, t, n], one.output, rtol=1e-6)
