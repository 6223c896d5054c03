"""Pointwise functions, split into what reads one side and what joins both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.arrays.shapes import Sizes
from jattn.call.hoist import split
from jattn.call.pose import pose_mask
from jattn.call.problem import index
from jattn.call.program import trace
from jattn.masks import Causal, Lengths, Prefix, Segments
from jattn.modifiers import ALiBi, RelativeBias, SoftCap

SIZES = Sizes(batch=(2,), T=5, S=6, N=4, K=2, H=3, D=3)
B, N, T, S = SIZES.BNTS
RNG = np.random.default_rng(0)
DOC = jnp.asarray(np.sort(RNG.integers(0, 3, 6)), jnp.int32)
SLOPE = jnp.asarray(RNG.standard_normal(N), jnp.float32)
TABLE = jnp.asarray(RNG.standard_normal((N, 11)), jnp.float32)
REAL = lambda x: x.astype(jnp.float32)
LOGIT = jnp.asarray(RNG.standard_normal((B, N, T, S)), jnp.float32)


@jax.custom_jvp
def doubled(x):
    return x * 2


doubled.defjvp(lambda primals, tangents: (doubled(*primals), tangents[0] * 5))


def parts(mask=None, modifier=None):
    """The program whole and split, each as a function of its arrays."""
    posed = pose_mask("test", SIZES, jnp.float32, mask=mask, modifier=modifier)
    problem, operands = posed
    name = "mask" if modifier is None else "modifier"
    at = index(problem, operands)
    return getattr(problem, name), getattr(operands, name), at


def primitives(jaxpr):
    names = []
    for eqn in jaxpr.eqns:
        inner = eqn.params.get("jaxpr")
        names += primitives(inner.jaxpr) if inner else [eqn.primitive.name]
    return names


def pieces(function):
    """Gives what is left inside, and the shapes of what is taken outside."""
    program, arrays, at = function
    joint, rest = split(program, arrays, at)
    return primitives(joint.jaxpr), [x.shape for x in rest.aligned], rest.captured


MASKS = {
    "causal": Causal(),
    "documents": lambda b, n, t, s: (t >= s) & (DOC[t] == DOC[s]),
    "lengths": Lengths(jnp.array([3, 6]), jnp.array([5, 2])),
    "prefix": Prefix(jnp.array([1, 2])) | Causal(),
    "segments": Segments(jnp.arange(5) // 2, jnp.arange(6) // 3, padding_id=1),
    "one_side": lambda b, n, t, s: jnp.cos(s.astype(jnp.float32)) > 0,
    "no_side": lambda b, n, t, s: SLOPE[0] > 0,
    "nothing": lambda b, n, t, s: jnp.bool_(True),
    "chunks": lambda b, n, t, s: (t // 2 == s // 2) | ((t - s) % 3 == n),
    "nested": jax.jit(lambda b, n, t, s: jax.jit(lambda t: DOC[t] + b)(t) > DOC[s]),
    "joint_gather": lambda b, n, t, s: TABLE[n, jnp.abs(t - s)] > 0,
    "loop": lambda b, n, t, s: jax.lax.fori_loop(0, 3, lambda i, x: x + DOC[s] * i, t) > 5,
}
MODIFIERS = {
    "soft_cap": SoftCap(jnp.float32(2.0)) >> ALiBi(SLOPE),
    "relative": RelativeBias(TABLE),
    "row": lambda logit, b, n, t, s: logit + TABLE[n][s - t + 5],
    "wave": lambda logit, b, n, t, s: (
        logit * jnp.cos(REAL(s) * 0.1) + jnp.sin(SLOPE[n] * REAL(t))
    ),
    "sum": lambda logit, b, n, t, s: logit + (jnp.cos(SLOPE[n]) + jnp.cos(REAL(s) * 0.1)),
    "replaced": lambda logit, b, n, t, s: jnp.where(t < s, SLOPE[n] * REAL(s), logit),
    "custom": lambda logit, b, n, t, s: doubled(logit) + doubled(SLOPE[n]),
    "kept": jax.checkpoint(lambda logit, b, n, t, s: jnp.tanh(logit) * REAL(DOC[s])),
}


@pytest.mark.parametrize("name", MASKS)
def test_split_mask_is_the_same(name):
    program, arrays, at = parts(MASKS[name])
    joint, rest = split(program, arrays, at)
    want, got = program(arrays, at), joint(rest, at)
    np.testing.assert_array_equal(*np.broadcast_arrays(got, want))
    assert all(x.shape[2] == 1 or x.shape[3] == 1 for x in rest.aligned)


@pytest.mark.parametrize("name", MODIFIERS)
def test_split_modifier_is_the_same_with_its_gradients(name):
    program, arrays, at = parts(modifier=MODIFIERS[name])

    def whole(logit, captured):
        return program(arrays._replace(captured=captured), at, logit)

    def apart(logit, captured):
        joint, rest = split(program, arrays._replace(captured=captured), at)
        return joint(rest, at, logit)

    def all_of(function, logit, captured):
        value, pull = jax.vjp(lambda *xs: jnp.sin(function(*xs)), logit, captured)
        return value, pull(LOGIT)

    captured = tuple(arrays.captured)
    want, got = (
        jax.jit(functools.partial(all_of, function))(LOGIT, captured)
        for function in (whole, apart)
    )
    floating = lambda xs: [x for x in jax.tree.leaves(xs) if x.dtype == jnp.float32]
    for x, y in zip(floating(got), floating(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_gathers_are_taken_out_and_comparisons_stay():
    inside, outside, captured = pieces(parts(MASKS["documents"]))
    assert sorted(inside) == ["and", "eq", "ge"]
    assert outside == [(1, 1, T, 1), (1, 1, 1, S)]
    assert not captured


def test_positions_and_what_costs_nothing_stay():
    inside, outside, _ = pieces(parts(lambda b, n, t, s: (t + 1 >= s) & (n > b)))
    assert sorted(inside) == ["add", "and", "ge", "gt"]
    assert outside == []


def test_costly_work_of_one_side_leaves_the_loop():
    inside, outside, _ = pieces(parts(modifier=MODIFIERS["wave"]))
    assert sorted(inside) == ["add", "mul"]
    assert outside == [(1, 1, 1, S), (1, N, T, 1)]


def test_a_sum_over_more_axes_than_its_parts_stays():
    inside, outside, _ = pieces(parts(modifier=MODIFIERS["sum"]))
    assert sorted(inside) == ["add", "add"]
    assert outside == [(1, N, 1, 1), (1, 1, 1, S)]


def test_captured_scalars_become_aligned():
    inside, outside, captured = pieces(parts(modifier=MODIFIERS["soft_cap"]))
    assert "custom_jvp_call" in inside
    assert (1, 1, 1, 1) in outside
    assert not captured


def test_a_gather_that_joins_both_sides_keeps_its_array():
    inside, _, captured = pieces(parts(modifier=MODIFIERS["relative"]))
    assert "gather" in inside or "dynamic_slice" in inside
    assert [x.shape for x in captured] == [TABLE.shape]


def test_a_mask_of_one_side_is_evaluated_outside():
    assert pieces(parts(MASKS["one_side"]))[:2] == ([], [(1, 1, 1, S)])


def test_a_call_on_pairs_alone_stays_whole():
    program, arrays, at = parts(lambda b, n, t, s: (t - s) // 3 < 1)
    (call, *_) = (
        e for e in split(program, arrays, at)[0].jaxpr.eqns if "jaxpr" in e.params
    )
    assert call.params["name"] == "floor_divide"


def test_programs_written_alike_stay_alike():
    mask = lambda doc: lambda b, n, t, s: doc[t] == doc[s]
    one, two = (split(*parts(mask(x)))[0] for x in (DOC, DOC + 1))
    assert one == two


def test_custom_derivatives_are_kept_on_both_sides():
    program, arrays, at = parts(modifier=MODIFIERS["custom"])
    joint, rest = split(program, arrays, at)
    gradient = jax.grad(lambda x: joint(rest, at, x).sum())(LOGIT)
    np.testing.assert_array_equal(gradient, jnp.full(LOGIT.shape, 5.0))


def test_split_under_vmap_of_a_captured_array():
    def weights(slope):
        modify = lambda logit, b, n, t, s: (
            logit * jnp.exp(slope[n]) - jnp.cos(slope[n] * REAL(t))
        )
        program, arrays = trace("test", modify, (), jnp.float32)
        at = parts(Causal())[2]
        joint, rest = split(program, arrays, at)
        return joint(rest, at, LOGIT), program(arrays, at, LOGIT)

    got, want = jax.vmap(weights)(jnp.stack([SLOPE, 2 * SLOPE]))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
