"""Masks and modifiers are values: compared, hashed, pickled, copied, mapped."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import modifiers
from jattn.counted import counted_from
from jattn.masks import Causal, Explicit, Lengths, Prefix, Segments, Window, as_mask
from jattn.modifiers import ALiBi, Bias, RelativeBias, SoftCap, log_bucket

KEY = jnp.zeros((1, 4, 1, 4))


def rule(b, n, t, s):
    return t >= s


def shifted(b, n, t, s, *, by=0):
    return t + by >= s


def clipped(offset, low=0, high=4):
    return jnp.clip(offset, low, high)


def relative(*args, **options):
    return RelativeBias(jnp.ones((2, 5)), functools.partial(*args, **options))


VALUES = {
    "causal": lambda: Causal(3),
    "window": lambda: Window(2, None),
    "prefix": lambda: Prefix(jnp.array([1, 2])),
    "segments": lambda: Segments(np.array([1, 2]), padding_id=0),
    "lengths": lambda: Lengths(3),
    "explicit": lambda: Explicit(np.ones((2, 2), bool)),
    "algebra": lambda: Causal() & Window(1, 0) | ~Prefix(2),
    "function": lambda: as_mask(rule),
    "partial": lambda: Causal() & functools.partial(shifted, by=jnp.array([1])[0]),
    "partial_of_one": lambda: as_mask(functools.partial(shifted, by=1)),
    "partial_of_a_partial": lambda: relative(functools.partial(clipped, low=1), high=3),
    "partial_of_arrays": lambda: relative(clipped, low=np.arange(3), high=jnp.ones(2)),
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
    "no_number": lambda: Bias(float("nan")),
    "no_numbers": lambda: ALiBi([1.0, float("nan")]),
    "minus_0": lambda: Bias(np.float32(-0.0)),
    "0": lambda: Bias(0.0),
    "counted": lambda: counted_from(rule, b=1),
    "counted_mask": lambda: counted_from(counted_from(rule, b=1) & Causal(), n=2),
    "counted_dropout": lambda: counted_from(jattn.Dropout(0.1, jax.random.key(0)), b=1),
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
    assert Bias(np.float32("nan")) == Bias(float("nan"))
    assert SoftCap(2) == SoftCap(np.float16(2))
    assert counted_from(rule, b=1) == counted_from(counted_from(rule), b=np.int8(1))
    assert counted_from(rule, b=1) != counted_from(rule, b=2)
    assert counted_from(rule, B=jnp.asarray(8)) == counted_from(rule, B=np.int8(8))
    assert as_mask(rule) != as_mask(lambda b, n, t, s: t >= s)
    assert log_bucket(8, 16) != log_bucket(8, 17)


NUMBERS = [1, 1.0, True, -0.0, 0.0, np.int8(1), jnp.asarray(1), jnp.int32(1), (1,), [1]]


def test_partials_that_hold_other_numbers_are_other_values():
    # Functions compute other results from 1 and 1.0, which are equal in Python.
    made = [relative(clipped, low=x) for x in NUMBERS]
    made += [relative(clipped, 0, 1), relative(clipped, high=0), relative(shifted, low=1)]
    for i, first in enumerate(made):
        assert [i] == [j for j, second in enumerate(made) if first == second]
    trees = set(map(jax.tree.structure, made))
    assert len(trees) == len(made)


def test_partials_of_unhashable_objects_are_values():
    log = type("Log", (), {"__eq__": lambda self, other: True})()
    first, second = (relative(clipped, low=x) for x in (log, log))
    assert first == second
    assert hash(first) == hash(second)
    assert first != relative(clipped, low=type(log)())


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
