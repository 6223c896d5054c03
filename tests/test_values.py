"""Masks and modifiers are values: compared, hashed, pickled, copied, mapped."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import modifiers
from jattn.masks import Causal, Explicit, Lengths, Prefix, Segments, Window, as_mask
from jattn.modifiers import ALiBi, Bias, RelativeBias, SoftCap, log_bucket

KEY = jnp.zeros((1, 4, 1, 4))


def rule(b, n, t, s):
    return t >= s


VALUES = {
    "causal": lambda: Causal(3),
    "window": lambda: Window(2, None),
    "prefix": lambda: Prefix(jnp.array([1, 2])),
    "segments": lambda: Segments(np.array([1, 2]), padding_id=0),
    "lengths": lambda: Lengths(3),
    "explicit": lambda: Explicit(np.ones((2, 2), bool)),
    "algebra": lambda: Causal() & Window(1, 0) | ~Prefix(2),
    "function": lambda: as_mask(rule),
    "table": lambda: jattn.block_table(Causal(), KEY, KEY),
    "traced_table": lambda: jattn.block_table(Segments(jnp.arange(4)), KEY, KEY, block=2),
    "cap": lambda: SoftCap(2.0),
    "alibi": lambda: ALiBi(),
    "slopes": lambda: ALiBi(jnp.array([0.5])),
    "relative": lambda: RelativeBias(jnp.ones((2, 5))),
    "t5": lambda: RelativeBias(jnp.ones((2, 32)), log_bucket()),
    "distance": lambda: RelativeBias(jnp.ones((2, 5)), modifiers.distance(2)),
    "chain": lambda: SoftCap(3.0) >> ALiBi() >> Bias(jnp.ones((2, 2))),
    "dropout": lambda: jattn.Dropout(0.1, jax.random.key(0)),
    "bucket": lambda: log_bucket(8, 16),
    "distance_alone": lambda: modifiers.distance(3),
}


@pytest.mark.parametrize("name", VALUES)
def test_made_twice_it_is_one_value(name):
    first, second = VALUES[name](), VALUES[name]()
    assert first == second
    assert hash(first) == hash(second)
    assert {first: "found"}[second] == "found"
    for other in (
        copy.copy(first),
        copy.deepcopy(first),
        pickle.loads(pickle.dumps(first)),
    ):
        assert other == first
        assert hash(other) == hash(first)
    others = [make() for label, make in VALUES.items() if label != name]
    assert first not in others


@pytest.mark.parametrize("name", VALUES)
def test_two_alike_are_one_tree_and_one_static_argument(name):
    first, second = VALUES[name](), VALUES[name]()
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(lambda x, y: x, first, second)
    traces = []
    count = jax.jit(lambda value: len(traces) or traces.append(0), static_argnums=0)
    count(first)
    count(second)
    assert len(traces) == 1


def test_content_and_kind_tell_values_apart():
    assert Causal(1) != Causal(2)
    assert Causal(1) == Causal(np.int32(1))
    assert Prefix(1) != Causal(1)
    assert Segments(jnp.array([1, 2])) == Segments(np.array([1, 2], np.int32))
    assert Segments(jnp.array([1, 2])) != Segments(jnp.array([1, 3]))
    assert Segments(jnp.array([1, 2])) != Segments(jnp.array([[1, 2]]))
    assert as_mask(rule) != as_mask(lambda b, n, t, s: t >= s)
    assert log_bucket(8, 16) != log_bucket(8, 17)


def test_traced_arrays_equal_themselves_alone():
    @jax.jit
    def check(x, y):
        assert Prefix(x) == Prefix(x)
        assert Prefix(x) != Prefix(y)
        return x

    check(1, 1)


def test_they_are_attributes_of_modules():
    nnx = pytest.importorskip("flax.nnx")

    class Layer(nnx.Module):
        def __init__(self):
            self.mask = Causal() & Window(3, 0)
            self.modifier = SoftCap(2.0)
            self.bucket = log_bucket(8, 16)

        def __call__(self, x):
            return jattn.attention(x, x, x, mask=self.mask, modifier=self.modifier)

    layer = Layer()
    graph, state = nnx.split(layer)
    assert hash(graph) == hash(nnx.split(Layer())[0])
    merged = nnx.merge(graph, state)
    want = nnx.jit(lambda layer: layer(KEY))(layer)
    np.testing.assert_array_equal(merged(KEY), want)
