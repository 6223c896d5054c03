"""Examples and heads of a device, counted as in the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType

import jattn
from jattn import masks, modifiers
from jattn.counted import counted_from
from tests.helpers.meshes import (
    BIAS,
    INPUTS,
    LENGTHS,
    QUERY,
    RNG,
    SLOPES,
    B,
    H,
    N,
    P,
    T,
    close,
    far,
    mesh_of,
)

pytestmark = pytest.mark.slow

COUNTED = {
    "lengths[b]": {"mask": lambda b, n, t, s: s < LENGTHS[b]},
    "Lengths": {"mask": masks.Lengths(LENGTHS)},
    "both": {"mask": masks.Causal() & (lambda b, n, t, s: (s < LENGTHS[b]) | (n == 1))},
    "array": {"mask": BIAS < 0.5},
    "slopes[n]": {"modifier": lambda x, b, n, t, s: x - SLOPES[n] * far(t, s)},
    "ALiBi()": {"modifier": modifiers.ALiBi()},
    "RelativeBias": {
        "modifier": modifiers.RelativeBias(BIAS[0, :, 0, :7]) >> modifiers.SoftCap(3.0)
    },
    "dropout": {"dropout": jattn.Dropout(0.5, RNG)},
    "shared dropout": {"dropout": jattn.Dropout(0.5, RNG, shared=True)},
}


@pytest.mark.parametrize("implementation", ["blockwise", "dense"])
@pytest.mark.parametrize("name", COUNTED)
def test_examples_and_heads_can_be_counted_as_in_the_whole(name, implementation):
    mesh = mesh_of(AxisType.Auto)
    named = isinstance(next(iter(COUNTED[name].values())), masks.Mask | modifiers.Modifier)
    whole = {"B": B, "N": N} if named or name == "array" else {}

    def call(inputs, counts):
        options = {
            key: counted_from(rule, **counts) if counts else rule
            for key, rule in COUNTED[name].items()
        }
        return jattn.attention(**inputs, **options, implementation=implementation)

    def part(inputs):
        b, n = lax.axis_index("x") * (B // 2), lax.axis_index("y") * (N // 2)
        return call(inputs, {"b": b, "n": n, **whole})

    spec = P("x", None, "y")
    mapped = jax.shard_map(part, mesh=mesh, in_specs=spec, out_specs=spec)
    loss = lambda f: lambda inputs: jnp.sum(f(inputs) ** 2)
    want = jax.jit(jax.value_and_grad(loss(lambda x: call(x, {}))))(INPUTS)
    close(jax.jit(jax.value_and_grad(loss(mapped)))(INPUTS), want)


def test_counting_needs_a_rule():
    with pytest.raises(ValueError, match="got the class Causal; call it"):
        counted_from(masks.Causal)
    for kind in ("mask", "modifier"):
        given = {kind: counted_from(lambda t, s: t >= s)}
        with pytest.raises(ValueError, match=r"`rule` must be a function of .*, got one"):
            jattn.attention(QUERY, QUERY, QUERY, **given)
    query = QUERY.reshape(2, 2, T, N, H)
    counted = counted_from(masks.Lengths(LENGTHS), B=B)
    with pytest.raises(ValueError, match="one batch axis"):
        jattn.attention(query, query, query, mask=counted)


def test_what_is_counted_lies_within_the_whole():
    query = QUERY[:2]
    attend = lambda **rule: jattn.attention(query, query, query, **rule)
    for b, count in ((B - 1, B), (-1, B), (0, 1), (jnp.int32(B), B)):
        counted = counted_from(masks.Lengths(LENGTHS), b=b, B=count)
        with pytest.raises(ValueError, match="`B` must count all of the whole call"):
            attend(mask=counted)
    traced = lambda n: attend(modifier=counted_from(modifiers.ALiBi(), n=n, N=N - 1))
    with pytest.raises(ValueError, match=r"`N` must count all .* for a part of"):
        jax.jit(traced)(0)
    for count in (True, 4.0, "a", -1):
        with pytest.raises(ValueError, match="counted_from: `N` must be a whole number"):
            counted_from(modifiers.ALiBi(), N=count)
    with pytest.raises(ValueError, match="`b` must be one whole number, got shape"):
        counted_from(masks.Causal(), b=jnp.arange(2))


@pytest.mark.parametrize("kind", [np.int8, np.asarray, jnp.asarray])
def test_the_counts_of_the_whole_are_numbers_of_python(kind):
    query = QUERY[:2]
    attend = jax.jit(lambda mask: jattn.attention(query, query, query, mask=mask))
    for rule in (masks.Lengths(LENGTHS), lambda b, n, t, s: s < LENGTHS[b]):
        make = lambda of, b, rule=rule: counted_from(rule, b=b, B=of(B), N=of(N))
        assert make(kind, 1) == make(int, 1)
        for b in (0, 1):  # the second asks whether both have one program
            np.testing.assert_array_equal(attend(make(kind, b)), attend(make(int, b)))
    modifier = counted_from(modifiers.ALiBi(), N=kind(N))
    assert modifier == counted_from(modifiers.ALiBi(), N=N)
