"""The rules that tables of blocks are made by, each by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.blocks import intervals, ranges


@pytest.mark.parametrize("dtype", ["bool", "int4", "uint32", "float8_e4m3fn", "float32"])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("size", [1, 4, 13])
def test_least_of_a_range_by_comparing_and_by_levels(dtype, batched, size):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.integers(-8, 8, (3, 13, 2))).astype(dtype)
    if dtype == "float32":
        table = table.at[:, 4, 0].set(jnp.inf).at[:, 9].set(-jnp.inf)
    lo = jnp.asarray(rng.integers(0, 13, (3, 1, 4, 5)), jnp.int32)
    hi = jnp.minimum(lo + jnp.asarray(rng.integers(0, 13, (1, 1, 4, 5)), jnp.int32), 12)
    rest = (jnp.arange(3, dtype=jnp.int32).reshape(3, 1, 1, 1),) if batched else ()
    table = table if batched else table[0]
    compared = ranges._least_in(size, table, lo, hi, *rest)
    in_levels = ranges._least_of_levels(table, lo, hi, *rest)
    assert compared.dtype == in_levels.dtype
    np.testing.assert_array_equal(compared, in_levels)


def examples_of_rules():
    """Equations with every parameter that a rule reads."""
    array, table = jnp.arange(6, dtype=jnp.int32), jnp.arange(12.0).reshape(3, 4)

    def function(i, x):
        yield jnp.broadcast_to(i, (2, 3))
        yield jax.lax.reshape(array, (2, 3))
        yield jax.lax.reshape(jnp.stack([i, i, i, i]).reshape(2, 2), (4,), (1, 0))
        yield jnp.stack([i, i]).reshape(1, 2).T
        yield jnp.stack([i, x.astype(int)])[::-1]
        yield jax.lax.slice(jnp.stack([i, i, i]), (0,), (3,), (2,))
        yield jnp.concatenate([i[None], i[None]])
        yield jax.lax.iota(jnp.int32, 4) + i
        yield jnp.stack([i > 1, i > 2]).all()
        yield jnp.stack([i > 1, i > 2]).any()
        yield jnp.stack([i, i]).max()
        yield jnp.stack([i, i]).min()
        yield jnp.stack([i, i]).sum()
        yield jax.lax.dynamic_slice(table, (i, 0), (1, 4))
        yield array.at[i].get(mode="fill", fill_value=-1)
        yield array.at[i].get(mode="clip")
        yield table[i]
        yield i**2
        yield jax.lax.integer_pow(i, 3)
        yield jnp.square(i)
        yield jnp.round(x)
        yield jax.lax.round(x)
        yield jnp.floor(x)
        yield jnp.clip(i, 1, 3)
        yield jnp.where(i > 2, i, -i)

    jaxpr = jax.make_jaxpr(lambda *xs: list(function(*xs)))(jnp.int32(1), jnp.float32(1))
    return jaxpr.jaxpr


def flat_equations(jaxpr):
    for eqn in jaxpr.eqns:
        inner = [x for x in eqn.params.values() if hasattr(x, "eqns")]
        for x in inner:
            yield from flat_equations(getattr(x, "jaxpr", x))
        if not inner:
            yield eqn


def interval_of(aval):
    lo, hi = np.zeros((1, 1, 1, 1, *aval.shape), aval.dtype), np.ones((), aval.dtype)
    return intervals.Interval(lo, lo + hi)


def test_a_parameter_of_another_name_makes_the_result_unknown():
    seen = set()
    for eqn in flat_equations(examples_of_rules()):
        name, avals = eqn.primitive.name, [x.aval for x in eqn.invars]
        if not intervals.has_rule(name):
            continue
        operands = [interval_of(aval) for aval in avals]
        result = eqn.outvars[0].aval

        def applied(params, name=name, avals=avals, result=result, operands=operands):
            return intervals.apply(
                intervals.Operation(name, params, avals, result), operands
            )

        usual, nothing = applied(eqn.params), intervals.unknown(result)
        for gone in eqn.params:
            params = {
                f"new_{key}" if key == gone else key: eqn.params[key] for key in eqn.params
            }
            found = applied(params)
            as_usual = all(map(np.array_equal, found, usual))
            assert as_usual or all(
                np.array_equal(x, y, equal_nan=result.dtype.kind == "f")
                for x, y in zip(
                    np.broadcast_arrays(*found), np.broadcast_arrays(*nothing), strict=True
                )
            )
            seen.add((name, gone, as_usual))
        applied({})  # answers, whatever
    read = {name for name, _, as_usual in seen if not as_usual}
    assert {"broadcast_in_dim", "gather", "integer_pow", "reduce_max", "round"} <= read


def test_a_power_or_rounding_without_its_parameter_is_unknown():
    scalar = jax.ShapeDtypeStruct((), np.float32)
    operand = intervals.Interval(
        np.full((1,) * 4, 2.0, np.float32), np.full((1,) * 4, 3.0, np.float32)
    )
    for name in ("integer_pow", "round"):
        found = intervals.apply(intervals.Operation(name, {}, [scalar], scalar), [operand])
        assert np.isnan(found).all()
