"""Block tables as masks: made once, converted, reused, refused; and what they skip."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.api.attention import _on_one
from jattn.blocks import of_call
from jattn.blocks.kinds import EMPTY, FULL, PARTIAL, resize, spread
from jattn.call.pose import pose
from jattn.masks import Causal, Explicit, Lengths, Segments, Window
from jattn.modifiers import ALiBi, Bias, SoftCap
from tests.helpers.draws import normal

T, B, N = 1100, 2, 2
INPUTS = [normal(i, (B, T, N, 4)) for i in range(3)]
IDS = jnp.repeat(jnp.arange(11), 100)
LENGTHS = jnp.array([300, 1030])
attention = functools.partial(jattn.attention, implementation="blockwise")
make = functools.partial(jattn.block_table, query=INPUTS[0], key=INPUTS[1])

MASKS = {
    "causal": Causal(),
    "segments": Segments(IDS) & Causal(),
    "lengths": Lengths(LENGTHS),
    "lambda": lambda b, n, t, s: (IDS[t] == IDS[s]) & (t >= s),
    "explicit": Explicit(np.tri(T, k=-40, dtype=bool)),
    "explicit, per example": Explicit(
        np.arange(T) < np.array(LENGTHS)[:, None, None, None]
    ),
    "array": np.tri(T, k=90, dtype=bool),
    "heads": lambda b, n, t, s: t - s < 100 * n,
}


def in_blocks(pairs, rows, columns):
    """The kinds of a dense mask's blocks."""
    cut = lambda x, size: np.array_split(x, range(size, x.shape[-1], size), axis=-1)
    strips = [strip.swapaxes(-1, -2) for strip in cut(pairs.swapaxes(-1, -2), rows)]
    kinds = [
        [x.any((-1, -2)).astype(np.int8) + x.all((-1, -2)) for x in cut(strip, columns)]
        for strip in strips
    ]
    return np.moveaxis(np.array(kinds), (0, 1), (-2, -1))


def dense(mask):
    return np.asarray(jattn.attention_logits(*INPUTS[:2], mask=mask)) > -np.inf


@pytest.mark.parametrize("name", MASKS)
def test_table_of_a_mask_is_that_of_its_pairs(name):
    table = make(MASKS[name], block=(128, 256))
    found = spread(table.kinds, table.lengths, table.blocks)
    expected = in_blocks(dense(MASKS[name]), 128, 256)
    np.testing.assert_array_equal(np.broadcast_to(found, expected.shape), expected)


@pytest.mark.parametrize("block", [128, (100, 300), 512, 4096])
@pytest.mark.parametrize("name", MASKS)
def test_attention_with_a_table_is_attention_with_its_mask(name, block):
    expected = attention(*INPUTS, mask=MASKS[name])
    found = attention(*INPUTS, mask=make(MASKS[name], block=block))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@hypothesis.settings(max_examples=100, deadline=None, database=None)
@hypothesis.given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_resized_table_says_no_more_than_the_pairs(seed, lengths, blocks, wanted):
    rng = np.random.default_rng(seed)
    pairs = np.repeat(rng.integers(0, 2, (lengths[0], 1 + lengths[1] // 5)) > 0, 5, 1)
    pairs = pairs[:, : lengths[1]]
    kinds, truth = in_blocks(pairs, *blocks), in_blocks(pairs, *wanted)
    found = resize(kinds, lengths, blocks, wanted)
    assert ((found == truth) | (found == PARTIAL)).all()
    if all(want % have == 0 for have, want in zip(blocks, wanted, strict=True)):
        np.testing.assert_array_equal(found == EMPTY, truth == EMPTY)
        np.testing.assert_array_equal(found == FULL, truth == FULL)


def test_resized_table_is_the_same_in_the_graph():
    kinds = np.random.default_rng(0).integers(0, 3, (2, 1, 9, 7)).astype(np.int8)
    options = {"lengths": (35, 21), "blocks": (4, 3), "wanted": (10, 2)}
    resized = functools.partial(resize, **options)
    found = jax.jit(resized)(kinds)
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, resized(kinds))


def test_attention_asks_the_table_and_not_the_mask(monkeypatch):
    table = make(Causal())
    monkeypatch.setattr(of_call.classify, "classify", None)
    found = attention(*INPUTS, mask=table, scale=0.75)
    np.testing.assert_allclose(
        found,
        jattn.attention(*INPUTS, mask=Causal(), scale=0.75, implementation="dense"),
        rtol=1e-5,
        atol=1e-6,
    )


# ---- through transformations ----


def test_one_table_serves_the_layers_of_a_scan():
    def layers(x, table):
        step = lambda x, _: (attention(x, x, x, mask=table), None)
        return jax.lax.scan(step, x, length=3)[0]

    mask = Segments(IDS) & Causal()
    found = jax.jit(layers)(INPUTS[0], make(mask))
    expected = INPUTS[0]
    for _ in range(3):
        expected = attention(expected, expected, expected, mask=mask)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_tables_of_their_own_go_through_a_scan_over_layers():
    def layers(x, ids):
        made = jax.vmap(lambda ids: make(Segments(ids)))(ids)
        step = lambda x, table: (attention(x, x, x, mask=table), None)
        return jax.lax.scan(step, x, made)[0]

    ids = jnp.stack([IDS, IDS // 3])
    found = jax.jit(layers)(INPUTS[0], ids)
    expected = INPUTS[0]
    for own in ids:
        expected = attention(expected, expected, expected, mask=Segments(own))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_table_is_made_and_used_under_vmap():
    def one(ids, query, key, value):
        table = jattn.block_table(Segments(ids), query, key)
        return attention(query, key, value, mask=table)

    ids = jnp.stack([IDS, IDS // 3])
    expected = attention(*INPUTS, mask=Segments(ids))
    found = jax.vmap(one)(ids, *INPUTS)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_table_returned_by_jit_is_the_table():
    made = jax.jit(lambda ids: make(Segments(ids) & Causal()))(IDS)
    plain = make(Segments(IDS) & Causal())
    np.testing.assert_array_equal(made.kinds, plain.kinds)
    assert (made.lengths, made.blocks) == (plain.lengths, plain.blocks)
    assert str(made) == str(plain)


@pytest.mark.parametrize("with_table", [False, True])
def test_new_ids_of_one_shape_compile_nothing_again(with_table):
    def call(ids):
        mask = Causal() & (lambda b, n, t, s: ids[t] == ids[s])
        attention(*INPUTS, mask=make(mask) if with_table else mask)

    call(IDS)
    before = _on_one._cache_size()
    for ids in (IDS[::-1], IDS // 2):
        call(ids)
    assert _on_one._cache_size() == before


# ---- every derivative skips the same blocks ----


CELL = 384  # of the tiles of 768 × 768 that 1536 queries and keys have


def wrong_table(problem, operands, block_q, block_kv):
    """Claims of causal attention that no query may look beyond its own cell of keys."""
    assert (block_q, block_kv) == (CELL, CELL)
    return (np.eye(1536 // CELL, dtype=np.int8) * np.int8(PARTIAL))[None, None]


def results(mask):
    inputs = [jnp.concatenate([x[:1], x[:1, :436]], 1) for x in INPUTS]
    attend = lambda *inputs: attention(*inputs, mask=mask)
    output, pull = jax.vjp(attend, *inputs)
    tangent = jax.jvp(attend, inputs, inputs[::-1])[1]
    return output, tangent, *pull(output)


def test_output_gradients_and_tangent_skip_the_same_blocks(monkeypatch):
    expected = results(lambda b, n, t, s: (t >= s) & (t // CELL == s // CELL))
    jax.clear_caches()
    monkeypatch.setattr(of_call, "block_table", wrong_table)
    found = results(Causal() & Segments(jnp.zeros(1536, jnp.int32)))
    jax.clear_caches()
    for have, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-6)


# ---- as a mask ----


def test_table_combines_as_its_mask():
    combined = make(Causal()) & Window(5, 0) | ~make(Causal())
    assert not isinstance(combined, jattn.BlockTable)
    np.testing.assert_array_equal(
        dense(combined), dense(Causal() & Window(5, 0) | ~Causal())
    )


def test_table_answers_as_its_mask():
    assert bool(make(Causal())(0, 0, 2, 1))


def test_table_of_a_table_is_that_of_its_mask():
    table = make(make(Causal(), block=256))
    np.testing.assert_array_equal(table.kinds, make(Causal()).kinds)


def test_modifier_skips_beside_a_table():
    near = lambda logit, b, n, t, s: jnp.where(t - s < 64, logit, -jnp.inf)
    found = attention(*INPUTS, mask=make(Causal()), modifier=near)
    expected = attention(*INPUTS, mask=Causal() & Window(63, None))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_table_takes_positions():
    query, key, value = INPUTS[0][:, -100:], *INPUTS[1:]
    at = jnp.int32(T - 100)
    table = jattn.block_table(Causal(), query, key, query_position=at, block=50)
    found = attention(query, key, value, mask=table, query_position=at)
    expected = attention(*INPUTS, mask=Causal())[:, -100:]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


REFUSALS = {
    "lengths": (
        lambda: attention(*[x[:, :50] for x in INPUTS], mask=make(Causal())),
        "attention: `mask` is a block table for T=1100 and S=1100, but the inputs have T=5",
    ),
    "batch": (
        lambda: attention(
            *[jnp.concatenate([x, x[:1]]) for x in INPUTS], mask=make(Lengths(LENGTHS))
        ),
        "`mask` is a block table for B=2, but the inputs have B=3; make one",
    ),
    "position": (
        lambda: attention(*INPUTS, mask=make(Causal()), query_position=7),
        "`mask` is a block table made without `query_position`; give",
    ),
    "no position": (
        lambda: attention(*INPUTS, mask=make(Causal(), key_position=7)),
        "`mask` is a block table made with `key_position`; give",
    ),
    "block": (lambda: make(Causal(), block=0), "block_table: `block` must be a number of"),
    "pair": (lambda: make(Causal(), block=(1, 2, 3)), "`block` must be a number of"),
    "shape": (
        lambda: jattn.block_table(Causal(), INPUTS[0], INPUTS[1][0]),
        "block_table: `key` must have as many axes as `query`",
    ),
    "mask": (lambda: make(Segments(IDS[:3])), "masks.Segments: `query_ids` must broadcast"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal_says_what_to_do(name):
    call, sentence = REFUSALS[name]
    with pytest.raises(ValueError, match=sentence):
        call()


def test_position_of_zero_is_no_position():
    attention(*INPUTS, mask=make(Causal()), query_position=0)


# ---- as text ----


def test_text_has_at_most_twenty_cells_on_a_side():
    lines = str(make(Causal(), block=16)).splitlines()
    assert lines[0] == "BlockTable(1×1×1100×1100 in blocks of 16×16):"
    assert lines[1] == "49.3 % empty, 1.45 % partial, 49.3 % full"
    assert len(lines) == 2 + 18
    assert lines[2:5] == ["░", "█░", "██░"]


def test_text_of_a_traced_table_says_so():
    seen = []
    jax.jit(lambda ids: seen.append(str(make(Segments(ids)))))(IDS)
    assert seen == ["BlockTable(1×1×1100×1100 in blocks of 128×128): known when it runs"]


def test_text_of_no_pairs_is_short():
    shape = jax.ShapeDtypeStruct((0, 1, 4), "float32")
    text = str(jattn.block_table(Causal(), shape, shape))
    assert (
        text
        == "BlockTable(1×1×0×0 in blocks of 128×128):\n0 % empty, 0 % partial, 0 % full"
    )


# ---- explained ----

SHAPE = jax.ShapeDtypeStruct((2, 4096, 4, 64), "float32")
explain = functools.partial(jattn.explain, SHAPE, SHAPE, SHAPE, implementation="blockwise")


def test_explain_says_how_many_blocks_are_skipped():
    found = explain(mask=Causal())
    assert found.flops_visited == 2 * 2 * 4 * 36 * 512**2 * 128
    assert str(found).splitlines()[3:5] == [
        "blocks          43.8 % skipped, 12.5 % partial (of 8 × 8 blocks of 512 × 512)",
        "not skipped     19.3 Gflop",
    ]


def test_partial_tiles_are_cut_but_not_into_small_cells():
    short = jax.ShapeDtypeStruct((2, 700, 4, 64), "float32")
    blocks = jattn.explain(
        short, short, short, mask=Causal(), implementation="blockwise"
    ).blocks
    assert blocks.sizes == (700, 700)
    assert explain(mask=Causal() & Window(3000, 0)).blocks.sizes == (512, 512)


def test_explain_counts_blocks_that_a_modifier_skips():
    near = lambda logit, b, n, t, s: jnp.where(abs(t - s) < 512, logit, -jnp.inf)
    blocks = explain(modifier=near).blocks
    count = blocks.counts[
        0
    ]  # far more than 512 pairs wide, so that three diagonals are left
    assert blocks.empty == (count**2 - (3 * count - 2)) / count**2
    assert explain(modifier=lambda logit, b, n, t, s: 2 * logit).blocks is None


@pytest.mark.parametrize("as_shape", [True, False])
def test_explain_says_when_blocks_are_known_only_when_it_runs(as_shape):
    ids = jnp.zeros(4096, jnp.int32)
    if as_shape:
        found = explain(mask=Segments(jax.ShapeDtypeStruct(ids.shape, ids.dtype)))
    else:
        seen = []
        jax.jit(lambda ids: seen.append(explain(mask=Segments(ids))))(ids)
        (found,) = seen
    assert "known when it runs (of 8 × 8 blocks of 512 × 512)" in str(found)
    assert found.flops_visited is None


def test_explain_of_dense_skips_nothing():
    assert explain(mask=Causal()).blocks is not None
    found = jattn.explain(SHAPE, SHAPE, SHAPE, mask=Causal(), implementation="dense")
    assert found.blocks is None


def hidden(shape):
    """A bias that is −∞ for the last half of its longest axis."""
    (axis,) = (i for i in (2, 3) if shape[i] > 1)
    places = np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(4)])
    return jnp.where(np.broadcast_to(places < shape[axis] // 2, shape), 0.5, -jnp.inf)


@pytest.mark.parametrize("shape", [(1, 1, 1, T), (1, 1, T, 1), (B, 1, 1, T), (1, N, 1, T)])
def test_table_knows_of_a_concrete_one_sided_bias(shape):
    problem, operands = pose("test", *INPUTS, bias=hidden(shape))
    assert of_call.skips(problem, operands)
    table = of_call.block_table(problem, operands, 110, 110)
    assert isinstance(table, np.ndarray)
    assert np.mean(table == EMPTY) == 0.5
    traced = jax.jit(
        lambda bias: of_call.block_table(*pose("x", *INPUTS, bias=bias), 110, 110)
    )
    np.testing.assert_array_equal(traced(hidden(shape)), table)


SINKS = {
    "where": lambda x: lambda logit, b, n, t, s: jnp.where(s < T // 2, logit, -jnp.inf),
    "added": lambda x: lambda logit, b, n, t, s: logit + x[s],
    "Bias": lambda x: Bias(x[:T].reshape(1, 1, 1, T)),
    "capped, then added": lambda x: (
        SoftCap(5.0) >> (lambda logit, b, n, t, s: logit + x[s])
    ),
}
PLAIN = {
    "cap": lambda x: SoftCap(x[0] + 50.0),
    "ALiBi": lambda x: ALiBi(x[:N]),
    "product": lambda x: lambda logit, b, n, t, s: logit + x[t] * x[s],
    "tanh": lambda x: lambda logit, b, n, t, s: jnp.tanh(logit + x[s]),
}


@pytest.mark.parametrize("name", SINKS)
def test_modifiers_hide_blocks_of_traced_arrays(name):
    bias = hidden((1, 1, 1, T)).ravel()
    make = lambda x: of_call.block_table(
        *pose("x", *INPUTS, modifier=SINKS[name](x)), 110, 110
    )
    for table in (make(bias), jax.jit(make)(bias)):
        assert np.mean(np.asarray(table) == EMPTY) == 0.5


@pytest.mark.parametrize("name", PLAIN)
def test_modifiers_that_hide_nothing_have_a_table_before_they_run(name):
    kinds = []

    @jax.jit
    def run(x):
        problem, operands = pose("x", *INPUTS, modifier=PLAIN[name](x))
        kinds.append(of_call.block_table(problem, operands, 110, 110))
        return x

    run(jnp.ones(T))
    assert isinstance(kinds[0], np.ndarray)
    assert np.all(kinds[0] == FULL)


def test_a_table_is_made_once_for_what_is_hoisted(monkeypatch):
    asked = []
    real = of_call.classify.dead_blocks
    monkeypatch.setattr(
        of_call.classify, "dead_blocks", lambda *args: asked.append(args) or real(*args)
    )
    x = hidden((1, 1, 1, T)).ravel()
    modifier = lambda logit, b, n, t, s: logit + jnp.exp(x[t] * 0.5) + x[s]
    found = attention(*INPUTS, modifier=modifier)
    assert len(asked) == 1
    expected = jattn.attention(*INPUTS, modifier=modifier, implementation="dense")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_table_is_of_the_numbers_that_it_was_made_with():
    ids, x = np.array([0, 0, 1, 1]), jnp.zeros((1, 4, 1, 4))
    table = jattn.block_table(Segments(ids), x, x, block=2)
    ids[:] = 0  # the mask would allow everything now, and the table skips half of it
    got = jattn.attention_weights(x, x, mask=table)[0, 0]
    np.testing.assert_array_equal(got, np.kron(np.eye(2), np.full((2, 2), 0.5)))
