"""Every message: where, what must hold, what was got, what to do."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import Dropout, modifiers
from jattn.masks import Causal, Explicit, Lengths, Prefix, Segments, Window

f32 = jnp.float32
QUERY, KEY = jnp.zeros((2, 5, 4, 8)), jnp.zeros((2, 6, 2, 8))
SQUARE = jnp.zeros((3, 3, 3, 8))  # as many examples as queries, keys and heads
IDS = jnp.zeros(5, jnp.int32)


def attend(query=QUERY, key=KEY, value=None, **options):
    return jattn.attention(query, key, key if value is None else value, **options)


def relative(bucket=None, table=None):
    return modifiers.RelativeBias(jnp.ones((4, 5)) if table is None else table, bucket)


MESSAGES = {
    "rank_too_low": (
        lambda: attend(jnp.zeros((5, 8))),
        "attention: `query` must have the axes TNH or more before them, got shape (5, 8)",
    ),
    "ranks_differ": (
        lambda: attend(key=KEY[0]),
        "attention: `key` must have as many axes as `query` (4: (2, 5, 4, 8)), got shape "
        "(6, 2, 8)",
    ),
    "batches_differ": (
        lambda: attend(key=jnp.zeros((3, 6, 2, 8))),
        "attention: `key` has batch axes (3,) in (3, 6, 2, 8), but `query` has (2,)",
    ),
    "head_sizes_differ": (
        lambda: attend(key=jnp.zeros((2, 6, 2, 7))),
        "attention: `key` has shape (2, 6, 2, 7) = …SKH, but H=8 in `query`",
    ),
    "value_is_shorter_than_key": (
        lambda: attend(value=jnp.zeros((2, 5, 2, 8))),
        "attention: `value` has shape (2, 5, 2, 8) = …SKD, but `key` has (2, 6, 2, 8)",
    ),
    "heads_are_no_multiple": (
        lambda: attend(key=jnp.zeros((2, 6, 3, 8))),
        "num_heads N=4 in `query` (2, 5, 4, 8) = …TNH must be a multiple of num_kv_heads",
    ),
    "no_kv_heads": (
        lambda: attend(key=jnp.zeros((2, 6, 0, 8))),
        "must be a multiple of num_kv_heads K=0 in `key` (2, 6, 0, 8) = …SKH; give `key`",
    ),
    "heads_before_positions": (
        lambda: attend(jnp.zeros((2, 8, 100, 64)), jnp.zeros((2, 8, 48, 64))),
        "They look like BNTH, heads first; jattn takes BTNH: swap axes -3 and -2.",
    ),
    "integers": (
        lambda: attend(QUERY.astype(int), KEY.astype(int)),
        "attention: `query` must have one of the dtypes float16, bfloat16, float32, "
        "float64, got int32; convert it with `.astype`.",
    ),
    "mixed_dtypes": (
        lambda: attend(key=KEY.astype(jnp.bfloat16)),
        "must have one dtype, got `query` float32, `key` bfloat16, `value` bfloat16",
    ),
    "not_an_array": (
        lambda: attend("query"),
        "attention: `query` must be an array, got str",
    ),
    "mask_does_not_broadcast": (
        lambda: attend(mask=jnp.ones((2, 3, 5, 6), bool)),
        "attention: `mask` must broadcast to BNTS = (2, 4, 5, 6), got shape (2, 3, 5, 6)",
    ),
    "float_mask": (
        lambda: attend(mask=jnp.ones((5, 6))),
        "attention: `mask` must be Boolean (True = may attend), got float32; what is added "
        "to the logits belongs in `bias`.",
    ),
    "integer_mask": (
        lambda: attend(mask=jnp.ones((5, 6), int)),
        "attention: `mask` must be Boolean (True = may attend), got int32; convert it with "
        "`.astype(bool)`.",
    ),
    "float_explicit_mask": (
        lambda: attend(mask=Explicit(jnp.ones((5, 6)))),
        "masks.Explicit: `array` must be Boolean (True = may attend), got float32",
    ),
    "mask_is_no_mask": (
        lambda: attend(mask="causal"),
        "attention: `mask` must be a mask, a Boolean array or a function, got 'causal'; "
        "masks with names are in jattn.masks, such as `masks.Causal()`.",
    ),
    "modifier_as_mask": (
        lambda: attend(mask=modifiers.SoftCap(3.0)),
        "attention: `mask` must say which pairs count, got the modifier SoftCap(3.0); give "
        "it as `modifier`.",
    ),
    "modifier_in_a_mask": (
        lambda: Causal() | modifiers.ALiBi(),
        "masks: `mask` must say which pairs count, got the modifier ALiBi()",
    ),
    "masks_in_a_tuple": (
        lambda: attend(mask=(Causal(), Window(1, 1))),
        "attention: `mask` must be one mask, got a tuple of them; combine masks by `&`.",
    ),
    "functions_in_a_list": (
        lambda: attend(mask=[lambda b, n, t, s: t >= s]),
        "attention: `mask` must be one mask, got a list of them; combine masks by `&`.",
    ),
    "modifiers_in_a_tuple": (
        lambda: attend(modifier=(modifiers.SoftCap(3.0), modifiers.ALiBi())),
        "attention: `modifier` must be one modifier, got a tuple; compose modifiers by",
    ),
    "ids_of_objects": (
        lambda: attend(mask=Segments(np.array([1, 2, None, 4, 5]))),
        "masks.Segments: `query_ids` must be an array, got one of the dtype object; "
        "convert it with `.astype`.",
    ),
    "ids_of_text": (
        lambda: attend(mask=Segments(np.array(["a"] * 5))),
        "masks.Segments: `query_ids` must be an array, got one of the dtype <U1; convert",
    ),
    "bias_of_dates": (
        lambda: attend(bias=np.zeros(6, "datetime64[D]")),
        "attention: `bias` must be an array, got one of the dtype datetime64[D]; convert",
    ),
    "two_ids_of_padding": (
        lambda: attend(QUERY, QUERY, mask=Segments(IDS, padding_id=np.arange(2))),
        "masks.Segments: `padding_id` must be one whole number, got shape (2,)",
    ),
    "mask_function_returns_a_float": (
        lambda: attend(mask=lambda b, n, t, s: t.astype(float)),
        "attention: `mask`: the function must return a Boolean scalar for one query "
        "and one key, got float32[]",
    ),
    "mask_function_returns_an_array": (
        lambda: attend(mask=lambda b, n, t, s: t >= jnp.arange(3)),
        "must return a Boolean scalar for one query and one key, got bool[3]",
    ),
    "mask_function_indexes_numpy": (
        lambda: attend(mask=lambda b, n, t, s: np.zeros(6)[t] == 0),
        "`jnp.asarray(table)[t]` for `table[t]`",
    ),
    "bias_does_not_broadcast": (
        lambda: attend(bias=jnp.zeros((5, 5))),
        "attention: `bias` must broadcast to BNTS = (2, 4, 5, 6), got shape (5, 5)",
    ),
    "bias_has_too_many_axes": (
        lambda: attend(bias=jnp.zeros((1, 2, 4, 5, 6))),
        "attention: `bias` must broadcast to BNTS = (2, 4, 5, 6)",
    ),
    "boolean_bias": (
        lambda: attend(bias=jnp.ones((5, 6), bool)),
        "attention: `bias` must be floating, got bool; a Boolean array belongs in `mask`.",
    ),
    "modifier_is_an_array": (
        lambda: attend(modifier=jnp.zeros((5, 6))),
        "attention: `modifier` must be a function (logit, b, n, t, s) → logit",
    ),
    "modifier_returns_a_boolean": (
        lambda: attend(modifier=lambda logit, b, n, t, s: t >= s),
        "attention: `modifier`: the function must return a floating scalar",
    ),
    "sink_per_key_head": (
        lambda: attend(sink=jnp.zeros(2)),
        "attention: `sink` must be one number or N = (4,), one per query head, got",
    ),
    "integer_sink": (
        lambda: attend(sink=jnp.zeros(4, int)),
        "attention: `sink` must be floating, got int32; convert it with `.astype`.",
    ),
    "integer_bias": (
        lambda: attend(bias=jnp.zeros((5, 6), int)),
        "attention: `bias` must be floating, got int32; convert it with `.astype`.",
    ),
    "scale_per_head": (
        lambda: attend(scale=jnp.ones(4)),
        "attention: `scale` must be one real number, got float32[4]",
    ),
    "positions_of_another_length": (
        lambda: attend(query_position=jnp.arange(4)),
        "attention: `query_position` must be an integer or have shape T = (5,) or "
        "BT = (2, 5), got (4,).",
    ),
    "floating_positions": (
        lambda: attend(key_position=jnp.zeros(6)),
        "attention: `key_position` must hold integers, got float32",
    ),
    "dropout_rate_above_one": (
        lambda: Dropout(1.0, jax.random.key(0)),
        "Dropout: `rate` must be a Python number in [0, 1), got 1.0.",
    ),
    "dropout_rate_below_zero": (
        lambda: Dropout(-0.1, jax.random.key(0)),
        "Dropout: `rate` must be a Python number in [0, 1), got -0.1.",
    ),
    "dropout_is_a_number": (
        lambda: attend(dropout=0.1),
        "attention: `dropout` must be jattn.Dropout(rate, rng), got float.",
    ),
    "unknown_implementation": (
        lambda: attend(implementation="flash"),
        "attention: `implementation` must be None or one of",
    ),
    "negative_window": (
        lambda: Window(-1, 0),
        "masks.Window: `left` must be ≥ 0, or None for no limit, got -1",
    ),
    "fractional_window": (
        lambda: Window(0, 1.5),
        "masks.Window: `right` must be a whole number, got 1.5.",
    ),
    "fractional_offset": (
        lambda: Causal(0.5),
        "masks.Causal: `offset` must be a whole number, got 0.5.",
    ),
    "floating_offset_array": (
        lambda: Causal(jnp.float32(1)),
        "masks.Causal: `offset` must be a whole number, got an array of float32.",
    ),
    "prefix_of_another_batch": (
        lambda: attend(mask=Prefix(jnp.arange(3))),
        "masks.Prefix: `length` must have shape () or B = (2,), got (3,)",
    ),
    "lengths_of_another_batch": (
        lambda: attend(mask=Lengths(jnp.arange(3))),
        "masks.Lengths: `key_lengths` must have shape () or B = (2,), got (3,)",
    ),
    "floating_lengths": (
        lambda: attend(mask=Lengths(jnp.zeros(2))),
        "masks.Lengths: `key_lengths` must hold integers, got float32",
    ),
    "segments_of_another_length": (
        lambda: attend(mask=Segments(IDS)),
        "masks.Segments: `query_ids (as key_ids)` must broadcast to BS = (2, 6), got",
    ),
    "floating_segments": (
        lambda: attend(mask=Segments(jnp.zeros(5), jnp.zeros(6))),
        "masks.Segments: `query_ids` must hold integers, got float32",
    ),
    "segments_called_with_positions": (
        lambda: attend(mask=lambda b, n, t, s: Segments(IDS)(b, n, t, s)),
        "masks.Segments: reads its arrays by row and column, not by position",
    ),
    "cap_of_zero": (
        lambda: modifiers.SoftCap(0),
        "modifiers.SoftCap: `cap` must be > 0, got 0.",
    ),
    "mesh_axis_of_batch_and_heads": (
        lambda: jattn.Context("a", batch="b", heads=("c", "b")),
        "Context: a mesh axis must be named once in `axis`, `batch` and `heads`, got 'b'",
    ),
    "mesh_axis_twice": (
        lambda: jattn.Context(("a", "a")),
        "Context: a mesh axis must be named once in `axis`, `batch` and `heads`, got 'a'",
    ),
    "cap_without_end": (
        lambda: modifiers.SoftCap(float("inf")),
        "modifiers.SoftCap: `cap` must be between 8.7e-19 and 1.3e+30, got inf; where",
    ),
    "cap_that_float32_has_not": (
        lambda: modifiers.SoftCap(np.float64(1e-60)),
        "modifiers.SoftCap: `cap` must be between 8.7e-19 and 1.3e+30, got 1e-60; where",
    ),
    "class_as_modifier": (
        lambda: attend(modifier=modifiers.SoftCap),
        "attention: `modifier` must be a modifier, got the class SoftCap; call it.",
    ),
    "mask_as_modifier": (
        lambda: attend(modifier=Segments(IDS)),
        "attention: `modifier` must change a logit, got the mask Segments(",
    ),
    "dropout_without_a_key": (
        lambda: attend(dropout=jattn.Dropout(0.1, None)),
        "attention: `dropout` must have one random key as `rng`, got NoneType; give",
    ),
    "dropout_with_a_seed": (
        lambda: attend(dropout=jattn.Dropout(0.1, 5)),
        "attention: `dropout` must have one random key as `rng`, got int; give",
    ),
    "dropout_with_several_keys": (
        lambda: attend(dropout=jattn.Dropout(0.1, jax.random.split(jax.random.key(0)))),
        "attention: `dropout` must have one random key as `rng`, got key<fry>[2]; give",
    ),
    "slopes_per_key_head": (
        lambda: attend(modifier=modifiers.ALiBi(jnp.zeros(2))),
        "modifiers.ALiBi: `slopes` must have shape N = (4,), one per query head, got (2,).",
    ),
    "table_without_a_middle": (
        lambda: modifiers.RelativeBias(jnp.zeros((4, 6))),
        "modifiers.RelativeBias: `table` must have an odd number of columns",
    ),
    "table_of_other_heads": (
        lambda: attend(modifier=modifiers.RelativeBias(jnp.zeros((2, 5)))),
        "modifiers.RelativeBias: `table` must be N × buckets with N=4 query heads, got "
        "shape (2, 5).",
    ),
    "boolean_bias_modifier": (
        lambda: attend(modifier=modifiers.Bias(jnp.ones((5, 6), bool))),
        "modifiers.Bias: `array` must be floating, got bool; a Boolean array belongs in",
    ),
    "Boolean_table": (
        lambda: attend(modifier=relative(table=jnp.ones((4, 5), bool))),
        "modifiers.RelativeBias: `table` must be floating, got bool; convert it with",
    ),
    "integer_table": (
        lambda: attend(modifier=relative(table=[[1] * 5] * 4)),
        "modifiers.RelativeBias: `table` must be floating, got int32; convert it with",
    ),
    "list_without_a_middle": (
        lambda: attend(modifier=relative(table=[[1.0] * 4] * 4)),
        "modifiers.RelativeBias: `table` must have an odd number of columns",
    ),
    "bucket_of_a_float": (
        lambda: attend(modifier=relative(lambda d: d / 2)),
        "modifiers.RelativeBias: `bucket` must give one column for each s − t, an integer "
        "scalar, got float32[]; convert a number with `.astype(int)`.",
    ),
    "bucket_of_a_Boolean": (
        lambda: attend(modifier=relative(lambda d: d > 0)),
        "an integer scalar, got bool[]; convert a number",
    ),
    "bucket_of_an_array": (
        lambda: attend(modifier=relative(lambda d: jnp.arange(2))),
        "an integer scalar, got int32[2]; convert a number",
    ),
    "bucket_of_nothing": (
        lambda: attend(modifier=relative(lambda d: None)),
        "an integer scalar, got NoneType; convert a number",
    ),
    "bucket_of_two_arguments": (
        lambda: relative(lambda t, s: s - t),
        "modifiers.RelativeBias: `bucket` must be a function of (offset), got one of "
        "(t, s); missing a required argument: 's'.",
    ),
    "bucket_is_a_number": (
        lambda: relative(3),
        "modifiers.RelativeBias: `bucket` must be a function of s − t, got 3; give "
        "`distance(radius)`",
    ),
    "fractional_radius": (
        lambda: modifiers.distance(2.5),
        "modifiers.distance: `radius` must be a whole number, at least 0, got 2.5; give an",
    ),
    "negative_radius": (
        lambda: modifiers.distance(-2),
        "modifiers.distance: `radius` must be a whole number, at least 0, got -2; give an",
    ),
    "fractional_buckets": (
        lambda: modifiers.log_bucket(8.0),
        "modifiers.log_bucket: `num_buckets` must be a whole number, at least 1, got 8.0",
    ),
    "endless_distance": (
        lambda: modifiers.log_bucket(8, float("nan")),
        "modifiers.log_bucket: `max_distance` must be a whole number, at least 1, got nan",
    ),
    "negative_heads": (
        lambda: modifiers.alibi_slopes(-1),
        "modifiers.alibi_slopes: `num_heads` must be a whole number, at least 0, got -1",
    ),
    "Boolean_slopes": (
        lambda: attend(modifier=modifiers.ALiBi(jnp.ones(4, bool))),
        "modifiers.ALiBi: `slopes` must hold real numbers, got bool; convert it with",
    ),
    "complex_cap": (
        lambda: attend(modifier=modifiers.SoftCap(jnp.array(1j))),
        "modifiers.SoftCap: `cap` must hold real numbers, got complex64; convert it with",
    ),
    "Boolean_cap": (
        lambda: attend(modifier=modifiers.SoftCap(True)),
        "modifiers.SoftCap: `cap` must hold real numbers, got bool; convert it with",
    ),
    "too_few_buckets": (
        lambda: modifiers.log_bucket(2),
        "modifiers.log_bucket: needs num_buckets ≥ 4",
    ),
    "rows_out_of_range": (
        lambda: jattn.attention_weights(QUERY, KEY, rows=[5]),
        "attention_weights: `rows` must be within the T=5 queries, got 5…5; count them",
    ),
    "floating_rows": (
        lambda: jattn.attention_weights(QUERY, KEY, rows=jnp.zeros(2)),
        "attention_weights: `rows` must be the indices of queries, integers in one axis",
    ),
    "mask_per_example": (
        lambda: attend(mask=jnp.ones((2, 6), bool)),
        "attention: `mask` must broadcast to BNTS = (2, 4, 5, 6), got shape (2, 6); write "
        "`mask[:, None, None]`.",
    ),
    "mask_per_example_and_query": (
        lambda: attend(mask=jnp.ones((2, 5, 6), bool)),
        "got shape (2, 5, 6); write `mask[:, None]`.",
    ),
    "mask_per_example_of_two_axes": (
        lambda: attend(QUERY[:, None], KEY[:, None], mask=jnp.ones((2, 1, 6), bool)),
        "got shape (2, 1, 6); write `mask[:, :, None, None]`.",
    ),
    "explicit_per_example": (
        lambda: attend(mask=Causal() & jnp.ones((2, 6), bool)),
        "masks.Explicit: `array` must broadcast to BNTS = (2, 4, 5, 6), got shape (2, 6); "
        "write `array[:, None, None]`.",
    ),
    "bias_per_example": (
        lambda: attend(bias=jnp.ones((2, 6))),
        "got shape (2, 6); write `bias[:, None, None]`.",
    ),
    "mask_of_examples_or_queries": (
        lambda: attend(SQUARE, SQUARE, mask=jnp.ones((3, 3), bool)),
        "attention: `mask` of shape (3, 3) may be meant for each example or for each "
        "query, as there are as many of both; write `mask[:, None, None]` or `mask[None]`.",
    ),
    "bias_of_examples_or_queries": (
        lambda: attend(SQUARE, SQUARE, bias=jnp.ones((3, 3))),
        "attention: `bias` of shape (3, 3) may be meant for each example or for each query",
    ),
    "mask_of_examples_or_heads": (
        lambda: attend(SQUARE, SQUARE, mask=jnp.ones((3, 3, 3), bool)),
        "attention: `mask` of shape (3, 3, 3) may be meant for each example or for "
        "each head",
    ),
    "position_per_example": (
        lambda: attend(query_position=jnp.arange(2)),
        "attention: `query_position` must be an integer or have shape T = (5,) or BT = "
        "(2, 5), got (2,); for a position of each example, write "
        "`query_position[:, None] + jnp.arange(5)`.",
    ),
    "position_per_example_of_one_query": (
        lambda: attend(QUERY[:, :1], query_position=jnp.arange(2)),
        "for a position of each example, write `query_position[:, None]`.",
    ),
    "position_of_examples_or_queries": (
        lambda: attend(SQUARE, SQUARE, key_position=jnp.arange(3)),
        "for a position of each example, write `key_position[:, None] + jnp.arange(3)`, "
        "and for one of each S, `key_position[None]`.",
    ),
    "position_beyond_32_bits": (
        lambda: attend(query_position=2**31),
        "attention: `query_position` must hold integers of 32 bits",
    ),
    "offset_of_each_example": (
        lambda: attend(mask=Causal(jnp.arange(2))),
        "masks.Causal: `offset` must be one whole number, got shape (2,)",
    ),
    "other_function_s_name": (
        lambda: jattn.attention_state(QUERY, KEY[0], KEY[0]),
        "attention_state: `key` must have as many axes",
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_message(name):
    call, expected = MESSAGES[name]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        call()
    assert expected in str(caught.value)


CHECKED = {
    "cap of zero": (modifiers.SoftCap, 0, "`cap` must be > 0"),
    "negative cap": (modifiers.SoftCap, -2.0, "`cap` must be > 0"),
    "no cap": (modifiers.SoftCap, math.nan, "`cap` must be > 0"),
    "endless cap": (modifiers.SoftCap, math.inf, "`cap` must be between"),
    "tiny cap": (modifiers.SoftCap, 1e-40, "`cap` must be between"),
    "left": (lambda x: Window(x, 0), -1, "`left` must be ≥ 0"),
    "right": (lambda x: Window(None, x), -1, "`right` must be ≥ 0"),
    "rate": (lambda x: Dropout(x, None), 1.0, "`rate` must be a Python number in"),
    "radius": (modifiers.distance, -2, "`radius` must be a whole number, at least 0"),
    "buckets": (modifiers.log_bucket, 8.0, "`num_buckets` must be a whole number"),
    "heads": (modifiers.alibi_slopes, -1, "`num_heads` must be a whole number"),
    "length": (jattn.caches.empty(1, 2, 1, 4).truncate, -1, "`length` must be at least 0"),
}
NUMBERS = {
    "python": lambda x: x,
    "numpy scalar": lambda x: np.asarray(x)[()],
    "numpy": np.asarray,
    "jax": jnp.asarray,
    "jax of one": lambda x: jnp.asarray([x]),
}


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("name", CHECKED)
def test_known_arrays_are_checked_as_numbers_of_python_are(name, kind):
    call, number, message = CHECKED[name]
    with pytest.raises(ValueError, match=message):
        call(NUMBERS[kind](number))


def test_known_arrays_are_checked_inside_jit_and_traced_ones_are_taken():
    cap, left = jnp.float32(-2), jnp.int32(-1)
    with pytest.raises(ValueError, match="`cap` must be > 0"):
        jax.jit(lambda x: attend(x, modifier=modifiers.SoftCap(cap)))(QUERY)
    with pytest.raises(ValueError, match="`left` must be ≥ 0"):
        jax.jit(lambda x: attend(x, mask=Window(left, 0)))(QUERY)
    assert jax.jit(lambda x: attend(modifier=modifiers.SoftCap(x)))(cap).shape
    ones = jnp.ones(KEY.shape)
    assert not jax.jit(lambda x: attend(value=ones, mask=Window(x, 0)))(left).any()


TABLE = [True, False, True, True, False, True]
ASKING = {
    "and": {"mask": lambda b, n, t, s: t >= s and s > 1},
    "or": {"mask": Causal() & (lambda b, n, t, s: t >= s or s > 1)},
    "not": {"mask": lambda b, n, t, s: not t >= s},
    "chain": {"mask": lambda b, n, t, s: 0 <= t - s < 3},
    "range": {"mask": lambda b, n, t, s: s in range(3)},
    "set": {"mask": lambda b, n, t, s: s in {0, 3}},
    "dict": {"mask": lambda b, n, t, s: dict(enumerate(TABLE))[t]},
    "int": {"mask": lambda b, n, t, s: int(t) > 2},
    "max": {"mask": lambda b, n, t, s: max(t, s) > 2},
    "list": {"mask": lambda b, n, t, s: TABLE[t]},
    "numpy": {"mask": lambda b, n, t, s: np.sin(t) > 0},
    "Boolean index": {"mask": lambda b, n, t, s: jnp.arange(6)[t > 2].sum() > 0},
    "if": {"modifier": lambda logit, b, n, t, s: logit if t > s else -logit},
    "math": {"modifier": lambda logit, b, n, t, s: logit * math.cos(t)},
    "bucket": {
        "modifier": modifiers.RelativeBias(jnp.ones((4, 5)), lambda d: 1 if d > 0 else 0)
    },
}


@pytest.mark.parametrize("name", ASKING)
def test_a_rule_that_asks_for_a_number(name):
    (argument,) = ASKING[name]
    with pytest.raises(ValueError, match="asks for a number; write `&`") as caught:
        attend(**ASKING[name])
    assert str(caught.value).startswith(f"attention: `{argument}`: a function of positions")
    assert "`<lambda>` in line" in str(caught.value)
    assert "of test_errors.py" in str(caught.value)
    assert isinstance(caught.value.__cause__, TypeError | IndexError)


def test_other_errors_of_a_rule_stay_as_they_are():
    with pytest.raises(TypeError, match="not supported between"):
        attend(mask=lambda b, n, t, s: t >= "s")
    with pytest.raises(IndexError, match="list index"):
        attend(mask=lambda b, n, t, s: TABLE[9])


def test_unknown_option_is_not_dropped():
    with pytest.raises(TypeError, match="causal"):
        attend(causal=True)


def test_what_an_ambiguous_mask_may_be_written_as():
    ones = jnp.ones((3, 3), bool)
    for mask in (ones[None], ones[:, None, None], jnp.ones((3, 3, 3), bool)[:, None]):
        assert attend(SQUARE, SQUARE, mask=mask).shape == SQUARE.shape
    for position in (jnp.arange(3)[None], jnp.arange(3)[:, None] + jnp.arange(3)[None]):
        assert attend(SQUARE, SQUARE, query_position=position).shape == SQUARE.shape


def test_a_numpy_rate_is_a_rate():
    rng = jax.random.key(0)
    got = attend(dropout=Dropout(np.float32(0.25), rng))
    np.testing.assert_array_equal(got, attend(dropout=Dropout(0.25, rng)))
    for rate in (1 - 1e-12, np.float64(1 - 1e-16)):
        ones = jnp.ones((1, 8, 1, 4))
        assert not jattn.attention(ones, ones, ones, dropout=Dropout(rate, rng)).any()
