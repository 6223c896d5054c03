"""Tables of blocks: sound for every mask, and exact where they can be."""

import functools
import itertools
import operator
import os
import unittest.mock

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.blocks import graph, ranges
from jattn.blocks.classify import classify, dead_blocks, evaluate
from jattn.blocks.classify import grid as cut_grid
from tests.helpers import random_masks

SCALAR = jax.ShapeDtypeStruct((), jnp.int32)
EXAMPLES = int(os.environ.get("EXAMPLES", "300"))
fuzz = functools.partial(
    hypothesis.settings,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def traced(mask, arrays, leading=()):
    """The jaxpr of a mask that is called as mask(arrays, *indices), and its constants."""
    arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
    closed = jax.make_jaxpr(lambda *xs: mask(arrays, *xs))(*leading, *[SCALAR] * 6)
    return closed.jaxpr, closed.consts


def of_grid(function, mask, arrays, grid, leading=()):
    """A function of `jattn.blocks.table` on a mask that also sees row and column."""
    aligned = (grid.row, grid.column)
    return function(*traced(mask, arrays, leading), grid, aligned)


def table_of(mask, arrays, grid):
    return of_grid(classify, mask, arrays, grid)


def dense(mask, arrays, grid):
    """Evaluates a mask at every point, one primitive at a time."""
    fields = grid.b, grid.n, grid.t, grid.s, grid.row, grid.column
    points = [jnp.asarray(x).ravel() for x in np.broadcast_arrays(*fields)]
    shape = np.broadcast_shapes(*(x.shape for x in fields))
    arrays = {name: jnp.asarray(a) for name, a in arrays.items()}
    result = jax.vmap(lambda *xs: jnp.asarray(mask(arrays, *xs)))(*points)
    return np.asarray(result).reshape(shape)


def dense_table(pairs, grid):
    B, N = pairs.shape[:2]
    table = np.zeros((B, N, *grid.shape), np.int8)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            rows = slice(i * grid.block_q, (i + 1) * grid.block_q)
            columns = slice(j * grid.block_kv, (j + 1) * grid.block_kv)
            block = pairs[:, :, rows, columns].reshape(B, N, -1)
            table[:, :, i, j] = block.any(-1) + block.all(-1).astype(np.int8)
    return table


def make_grid(shape, positions, cut, batch=random_masks.B, heads=random_masks.N):
    return cut_grid((batch, heads, *shape), cut, *positions)


def assert_sound(table, pairs, grid):
    truth = dense_table(pairs, grid)
    table = np.broadcast_to(np.asarray(table), truth.shape)
    wrong = (table != 1) & (table != truth)
    assert not wrong.any(), np.argwhere(wrong)[0]


def as_mask(term):
    return lambda arrays, *point: term.function((arrays, point))


def check_soundness(problem):
    term, arrays, shape, positions, cut = problem
    mask, grid = as_mask(term), make_grid(shape, positions, cut)
    table = table_of(mask, arrays, grid)
    assert_sound(table, dense(mask, arrays, grid), grid)


def check_soundness_traced(problem):
    term, arrays, shape, positions, cut = problem
    mask, grid = as_mask(term), make_grid(shape, positions, cut)

    @jax.jit
    def table(arrays, positions):
        return table_of(mask, arrays, make_grid(shape, positions, cut))

    result = table(arrays, positions)
    assert_sound(result, dense(mask, arrays, grid), grid)


@fuzz(max_examples=EXAMPLES)
@hypothesis.given(random_masks.problems())
def test_every_table_is_sound(problem):
    check_soundness(problem)


@fuzz(max_examples=EXAMPLES // 5)
@hypothesis.given(random_masks.problems())
def test_every_table_is_sound_from_intervals_alone(problem):
    with unittest.mock.patch.object(graph, "_MAX_SIZE", 4):
        check_soundness(problem)


@fuzz(max_examples=EXAMPLES // 20)
@hypothesis.given(random_masks.problems())
def test_every_table_is_sound_when_traced(problem):
    check_soundness_traced(problem)


DOC = np.repeat(np.arange(6, dtype=np.int32), (3, 9, 1, 7, 12, 8))
ARRAYS = {
    "doc": DOC,
    "padded": np.where(np.arange(40) < 21, DOC + 1, 0).astype(np.int32),
    "lengths": np.array([11, 17], np.int32),
    "left": np.array([5, 9], np.int32),
}
SIMPLE = {
    "causal": lambda a, b, n, t, s, row, column: t >= s,
    "causal + 3": lambda a, b, n, t, s, row, column: t + 3 >= s,
    "causal - 3": lambda a, b, n, t, s, row, column: t - 3 >= s,
    "window": lambda a, b, n, t, s, row, column: (t - 5 <= s) & (s <= t + 2),
    "heads": lambda a, b, n, t, s, row, column: (t - a["left"][n] <= s) & (s <= t),
    "prefix": lambda a, b, n, t, s, row, column: (s < 7) | (t >= s),
    "lengths": lambda a, b, n, t, s, row, column: column < a["lengths"][b],
    "segments": lambda a, b, n, t, s, row, column: a["doc"][t] == a["doc"][s],
    "padded": lambda a, b, n, t, s, row, column: (
        (a["padded"][t] == a["padded"][s]) & (a["padded"][s] != 0)
    ),
    "chunked": lambda a, b, n, t, s, row, column: t // 8 == s // 8,
    "dilated": lambda a, b, n, t, s, row, column: (t // 4 - s // 4) % 3 == 0,
    "sink": lambda a, b, n, t, s, row, column: (s < 3) | ((t - 5 <= s) & (s <= t)),
    "document-causal": lambda a, b, n, t, s, row, column: (
        (t >= s) & (a["doc"][t] == a["doc"][s])
    ),
}
JOINED = {
    f"{x} {sign} {y}": lambda *p, f=f, g=g, join=join: join(f(*p), g(*p))
    for (x, f), (y, g) in itertools.combinations(SIMPLE.items(), 2)
    for sign, join in {"&": operator.and_, "|": operator.or_}.items()
}
# Shape, offsets of the positions, blocks; a dilation's blocks hold whole ones of these.
LAYOUTS = [
    ((24, 24), (None, None), (4, 4)),
    ((26, 23), (None, None), (4, 4)),
    ((24, 24), (None, None), (2, 4)),
    ((8, 24), (16, None), (4, 4)),
    ((1, 24), (19, None), (4, 2)),
    ((9, 21), (16, 4), (4, 4)),
]


def all_pairs(mask, grid):
    """Evaluates a mask that broadcasts at every point."""
    fields = grid.b, grid.n, grid.t, grid.s, grid.row, grid.column
    arrays = {name: jnp.asarray(a) for name, a in ARRAYS.items()}
    shape = np.broadcast_shapes(*(x.shape for x in fields))
    return np.broadcast_to(mask(arrays, *map(jnp.asarray, fields)), shape)


@pytest.mark.parametrize("name", [*SIMPLE, *JOINED])
def test_tables_are_exact(name):
    mask = (SIMPLE | JOINED)[name]
    for layout in LAYOUTS:
        grid = make_grid(*layout)
        table = table_of(mask, ARRAYS, grid)
        truth = dense_table(all_pairs(mask, grid), grid)
        np.testing.assert_array_equal(np.broadcast_to(table, truth.shape), truth)


@pytest.mark.parametrize("name", [*SIMPLE, "segments & sink", "causal - 3 | segments"])
@pytest.mark.parametrize("size", [None, 1, 4], ids=["in levels", "compared", "in parts"])
def test_tables_are_exact_when_traced(name, size, monkeypatch):
    if size:  # as on a GPU
        compare = functools.partial(ranges._least_in, size)
        monkeypatch.setattr(ranges, "_least_of_levels", compare)
    mask = (SIMPLE | JOINED)[name]
    shape, _, cut = LAYOUTS[0]

    def table(arrays, position):
        return table_of(mask, arrays, make_grid(shape, (position, position), cut))

    grid = make_grid(*LAYOUTS[0])
    truth = dense_table(all_pairs(mask, grid), grid)
    result = jax.jit(table, static_argnums=1)(ARRAYS, None)
    np.testing.assert_array_equal(np.broadcast_to(result, truth.shape), truth)


def pictures(mask, arrays=None, query_position=None):
    arrays = {name: a.astype(np.int32) for name, a in (arrays or {}).items()}
    grid = cut_grid((1, 1, 8, 8), (2, 2), query_position, None)
    table = table_of(mask, arrays, grid)
    table = np.broadcast_to(table[0, 0], grid.shape)
    return ["".join("·◪■"[x] for x in row) for row in table]


def test_picture_of_causal():
    drawn = pictures(lambda a, b, n, t, s, row, column: t >= s)
    assert drawn == ["◪···", "■◪··", "■■◪·", "■■■◪"]


def test_picture_of_documents():
    arrays = {"doc": np.array([0, 0, 0, 1, 1, 1, 2, 2])}
    same = lambda a, b, n, t, s, row, column: a["doc"][t] == a["doc"][s]
    assert pictures(same, arrays) == ["■◪··", "◪◪◪·", "·◪■·", "···■"]


def test_picture_of_unsorted_positions():
    position = np.array([6, 7, 0, 1, 4, 5, 2, 3])
    causal = lambda a, b, n, t, s, row, column: t >= s
    drawn = pictures(causal, query_position=position)
    assert drawn == ["■■■◪", "◪···", "■■◪·", "■◪··"]


def test_picture_of_a_table_of_blocks():
    arrays = {"kept": np.array([[1, 0], [1, 1]])}
    mask = lambda a, b, n, t, s, row, column: a["kept"][t // 4, s // 4] > 0
    assert pictures(mask, arrays) == ["■■··", "■■··", "■■■■", "■■■■"]


def test_picture_of_boundaries_that_are_searched():
    arrays = {"ends": np.array([2, 6])}

    def mask(a, b, n, t, s, row, column):
        part = lambda x: jnp.searchsorted(a["ends"], x, side="right")
        return part(t) == part(s)

    assert pictures(mask, arrays) == ["■···", "·■■·", "·■■·", "···■"]


def test_bounds_that_contradict_leave_nothing():
    mask = lambda a, b, n, t, s, row, column: (t >= s) & (t + 1 <= s)
    assert pictures(mask) == ["····"] * 4


def test_bounds_that_wrap_around_do_not_contradict():
    far = np.int32(2**31 - 1)
    mask = lambda a, b, n, t, s, row, column: (t + far < s) & (t >= s)
    assert pictures(mask)[3][0] != "·"


def test_table_is_numpy_and_runs_nothing_when_all_is_known():
    mask = (SIMPLE | JOINED)["padded & sink"]
    grid = make_grid(*LAYOUTS[0])
    program = traced(mask, ARRAYS)

    def run(x):
        table = classify(*program, grid, (grid.row, grid.column))
        assert isinstance(table, np.ndarray)
        return x

    assert not jax.make_jaxpr(run)(0.0).eqns


def test_searches_are_static_when_all_is_known():
    ends = np.array([2, 6], np.int32)
    mask = lambda a, b, n, t, s, row, column: jnp.searchsorted(a["ends"], t) > s
    grid = make_grid(*LAYOUTS[0])
    program = traced(mask, {"ends": ends})

    def run(x):
        table = classify(*program, grid, (grid.row, grid.column))
        assert isinstance(table, np.ndarray)
        return x

    jax.make_jaxpr(run)(0.0)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("causal", (1, 1, 6, 6)),
        ("lengths", (2, 1, 1, 6)),
        ("heads", (1, 2, 6, 6)),
        ("heads & lengths", (2, 2, 6, 6)),
    ],
)
def test_table_has_only_the_axes_that_the_mask_depends_on(name, shape):
    mask = (SIMPLE | JOINED)[name]
    grid = make_grid(*LAYOUTS[0])
    table = table_of(mask, ARRAYS, grid)
    assert table.shape == shape


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
def test_empty_sides_have_no_blocks(shape):
    mask = SIMPLE["document-causal"]
    grid = make_grid(shape, (None, None), (4, 4))
    table = table_of(mask, ARRAYS, grid)
    assert np.broadcast_to(table, (1, 1, *grid.shape)).shape[2:] == grid.shape


MODIFIERS = {
    "where": lambda keep, logit: jnp.where(keep, logit, -jnp.inf),
    "add": lambda keep, logit: logit + jnp.where(keep, 0.0, -jnp.inf),
    "cap": lambda keep, logit: jnp.where(keep, 5 * jnp.tanh(logit / 5), -jnp.inf),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", MODIFIERS)
def test_modifier_of_minus_infinity_is_dead_where_its_mask_is_empty(name, dtype):
    mask = SIMPLE["document-causal"]
    modifier = lambda a, logit, *point: MODIFIERS[name](mask(a, *point), logit)
    logit = jax.ShapeDtypeStruct((), dtype)
    grid = make_grid(*LAYOUTS[0])
    dead = of_grid(dead_blocks, modifier, ARRAYS, grid, [logit])
    table = table_of(mask, ARRAYS, grid)
    np.testing.assert_array_equal(dead, table == 0)


def test_modifier_that_lowers_logits_is_nowhere_dead():
    modifier = lambda a, logit, b, n, t, s, row, column: (
        logit - 1e30 * jnp.abs(t - s).astype(jnp.float32)
    )
    logit = jax.ShapeDtypeStruct((), jnp.float32)
    assert not of_grid(dead_blocks, modifier, {}, make_grid(*LAYOUTS[0]), [logit]).any()


def test_bounds_of_a_difference_are_exact():
    grid = make_grid(*LAYOUTS[0])
    distance = lambda a, b, n, t, s, row, column: t - s
    lo, hi = of_grid(evaluate, distance, {}, grid)
    first = 4 * (np.arange(6)[:, None] - np.arange(6))
    np.testing.assert_array_equal(lo[0, 0], first - 3)
    np.testing.assert_array_equal(hi[0, 0], first + 3)


def test_table_of_a_long_sequence_takes_little_memory():
    length = 131072
    doc = np.sort(np.random.default_rng(0).integers(0, 1000, length)).astype(np.int32)
    grid = cut_grid((1, 1, length, length), (512, 512), None, None)
    table = jax.jit(lambda doc: table_of(SIMPLE["document-causal"], {"doc": doc}, grid))
    doc = jnp.asarray(doc)
    assert table(doc).shape == (1, 1, 256, 256)
    memory = table.lower(doc).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64 * length


# The numbers inside are operands: known in the graph, or one for each example or head.
NUMBERED = {
    "causal": lambda o, l, r, doc, t, s: s - t <= o,
    "causal, other form": lambda o, l, r, doc, t, s: t + o >= s,
    "window": lambda o, l, r, doc, t, s: (t - s <= l) & (s - t <= r),
    "prefix": lambda o, l, r, doc, t, s: (s < l) | (s - t <= o),
    "documents": lambda o, l, r, doc, t, s: (s - t <= o) & (doc[t] == doc[s]),
    "padded": lambda o, l, r, doc, t, s: (doc[t] == doc[s]) & (doc[s] != r),
    "all": lambda o, l, r, doc, t, s: (
        (s - t <= o) & (t - s <= l) & (s - t <= r) & (doc[t] == doc[s])
    ),
    "either": lambda o, l, r, doc, t, s: ((s - t <= o) & (t - s <= l)) | (doc[t] == doc[s]),
    "not": lambda o, l, r, doc, t, s: ~((s - t <= o) & (doc[t] == doc[s])),
    "contradiction": lambda o, l, r, doc, t, s: (t - s <= -l - 1) & (s - t <= l),
    "two sums": lambda o, l, r, doc, t, s: (t + o - s <= l - r) & (s - t + r <= o),
}
NUMBERS = [
    (0, 7, 2),
    (-3, 5, 0),
    (4, 0, 9),
    (2**31 - 1, 2**31 - 1, 2**30),
    (-(2**31), 1, 0),
]


@pytest.mark.parametrize("name", NUMBERED)
def test_numbers_in_the_graph_skip_what_literals_do(name):
    doc = jnp.asarray(DOC)

    def table(numbers, doc):
        mask = lambda a, b, n, t, s, row, column: NUMBERED[name](*numbers, doc, t, s)
        return table_of(mask, {}, make_grid((26, 23), (None, None), (4, 4)))

    traced = jax.jit(table)
    for numbers in NUMBERS:
        numbers = [np.int32(x) for x in numbers]
        # The literals are traced beside documents that are, as a mask's always are.
        literal = jax.jit(functools.partial(table, numbers))(doc)
        np.testing.assert_array_equal(traced(numbers, doc), literal)


@pytest.mark.parametrize("name", NUMBERED)
def test_numbers_of_each_head_skip_what_is_so_for_each(name):
    doc = jnp.asarray(DOC)
    numbers = np.array([NUMBERS[0], NUMBERS[1]], np.int32).T

    def table(numbers, doc):
        def mask(a, b, n, t, s, row, column):
            return NUMBERED[name](*(x[n] for x in numbers), doc, t, s)

        return table_of(mask, {}, make_grid((26, 23), (None, None), (4, 4)))

    both = jax.jit(table)(jnp.asarray(numbers), doc)
    for i in range(2):
        one = jax.jit(table)(jnp.asarray(numbers[:, [i, i]]), doc)
        np.testing.assert_array_equal(
            np.broadcast_to(both, (1, 2, 7, 6))[:, i],
            np.broadcast_to(one, (1, 2, 7, 6))[:, i],
        )


WIDE = ["int64", "uint32", "uint64", "int16", "uint8"]


@pytest.mark.parametrize("is_traced", [False, True])
@pytest.mark.parametrize("dtype", WIDE)
def test_ids_of_any_type_skip_what_those_of_32_bits_do(dtype, is_traced):
    with jax.enable_x64(True):
        far = np.iinfo(dtype).max - 6
        ids = jnp.asarray(DOC.astype(dtype) + np.array(far, dtype))
        grid = make_grid((26, 23), (None, None), (4, 4))
        for mask in ("segments", "document-causal"):
            table = lambda doc, mask=mask: table_of(SIMPLE[mask], {"doc": doc}, grid)
            want = table(jnp.asarray(DOC, jnp.int32))
            got = (jax.jit(table) if is_traced else table)(ids)
            np.testing.assert_array_equal(got, want)


def test_ids_that_differ_above_32_bits_are_told_apart():
    with jax.enable_x64(True):
        ids = 7 + DOC.astype(np.int64) * 2**32
        grid = make_grid((26, 23), (None, None), (4, 4))
        table = lambda doc: table_of(SIMPLE["segments"], {"doc": doc}, grid)
        np.testing.assert_array_equal(jax.jit(table)(jnp.asarray(ids)), table(DOC))


FAR = [0, 2**31 - 5, 2**40, -(2**40), 2**62, 2**63 - 40, -(2**63)]


@pytest.mark.parametrize("is_traced", [False, True])
@pytest.mark.parametrize("name", ["causal", "causal + 3", "window", "sink", "chunked"])
def test_positions_of_64_bits_are_compared_in_full(name, is_traced):
    indices = [jax.ShapeDtypeStruct((), jnp.int64)] * 4
    mask = SIMPLE[name]
    with jax.enable_x64(True):
        indices = [jax.ShapeDtypeStruct((), jnp.int64)] * 4
        program = jax.make_jaxpr(lambda *xs: mask({}, *xs, *xs[2:]))(*indices)
        for far in FAR:
            for shift in (0, 3):
                t, s = (
                    (np.int64(far) + shift + np.arange(24)),
                    np.int64(far) + np.arange(24),
                )

                def table(t, s):
                    grid = cut_grid((1, 1, 24, 24), (4, 4), t, s)
                    return classify(program.jaxpr, program.consts, grid)

                got = (jax.jit(table) if is_traced else table)(
                    jnp.asarray(t), jnp.asarray(s)
                )
                at = (0, 0, jnp.asarray(t)[:, None], jnp.asarray(s)[None])
                pairs = np.asarray(mask({}, *at, *at[2:]))[None, None]
                truth = dense_table(
                    np.broadcast_to(pairs, (1, 1, 24, 24)),
                    cut_grid((1, 1, 24, 24), (4, 4), 0, 0),
                )
                sound = (got == 1) | (got == truth)
                assert np.all(sound)
                if name == "causal":
                    np.testing.assert_array_equal(np.broadcast_to(got, truth.shape), truth)


JITTED = {
    "causal": lambda doc: jax.jit(lambda b, n, t, s: t >= s),
    "inside": lambda doc: lambda b, n, t, s: jax.jit(lambda x, y: x[t] == y[s])(doc, doc),
    "parts": lambda doc: lambda b, n, t, s: jax.jit(operator.ge)(t, s) & (doc[t] == doc[s]),
    "nested": lambda doc: jax.jit(
        lambda b, n, t, s: jax.jit(lambda i: doc[i])(t) == jax.jit(lambda i: doc[i])(s)
    ),
    "checkpoint": lambda doc: jax.checkpoint(
        lambda b, n, t, s: (t >= s) & (doc[t] == doc[s])
    ),
}


@pytest.mark.parametrize("name", JITTED)
def test_jit_inside_a_mask_keeps_its_table(name):
    grid = make_grid(*LAYOUTS[1])
    mask = JITTED[name](jnp.asarray(DOC))
    called = lambda a, b, n, t, s, row, column: mask(b, n, t, s)
    table = table_of(called, {}, grid)
    with jax.disable_jit():
        plain = table_of(called, {}, grid)
    np.testing.assert_array_equal(table, plain)
    assert np.any(table == 0)


def test_division_is_told_by_its_structure():
    grid = make_grid(*LAYOUTS[0])

    @jax.jit
    def floor_divide(x, y):  # of that name, but another function
        return x * 0 + y

    own = lambda a, b, n, t, s, row, column: floor_divide(t, 8) == floor_divide(s, 8)
    assert (table_of(own, {}, grid) == 2).all()
    np.testing.assert_array_equal(
        table_of(SIMPLE["chunked"], {}, grid),
        dense_table(all_pairs(SIMPLE["chunked"], grid), grid)[:1, :1],
    )
