"""Blockwise as on a GPU: one loop over the tiles of all blocks, on this CPU."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jattn
from bench.gpu_launches import Launches, count
from jattn import definition
from jattn.call.pose import pose
from jattn.implementations import attention
from jattn.implementations.attention import Attention
from jattn.implementations.blockwise.plan import GPU_LOGITS, GPUS, plan
from jattn.masks import Causal
from jattn.testing import CASES, assert_matches_definition
from tests.helpers import flat
from tests.helpers.draws import normal
from tests.helpers.params import quick_and_slow

named = {case.name: case for case in CASES}
QUICK = ("everything",)


@pytest.mark.parametrize("case", quick_and_slow(CASES, QUICK, group=True))
def test_one_loop_over_all_tiles_equals_the_definition(case):
    assert_matches_definition(flat.attention_state, case)


@pytest.mark.parametrize("name", ["everything", "segments_with_padding"])
@pytest.mark.slow
def test_one_loop_for_each_head_equals_the_definition(name):
    one_head = functools.partial(flat.attention_state, logits=flat.ONE_HEAD)
    assert_matches_definition(one_head, named[name])


def test_batch_and_heads_can_be_sharded():
    query, key, value = (normal(i, (2, 8, n, 4)) for i, n in enumerate((4, 2, 2)))

    def loss(attend, query, key, value):
        output, logsumexp = attend(query, key, value, mask=Causal())
        return jnp.sum(output**2) + jnp.sum(logsumexp)

    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    where = NamedSharding(mesh, PartitionSpec("data", None, "model"))
    placed = [jax.device_put(x, where) for x in (query, key, value)]
    step = jax.jit(jax.grad(functools.partial(loss, flat.attention_state), (0, 1, 2)))
    compiled = step.lower(*placed).compile()
    assert "all-gather" not in compiled.as_text()
    want = jax.grad(functools.partial(loss, definition.attention_state), (0, 1, 2))
    pairs = zip(compiled(*placed), want(query, key, value), strict=True)
    for got, expected in pairs:
        chex.assert_trees_all_close(got, expected, atol=1e-5)


@pytest.mark.parametrize(("precision", "narrow"), [(None, True), ("highest", False)])
def test_precise_products_take_no_rounded_weights(precision, narrow):
    """A GPU multiplies bfloat16 by itself, so weights are rounded to it, unless asked."""
    arrays = [normal(i, (256, n, 64), jnp.bfloat16) for i, n in enumerate((4, 2, 2))]

    def loss(*arrays):
        with jax.default_matmul_precision(precision):
            output = jattn.attention(*arrays, mask=Causal(), implementation="blockwise")
        return jnp.sum(output.astype(jnp.float32))

    traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(*arrays)
    lines = traced.lower(lowering_platforms=("cuda",)).as_text().splitlines()
    products = [line for line in lines if "stablehlo.dot_general" in line]
    assert len(products) >= 7  # two of forward, five of backward
    assert any("bf16" in line for line in products) == narrow


NARROW = [named[name] for name in ("large_logits", "everything", "scale", "soft_cap")]


@pytest.mark.parametrize("case", quick_and_slow(NARROW, ("large_logits",)))
def test_products_of_bfloat16_equal_the_definition(case, monkeypatch):
    """On a GPU products stay narrow, also those of tangents."""
    usual = Attention.on
    narrow = lambda self, name: dataclasses.replace(usual(self, name), widens=False)
    monkeypatch.setattr(Attention, "on", narrow)
    monkeypatch.setattr(attention, "multiplies_bfloat16", lambda: True)
    jax.clear_caches()  # or what was lowered without the patch would run
    assert_matches_definition(flat.attention_state, case, "bfloat16")
    jax.clear_caches()


def posed(B=1, T=4096, N=16, K=16, H=128, mask=None):
    shapes = [(B, T, heads, H) for heads in (N, K, K)]
    arrays = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes]
    found = []
    jax.eval_shape(lambda *xs: found.append(pose("test", *xs, mask=mask)[0]), *arrays)
    return found[0]


def test_only_gpus_get_the_flat_plan():
    operation = Attention(posed(), None)
    assert [operation.on(name).flat for name in GPUS] == [GPU_LOGITS] * len(GPUS)
    assert operation.on("cpu").flat == operation.on("tpu").flat == 0


def test_explain_tells_the_blocks_of_the_platform():
    query = jax.ShapeDtypeStruct((1, 4096, 16, 64), "float32")
    explain = functools.partial(
        jattn.explain, query, query, query, mask=Causal(), implementation="blockwise"
    )
    assert explain(platform="gpu").blocks.sizes == (1024, 1024)
    assert explain(platform="cpu").blocks.sizes == (512, 512)


@pytest.mark.parametrize("B", [1, 8])
@pytest.mark.parametrize("T", [128, 1000, 4096, 5000])
@pytest.mark.parametrize("K", [1, 4, 16])
@pytest.mark.parametrize("mask", [None, Causal()])
def test_a_tile_of_a_gpu_has_as_many_heads_as_fit(B, T, K, mask):
    problem = posed(B, T, K=K, mask=mask)
    found = plan(problem, False, flat=GPU_LOGITS)
    logits = found.B * found.N * found.T * found.S
    assert logits <= GPU_LOGITS
    is_full = 2 * logits > GPU_LOGITS
    assert found.N == 16 or is_full
    assert found.B == B or found.N < 16 or is_full


PROGRAM = """\
HloModule jit_f

%body (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %a = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused
  %s = ((f32[4]), f32[4], u32[]) fusion-start(%a), calls=%fused
  ROOT %d = f32[4]{0} fusion-done(%s)
}

%inner (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %w = f32[4]{0} while(%x), condition=%cond, body=%body
}

%again (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %a = f32[4]{0} negate(%x)
  %b = f32[4]{0} negate(%a)
  ROOT %w = f32[4]{0} while(%b), condition=%cond, body=%body
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %known = f32[4]{0} while(%x), condition=%c, body=%inner, \
backend_config={"known_trip_count":{"n":"3"}}
  %if = f32[4]{0} conditional(%p, %known, %known), true_computation=%body, \
false_computation=%again
  %t = (f32[4]{0}, f32[4]{0}) tuple(%if, %known)
  ROOT %copy = f32[4]{0} copy(%if)
}
"""


def test_launches_are_counted_through_loops_and_branches():
    # 3 turns with an unknown loop of 2 kernels each; the shorter branch; a copy.
    found = count(PROGRAM)
    assert found.kernels == 3 * 2 + 2 + 1
    assert found.waits == 3 + 1
    assert Launches(1, 2) * 3 + Launches(0, 1) == Launches(3, 7)
