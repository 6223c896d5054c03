"""Random masks: expressions of (b, n, t, s, row, column) and a few arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

B, N, L = 2, 2, 13  # Examples, heads, and the length of every indexed array.
ARRAYS = ("doc", "docs", "table", "lengths", "flags")


@dataclasses.dataclass(frozen=True)
class Term:
    """A function of a point, and its text, which hypothesis prints."""

    text: str
    function: object

    def __repr__(self):
        return self.text


def _combine(text, function, *terms):
    return Term(
        text.format(*terms), lambda point: function(*(x.function(point) for x in terms))
    )


def _index(i):
    name = ("b", "n", "t", "s", "row", "column")[i]
    return Term(name, lambda point: point[1][i])


def _constant(value):
    return Term(str(value), lambda point: value)


def _lookup(text, get, *terms):
    def function(point):
        return get(point[0], *(x.function(point) for x in terms))

    return Term(text.format(*terms), function)


def _int(x):
    return jnp.asarray(x).astype(jnp.int32)


def _float(x):
    return jnp.asarray(x).astype(jnp.float32)


def _half(x):
    return jnp.asarray(x).astype(jnp.bfloat16)


@jax.custom_jvp
def _custom(x):
    return jnp.maximum(x, 0)


_custom.defjvps(lambda g, ans, x: g)


@jax.custom_vjp
def _custom_vjp(x):
    return x - 2


_custom_vjp.defvjp(lambda x: (x - 2, None), lambda _, g: (g,))


@jax.checkpoint
def _remat(x):
    return x + 1


SMALL = st.integers(-5, 14)
EDGES = st.sampled_from([2**31 - 1, -(2**31), 2**30, -(2**30), 40000, -65536])
LEAVES = st.one_of(
    st.sampled_from([_index(2), _index(3)] * 4 + [_index(i) for i in range(6)]),
    SMALL.map(_constant),
    st.one_of(SMALL, EDGES).map(_constant),
)
PLAIN = [
    ("({0} + {1})", lambda x, y: _int(x) + y),
    ("({0} - {1})", lambda x, y: _int(x) - y),
    ("({0} - {1})", lambda x, y: _int(x) - y),
    ("({0} * {1})", lambda x, y: _int(x) * y),
    ("min({0}, {1})", lambda x, y: jnp.minimum(_int(x), y)),
    ("max({0}, {1})", lambda x, y: jnp.maximum(_int(x), y)),
    ("({0} ^ {1})", lambda x, y: _int(x) ^ _int(y)),
    ("({0} & {1})", lambda x, y: _int(x) & _int(y)),
    ("sum[{0}, {1}]", lambda x, y: _int(jnp.stack([_int(x), _int(y)]).sum())),
    ("max[{0}, {1}]", lambda x, y: jnp.stack([_int(x), _int(y)])[::-1].max()),
    ("min[{0}, {1}]", lambda x, y: jnp.array([_int(x), _int(y)]).min()),
    ("-{0}", lambda x: -_int(x)),
    ("~{0}", lambda x: ~_int(x)),
    ("abs({0})", lambda x: abs(_int(x))),
    ("sign({0})", lambda x: jnp.sign(_int(x))),
    ("({0} ** 2)", lambda x: _int(x) ** 2),
    ("clip({0}, 1, 9)", lambda x: jnp.clip(_int(x), 1, 9)),
    ("clamp({0})", lambda x: lax.clamp(np.int32(2), _int(x), np.int32(7))),
    ("popcount({0})", lambda x: lax.population_count(_int(x))),
    ("int8({0})", lambda x: _int(_int(x).astype(jnp.int8))),
    ("int4({0})", lambda x: _int(_int(x).astype(jnp.int4) + jnp.int4(3))),
    ("uint16({0})", lambda x: _int(_int(x).astype(jnp.uint16))),
    ("uint32({0})", lambda x: _int((_int(x).astype(jnp.uint32) - jnp.uint32(3)) >> 1)),
    ("rint({0})", lambda x: _int(jnp.round(jnp.clip(_float(x), -99, 99) * 0.3))),
    ("jit({0})", jax.jit(lambda x: jnp.where(_int(x) > 3, x, -_int(x)))),
    ("custom({0})", lambda x: _custom(_int(x))),
    ("custom_vjp({0})", lambda x: _custom_vjp(_int(x))),
    ("remat({0})", lambda x: _remat(_int(x))),
]
DIVISIONS = [
    ("({0} // {1})", lambda x, y: _int(x) // y),
    ("({0} % {1})", lambda x, y: _int(x) % y),
    ("div({0}, {1})", lambda x, y: lax.div(_int(x), _int(y))),
    ("rem({0}, {1})", lambda x, y: lax.rem(_int(x), _int(y))),
    ("({0} << {1})", lambda x, y: lax.shift_left(_int(x), _int(y))),
    ("({0} >> {1})", lambda x, y: lax.shift_right_arithmetic(_int(x), _int(y))),
    ("({0} >>> {1})", lambda x, y: lax.shift_right_logical(_int(x), _int(y))),
]
LOOKUPS = [
    ("doc[{0}]", lambda a, x: a["doc"][x]),
    ("doc[{0}]", lambda a, x: a["doc"][x]),
    ("docs[b, {0}]", lambda a, x, b: a["docs"][b, x]),
    ("table[{1}, {0}]", lambda a, x, y: a["table"][y, x]),
    ("table[n, {0}]", lambda a, x, n: a["table"][n, x]),
    ("lengths[{0}]", lambda a, x: a["lengths"][x]),
    ("doc.fill[{0}]", lambda a, x: a["doc"].at[x].get(mode="fill", fill_value=-1)),
    ("doc.default[{0}]", lambda a, x: a["doc"].at[x].get(mode="fill")),
    ("doc.clip[{0}]", lambda a, x: a["doc"].at[x].get(mode="clip")),
    ("max(table[{0}])", lambda a, x: a["table"][x].max()),
    ("search(docs[0], {0})", lambda a, x: _int(jnp.searchsorted(a["docs"][0], x))),
    ("cumsum(doc)[{0}]", lambda a, x: jnp.cumsum(a["doc"])[x]),
]
COMPARISONS = [
    ("({0} >= {1})", lambda x, y: _int(x) >= y),
    ("({0} >= {1})", lambda x, y: _int(x) >= y),
    ("({0} > {1})", lambda x, y: _int(x) > y),
    ("({0} <= {1})", lambda x, y: _int(x) <= y),
    ("({0} < {1})", lambda x, y: _int(x) < y),
    ("({0} == {1})", lambda x, y: _int(x) == y),
    ("({0} != {1})", lambda x, y: _int(x) != y),
    ("({0}/3. < {1})", lambda x, y: _float(x) / 3.0 < _float(y)),
    ("({0}/{1}. <= 2)", lambda x, y: _float(x) / _float(y) <= 2.0),
    ("({0}*{1}. > 8)", lambda x, y: _float(x) * _float(y) > 8.0),
    ("(inf*{0} < {1}.)", lambda x, y: _float(x) * jnp.inf < _float(y)),
    ("({0}. - inf*{1} != 2)", lambda x, y: _float(x) - jnp.inf * _float(y) != 2.0),
    ("(tanh({0}.) > {1}.)", lambda x, y: jnp.tanh(_float(x)) > _float(y)),
    ("(sin({0}.) > {1}.)", lambda x, y: jnp.sin(_float(x)) > _float(y)),
    ("any([{0}, {1}] > 3)", lambda x, y: (jnp.stack([_int(x), _int(y)]) > 3).any()),
    ("all([{0}, {1}] > 3)", lambda x, y: (jnp.stack([_int(x), _int(y)]) > 3).all()),
    ("bf16({0}) < {1}", lambda x, y: _half(x) * _half(0.3) < _half(y)),
    ("(tiny {0} < {1})", lambda x, y: _float(x) * 1e-39 + 1e-40 < _float(y) * 1e-40),
    ("bool({0} - {1})", lambda x, y: (_int(x) - y).astype(bool)),
]


def _pick(table, terms):
    return st.sampled_from(table).flatmap(
        lambda row: st.tuples(*[terms] * (row[0].count("{1}") + 1)).map(
            lambda xs: _combine(row[0], row[1], *xs)
        )
    )


def _lookups(terms):
    extra = {"b": _index(0), "n": _index(1)}

    def build(row, xs):
        text, get = row
        named = [extra[c] for c in "bn" if f"[{c}, " in text]
        return _lookup(text, get, xs[0], *named, *xs[1 : text.count("{1}") + 1])

    return st.builds(build, st.sampled_from(LOOKUPS), st.tuples(terms, terms))


def _choices(terms):
    def where(p, x, y):
        return jnp.where(_int(p) > 2, _int(x), _int(y))

    def cond(p, x, y):
        return lax.cond(_int(p) > 2, lambda: _int(x), lambda: _int(y) + 1)

    def switch(p, x, y):
        return lax.switch(_int(p), [lambda: _int(x), lambda: _int(y), lambda: _int(p)])

    rows = [("where({0})", where), ("cond({0})", cond), ("switch({0})", switch)]
    return st.builds(
        lambda row, xs: _combine(row[0].format("{0}, {1}, {2}"), row[1], *xs),
        st.sampled_from(rows),
        st.tuples(terms, terms, terms),
    )


def _grow(terms):
    return st.one_of(
        _pick(PLAIN, terms),
        _pick(PLAIN, terms),
        _pick(DIVISIONS, st.one_of(terms, SMALL.map(_constant))),
        _lookups(terms),
        _lookups(terms),
        _choices(terms),
    )


INTEGERS = st.recursive(LEAVES, _grow, max_leaves=5)
BOOLEANS = [
    ("({0} & {1})", lambda x, y: x & y),
    ("({0} & {1})", lambda x, y: x & y),
    ("({0} | {1})", lambda x, y: x | y),
    ("({0} ^ {1})", lambda x, y: x ^ y),
    ("({0} == {1})", lambda x, y: x == y),
    ("~{0}", lambda x: ~x),
    ("where({0}, {1})", lambda x, y: jnp.where(x, y, ~y)),
    ("jit({0}, {1})", jax.jit(lambda x, y: jnp.logical_and(x, ~y))),
]
MASKS = st.recursive(
    _pick(COMPARISONS, INTEGERS), lambda terms: _pick(BOOLEANS, terms), max_leaves=4
)


@st.composite
def problems(draw):
    """Draws a mask, the arrays, the positions and the blocks."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sort = np.sort if draw(st.booleans()) else lambda x: x
    arrays = {
        "doc": sort(rng.integers(-1, 5, L)),
        "docs": sort(rng.integers(0, 4, (B, L))),
        "table": rng.integers(-20, 20, (N, L)),
        "lengths": rng.integers(0, L, B),
    }
    if draw(st.integers(0, 9)) == 0:
        arrays["table"] = rng.integers(-(2**31), 2**31, (N, L))
    arrays = {name: a.astype(np.int32) for name, a in arrays.items()}
    T, S = draw(st.sampled_from([(13, 13), (8, 12), (1, 13)]))
    positions = [_positions(draw, rng, size) for size in (T, S)]
    blocks = draw(st.sampled_from([1, 2, 4, 5, 16])), draw(st.sampled_from([2, 3, 4]))
    return draw(MASKS), arrays, (T, S), positions, blocks


def _positions(draw, rng, size):
    return draw(
        st.sampled_from(
            [
                None,
                None,
                4,
                -6,
                rng.integers(-3, L + 3, size),
                np.sort(rng.integers(0, L, (B, size))),
                rng.integers(-(2**31), 2**31, size).astype(np.int32),
            ]
        )
    )
