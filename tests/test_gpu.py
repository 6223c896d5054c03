"""The kernels for NVIDIA GPUs, emulated: equal to the definition, without races.

An emulated kernel that waits for something that never comes hangs for good. So each call
runs in a process of its own, under a time limit.
"""

import importlib.util
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.call.pose import pose
from jattn.implementations import nvidia
from jattn.implementations.gpu import pairs
from jattn.implementations.gpu.kernel import GPU
from jattn.implementations.gpu.refusal import OLDEST
from jattn.testing import CASES
from tests.helpers.limited import Worker

AMPERE = "8.0"

ONE = jnp.eye(4)
TABLE = ONE > 0
SECONDS = 400  # a call takes 3 to 20 of them, and the machine may be busy
JOBS = "tests.helpers.gpu_jobs"
emulated = [
    pytest.mark.skipif(
        jax.__version_info__ < OLDEST,
        reason=f"the emulator of jax {jax.__version__} lacks what the kernels use",
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("absl") is None, reason="needs absl: pip install absl-py"
    ),
    pytest.mark.xdist_group("emulated_gpu"),
]
CALLS = (  # jobs that take paths of their own through the kernels
    ("kernels_match", "bent", "bfloat16"),
    ("kernels_match", "dropout", "float16"),
    ("matches_definition", "alibi", "bfloat16"),
    ("kernels_match", "causal", "bfloat16", AMPERE),
    ("kernels_match", "hidden by the lowest number", "bfloat16"),
    ("kernels_match", "no number at padding", "bfloat16"),
)
OTHERS = (  # the same for Ampere, whose masks and modifiers are those of Hopper
    ("kernels_match", "bent", "bfloat16"),
    ("kernels_match", "dropout", "float16"),
    ("kernels_match", "rows that see nothing", "bfloat16"),
    ("kernels_match", "lengths", "float16"),
    ("kernels_match", "no number at padding", "float16"),
    ("kernels_match", "ample heads", "bfloat16"),
    ("output_matches", "large heads", "bfloat16"),
    ("output_matches", "wide values", "bfloat16"),
    *[
        ("matches_definition", name, "bfloat16")
        for name in ("causal", "segments", "soft_cap", "alibi", "bias")
    ],
)
SEVERAL = ("plain", "causal", "window with empty blocks", "rows that see nothing")
SEVERAL += ("segments", "lengths", "bias per key", "negative scale", "large heads")
SEVERAL += ("wide values",)
FAULTS = (
    "the copier does not wait until a block is used",
    "keys are read before they arrive",
    "values are read before they arrive",
    "a block of keys is given back before it is read",
    "the groups do not meet",
    "a copy is not waited for",
    "queries are read before they arrive",
)


@pytest.fixture(scope="module")
def worker():
    worker = Worker(f"{JOBS}:strict")
    yield worker
    worker.stop()


def mark(test):
    for one in emulated:
        test = one(test)
    return test


@mark
@pytest.mark.parametrize("call", CALLS, ids=" ".join)
def test_emulated_kernels_equal_definition(worker, call):
    job, *arguments = call
    worker.run(f"{JOBS}:{job}", *arguments, seconds=SECONDS)


@mark
@pytest.mark.slow
@pytest.mark.parametrize("call", OTHERS, ids=" ".join)
def test_emulated_kernels_for_ampere_equal_definition(worker, call):
    job, *arguments = call
    worker.run(f"{JOBS}:{job}", *arguments, AMPERE, seconds=SECONDS)


@mark
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", SEVERAL)
def test_several_blocks_by_kernels_alone(worker, name, dtype):
    worker.run(f"{JOBS}:kernels_match", name, dtype, seconds=SECONDS)


@mark
@pytest.mark.slow
@pytest.mark.parametrize("name", ["large logits", "logits in powers of 2"])
def test_large_logits_are_as_exact(worker, name):
    worker.run(f"{JOBS}:kernels_match", name, "bfloat16", seconds=SECONDS)


@mark
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_equals_definition_in_every_derivative(worker, case):
    if sentence := worker.run(f"{JOBS}:refused", case.name, "bfloat16", seconds=SECONDS):
        pytest.skip(sentence)
    worker.run(f"{JOBS}:matches_definition", case.name, "bfloat16", seconds=SECONDS)


@mark
@pytest.mark.slow
@pytest.mark.parametrize(
    "job", ["hidden_is_ignored", "traced_tables_match", "small_cotangents_and_large"]
)
def test_emulated(worker, job):
    worker.run(f"{JOBS}:{job}", seconds=SECONDS)


@mark
@pytest.mark.parametrize(
    "job",
    [
        "small_cotangents_of_logits",
        "weights_near_one",
        "small_values_of_keys_with_all_the_weight",
        "huge_logits",
        "soft_caps_of_all_sizes",
    ],
)
def test_numbers_far_from_one_are_as_exact(worker, job):
    worker.run(f"{JOBS}:{job}", seconds=SECONDS)


@mark
@pytest.mark.parametrize("unit", [0.3, 2**-0.5, 88**-0.5, 1.0001, 1.9999, 0.25, 7.3])
def test_backward_finds_the_product_that_forward_had(unit):
    from jattn.implementations.gpu.forward import base_of, of_logits

    rng = np.random.default_rng(0)
    size = 10.0 ** rng.uniform(-3, 12, 20000) * rng.choice([-1, 1], 20000)
    product = jnp.asarray(size, "float32")
    least = 1 + jnp.finfo("float32").eps
    for total in (1.0, least, 1.2, 3.0, 2.0**20):
        top, kept = of_logits(product, jnp.full_like(product, total), jnp.float32(unit))
        assert np.all((kept <= 1) == (total == 1))
        assert np.all(np.isfinite(np.log(kept)))
        base, level = base_of(top, kept, jnp.float32(unit))
        wide = lambda x: np.asarray(x, np.float64)
        # The weight of the largest logit, as backward computes it.
        exponent = (wide(product) - wide(base)) * wide(jnp.float32(unit)) / np.log(2)
        weight = np.exp2(exponent - wide(level))
        np.testing.assert_allclose(weight, 1 / total, rtol=1e-5)
        # The logsumexp, to the last place of the maximum, and of the sum's logarithm.
        got = wide(top) + np.log(wide(kept))
        want = wide(product) * wide(jnp.float32(unit)) + np.log(total)
        bound = 3e-7 * (np.log(total) + 1) + 1.5 * wide(np.spacing(abs(top)))
        assert np.all(abs(got - want) <= bound)


@mark
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(fault):
    worker = Worker(f"{JOBS}:strict")
    with pytest.raises((AssertionError, TimeoutError)) as found:
        worker.run(f"{JOBS}:faulty", fault, seconds=90)
    worker.stop()
    # Found by the emulator or by the result, not because the fault could not be planted.
    assert "text.count(old)" not in str(found.value)


def test_named_elsewhere_it_raises_the_reason():
    query = jnp.zeros((4, 1, 8), "bfloat16")
    with pytest.raises(ValueError, match=r'"gpu"\): runs on NVIDIA GPUs only, and the'):
        jattn.attention(query, query, query, implementation="gpu")


@pytest.mark.parametrize(
    ("dtype", "options", "message"),
    [
        ("float32", {}, "bfloat16 and float16"),
        ("bfloat16", {"mask": lambda b, n, t, s: jnp.arange(9)[t - s] > 3}, "joins"),
        ("bfloat16", {"mask": lambda b, n, t, s: TABLE[t, s]}, "as a Boolean mask"),
        (
            "bfloat16",
            {"modifier": lambda x, b, n, t, s: x * ONE[t, s]},
            "as a `bias`",
        ),
        ("bfloat16", {"modifier": lambda x, b, n, t, s: jax.lax.erf(x)}, "`erf`"),
        ("bfloat16", {"modifier": lambda x, b, n, t, s: jnp.sin(x)}, "`sin`"),
    ],
)
def test_what_kernels_cannot_do_is_refused_in_a_sentence(dtype, options, message):
    query = jnp.zeros((4, 1, 8), dtype)
    problem, _ = pose("test", query, query, query, **options)
    assert message in (GPU().refusal(problem, "cuda") or "")


def test_large_heads_and_other_precisions_are_refused():
    query = jnp.zeros((4, 1, 264), "bfloat16")
    problem, _ = pose("test", query, query, query)
    assert "up to 256" in (GPU().refusal(problem, "cuda") or "")
    query = query[..., :8]
    with jax.default_matmul_precision("highest"):
        problem, _ = pose("test", query, query, query)
    assert "precision" in (GPU().refusal(problem, "cuda") or "")


@pytest.mark.parametrize("power", [-3, -2, -1, 0, 1, 2, 5])
def test_powers_are_those_that_mosaic_has(power):
    x = jnp.array([-2.5, 0.3, 4.0])
    raised = lambda x: pairs.plain(lambda x: jax.lax.integer_pow(x, power), x)
    np.testing.assert_allclose(raised(x), x**power, rtol=1e-6)
    equations = jax.make_jaxpr(raised)(x).eqns
    powers = [e.params["y"] for e in equations if e.primitive.name == "integer_pow"]
    assert all(y > 1 for y in powers)


def test_tanh_keeps_the_digits_of_small_numbers():
    x = np.geomspace(1e-30, 20, 20000).astype("float32")
    x = np.concatenate([x, -x, np.zeros(1, "float32")])
    got = np.asarray(pairs.plain(jnp.tanh, x), np.float64)
    want = np.tanh(x.astype(np.float64))
    np.testing.assert_allclose(got, want, rtol=0, atol=8e-7)
    np.testing.assert_allclose(got, want, rtol=5e-5)


@mark
@pytest.mark.parametrize("capability", ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"])
def test_only_some_devices_are_taken(monkeypatch, capability):
    monkeypatch.setattr(nvidia, "lacking", lambda lacks: lacks(capability))
    query = jnp.zeros((4, 1, 8), "bfloat16")
    problem, _ = pose("test", query, query, query)
    sentence = GPU().refusal(problem, "cuda")
    assert (sentence is None) == (capability[0] in "89")
    assert nvidia.capability() == capability


@mark
@pytest.mark.parametrize(
    ("capability", "T", "chosen"),
    [("9.0", 256, "gpu"), ("9.0", 1, "blockwise"), ("8.0", 256, "blockwise")],
)
def test_it_is_chosen_where_it_was_measured(monkeypatch, capability, T, chosen):
    monkeypatch.setattr(nvidia, "lacking", lambda lacks: lacks(capability))
    query, key = jnp.zeros((T, 1, 64), "bfloat16"), jnp.zeros((256, 1, 64), "bfloat16")
    alibi = jattn.modifiers.ALiBi()
    found = jattn.explain(query, key, key, modifier=alibi, platform="gpu")
    assert found.implementation == chosen
    assert (found.refusals["gpu"] is None) == (chosen == "gpu")


@mark
@pytest.mark.parametrize(
    ("T", "S", "first"),
    [(2048, 2048, "gpu"), (2050, 2048, "cudnn"), (256, 4096, "cudnn")],
)
def test_cudnn_comes_first_where_it_is_faster(monkeypatch, T, S, first):
    monkeypatch.setattr(nvidia, "lacking", lambda lacks: lacks("9.0"))
    query, key = (jax.ShapeDtypeStruct((1, x, 1, 64), "bfloat16") for x in (T, S))
    found = jattn.explain(query, key, key, platform="gpu")
    assert found.implementation == first
    assert found.refusals["gpu"] is found.refusals["cudnn"] is None


def test_elsewhere_no_call_chooses_it_by_itself():
    query = jnp.zeros((256, 1, 64), "bfloat16")
    found = jattn.explain(query, query, query, platform="gpu")
    assert found.implementation != "gpu"
    assert found.refusals["gpu"]


@pytest.mark.slow
def test_the_day_of_a_gpu_says_that_there_is_none(tmp_path, capsys):
    from bench import gpu_day

    if jax.default_backend() == "gpu":
        pytest.skip("there is one")
    assert gpu_day.run(str(tmp_path / "gpu.json")) == 1
    assert "needs a GPU" in capsys.readouterr().out
    assert not (tmp_path / "gpu.json").exists()


def test_every_row_of_the_day_has_someone_to_compute_it():
    from bench import gpu_day, gpu_rows

    for row in gpu_rows.ROWS:
        names = [name for name in gpu_day.TIMED if name != "torch"]
        assert len([x for x in names if gpu_rows.by_name(x, row) is not None]) >= 2
        assert row.operations > 0
    timed = gpu_day.COMPILE + gpu_day.TIME * len(gpu_day.TIMED)
    assert gpu_day.TESTS + gpu_day.CHECKS + timed <= 9 * 60


@mark
def test_a_tile_and_the_operand_of_mma_are_in_the_same_registers():
    """Checks what `mma._left` says: of each 16 columns, both have equal numbers there."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    tile = _by_registers(plgpu.Layout.WGMMA.to_mgpu(), (64, 48))
    operand = _by_registers(plgpu.Layout.MMA_LHS(jnp.bfloat16).to_mgpu(), (64, 48))
    parts = np.split(tile, 3, axis=2), np.split(operand, 3, axis=2)
    for of_tile, of_operand in zip(*parts, strict=True):
        np.testing.assert_array_equal(of_tile, of_operand)


def _by_registers(layout, shape):
    """The numbers of a matrix: by warp, lane, register, and place in the register."""
    array = np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        lead, count = array.ndim - len(tile), len(tile)
        whole, inner = array.shape[:lead], array.shape[lead:]
        split = [(n // size, size) for n, size in zip(inner, tile, strict=True)]
        array = array.reshape(*whole, *itertools.chain(*split))
        outer = range(lead, lead + 2 * count, 2)
        array = array.transpose([*range(lead), *outer, *(i + 1 for i in outer)])
    warps = [axis for axis in layout.warp_dims if isinstance(axis, int)]
    named = [*warps, *layout.lane_dims, layout.vector_dim]
    array = np.moveaxis(array, named, [*range(len(named) - 1), -1])
    return array.reshape(4, 32, -1, array.shape[-1])
