"""Paged caches: a state machine over forks and releases, and tokens of any examples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

import jattn
from jattn import caches
from jattn.masks import Causal, Explicit, Lengths, as_mask
from tests.helpers import machines
from tests.helpers.small_chunks import small_chunks as small_chunks

B, P, PAGE, MOST, N, K, H, D = 3, 9, 4, 5, 2, 1, 4, 3
S, T = PAGE * MOST, 3
LAMBDA = lambda b, n, t, s: (t >= s) & ((s + b) % 3 != n)

append = jax.jit(lambda kv, *x: kv.append(*x[:2], count=x[2]))
release = jax.jit(lambda kv, chosen: kv.release(chosen))
fork = jax.jit(lambda kv, source, target: kv.fork(source, target))
take = jax.jit(lambda kv, indices: kv.take(indices))
truncate = jax.jit(lambda kv, length: kv.truncate(length))
reserve = jax.jit(lambda kv, count: kv.reserve(count))
attend = jax.jit(lambda kv, query: kv.attend(query, mask=LAMBDA))
by_token = jax.jit(lambda kv, *x: kv.attend_tokens(*x, mask=LAMBDA))


@jax.jit
def definition(query, key, value, lengths):
    mask = Lengths(lengths) & as_mask(LAMBDA)
    position = lengths[:, None] - T + jnp.arange(T)[None]
    return jattn.definition.attention(query, key, value, mask=mask, query_position=position)


class Serving(RuleBasedStateMachine):
    """A paged cache beside lists of tokens; None for an example that found no page."""

    @initialize(seed=st.integers(0, 2**16))
    def begin(self, seed):
        self.random = np.random.default_rng(seed)
        self.kv = caches.paged(P, PAGE, K, H, D, batch_size=B, max_pages=MOST)
        self.tokens = [[] for _ in range(B)]

    def draw(self, *shape):
        return self.random.standard_normal(shape).astype("float32")

    def forget_the_overflowed(self):
        """Asserts that who asked for too much is marked, and nobody else; heals these."""
        owned = (np.asarray(self.kv.table) >= 0).sum(1) * PAGE
        marked = np.asarray(self.kv.length) > owned
        for b, tokens in enumerate(self.tokens):
            assert marked[b] or len(tokens) == self.kv.length[b]
        if marked.any():
            assert np.isnan(attend(self.kv, self.draw(B, T, N, H))[marked]).all()
            self.truncate(np.where(marked, owned, S))
        return marked

    @rule(counts=st.tuples(*[st.integers(0, T)] * B))
    def append(self, counts):
        key, value = self.draw(B, T, K, H), self.draw(B, T, K, D)
        free, owned = int(self.kv.num_free), (np.asarray(self.kv.table) >= 0).sum(1)
        self.kv = append(self.kv, key, value, np.array(counts, np.int32))
        want = []
        for b, count in enumerate(counts):
            self.tokens[b] = self.tokens[b] + [
                (key[b, i], value[b, i]) for i in range(count)
            ]
            blocks = -(-len(self.tokens[b]) // PAGE)
            need = max(blocks - owned[b], 0)
            want.append(blocks > MOST or need > free)
            free -= 0 if want[-1] else need
        assert self.forget_the_overflowed().tolist() == want

    @rule(chosen=st.tuples(*[st.booleans()] * B))
    def release(self, chosen):
        self.kv = release(self.kv, np.array(chosen))
        self.tokens = [[] if x else y for x, y in zip(chosen, self.tokens, strict=True)]

    @rule(source=st.integers(0, B - 1), copy=st.integers(0, B - 1))
    def fork(self, source, copy):
        self.kv = fork(self.kv, source, copy)
        self.tokens[copy] = self.tokens[source]
        self.forget_the_overflowed()

    @rule(which=st.tuples(*[st.integers(0, B - 1)] * B))
    def take(self, which):
        self.kv = take(self.kv, np.array(which))
        self.tokens = [self.tokens[b] for b in which]
        self.forget_the_overflowed()

    @rule(lengths=st.tuples(*[st.integers(0, S)] * B))
    def truncate(self, lengths):
        self.kv = truncate(self.kv, np.array(lengths))
        self.tokens = [x[:n] for x, n in zip(self.tokens, lengths, strict=True)]
        self.forget_the_overflowed()

    @rule(count=st.integers(0, PAGE))
    def reserve(self, count):
        self.kv = reserve(self.kv, count)
        room = np.asarray(self.kv.room)
        marked = self.forget_the_overflowed()
        assert (room[~marked] >= count).all()

    def expected(self, query):
        key, value = np.full((B, S, K, H), np.nan, "f"), np.full((B, S, K, D), np.nan, "f")
        for b, pairs in enumerate(self.tokens):
            for i, pair in enumerate(pairs):
                key[b, i], value[b, i] = pair
        lengths = np.array([len(x) for x in self.tokens], np.int32)
        return np.asarray(definition(query, key, value, lengths)), lengths

    @rule()
    def attend(self):
        query = self.draw(B, T, N, H)
        want, lengths = self.expected(query)
        np.testing.assert_allclose(attend(self.kv, query), want, atol=3e-6)
        example = np.array([2, 0, 0, -1, 1, 2, 1, 0], np.int32)
        row = np.array([0, 2, 1, 0, 2, 2, 0, 0], np.int32)
        position = lengths[example] - T + row
        got = np.asarray(by_token(self.kv, query[example, row], example, position))
        wanted = np.where(example[:, None, None] < 0, 0, want[example, row])
        np.testing.assert_allclose(got, wanted, atol=3e-6)

    @invariant()
    def no_page_is_lost(self):
        if not hasattr(self, "kv"):
            return
        table, pool = np.asarray(self.kv.table), self.kv.pool
        owners = np.bincount(table[table >= 0], minlength=P)
        assert (owners == np.asarray(pool.owners)).all()
        free = np.asarray(pool.free)[: int(pool.num_free)]
        assert sorted(free) == np.flatnonzero(owners == 0).tolist()


@pytest.mark.parametrize(
    ("examples", "steps"), [(5, 10), pytest.param(80, 30, marks=pytest.mark.slow)]
)
def test_any_sequence_of_calls_is_that_of_lists(examples, steps):
    machines.run(Serving, examples, steps)


@pytest.mark.parametrize("copied", [lambda kv: kv.fork(0, 1), lambda kv: kv.take([0, 0])])
@pytest.mark.parametrize("held", [0, 1, PAGE])
def test_reserved_pages_stay_with_the_first(copied, held):
    kv = caches.paged(8, PAGE, K, H, D, batch_size=2, max_pages=3)
    key, value = jnp.ones((2, PAGE, K, H)), jnp.ones((2, PAGE, K, D))
    kv = kv.append(key, value, count=jnp.array([held, 0])).reserve(jnp.array([PAGE, 0]))
    kv = copied(kv)
    again = jnp.stack([key[0], 2 * key[0]]), jnp.stack([value[0], 2 * value[0]])
    kv = kv.append(*again, count=1)
    got = kv.attend(jnp.ones((2, 1, N, H)), mask=lambda b, n, t, s: s == t)
    np.testing.assert_array_equal(got, np.ones((2, 1, N, D)) * [[[[1]]], [[[2]]]])


AFTER = {
    "nothing": lambda kv, one: kv,
    "append": lambda kv, one: kv.append(*one),
    "fork": lambda kv, one: kv.fork(0, 1).append(*one),
    "take": lambda kv, one: kv.take([0, 0]).append(*one),
    "twice": lambda kv, one: reserve(kv.append(*one), 11),
}


@pytest.mark.parametrize("name", AFTER)
def test_to_reserve_too_much_forgets_no_token_and_makes_none(name):
    kv = caches.paged(3, PAGE, K, H, D, batch_size=2, max_pages=3)
    values = lambda *of: np.float32(of).reshape(2, -1, 1, 1).repeat(D, 3)
    two, one = (
        (jnp.ones((2, x.shape[1], K, H)), x) for x in (values(1, 1, 0, 0), values(3, 7))
    )
    kv = kv.append(*two, count=jnp.array([2, 0]))
    kv = AFTER[name](reserve(kv, np.array([11, 0], np.int32)), one)
    query = jnp.zeros((2, 1, N, H))
    assert np.isnan(kv.attend(query)[0]).all()
    healed = truncate(kv, np.array([PAGE, PAGE], np.int32))
    want = [1, 1] if name == "nothing" else [1, 1, 3]
    assert int(healed.length[0]) == len(want)
    got = healed.attend(query)
    np.testing.assert_allclose(got[0], np.full((1, N, D), np.mean(want)), rtol=1e-6)
    if name in ("fork", "take"):
        np.testing.assert_allclose(got[1], np.full((1, N, D), 3.0), rtol=1e-6)


def test_too_few_pages_are_an_error_where_that_is_known():
    kv = caches.paged(2, PAGE, K, H, D, batch_size=2, max_pages=2)
    key, value = jnp.ones((2, 5, K, H)), jnp.ones((2, 5, K, D))
    with pytest.raises(ValueError, match=r"caches.append: examples \[1\] need more pages"):
        kv.append(key, value)
    with pytest.raises(ValueError, match=r"caches.reserve: examples \[0, 1\] need"):
        kv.reserve(9)
    assert kv.reserve(4).room.tolist() == [4, 4]
    kv = kv.append(key, value, count=jnp.array([5, 0]))
    with pytest.raises(ValueError, match="`Explicit` lies along slots"):
        kv.attend_tokens(
            jnp.ones((1, N, H)), [0], [4], mask=Explicit(jnp.ones((1, 8), bool))
        )


def filled(*counts):
    """A paged cache whose examples hold so many tokens: those of example b are all b."""
    kv = caches.paged(8, PAGE, K, H, D, batch_size=len(counts), max_pages=3)
    number = jnp.arange(len(counts), dtype=jnp.float32).reshape(-1, 1, 1, 1)
    one = lambda size: jnp.broadcast_to(number, (len(counts), PAGE, K, size))
    return kv.append(one(H), one(D), count=jnp.array(counts))


BEYOND = {
    "release": lambda kv: kv.release([0, 3]),
    "release_below": lambda kv: kv.release(-4),
    "fork_source": lambda kv: kv.fork(3, 0),
    "fork_target": lambda kv: kv.fork(0, [1, 5]),
    "take": lambda kv: kv.take([0, 1, 3]),
    "example": lambda kv: kv.attend_tokens(jnp.ones((2, N, H)), [0, 3], [0, 0]),
    "uint32": lambda kv: kv.release(np.uint32(2**32 - 1)),
}


@pytest.mark.parametrize("name", BEYOND)
def test_examples_that_are_not_there_are_refused(name):
    with pytest.raises(ValueError, match=r"must be less than B = 3"):
        BEYOND[name](filled(1, 2, 3))


def test_booleans_of_another_shape_are_refused():
    kv = filled(1, 2, 3)
    for chosen in (jnp.array([True]), [True, False], np.ones((3, 1), bool)):
        with pytest.raises(ValueError, match=r"Booleans of shape B = \(3,\)"):
            kv.release(chosen)
    assert kv.release([True, False, True]).length.tolist() == [0, 2, 0]
    assert kv.release([-1, 0]).length.tolist() == [0, 2, 0]


NOBODY = {
    "release": lambda kv: kv.release([]),
    "fork": lambda kv: kv.fork([], ()),
}


@pytest.mark.parametrize("name", NOBODY)
def test_an_empty_list_names_nobody(name):
    kv = filled(1, 2, 3)
    assert NOBODY[name](kv).length.tolist() == [1, 2, 3]
    flat = caches.empty(3, 8, K, H, D, ragged=True)
    assert flat.take([]).length.shape == (0,)
    assert kv.attend_tokens(jnp.ones((0, N, H)), [], []).shape == (0, N, D)


@pytest.mark.parametrize("by", [take, lambda kv, indices: kv.take(indices)])
def test_an_example_counted_from_the_end_is_the_same_example(by):
    kv = by(filled(2, 2, 2), np.array([1, -2, -1], np.int32))
    assert kv.length.tolist() == [2, 2, 2]
    assert kv.table[0, 0] != kv.table[1, 0]  # both will write their next token there
    assert int(kv.num_free) == 5


def test_traced_examples_that_are_not_there_give_nan():
    kv, indices = filled(2, 2, 2), np.array([1, 3, -5], np.int32)
    query = jnp.ones((3, T, N, H))
    taken, one = take(kv, indices), jnp.ones((3, 1, K, H))
    flat = caches.empty(3, 8, K, H, D, ragged=True).append(one, one[..., :D])
    flat = jax.jit(lambda kv, indices: kv.take(indices))(flat, indices)
    for copy in (taken, flat):
        longer = append(copy, one, one[..., :D], np.array([1, 1, 1], np.int32))
        for cache in (copy, longer):
            got = np.isnan(cache.attend(query)).all((1, 2, 3))
            np.testing.assert_array_equal(got, [False, True, True])
    assert release(kv, np.array([3, -5, 1], np.int32)).length.tolist() == [2, 0, 2]
    got = by_token(kv, query[0], np.array([0, 3, 1], np.int32), np.array([1, 1, 1]))
    np.testing.assert_array_equal(np.isnan(got).all((1, 2)), [False, True, False])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_gradients_and_rounded_pages(dtype):
    draw = np.random.default_rng(0).standard_normal
    query, key, value = (
        jnp.asarray(draw((2, 6, heads, size)), jnp.float32)
        for heads, size in ((N, H), (K, H), (K, D))
    )

    def total(make, query, key, value):
        kv = make(dtype=dtype).append(key, value)
        return jnp.sum(jnp.sin(kv.attend(query, mask=Causal())))

    pages = functools.partial(caches.paged, 9, PAGE, K, H, D, batch_size=2, max_pages=3)
    flat = functools.partial(caches.empty, 2, 12, K, H, D)
    got, want = (
        jax.jit(jax.value_and_grad(functools.partial(total, make), (0, 1, 2)))(
            query, key, value
        )
        for make in (pages, flat)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=3e-6), got, want)
