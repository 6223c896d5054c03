"""Integers are compared in full, or refused by name: nothing wraps, with x64 or without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.counted import counted_from
from jattn.masks import Causal, Lengths, Prefix, Segments, Window
from tests.helpers.draws import normal

KEY = jnp.zeros((1, 2, 1, 4))
FAR = 2**32
TOP = 2**31


def weights(mask, **options):
    return np.asarray(jattn.attention_weights(KEY, KEY, mask=mask, **options)[0, 0])


APART, BOTH = np.eye(2), np.full((2, 2), 0.5)

REFUSED = {  # what is refused, and the name that the message must have
    "ids": (lambda: Segments(np.array([7, 7 + FAR])), "query_ids"),
    "ids_in_a_list": (lambda: Segments([7, 7 + FAR]), "query_ids"),
    "key_ids": (lambda: Segments(np.array([7, 7]), np.array([7, 7 + FAR])), "key_ids"),
    "unsigned": (lambda: Segments(np.array([7, 2**63], np.uint64)), "query_ids"),
    "negative": (lambda: Segments(np.array([-1, -1 - FAR])), "query_ids"),
    "padding": (lambda: Segments(np.array([7, 7]), padding_id=FAR), "padding_id"),
    "padding_of_int8": (
        lambda: Segments(np.array([7, TOP], np.uint32), padding_id=-1),
        "padding_id",
    ),
    "lengths": (lambda: Lengths(np.array([FAR + 1])), "key_lengths"),
    "query_lengths": (lambda: Lengths(2, np.array([FAR + 1])), "query_lengths"),
    "prefix": (lambda: Prefix(FAR + 1), "length"),
    "causal": (lambda: Causal(TOP), "offset"),
    "window": (lambda: Window(TOP, 0), "left"),
    "mixed": (
        lambda: Segments(np.array([1, TOP], np.uint32), np.array([-1, -2])),
        "query_ids",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(name):
    make, argument = REFUSED[name]
    with pytest.raises(ValueError, match=f"`{argument}`"):
        weights(make())


@pytest.mark.parametrize("name", ["query_position", "key_position"])
@pytest.mark.parametrize(
    "position", [TOP, TOP - 1, -TOP - 1, np.int64(FAR), np.array([0, FAR]), [0, FAR]]
)
@pytest.mark.parametrize("x64", [False, True])
def test_positions_that_do_not_fit_are_refused_by_name(name, position, x64):
    with jax.enable_x64(x64), pytest.raises(ValueError, match=f"`{name}`"):
        weights(Causal(), **{name: position})


def test_positions_too_far_apart_are_refused():
    with pytest.raises(ValueError, match="`query_position` and `key_position` must differ"):
        weights(Causal(), query_position=-5, key_position=TOP - 5)


def test_positions_at_the_ends_are_exact():
    for first in (TOP - 2, -TOP):
        got = weights(Causal(), query_position=first, key_position=first)
        np.testing.assert_array_equal(got, [[1, 0], [0.5, 0.5]])


@pytest.mark.parametrize("name", ["query_position", "key_position"])
@pytest.mark.parametrize("dtype", ["int32", "uint32"])
def test_traced_positions_that_wrap_give_nan(name, dtype):
    call = jax.jit(
        lambda p: jattn.attention(KEY, KEY, KEY, mask=Causal(), **{name: p}).ravel()
    )
    assert not np.isnan(call(jnp.asarray(5, dtype))).any()
    assert np.isnan(call(jnp.asarray(TOP - 1, dtype))).all()
    other = {"query_position": "key_position", "key_position": "query_position"}[name]
    far = jax.jit(
        lambda p: jattn.attention(KEY, KEY, KEY, mask=~Causal(), **{name: p, other: -9})
    )
    assert np.isnan(far(jnp.asarray(TOP - 5, "int32"))).all()


COMPARED = {
    "int8": (np.array([7, -1], np.int8), None, APART),
    "int8_and_int16": (np.array([7, -1], np.int8), np.array([255, -1], np.int16), None),
    "uint8_and_int8": (np.array([255, 1], np.uint8), np.array([-1, 1], np.int8), None),
    "uint32": (np.array([5, 5 + TOP], np.uint32), None, APART),
    "int64_that_fits": (np.array([5, 6]), None, APART),
}


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("x64", [False, True])
def test_ids_of_any_type_are_compared_in_full(name, x64):
    query_ids, key_ids, want = COMPARED[name]
    if want is None:
        equal = query_ids.astype(int)[:, None] == key_ids.astype(int)
        want = np.where(equal, 1 / np.maximum(equal.sum(1, keepdims=True), 1), 0)
    with jax.enable_x64(x64):
        np.testing.assert_array_equal(weights(Segments(query_ids, key_ids)), want)
        if key_ids is None:
            traced = jax.jit(
                lambda ids: jattn.attention_weights(KEY, KEY, mask=Segments(ids))
            )
            np.testing.assert_array_equal(traced(query_ids)[0, 0], want)


def test_ids_of_64_bits_with_x64():
    ids = np.array([7, 7 + FAR])
    with jax.enable_x64(True):
        for kind in (ids, ids.astype(np.uint64)):
            np.testing.assert_array_equal(weights(Segments(kind)), APART)
            traced = jax.jit(
                lambda ids: jattn.attention_weights(KEY, KEY, mask=Segments(ids))
            )
            np.testing.assert_array_equal(traced(kind)[0, 0], APART)
        padded = weights(Segments(ids, padding_id=7 + FAR))
        np.testing.assert_array_equal(padded, [[1, 0], [0, 0]])
        with pytest.raises(
            ValueError, match="`query_ids` and `key_ids` must be of one type"
        ):
            weights(Segments(ids.astype(np.uint64), ids))


def test_ids_of_64_bits_are_compared_in_every_tile():
    ids = np.sort(np.random.default_rng(0).integers(0, 5, 2100)) * FAR
    with jax.enable_x64(True):
        key = normal(0, (2100, 1, 8), jnp.float32)
        mask = Segments(ids) & Causal()
        got = jattn.attention(key, key, key, mask=mask)
        want = jattn.attention(key, key, key, mask=Segments(ids // FAR) & Causal())
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_large_numbers_mean_everything_or_nothing():
    np.testing.assert_array_equal(weights(Causal(TOP - 1)), BOTH)
    np.testing.assert_array_equal(weights(Causal(-TOP)), 0 * BOTH)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(weights(Causal(2**40)), BOTH)
        np.testing.assert_array_equal(weights(Lengths(np.array([FAR + 1]))), BOTH)
        np.testing.assert_array_equal(weights(Prefix(FAR)), BOTH)
        traced = jax.jit(lambda n: jattn.attention_weights(KEY, KEY, mask=Lengths(n)))
        np.testing.assert_array_equal(traced(np.array([FAR + 1]))[0, 0], BOTH)


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="`rows` must hold integers of 32 bits"):
        jattn.attention_weights(KEY, KEY, rows=np.array([FAR]))


def _truncated(kv, length):
    return kv.truncate(length).length


TOKENS = jnp.zeros((2, 3, 1, 4))
CACHES = {
    "plain": lambda: jattn.caches.empty(2, 4, 1, 4).append(*2 * [TOKENS]),
    "ragged": lambda: jattn.caches.empty(2, 4, 1, 4, ragged=True).append(*2 * [TOKENS]),
    "paged": lambda: jattn.caches.paged(4, 2, 1, 4, batch_size=2, max_pages=2).append(
        *2 * [TOKENS]
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_lengths_of_caches_do_not_wrap(name):
    with jax.enable_x64(True):
        kv = CACHES[name]()
        traced = jax.jit(_truncated)
        for length in (np.uint32(2**32 - 1), np.int64(2**32 + 1), np.uint64(2**63)):
            assert (_truncated(kv, length) == 3).all()
            assert (traced(kv, jnp.asarray(length)) == 3).all()
        assert (traced(kv, jnp.int64(-(2**32) + 1)) == 0).all()
        append = jax.jit(lambda kv, x, count: kv.append(x, x, count=count).length)
        # More than T is T, also for a number that would wrap to 0.
        assert (append(kv, TOKENS[:, :1], jnp.int64(2**32)) == 4).all()


@pytest.mark.parametrize("name", [*CACHES, "latent"])
def test_known_lengths_below_zero_are_refused(name):
    kv = {**CACHES, "latent": _latent}[name]()
    below = [-1, np.int64(-1), np.array(-1), jnp.int32(-1)]
    below += [jnp.array([2, -1]), [2, -1]] if kv.length.ndim else []
    for length in below:
        with pytest.raises(ValueError, match=r"`length` must be at least 0, got .*-1"):
            kv.truncate(length)
        assert (jax.jit(_truncated)(kv, jnp.asarray(length)) <= 2).all()
    # As of a list, the first tokens of fewer are all of them.
    assert (kv.truncate(7).length == 3).all()
    assert (kv.truncate(0).length == 0).all()


def _latent():
    latent = jattn.caches.latent(2, 4, 4, 1)
    return latent.append(TOKENS[:, :, 0], TOKENS[:, :, 0, :1])


def test_examples_and_heads_are_counted_from_whole_numbers():
    for number in (1.0, "1", np.float32(2)):
        with pytest.raises(ValueError, match="counted_from: `b` must be a whole number"):
            jattn.counted.counted_from(Causal(), b=number)
    with pytest.raises(ValueError, match="counted_from: `n` must be a whole number"):
        jattn.counted.counted_from(lambda b, n, t, s: b == n, n=0.5)


def test_a_prefix_called_with_positions_does_not_wrap():
    length = jnp.array([2**32 - 1], jnp.uint32)
    got = weights(lambda b, n, t, s: Prefix(length)(b, n, t, s))
    np.testing.assert_array_equal(got, BOTH)
    lengths, x = np.array([[1, 2]]), jnp.zeros((1, 2, 2, 1, 4))
    mask = lambda b, n, t, s: Prefix(lengths)(b, n, t, s)
    got = jattn.attention_weights(x, x, mask=mask)[0, :, 0, 0]
    np.testing.assert_array_equal(got, [[1, 0], [0.5, 0.5]])


NARROW = [np.int8(1), np.array(1, np.int16), *(jnp.asarray(1, f"int{x}") for x in (2, 8))]


@pytest.mark.parametrize("one", NARROW)
def test_narrow_integers_of_masks_that_are_called(one):
    for mask in (Causal, Prefix, lambda x: Window(x, x), lambda x: counted_from(Causal(x))):
        called = lambda x, mask=mask: weights(lambda *at: mask(x)(*at))
        np.testing.assert_array_equal(called(one), weights(mask(1)))
    for by in (Causal(), lambda b, n, t, s: b + n + s <= 2):
        np.testing.assert_array_equal(
            weights(counted_from(by, b=one, n=one)), weights(counted_from(by, b=1, n=1))
        )


def test_wide_integers_of_masks_that_are_called():
    calls = {"offset": (Causal, ()), "length": (Prefix, (1,))}
    for name, (mask, shape) in calls.items():
        number = np.full(shape, FAR + 1)
        called = lambda mask=mask, x=number: weights(lambda *at: mask(x)(*at))
        with pytest.raises(ValueError, match=f"`{name}` must hold integers of 32 bits"):
            called()
        with jax.enable_x64(True):
            np.testing.assert_array_equal(called(), BOTH)
    with jax.enable_x64(True):
        got = weights(lambda *at: Window(2**40, None)(*at))
    np.testing.assert_array_equal(got, BOTH)


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int64])
def test_sizes_of_numpy_are_those_of_python(kind):
    rule = Causal()
    for args in ((96, 2), (96, 2, rule), (96, 3, rule, 16), (64, 32, rule, 2)):
        numbers = [kind(x) if isinstance(x, int) else x for x in args]
        np.testing.assert_array_equal(jattn.balanced(*numbers), jattn.balanced(*args))
    long = jattn.balanced(256, kind(2), rule, kind(64))
    np.testing.assert_array_equal(long, jattn.balanced(256, 2, rule, 64))
    inputs = [jax.ShapeDtypeStruct((x(100), x(2), x(64)), "float32") for x in (kind, int)]
    got, want = (jattn.block_table(rule, x, x, block=kind(100)) for x in inputs)
    assert got == want


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_rows_of_few_bits_count_in_full(dtype):
    query = normal(0, (300, 1, 4))
    rows = np.array([0, 127] if dtype.startswith("u") else [-1, -128, 127], dtype)
    want = jattn.attention_weights(query, query)[:, rows.astype(int)]
    look = lambda rows: jattn.attention_weights(query, query, rows=rows)
    for got in (look(rows), jax.jit(look)(rows)):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_known_lengths_of_64_bits_are_read_inside_jit():
    with jax.enable_x64(True):
        lengths = jnp.array([1], jnp.int64)
        got = jax.jit(lambda: jattn.attention_weights(KEY, KEY, mask=Lengths(lengths)))()
    np.testing.assert_array_equal(got[0, 0], [[1, 0], [1, 0]])


def test_what_has_no_number_of_its_own_is_refused():
    with pytest.raises(
        ValueError, match="`scale` must be given, for the cache cannot know"
    ):
        _latent().attend(jnp.zeros((2, 1, 1, 5)), scale=None)
    for count in (-1, np.array([0, -1])):
        with pytest.raises(ValueError, match=r"caches.reserve: `count` must be at least 0"):
            CACHES["paged"]().reserve(count)
