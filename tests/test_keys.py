"""Programs are keyed by what they compute: never by printed text, never by identity."""

import functools
import gc
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import xlogy

import jattn
from jattn.call.pose import pose
from jattn.counted import counted_from
from jattn.masks import Causal, Lengths, Prefix, Segments, Window
from jattn.modifiers import RelativeBias, SoftCap, distance, log_bucket
from tests.helpers.draws import normal

QUERY = jnp.ones((1, 6, 1, 4))
KEY = normal(0, (1, 6, 1, 4))


def problem(**options):
    return pose("test", QUERY, KEY, KEY, **options)[0]


def with_rule(slope):
    """A modifier whose function brings its own derivative, made anew in each call."""

    @jax.custom_jvp
    def bend(x):
        return jnp.sin(x)

    bend.defjvp(lambda x, t: (bend(*x), slope * jnp.cos(*x) * t[0]))
    return lambda logit, b, n, t, s: bend(logit)


def with_pullback(slope, power=1):
    @jax.custom_vjp
    def bend(x):
        return jnp.sin(x)

    bend.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (slope * jnp.cos(x) ** power * g,))
    return lambda logit, b, n, t, s: bend(logit)


def calling_itself(_):
    @jax.custom_jvp
    def grow(x):
        return jnp.exp(x)

    grow.defjvp(lambda x, t: (grow(*x), grow(*x) * t[0]))
    return lambda logit, b, n, t, s: grow(logit)


# Two numbers that print alike, and their neighbours in other types.
TWINS = (np.float32(0.000123469), np.float32(0.000123471))


@pytest.mark.parametrize("where", ["plain", "jit", "cond", "branch", "constant"])
def test_numbers_that_print_alike_are_two_programs(where):
    x = jnp.array([0.0, 0.00012347, 0, 0, 0, 0])

    def mask(limit):
        below = lambda s: x[s] < limit
        if where == "jit":
            below = jax.jit(below)
        if where == "cond":
            below = lambda s: jax.lax.cond(s > 0, lambda: x[s] < limit, lambda: x[0] < 1)
        if where == "branch":
            below = lambda s: jax.lax.map(lambda y: y < limit, x)[s]
        if where == "constant":
            below = jax.jit(lambda s: x[s] < jnp.asarray(np.full(6, limit))[s])
        return lambda b, n, t, s: below(s)

    for limit in TWINS:
        got = jattn.attention_weights(QUERY, KEY, mask=mask(limit))[0, 0, 0]
        assert (got > 0).tolist() == (np.asarray(x) < limit).tolist()


@pytest.mark.parametrize("inner", [lambda f: f, lambda f: jax.jit(lambda s: f(s + 0))])
def test_arrays_of_an_inner_jit_are_operands(inner):
    def masked(ids):
        at = jax.jit(inner(jax.jit(lambda s: ids[s])))
        return lambda b, n, t, s: at(t) == at(s)

    def tilted(slopes):
        tilt = jax.jit(inner(jax.jit(lambda s: slopes[s])))
        return lambda logit, b, n, t, s: logit + tilt(s)

    arrays = [jnp.array(x) for x in ([0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5])]
    assert len({problem(mask=masked(x)) for x in arrays}) == 1
    weights = [jattn.attention_weights(QUERY, KEY, mask=masked(x)) for x in arrays]
    assert [int((x > 0).sum()) for x in weights] == [12, 6]
    total = lambda slopes: jattn.attention(QUERY, KEY, KEY, modifier=tilted(slopes)).sum()
    plain = lambda slopes: jattn.attention(QUERY, KEY, KEY, bias=slopes[None]).sum()
    slopes = jnp.linspace(0.0, 1.0, 6)
    chex.assert_trees_all_close(jax.grad(total)(slopes), jax.grad(plain)(slopes), atol=1e-5)


DIFFERENT = {
    "type": (
        lambda: lambda logit, *_: logit * 2,
        lambda: lambda logit, *_: logit * 2.0**-1,
    ),
    "zero": (
        lambda: (
            lambda logit, *_: jnp.float32(1) / (logit * np.float32(0.0) - np.float32(0.0))
        ),
        lambda: (
            lambda logit, *_: jnp.float32(1) / (logit * np.float32(0.0) - np.float32(-0.0))
        ),
    ),
    "jvp": (lambda: with_rule(1.0), lambda: with_rule(2.0)),
    "vjp": (lambda: with_pullback(1.0), lambda: with_pullback(2.0)),
    "vjp_power": (lambda: with_pullback(1.0, 1), lambda: with_pullback(1.0, 3)),
    "primal": (lambda: with_rule(1.0), lambda: calling_itself(0)),
    "static": (lambda: lambda x, *_: x**2, lambda: lambda x, *_: x**3),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_functions_are_two_programs(name):
    first, second = DIFFERENT[name]
    assert problem(modifier=first()) == problem(modifier=first())
    assert problem(modifier=first()) != problem(modifier=second())


ALIKE = {
    "relu": lambda i: {"modifier": lambda logit, *_: jax.nn.relu(logit)},
    "xlogy": lambda i: {"modifier": lambda logit, *_: xlogy(logit, logit)},
    "sinc": lambda i: {"modifier": lambda logit, *_: jnp.sinc(logit)},
    "relu_in_jit": lambda i: {"modifier": jax.jit(lambda x, b, n, t, s: jax.nn.relu6(x))},
    "jvp": lambda i: {"modifier": with_rule(1.0)},
    "vjp": lambda i: {"modifier": with_pullback(1.0)},
    "calling_itself": lambda i: {"modifier": calling_itself(i)},
    "rule_in_a_mask": lambda i: {
        "mask": lambda b, n, t, s: jax.nn.relu(s.astype(jnp.float32)) > 2
    },
    "causal": lambda i: {"mask": Causal(i)},
    "causal_numpy": lambda i: {"mask": Causal(np.int64(i))},
    "prefix": lambda i: {"mask": Prefix(i)},
    "window": lambda i: {"mask": Window(i, i + 1)},
    "window_open": lambda i: {"mask": Window(None, np.int8(i))},
    "algebra": lambda i: {"mask": ~Window(i, 0) & Causal(i) | Prefix(i)},
    "lengths": lambda i: {"mask": Lengths(i, 6 - i)},
    "padding": lambda i: {"mask": Segments(jnp.arange(6), padding_id=i)},
    "cap": lambda i: {"modifier": SoftCap(1.0 + i)},
    "cap_numpy": lambda i: {"modifier": SoftCap(np.float32(1 + i))},
    "buckets": lambda i: {
        "modifier": RelativeBias(jnp.ones((1, 8)) * i, log_bucket(8, 16))
    },
    "distance": lambda i: {"modifier": RelativeBias(jnp.ones((1, 5)) * i, distance(2))},
    "position": lambda i: {"mask": Causal(), "query_position": i},
    "scale": lambda i: {"scale": float(i)},
    "counted": lambda i: {"mask": counted_from(lambda b, n, t, s: s <= t + b, b=i)},
    "counted_numpy": lambda i: {
        "modifier": counted_from(
            lambda x, b, n, t, s: jnp.where(n > 2, x, 2 * x), n=np.int8(i)
        )
    },
}


@pytest.mark.parametrize("name", ALIKE)
def test_alike_calls_are_one_program(name):
    calls = [ALIKE[name](i) for i in range(5)]
    # One position, 0, is as good as none: of the others all are alike.
    problems = {problem(**options) for options in calls[name == "position" :]}
    assert len({_shared(x) for x in problems}) == 1


def _shared(problem):
    import dataclasses

    return dataclasses.replace(problem, named=None)


@pytest.mark.parametrize("length", [40, 128, 1024])
def test_windows_of_about_one_size_are_one_program(length):
    x = jnp.ones((length, 1, 4))
    masks = [Causal() & Window(left, 0) for left in (1, 3, 7, 20, 60)]
    assert len({_shared(pose("test", x, x, x, mask=mask)[0]) for mask in masks}) == 1


@pytest.mark.parametrize(
    "name", ["relu", "vjp", "causal", "window", "prefix", "cap", "counted"]
)
def test_alike_calls_compile_once(name):
    before = jattn.api.attention._on_one._cache_size()
    results = [jattn.attention(QUERY, KEY, KEY, **ALIKE[name](i)) for i in range(1, 6)]
    assert jattn.api.attention._on_one._cache_size() - before <= 1
    for i, result in enumerate(results, 1):
        want = jattn.definition.attention(QUERY, KEY, KEY, **ALIKE[name](i))
        np.testing.assert_allclose(result, want, atol=1e-6)


@pytest.mark.parametrize("name", ["causal", "window", "cap"])
def test_a_jitted_call_is_traced_once_for_all_numbers(name):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def attend(query, i):
        return jattn.attention(query, KEY, KEY, **ALIKE[name](i))

    for i in range(1, 6):
        attend(QUERY, jnp.int32(i) if name != "cap" else jnp.float32(i))


def test_numbers_are_traced_once_inside_jit():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def attend(offset, left):
        mask = Causal(offset) & Window(left, None)
        return jattn.attention(QUERY, KEY, KEY, mask=mask)

    for offset, left in ((0, 1), (1, 5), (-3, 2)):
        want = jattn.definition.attention(
            QUERY, KEY, KEY, mask=Causal(offset) & Window(left, None)
        )
        np.testing.assert_allclose(attend(offset, left), want, atol=1e-6)


def test_derivatives_are_each_rule_s_own():
    for slope in (1.0, 2.0):
        for make in (with_rule, with_pullback):
            loss = lambda q, make=make, slope=slope: jattn.attention(
                q, KEY, KEY, modifier=make(slope)
            ).sum()
            plain = lambda q, make=make, slope=slope: jattn.definition.attention(
                q, KEY, KEY, modifier=make(slope)
            ).sum()
            got, want = jax.grad(loss)(QUERY), jax.grad(plain)(QUERY)
            np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(
    "mask", [Causal(100), Causal() & Window(300, 0), Prefix(700), Window(128, 64)]
)
def test_skipping_is_as_exact_as_with_numbers_in_the_program(mask):
    shape = jax.ShapeDtypeStruct((1024, 1, 8), "float32")
    table = jattn.block_table(mask, shape, shape, block=128)
    plain = jattn.block_table(lambda b, n, t, s: mask(b, n, t, s), shape, shape, block=128)
    np.testing.assert_array_equal(table.kinds, plain.kinds)
    assert isinstance(table.kinds, np.ndarray)


def _traced_anew(function):
    """The key of a function that JAX has not traced before."""
    return pose("test", QUERY, KEY, KEY, mask=lambda *at: function(*at))[0].mask


def _mapped(factor):
    @jax.custom_batching.custom_vmap
    def scale(x):
        return x * factor

    scale.def_vmap(lambda size, mapped, x: (x * factor, mapped[0]))
    return scale


def _summed(factor):
    x = KEY[0, :, 0]
    held = [factor]  # a function that closes over what a literal cannot be
    add = lambda x, y: x + held[0] * y
    return lambda b, n, t, s: jax.lax.reduce(x, 0.0, add, (0, 1)) > 0.5


SCALE = _mapped(2.0)
KEPT = "kept"
WITHOUT_JAXPR = {
    "custom_vmap": lambda b, n, t, s: SCALE(KEY[0, s, 0, 0]) > 0.5,
    "reduce": lambda b, n, t, s: _summed(2.0)(b, n, t, s),
    "partial": lambda b, n, t, s: (
        jax.lax.reduce(KEY[0, s], 0.0, functools.partial(lambda x, y: x + y), (0, 1)) > 0
    ),
    "policy": lambda b, n, t, s: jax.checkpoint(
        lambda x: jnp.sin(x) > 0,
        policy=jax.checkpoint_policies.save_only_these_names(KEPT),
    )(KEY[0, s, 0, 0]),
}


@pytest.mark.parametrize("name", WITHOUT_JAXPR)
def test_functions_in_parameters_are_one_program(name):
    first, second = (_traced_anew(WITHOUT_JAXPR[name]) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)


def test_functions_that_hold_other_numbers_are_two_programs():
    assert _traced_anew(_summed(2.0)) != _traced_anew(_summed(3.0))
    rules = [_mapped(2.0), _mapped(3.0)]
    one, two = (lambda b, n, t, s, f=f: f(KEY[0, s, 0, 0]) > 0 for f in rules)
    assert _traced_anew(one) != _traced_anew(two)


def test_functions_that_hold_other_functions_with_other_attributes_are_two_programs():
    def scaled(factor):
        def held():
            return None

        held.factor = factor
        scale = jax.custom_batching.custom_vmap(lambda x: x)
        scale.def_vmap(lambda size, mapped, x: (x * held.factor, mapped[0]))
        return lambda b, n, t, s: scale(KEY[0, s, 0, 0]) > 0.5

    assert _traced_anew(scaled(2.0)) == _traced_anew(scaled(2.0))
    assert _traced_anew(scaled(2.0)) != _traced_anew(scaled(3.0))


def _host(function):
    out = jax.ShapeDtypeStruct((), jnp.float32)
    call = functools.partial(jax.pure_callback, vmap_method="sequential")
    return lambda logit, *_: call(function, out, logit)


def _double(x, factor):
    return np.asarray(x) * factor


def _in_sequence(factor):
    @jax.custom_batching.sequential_vmap
    def scale(x):
        return x * factor

    return lambda logit, *_: scale(logit)


def _watched(function):
    return lambda logit, *_: (jax.debug.callback(function, logit), logit)[1]


def _of_default(factor):
    return _host(lambda x, factor=factor: np.asarray(x) * np.float32(factor))


def _of_partial(factor):
    return _host(functools.partial(_double, factor=np.float32(factor)))


HOST = {
    "callback": (lambda: _host(lambda x: x * 2), lambda: _host(lambda x: x * 3)),
    "default": (lambda: _of_default(2.0), lambda: _of_default(3.0)),
    "partial": (lambda: _of_partial(2.0), lambda: _of_partial(3.0)),
    "method": (lambda: _host(np.float32(2).__mul__), lambda: _host(np.float32(3).__mul__)),
    "sequential": (lambda: _in_sequence(2.0), lambda: _in_sequence(3.0)),
    "debug": (lambda: _watched(lambda x: None), lambda: _watched(lambda x: x)),
}


@pytest.mark.parametrize("name", HOST)
def test_callbacks_made_anew_are_one_program_if_nothing_else_can_run(name):
    first, second = HOST[name]
    if name != "method":  # which compares its object by identity
        assert problem(modifier=first()) == problem(modifier=first())
        assert hash(problem(modifier=first())) == hash(problem(modifier=first()))
    assert problem(modifier=first()) != problem(modifier=second())


def test_callbacks_that_share_no_variable_are_two_programs():
    def counting():
        seen = []
        return _watched(lambda x: seen.append(x)), seen

    (first, seen), (second, others) = counting(), counting()
    for modifier in (first, second, second):
        jattn.attention(QUERY, KEY, KEY, modifier=modifier).block_until_ready()
        jax.effects_barrier()
    assert len(others) == 2 * len(seen) > 0


def _rules(i):
    """Gives functions whose rules read a variable that the caller changes afterwards."""

    @jax.custom_vjp
    def pulled(x):
        return jnp.sin(x)

    pulled.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (i() * jnp.cos(x) * g,))

    @jax.custom_jvp
    def pushed(x):
        return jnp.sin(x)

    pushed.defjvp(lambda x, t: (jnp.sin(*x), i() * jnp.cos(*x) * t[0]))

    @jax.custom_batching.custom_vmap
    def mapped(x):
        return 7 * x

    mapped.def_vmap(lambda size, batched, x: (i() * x, batched[0]))
    return {"vjp": pulled, "jvp": pushed, "vmap": mapped}


@pytest.mark.parametrize("name", ["vjp", "jvp", "vmap"])
def test_rules_that_read_the_variable_of_a_loop(name):
    weights = jnp.array([0.5, 1.0])

    def by(attention, bend, w):
        tilt = lambda logit, b, n, t, s: logit + s.astype(jnp.float32) * bend(w)
        return jnp.square(attention(QUERY, KEY, KEY, modifier=tilt)).sum()

    def loop(transform, attention):
        results = []
        for i in (1.0, 2.0, 3.0):
            bend = _rules(lambda: i)[name]  # noqa: B023  the variable is what is tested
            results.append(transform(functools.partial(by, attention, bend)))
        return results

    plain = lambda f: f(weights[0])
    derived = lambda f: jax.vmap(f)(weights) if name == "vmap" else jax.grad(f)(weights[0])
    loop(plain, jattn.attention)  # whose programs the second loop must not take
    got = loop(derived, jattn.attention)
    want = loop(derived, jattn.definition.attention)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_programs_keep_no_array():
    """They stay in the caches of JAX, and jax 0.12 keeps in a jaxpr what it captured."""

    def attended():
        ids, query = jnp.arange(8) // 3, jnp.ones((8, 1, 4))
        jattn.attention(query, query, query, mask=lambda b, n, t, s: ids[t] == ids[s])
        return weakref.ref(ids)

    held = attended()
    gc.collect()
    assert held() is None
