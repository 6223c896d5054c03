"""A cache stands for the tokens that were appended: the oracle is a plain list of them."""

import functools
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
)

import jattn
from jattn import caches
from jattn.masks import Causal, Explicit, Lengths, Segments, Window, as_mask
from jattn.modifiers import ALiBi, SoftCap
from tests.helpers import machines
from tests.helpers.small_chunks import small_chunks as small_chunks

SLOW = pytest.mark.slow

B, S, N, K, H, D = 2, 23, 4, 2, 8, 6
MASKS = {
    "none": None,
    "causal": Causal(),
    "window": Causal() & Window(2, None),
    "lambda": lambda b, n, t, s: (t >= s) & ((s + b) % 3 != n),
}


def draw(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def tokens(T, seed=0, dtype="float32"):
    """A query, a key and a value of T tokens."""
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, D)
    return [draw((seed, i), *shape, dtype=dtype) for i, shape in enumerate(shapes)]


def cut(arrays, first, last):
    return [x[:, first:last] for x in arrays]


def filled(count, *, seed=0, **given):
    kv = caches.empty(B, S, K, H, D, **given)
    query, key, value = tokens(count, seed)
    return (query, key, value), kv.append(key, value)


def close(got, want, atol=3e-6):
    np.testing.assert_allclose(got, want, atol=atol, rtol=1e-5)


@functools.partial(jax.jit, static_argnames=("name",))
def attend(kv, query, name, count=None):
    return kv.attend(query, mask=MASKS[name], count=count)


@functools.partial(jax.jit, static_argnames=("name",))
def extend(kv, query, key, value, name, count=None):
    return kv.extend(query, key, value, mask=MASKS[name], count=count)


@jax.jit
def append(kv, key, value, count):
    return kv.append(key, value, count=count)


truncate = jax.jit(lambda kv, length: kv.truncate(length))
take = jax.jit(lambda kv, indices: kv.take(indices))


@functools.partial(jax.jit, static_argnames=("name",))
def definition(query, key, value, lengths, first, name):
    present = Lengths(lengths)
    mask = present if MASKS[name] is None else present & as_mask(MASKS[name])
    position = first[:, None] + jnp.arange(query.shape[1])[None]
    return jattn.definition.attention(query, key, value, mask=mask, query_position=position)


def plain(*args):
    return np.asarray(definition(*args))


@functools.partial(jax.jit, static_argnames=("dtype",))
def alone(key, value, dtype):
    """What each token is rounded to."""
    kv = caches.empty(B, key.shape[1], K, H, D, dtype=dtype).append(key, value)
    return kv.key, kv.value


class Sequences(RuleBasedStateMachine):
    """A ragged cache beside lists of the tokens of each example."""

    dtype = "float32"

    @initialize(seed=st.integers(0, 2**16))
    def begin(self, seed):
        self.random = np.random.default_rng(seed)
        self.kv = caches.empty(B, S, K, H, D, dtype=self.dtype, ragged=True)
        self.tokens = [[] for _ in range(B)]

    def some(self, T):
        shapes = (B, T, N, H), (B, T, K, H), (B, T, K, D)
        return [self.random.standard_normal(x).astype("float32") for x in shapes]

    def fitting(self, T, counts):
        room = [S - len(x) for x in self.tokens]
        return np.minimum(np.minimum(counts, T), room).astype(np.int32)

    def keep(self, key, value, counts):
        key, value = alone(key, value, self.kv.store.dtype)
        for b, count in enumerate(counts):
            self.tokens[b] += [(key[b, i], value[b, i]) for i in range(count)]

    def expected(self, query, name, positions):
        key, value = np.full((B, S, K, H), np.nan, "f"), np.full((B, S, K, D), np.nan, "f")
        for b, pairs in enumerate(self.tokens):
            for i, pair in enumerate(pairs):
                key[b, i], value[b, i] = pair
        lengths = np.array([len(x) for x in self.tokens], np.int32)
        return plain(query, key, value, lengths, np.array(positions, np.int32), name)

    @rule(counts=st.tuples(*[st.integers(0, 3)] * B))
    def append(self, counts, T=3):
        _, key, value = self.some(T)
        counts = self.fitting(T, counts)
        self.kv = append(self.kv, key, value, counts)
        self.keep(key, value, counts)

    @rule(
        counts=st.tuples(*[st.integers(0, 3)] * B),
        name=st.sampled_from(["causal", "lambda"]),
    )
    def extend(self, counts, name, T=3):
        query, key, value = self.some(T)
        counts = self.fitting(T, counts)
        output, self.kv = extend(self.kv, query, key, value, name, counts)
        self.keep(key, value, counts)
        first = [len(x) - count for x, count in zip(self.tokens, counts, strict=True)]
        want, output = self.expected(query, name, first), np.asarray(output)
        for b, count in enumerate(counts):
            close(output[b, :count], want[b, :count])
            assert not output[b, count:].any()

    @rule(name=st.sampled_from(["none", "window"]))
    def attend(self, name, T=3):
        query = self.some(T)[0]
        first = [len(x) - T for x in self.tokens]
        close(attend(self.kv, query, name), self.expected(query, name, first))

    @rule(lengths=st.tuples(*[st.integers(0, S)] * B))
    def truncate(self, lengths):
        self.kv = truncate(self.kv, np.array(lengths, np.int32))
        self.tokens = [x[:most] for x, most in zip(self.tokens, lengths, strict=True)]

    @rule(which=st.tuples(*[st.integers(0, B - 1)] * B))
    def take(self, which):
        self.kv = take(self.kv, np.array(which, np.int32))
        self.tokens = [list(self.tokens[b]) for b in which]


@pytest.mark.parametrize(
    ("dtype", "examples", "steps"),
    [
        ("float32", 5, 8),
        pytest.param("float32", 60, 20, marks=SLOW),
        pytest.param("int8", 30, 20, marks=SLOW),
        pytest.param("float8_e4m3fn", 15, 20, marks=SLOW),
        pytest.param("int4", 15, 20, marks=SLOW),
    ],
)
def test_any_sequence_of_calls_is_that_of_lists(dtype, examples, steps):
    machines.run(type("Sequences", (Sequences,), {"dtype": dtype}), examples, steps)


@pytest.mark.parametrize(
    ("dtype", "pieces"),
    [
        pytest.param("bfloat16", (20,), marks=SLOW),
        pytest.param("float64", (20,), marks=SLOW),
        ("float32", (18, 1, 1)),
        pytest.param("bfloat16", (3, 1, 9, 7), marks=SLOW),
        pytest.param("float64", (3, 1, 9, 7), marks=SLOW),
    ],
)
def test_pieces_of_a_prompt_are_the_prompt(dtype, pieces):
    with jax.enable_x64(dtype == "float64"):
        query, key, value = tokens(20, dtype=dtype)
        kv, outputs, at = caches.empty(B, S, K, H, D, dtype=dtype), [], 0
        for T in pieces:
            output, kv = kv.extend(*cut((query, key, value), at, at + T), mask=Causal())
            outputs.append(output)
            at += T
        want = jattn.definition.attention(query, key, value, mask=Causal())
        got = jnp.concatenate(outputs, 1)
        assert got.dtype == kv.key.dtype == dtype
        eps = float(jnp.finfo(dtype).eps)
        close(got.astype("float32"), want.astype("float32"), atol=16 * eps)
        assert (kv.key[:, :20] == key).all()


@pytest.mark.parametrize(
    "dtype", ["int8", pytest.param("float8_e4m3fn", marks=SLOW), "int4"]
)
def test_rounded_pieces_are_bit_for_bit_the_rounded_prompt(dtype):
    _, key, value = tokens(12)
    whole = caches.empty(B, S, K, H, D, dtype=dtype).append(key, value)
    pieces = caches.empty(B, S, K, H, D, dtype=dtype)
    add = jax.jit(lambda kv, key, value: kv.append(key, value))
    for at, T in ((0, 1), (1, 1), (2, 5), (7, 5)):
        pieces = add(pieces, *cut((key, value), at, at + T))
    chex.assert_trees_all_equal(whole, pieces)
    exact = whole.dequantize()
    assert exact.store.dtype == "float32"
    step = {"int8": 1 / 254, "int4": 1 / 14, "float8_e4m3fn": 1 / 16}[dtype]
    largest = jnp.max(jnp.abs(key), -1, keepdims=True)
    # Half a step of the grid; that of float8 is relative to the number.
    assert (jnp.abs(exact.key[:, :12] - key) <= step * largest * 1.001).all()


@pytest.mark.parametrize("dtype", ["float32", pytest.param("int8", marks=SLOW)])
@pytest.mark.parametrize(
    "options",
    [
        {
            "modifier": ALiBi() >> SoftCap(5.0),
            "sink": jnp.arange(N, dtype=jnp.float32),
            "scale": 0.3,
        },
        {
            "modifier": lambda x, b, n, t, s: x - 0.1 * (t - s).astype(x.dtype),
            "bias": draw(5, 1, N, 1, S),
            "mask": Explicit(draw(6, 1, S) > 0),
        },
        {
            "dropout": jattn.Dropout(0.4, jax.random.key(1)),
            "mask": Segments(jnp.zeros(2, jnp.int32), jnp.arange(S) % 2),
        },
        {"query_position": 40, "mask": Window(30, 0), "key_position": jnp.arange(S)[::-1]},
        {"mask": jattn.block_table(Causal(3), draw(0, B, 2, N, H), draw(0, B, S, K, H))},
    ],
    ids=["sink", "bias", "dropout", "positions", "table"],
)
def test_options_are_those_of_attention(dtype, options):
    (query, *_), kv = filled(19, dtype=dtype)
    query = query[:, :2]
    got = kv.attend_state(query, **options)
    here = dict(options)
    here.setdefault("query_position", 17)
    if isinstance(here.get("mask"), jattn.BlockTable):
        here["mask"] = here["mask"].mask
    present = Explicit(jnp.arange(S) < 19)
    here["mask"] = present & as_mask(here["mask"]) if "mask" in here else present
    want = jattn.attention_state(query, kv.key, kv.value, implementation="dense", **here)
    close(got.output, want.output)
    close(got.logsumexp, want.logsumexp)


def rolled_out(query, key, value, dtype="float32", steps=S):
    """Attends from each token in turn, in a scan."""

    def step(kv, token):
        output, kv = kv.extend(*(x[:, None] for x in token), mask=Causal())
        return kv, output[:, 0]

    first = lambda x: jnp.swapaxes(x, 0, 1)[:steps]
    kv = caches.empty(B, S, K, H, D, dtype=dtype)
    _, outputs = jax.lax.scan(step, kv, tuple(map(first, (query, key, value))))
    return jnp.swapaxes(outputs, 0, 1)


def test_gradients_through_a_cache_are_those_of_the_whole():
    inputs, weight = tokens(S), draw(9, B, S, N, D)
    through = lambda *x: jnp.sum(jnp.sin(rolled_out(*x)) * weight)
    whole = lambda *x: jnp.sum(jnp.sin(jattn.attention(*x, mask=Causal())) * weight)
    got = jax.jit(jax.grad(through, (0, 1, 2)))(*inputs)
    want = jax.grad(whole, (0, 1, 2))(*inputs)
    for a, b in zip(got, want, strict=True):
        close(a, b, atol=2e-5)


@SLOW
def test_derivatives_of_higher_order():
    (query, key, value), _ = filled(9)
    count = jnp.array([2, 9])

    def total(attend, x):
        query, key, value = x
        return jnp.sum(jnp.sin(attend(query, key, value)))

    def cached(query, key, value):
        kv = caches.empty(B, S, K, H, D, ragged=True).append(key, value, count=count)
        return kv.attend(query[:, :2], mask=Window(40, 0), sink=jnp.float32(0.5))

    def plain(query, key, value):
        mask = (jnp.arange(9)[None] < count[:, None])[:, None, None] & jnp.ones(
            (1, 1, 2, 1), bool
        )
        position = count[:, None] - 2 + jnp.arange(2)[None]
        return jattn.definition.attention(
            query[:, :2],
            key,
            value,
            mask=Explicit(mask) & Window(40, 0),
            query_position=position,
            sink=jnp.float32(0.5),
        )

    def product(attend, x):
        return jax.jvp(jax.grad(functools.partial(total, attend)), (x,), (x,))

    inputs = (query, key, value)
    got, want = (jax.jit(functools.partial(product, f))(inputs) for f in (cached, plain))
    jax.tree.map(functools.partial(close, atol=2e-5), got, want)


@SLOW
def test_what_is_rounded_has_no_gradient_and_queries_do():
    query, key, value = tokens(3)

    def total(query, key):
        kv = caches.empty(B, S, K, H, D, dtype="int8").append(key, value)
        return jnp.sum(jnp.sin(kv.attend(query)))

    of_query, of_key = jax.grad(total, (0, 1))(query, key)
    assert not of_key.any()
    assert (jnp.abs(of_query).max((1, 3)) > 0).all()


@pytest.mark.parametrize("dtype", ["float32", pytest.param("int8", marks=SLOW)])
def test_nan_that_is_not_seen_touches_nothing(dtype):
    (query, key, value), _ = filled(20)
    spoiled = [x.at[:, 12:].set(jnp.nan).at[:, 3].set(jnp.inf) for x in (key, value)]
    kv = caches.empty(B, S, K, H, D, dtype=dtype).append(*spoiled).truncate(12)
    hidden = lambda b, n, t, s: s != 3
    attend = lambda query, kv, hide: kv.attend(query, mask=hidden if hide else None)
    clean = caches.empty(B, S, K, H, D, dtype=dtype).append(key, value).truncate(12)
    query = query[:, :2]
    total = lambda query, kv: jnp.sum(jnp.sin(attend(query, kv, True)))
    got, want = (jax.value_and_grad(total)(query, x) for x in (kv, clean))
    jax.tree.map(close, got, want)
    assert jnp.isnan(attend(query, kv, False)).all()  # who sees it does get it
    if dtype == "float32":
        gradient = jax.grad(total, 1, allow_int=True)(query, kv).store
        wanted = jax.grad(total, 1, allow_int=True)(query, clean).store
        close(gradient.keys, wanted.keys)
        close(gradient.values, wanted.values)


def test_one_program_serves_all_lengths_and_nothing_moves():
    @functools.partial(jax.jit, donate_argnums=0)
    @chex.assert_max_traces(n=1)
    def step(kv, query, key, value):
        return kv.extend(query, key, value, mask=Causal())

    query, key, value = tokens(S)
    kv, outputs = caches.empty(B, S, K, H, D), []
    place = lambda kv: [x.unsafe_buffer_pointer() for x in jax.tree.leaves(kv.store)]
    places = place(kv)
    for t in range(S):
        output, kv = step(kv, *cut((query, key, value), t, t + 1))
        outputs.append(output)
        assert place(kv) == places
    want = jattn.definition.attention(query, key, value, mask=Causal())
    close(jnp.concatenate(outputs, 1), want)


def test_a_full_cache_says_so_where_it_is_known():
    (query, key, value), kv = filled(S)
    assert int(kv.room) == 0
    match = f"caches.append: {S + 1} tokens must fit a capacity of {S}"
    with pytest.raises(ValueError, match=match):
        kv.append(*cut((key, value), 0, 1))
    with pytest.raises(ValueError, match="24 tokens must fit a capacity of 23"):
        caches.empty(B, S, K, H, D).append(jnp.ones((B, 24, K, H)), jnp.ones((B, 24, K, D)))
    assert kv.append(key[:, :0], value[:, :0]).length == S
    assert kv.append(*cut((key, value), 0, 1), count=0).length == S
    assert not jnp.isnan(kv.attend(query)).any()


@pytest.mark.parametrize("ragged", [pytest.param(False, marks=SLOW), True])
def test_overflow_under_jit_is_nan_until_truncated(ragged):
    query, key, value = tokens(S)
    kv = caches.empty(B, S, K, H, D, ragged=ragged).append(key, value)
    kv = kv.truncate(jnp.array([20, 22]) if ragged else 21)
    count = jnp.array([3, 3]) if ragged else None
    more = tokens(3, seed=7)
    output, kv = extend(kv, *more, "causal", count)
    over = np.array([False, True]) if ragged else np.array([True, True])
    assert (np.isnan(output).all((1, 2, 3)) == over).all()
    assert (np.isnan(kv.attend_state(query).logsumexp).all((1, 2)) == over).all()
    assert (np.asarray(kv.length) == (np.array([23, 25]) if ragged else 24)).all()
    _, again = extend(kv, *more, "causal", count)
    assert (np.asarray(again.length) > S).all()
    healed = kv.truncate(S)
    start = [20, 22] if ragged else [21, 21]
    for b, at in enumerate(start):  # what fitted is there, and nothing else was touched
        want = jnp.concatenate([key[b, :at], more[1][b, : S - at]])
        assert (healed.key[b] == want).all()
    want = jattn.definition.attention(query, healed.key, healed.value)
    close(healed.attend(query), want)


@SLOW
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_batch_axes_are_none_or_several(batch):
    shape = lambda *x: (*batch, *x)
    inputs = draw(1, *shape(5, N, H)), draw(2, *shape(5, K, H)), draw(3, *shape(5, K, D))
    kv = caches.empty(batch, S, K, H, D, ragged=True)
    count = jnp.arange(np.prod(batch, dtype=int), dtype=jnp.int32).reshape(batch) % 6
    count = count if batch else jnp.int32(4)
    output, kv = kv.extend(*inputs, count=count, mask=Causal())
    want = jattn.definition.attention(*inputs, mask=Causal())
    row = jnp.arange(5).reshape(*[1] * len(batch), 5)
    counted = (row < count[..., None])[..., None, None]
    close(output, jnp.where(counted, want, 0))
    assert kv.batch == batch
    assert kv.length.shape == batch


def test_nothing_is_nothing():
    query, key, value = tokens(2)
    kv = caches.empty(B, S, K, H, D)
    state = kv.attend_state(query)
    assert not state.output.any()
    assert (state.logsumexp == -jnp.inf).all()
    assert not jax.grad(lambda query: kv.attend(query).sum())(query).any()
    assert kv.attend(query[:, :0]).shape == (B, 0, N, D)
    none = caches.empty(B, 0, K, H, D)
    assert not none.attend(query).any()
    assert none.append(key[:, :0], value[:, :0]).length == 0
    nobody = caches.empty(0, S, K, H, D, ragged=True)
    assert nobody.attend(query[:0]).shape == (0, 2, N, D)


@SLOW
def test_a_cache_mapped_by_vmap():
    _, kv = filled(6)
    one = lambda x: x[:, None, None]  # a beam each: 1 example of 1 token
    beams = tokens(3, seed=4)
    beams = [one(x[0]) for x in beams]
    first = kv.take([0])
    output, many = jax.vmap(lambda *x: first.extend(*x, mask=Causal()))(*beams)
    for i in range(3):
        close(output[i], first.extend(*(x[i] for x in beams), mask=Causal())[0])
    assert many.length.shape == (3,)
    assert many.batch == (3, 1)
    # A cache with a new first axis is one of more examples.
    close(many.attend(beams[0], mask=Causal()), output)
    different = jax.vmap(lambda kv, n: kv.truncate(n), (None, 0))(first, jnp.arange(3) + 1)
    got = jax.vmap(lambda kv, query: kv.attend(query))(different, beams[0])
    for i in range(3):
        close(got[i], first.truncate(i + 1).attend(beams[0][i]))


@SLOW
def test_layers_in_a_scan():
    layers = 3
    inputs = [jnp.stack([x] * layers) for x in tokens(4)]
    empty = caches.empty(B, S, K, H, D)
    stack = jax.tree.map(lambda x: jnp.stack([x] * layers), empty)

    def layer(carry, given):
        kv, *token = given
        output, kv = kv.extend(*token, mask=Causal())
        return carry + output, kv

    total, stack = jax.lax.scan(layer, jnp.zeros((B, 4, N, D)), (stack, *inputs))
    close(total, layers * empty.extend(*tokens(4), mask=Causal())[0])
    assert (stack.length == 4).all()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda kv, q, k, v: kv.append(k[:, :, :1], v),
            r"`key` must have shape \(2, T, 2, 8\)",
        ),
        (lambda kv, q, k, v: kv.append(k, v[:, :1]), "with one T for all"),
        (
            lambda kv, q, k, v: kv.append(k.astype("float16"), v),
            "of the cache, float32",
        ),
        (lambda kv, q, k, v: kv.append(k, v, count=4), "between 0 and the T = 3"),
        (lambda kv, q, k, v: kv.append(k, v, count=[1, 2]), "`ragged=True` makes"),
        (lambda kv, q, k, v: kv.attend(q.astype("float16")), "`query` must have the dtype"),
        (lambda kv, q, k, v: kv.attend(q[:, :, :3]), "a multiple of K = 2 heads"),
        (lambda kv, q, k, v: kv.attend(q[..., :3]), "must have shape BTNH"),
        (lambda kv, q, k, v: kv.attend(q, causal=True), "got `causal`"),
        (lambda kv, q, k, v: kv.truncate([1, 2]), r"must have shape \(\) or \(\)"),
        (lambda kv, q, k, v: kv.take([2]), "must be less than B = 2"),
        (lambda kv, q, k, v: caches.empty(1, 2, 1, 4, dtype="int2"), "`dtype` must be one"),
    ],
    ids=range(12),
)
def test_errors_say_what_to_do(call, match):
    inputs = tokens(3)
    with pytest.raises(ValueError, match=match):
        call(caches.empty(B, S, K, H, D), *inputs)


@SLOW
def test_take_of_no_example_is_nan():
    (query, *_), kv = filled(5, ragged=True)
    got = jax.jit(lambda kv, i: kv.take(i).attend(query))(kv, jnp.array([1, 2]))
    assert np.isnan(got).all((1, 2, 3)).tolist() == [False, True]


@SLOW
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_to_append_takes_the_same_time_in_a_small_and_a_large_cache(dtype):
    """Guards jax#40101: some versions of XLA:CPU rewrite the whole array in a loop."""
    token = jnp.ones((1, 1, 1, 4), "bfloat16" if dtype == "bfloat16" else "float32")
    times, runs = {}, {}
    for capacity in (1024, 65536):

        @functools.partial(jax.jit, donate_argnums=0)
        def run(kv):
            step = lambda kv, _: (kv.append(token, token), None)
            return jax.lax.scan(step, kv, length=500)[0]

        runs[capacity] = run, caches.empty(1, capacity, 1, 4, dtype=dtype)
    for _ in range(12):
        for capacity, (run, kv) in runs.items():
            start = time.perf_counter()
            kv = jax.block_until_ready(run(kv)).truncate(0)
            taken = time.perf_counter() - start
            times[capacity] = min(times.get(capacity, 9.0), taken)
            runs[capacity] = run, kv
    assert times[65536] < 1.5 * times[1024] + 1e-3


@SLOW
def test_examples_on_several_devices():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    spec = jax.sharding.PartitionSpec("data")
    _, kv = filled(9, ragged=True)
    inputs = tokens(3, seed=3)
    run = lambda kv, *x: kv.extend(*x, mask=Causal())
    want, after = run(kv, *inputs)
    place = jax.sharding.NamedSharding(mesh, spec)
    spread = [jax.device_put(x, place) for x in (kv, *inputs)]
    for function in (run, jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)):
        got, moved = jax.jit(function)(*spread)
        close(got, want)
        close(moved.store.keys, after.store.keys)
        assert moved.store.keys.sharding.spec[0] == "data"
