"""Functions of one pair, made into data."""

import jax
import jax.numpy as jnp
import numpy as np

import jattn
from jattn.api.attention import _on_one
from jattn.call.program import Index, trace
from tests.helpers.draws import normal

QUERY = normal(0, (1, 6, 2, 4))


def program(function, **options):
    return trace("test", function, (), **options)[0]


def test_functions_written_alike_are_one_program():
    first = program(lambda b, n, t, s: t - s < 3)
    second = program(lambda b, n, t, s: t - s < 3)
    assert first == second
    assert hash(first) == hash(second)


def test_programs_differ_by_a_number():
    three, four = (program(lambda b, n, t, s, k=k: t - s < k) for k in (3, 4))
    assert three != four


def test_programs_differ_by_an_operation():
    assert program(lambda b, n, t, s: t < s) != program(lambda b, n, t, s: t <= s)


def test_programs_differ_by_the_order_of_arguments():
    assert program(lambda b, n, t, s: t < s) != program(lambda b, n, t, s: s < t)


def test_programs_differ_by_what_is_inside_a_nested_function():
    inner = [jax.jit(lambda x: x > 1), jax.jit(lambda x: x > 2)]
    one, two = (program(lambda b, n, t, s, f=f: f(t)) for f in inner)
    assert one != two


def test_captured_arrays_are_operands_and_not_part_of_the_program():
    old, new = jnp.arange(6), jnp.arange(6) * 2
    (first, arrays), (second, others) = (
        trace("test", lambda b, n, t, s, ids=ids: ids[t] == ids[s], ())
        for ids in (old, new)
    )
    assert first == second
    np.testing.assert_array_equal(arrays.captured[0], old)
    np.testing.assert_array_equal(others.captured[0], new)


def test_new_arrays_of_one_shape_compile_nothing_again():
    def call(ids, heat):
        return jattn.attention(
            QUERY,
            QUERY,
            QUERY,
            mask=lambda b, n, t, s: ids[t] == ids[s],
            modifier=lambda logit, b, n, t, s: logit * heat[n],
        )

    ids, heat = jnp.arange(6), jnp.ones(2)
    call(ids, heat)
    before = _on_one._cache_size()
    for order in ([5, 4, 3, 2, 1, 0], [0, 0, 1, 1, 2, 2]):
        call(ids[jnp.array(order)], 2 * heat)
    assert _on_one._cache_size() == before


def test_result_spreads_over_the_axes_it_depends_on_only():
    seen = {}
    for name, function in {
        "nothing": lambda b, n, t, s: b == b,
        "t": lambda b, n, t, s: t > 2,
        "t_and_s": lambda b, n, t, s: t > s,
        "all": lambda b, n, t, s: b + n + t > s,
    }.items():
        traced, arrays = trace("test", function, ())
        sizes = enumerate((2, 3, 4, 5))
        index = Index(
            *(
                jnp.arange(size).reshape([-1 if i == j else 1 for j in range(4)])
                for i, size in sizes
            )
        )
        seen[name] = traced(arrays, index).shape
    assert seen["t"] == (1, 1, 4, 1)
    assert seen["t_and_s"] == (1, 1, 4, 5)
    assert seen["all"] == (2, 3, 4, 5)
