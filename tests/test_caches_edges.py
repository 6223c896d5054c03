"""Caches at their edges: sizes that meet, or are 0, or no sizes; explicit axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jattn
from jattn import caches
from jattn.dropout import Dropout
from jattn.masks import Causal
from tests.helpers.draws import normal

B, T, N, K, H = 4, 3, 4, 2, 4
SLOW = pytest.mark.slow
MASK = lambda b, n, t, s: (t >= s) & ((s + b) % 5 != n)


def tokens(T, *batch, seed=0):
    rng = np.random.default_rng((seed, T))
    new = lambda heads: jnp.asarray(rng.standard_normal((*batch, T, heads, H)), jnp.float32)
    return new(N), new(K), new(K)


def banded(window):
    return lambda b, n, t, s: MASK(b, n, t, s) & (t - s < window)


@pytest.mark.parametrize(
    "batch", [(3,), pytest.param((), marks=SLOW), pytest.param((3, 2), marks=SLOW)]
)
def test_a_rolling_cache_may_have_as_many_slots_as_examples(batch):
    query, key, value = tokens(5, *batch)
    kv = caches.rolling(batch, 3, K, H)
    parts = []
    for first, last in ((0, 4), (4, 5)):
        part = (x[..., first:last, :, :] for x in (query, key, value))
        output, kv = kv.extend(*part, mask=MASK)
        parts.append(output)
    want = jattn.attention(query, key, value, mask=banded(3))
    np.testing.assert_allclose(jnp.concatenate(parts, -3), want, atol=2e-6)


def test_no_tokens_are_no_tokens():
    none = tokens(0, B)
    position = jnp.zeros((0,), int)
    for mask in (Causal(), MASK):
        placed = {"query_position": position, "mask": mask}
        alone = [x[0] for x in none]
        assert jattn.attention(alone[0], *alone[1:], **placed).shape == (0, N, H)
    kv = caches.rolling(B, 2, K, H, ragged=True)
    output, kv = kv.extend(*none)
    assert output.shape == (B, 0, N, H)
    assert not kv.length.any()
    pages = caches.paged(4, 2, K, H, batch_size=2, max_pages=2)
    assert pages.attend_tokens(none[0][0], position, position).shape == (0, N, H)


SIZES = {
    "`capacity`": lambda: caches.empty(1, -1, K, H),
    "`batch_size`": lambda: caches.empty((2, 1.0), 4, K, H),
    "`head_dim`": lambda: caches.empty(1, 4, K, jnp.float32(4)),
    "`window`": lambda: caches.rolling(1, 2.0, K, H),
    "`sinks`": lambda: caches.rolling(1, 2, K, H, sinks=-1),
    "`rope_dim`": lambda: caches.latent(1, 2, 4, None),
    "`page_size`": lambda: caches.paged(2, 0, K, H, batch_size=1, max_pages=2),
    "`num_pages`": lambda: caches.paged(0, 2, K, H, batch_size=1, max_pages=2),
    "caches.paged: `batch_size`": lambda: caches.paged(
        2, 2, K, H, batch_size=(1,), max_pages=2
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_size_is_a_whole_number(name):
    with pytest.raises(ValueError, match=f"{name} must be a whole number, at least"):
        SIZES[name]()
    assert caches.empty([2, np.int64(3)], 4, K, H).batch == (2, 3)


SMALL = {  # whose sums and products are more than int8 or uint8 holds
    "empty": lambda of: caches.empty(of(2), of(100), of(2), of(4), of(3)),
    "rolling": lambda of: caches.rolling(of(1), of(100), of(1), of(4), sinks=of(90)),
    "more sinks": lambda of: caches.rolling((), of(127), of(1), of(4), sinks=of(127)),
    "paged": lambda of: caches.paged(
        of(40), of(8), of(1), of(4), batch_size=of(2), max_pages=of(40)
    ),
    "latent": lambda of: caches.latent(of(1), of(8), of(100), of(64)),
}


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64])
@pytest.mark.parametrize("name", SMALL)
def test_sizes_of_numpy_are_those_of_python(name, kind):
    got, want = (SMALL[name](x) for x in (kind, int))
    assert got.capacity == want.capacity
    # With all that is static, where `np.int8(4)` is not written as 4 is.
    assert repr(jax.tree.map(jnp.shape, got)) == repr(jax.tree.map(jnp.shape, want))


@pytest.mark.parametrize("dtype", [None, "float64"])
def test_a_dtype_that_jax_has_not_is_refused(dtype):
    with pytest.raises(ValueError, match="`dtype`"):
        caches.empty(1, 4, K, H, dtype=dtype)


def test_more_queries_than_tokens_are_refused():
    query, key, value = tokens(T, B)
    more = jnp.concatenate([query, query], 1)
    rolling = caches.rolling(B, 2, K, H)
    for kv in (caches.empty(B, 8, K, H), rolling):
        with pytest.raises(ValueError, match=r"`query` must have T = 3 queries"):
            kv.extend(more, key, value)
    with pytest.raises(ValueError, match="one for the last"):  # of 3, where would 2 stand?
        rolling.extend(query[:, :2], key, value)
    last, _ = rolling.extend(query[:, -1:], key, value, mask=MASK)
    whole, _ = rolling.extend(query, key, value, mask=MASK)
    np.testing.assert_allclose(last, whole[:, -1:], atol=2e-6)
    with pytest.raises(ValueError, match="`query` must have shape BTNH"):
        rolling.attend(query[0, 0])


def test_pages_that_no_number_counts_are_refused():
    _, key, value = tokens(1, 2)
    kv = caches.paged(4, 2, K, H, batch_size=2, max_pages=2).append(key, value)
    with pytest.raises(ValueError, match=r"examples \[0, 1\] need more pages"):
        kv.reserve(2**31 - 1)
    with pytest.raises(ValueError, match="`source` must name one example, or one for each"):
        kv.fork([0, 1], [0, 1, 1])


def test_an_example_that_is_not_there_spoils_no_other():
    query, key, value = tokens(1, 2)
    kv = caches.rolling(2, 2, K, H, ragged=True).append(*tokens(T, 2)[1:])

    @jax.jit
    def taken(kv, indices):
        return kv.take(indices).extend(query, key, value)[0]

    output = taken(kv, jnp.array([0, 5]))
    np.testing.assert_allclose(output[0], taken(kv, jnp.array([0, 1]))[0], atol=1e-6)
    assert jnp.isnan(output[1]).all()


def test_parts_of_a_latent_token_may_have_two_dtypes_where_it_is_rounded():
    kv = caches.latent(1, 4, 4, 2, dtype="int8")
    part = jnp.ones((1, 1, 4)), jnp.ones((1, 1, 2), jnp.bfloat16)
    assert int(kv.append(*part).length) == 1
    assert kv.batch == (1,)


KINDS = {
    "flat": lambda: caches.empty(B, 8, K, H),
    "ragged": lambda: caches.empty(B, 8, K, H, ragged=True, dtype="int8"),
    "rolling": lambda: caches.rolling(B, 4, K, H),
    "paged": lambda: caches.paged(8, 4, K, H, batch_size=B, max_pages=2),
}
MESH = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))


def along_examples(x):
    spec = P("x") if x.ndim and x.shape[0] % 2 == 0 else P()
    return jax.device_put(x, NamedSharding(MESH, spec))


@pytest.mark.parametrize(
    "kind", [pytest.param(x, marks=[] if x == "ragged" else SLOW) for x in KINDS]
)
def test_explicit_axes_change_no_number_and_stay(kind):
    step = jax.jit(lambda kv, *x: kv.extend(*x, mask=MASK))
    pieces = [tokens(T, B), tokens(T, B, seed=1)]
    want, kv = [], KINDS[kind]()
    for piece in pieces:
        output, kv = step(kv, *piece)
        want.append(output)
    with jax.set_mesh(MESH):
        kv = first = jax.tree.map(along_examples, KINDS[kind]())
        for piece, output in zip(pieces, want, strict=True):
            got, kv = step(kv, *map(along_examples, piece))
            np.testing.assert_allclose(got, output, atol=2e-6)
            assert jax.typeof(got).sharding.spec[0] == "x"
        lies = lambda kv: jax.tree.map(lambda x: jax.typeof(x).sharding.spec, kv)
        assert lies(kv) == lies(first) == lies(kv.take(jnp.arange(B)))
        if kind == "paged":
            forked = kv.release([1]).fork(0, 1).truncate(2)
            assert forked.length.tolist() == [2] * B
            assert lies(forked) == lies(first)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("capacity", [250, 256, 1024])
@pytest.mark.parametrize("make", [caches.empty, caches.rolling, caches.latent])
def test_what_is_not_rounded_has_the_shapes_of_a_new_cache(make, capacity, dtype):
    kv, plain = make(2, capacity, 1, 8, dtype=dtype), make(2, capacity, 1, 8)
    shapes = lambda kv: jax.tree.map(lambda x: (x.shape, x.dtype), kv)
    assert shapes(kv.dequantize()) == shapes(plain)


@pytest.mark.parametrize("dtype", ["int8", int, bool, "float8_e4m3fn", "half precision"])
@pytest.mark.parametrize(
    "kv",
    [
        caches.empty(2, 4, 1, 8, dtype="int8"),
        caches.rolling(2, 4, 1, 8),
        caches.latent(2, 4, 8, 0, dtype="int4"),
        caches.paged(4, 4, 1, 8, batch_size=2, max_pages=2),
    ],
    ids=["empty", "rolling", "latent", "paged"],
)
def test_what_is_not_rounded_is_floating(kv, dtype):
    with pytest.raises(ValueError, match=r"caches\.dequantize: `dtype` must be one of"):
        kv.dequantize(dtype)


MAKE = {
    "empty": lambda: caches.empty(2, 8, 2, 0, 3),
    "rolling": lambda: caches.rolling(2, 8, 2, 0, 3),
    "paged": lambda: caches.paged(4, 8, 2, 0, 3, batch_size=2, max_pages=2),
}


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("name", MAKE)
def test_keys_without_numbers_are_all_alike(name, T):
    query, key = jnp.ones((2, T, 4, 0)), jnp.ones((2, T, 2, 0))
    value = jnp.arange(2.0 * T * 2 * 3).reshape(2, T, 2, 3)
    output, _ = MAKE[name]().extend(query, key, value)
    mean = jnp.repeat(jnp.mean(value, 1, keepdims=True), 2, axis=2)
    np.testing.assert_allclose(output[:, -1:], mean, rtol=1e-6)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("symbol", ["batch", "tokens"])
def test_caches_export_with_symbolic_sizes(symbol, dtype, ragged):
    (size,) = export.symbolic_shape("x", constraints=["x <= 40", "x >= 1"])
    B, T = (size, 5) if symbol == "batch" else (3, size)
    kv = caches.empty(3, 40, 2, 8, dtype=dtype, ragged=ragged)
    batch = lambda x: (B, *x.shape[1:]) if x.ndim else ()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(batch(x), x.dtype), kv)
    struct = lambda heads: jax.ShapeDtypeStruct((B, T, heads, 8), jnp.float32)
    extend = jax.jit(lambda kv, *x: kv.extend(*x, mask=Causal()))
    exported = export.export(extend)(shapes, struct(4), struct(2), struct(2))
    arrays = normal(0, (3, 5, 4, 8)), normal(1, (3, 5, 2, 8)), normal(2, (3, 5, 2, 8))
    close = functools.partial(np.testing.assert_allclose, atol=2e-6, rtol=1e-5)
    jax.tree.map(close, exported.call(kv, *arrays), extend(kv, *arrays))


@pytest.mark.parametrize("rate", [0.1, 0.3])
@pytest.mark.parametrize("head_dim", [1, 8])
def test_a_key_with_all_the_weight_has_no_slope_under_dropout(rate, head_dim):
    """Logits near 10³: slopes are far below 10⁻¹², and rounding must not make others."""
    draw, tokens = np.random.default_rng(0).standard_normal, 120
    sizes = (1, 3, 4, head_dim), (1, tokens, 1, head_dim), (1, tokens, 1, 5), (1, 3, 4, 5)
    query, key, value, weight = (jnp.asarray(draw(x), jnp.float32) for x in sizes)
    query = query.at[..., 0].set(1 + abs(query[..., 0]))
    key = key.at[0, 7, 0, 0].set(1e3)
    dropout = Dropout(rate, jax.random.key(0))

    def total(query, key, value):
        kv = caches.empty(1, 700, 1, head_dim, 5).append(key, value)
        output = kv.attend(query, mask=Causal(), scale=1.0, dropout=dropout)
        return jnp.sum(output * weight)

    for slope in jax.jit(jax.grad(total, (0, 1)))(query, key, value):
        np.testing.assert_array_less(abs(slope), 1e-12)
