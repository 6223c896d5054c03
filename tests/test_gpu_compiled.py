"""The kernels compile for GPUs that are not there, and are as short as JAX's own."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest

import jattn
from bench import gpu, gpu_kernels, gpu_rows
from jattn import masks, modifiers
from jattn.call.pose import pose
from jattn.implementations.gpu.kernel import GPU
from jattn.implementations.gpu.refusal import HOPPER, OLDEST

NEEDED = ("jax_cuda13_plugin", "absl")
pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in NEEDED),
        reason="needs pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt, and absl-py",
    ),
    pytest.mark.skipif(jax.__version_info__ < OLDEST, reason="needs a newer jax"),
    pytest.mark.xdist_group("cuda"),
]
SPILLED = 200  # bytes at most in a backward kernel: stored and loaded once a turn
# Times those of JAX's kernel, which multiplies a logit before it subtracts the maximum: one
# instruction less for each pair, but then the difference is not 0 at the maximum itself.
INSTRUCTIONS = {"causal": 1.25, "softcap and alibi": 2.9}


def attend(query, key, value, capability=HOPPER, **options):
    """`jattn.attention` by the kernels, whatever device is here."""
    problem, _ = pose("test", query, key, value, **options)
    assert GPU().refusal(problem, "cuda") is None
    return gpu_rows.by_kernels(query, key, value, capability, **options)


def gradients(function):
    total = lambda *xs: jnp.sum(function(*xs).astype(jnp.float32))
    return jax.grad(total, (0, 1, 2))  # the first three arguments


def arrays(T=1024, S=None, N=2, K=1, H=128, D=None, dtype="bfloat16"):
    shapes = (1, T, N, H), (1, S or T, K, H), (1, S or T, K, D or H)
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


@functools.cache
def of_jax():
    """The loops of JAX's own kernel, causal: without a mask, and with it."""
    forward = gpu_rows.mgpu_forward
    (kernel,) = gpu_kernels.compiled(forward, *arrays(K=2, dtype="float16"))
    return kernel.loops[:2]


BENT = modifiers.SoftCap(20.0) >> modifiers.ALiBi()
CASES = {
    "causal": ({"mask": masks.Causal()}, 1024, 2),
    "softcap and alibi": ({"mask": masks.Causal(), "modifier": BENT}, 1152, 3),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_use_tensor_cores_and_registers_and_are_short(name):
    options, T, count = CASES[name]
    attention = functools.partial(attend, **options)
    found = gpu_kernels.compiled(gradients(attention), *arrays(T=T))
    (forward,) = [kernel for kernel in found if kernel.name == "jattn_forward"]
    backward = [kernel for kernel in found if kernel.name == "jattn_backward"]
    assert len(backward) == count  # one for queries, one or two for keys and values
    assert all(kernel.wgmma > 0 for kernel in found)
    assert forward.spilled == 0
    assert max(kernel.spilled for kernel in backward) <= SPILLED
    if gpu_kernels.tools():
        for mine, theirs in zip(forward.loops[:2], of_jax(), strict=True):
            assert mine <= INSTRUCTIONS[name] * theirs


SIZES = {
    "grouped and ragged": {"T": 600, "S": 1100, "N": 8, "K": 2, "H": 64},
    "values of another size": {"T": 256, "H": 192, "D": 128},
    "the largest heads": {"T": 256, "H": 256},
    "small heads": {"T": 200, "H": 80, "D": 96},
    "one query": {"T": 1, "S": 2048, "N": 8, "K": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_compile_for_sizes(sizes, dtype):
    kernels = gpu_kernels.compiled(gradients(attend), *arrays(**SIZES[sizes], dtype=dtype))
    assert len(kernels) >= 3
    assert all(kernel.wgmma > 0 for kernel in kernels)


IDS = jnp.arange(512, dtype=jnp.int32) // 100
OPTIONS = {
    "documents": {"mask": lambda b, n, t, s: (t >= s) & (IDS[t] == IDS[s])},
    "lengths": {"mask": masks.Lengths(jnp.array([300]))},
    "explicit": {"mask": masks.Explicit(jnp.ones((512, 512), bool))},
    "heads": {"mask": lambda b, n, t, s: (t + s) % 3 != n},
    "bias and floor": {
        "modifier": lambda x, b, n, t, s: jnp.floor(x) + jnp.log1p(x * x) - jnp.expm1(-x),
        "bias": jnp.zeros((1, 512, 512)),
    },
    "dropout": {"dropout": jattn.Dropout(0.1, jax.random.key(0))},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_compile_for_masks_and_modifiers(options):
    attention = functools.partial(attend, **OPTIONS[options])
    kernels = gpu_kernels.compiled(gradients(attention), *arrays(T=512))
    assert len(kernels) >= 3
    assert all(kernel.wgmma > 0 for kernel in kernels)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [HOPPER, "8.9"])
def test_gradient_of_a_number_in_a_modifier_compiles(capability):
    def attention(cap, *arrays):
        bent = modifiers.SoftCap(cap) >> modifiers.ALiBi()
        return attend(*arrays, capability=capability, modifier=bent)

    cap = jax.ShapeDtypeStruct((), "float32")
    kernels = gpu_kernels.compiled(
        gradients(attention), cap, *arrays(T=384), capability=capability
    )
    assert len(kernels) >= 3
    assert all(kernel.wgmma + kernel.mma > 0 for kernel in kernels)


def test_second_derivatives_compile_beside_kernels():
    attention = functools.partial(attend, mask=masks.Causal())
    hessian = lambda *xs: jax.jvp(gradients(attention), xs, xs)[1]
    assert len(gpu_kernels.compiled(hessian, *arrays(T=512))) == 1  # forward


def compiled_blockwise(mask, heads=16):
    """The forward pass at T = 4096, and with gradients, in bfloat16 with D = 128."""
    arguments = gpu.structs((1, 4096, heads, 128, heads))
    functions = gpu.functions(mask, "blockwise").values()
    return [gpu.compile_for(gpu.device(), function, arguments) for function in functions]


def test_blockwise_is_one_loop_that_the_host_need_not_follow():
    forward, both = compiled_blockwise(masks.Causal())
    # Two loops a block, as on CPU, had 3000 launches and 290 waits here.
    assert forward.launches.kernels <= 250
    assert both.launches.kernels <= 500
    assert forward.launches.waits == both.launches.waits == 0
    assert forward.temporaries <= 200 * 2**20
    # Logits and weights of a tile twice, 192 MiB, and the gradients in float32, 96 MiB.
    assert both.temporaries <= 340 * 2**20


def test_blockwise_has_one_loop_of_each_kind_where_the_mask_is_known_at_run_time():
    documents = masks.Segments(jnp.arange(4096) // 512)
    forward, _ = compiled_blockwise(masks.Causal() & documents)
    assert forward.launches.waits == 2  # full tiles, and partial ones


# Instructions of the unmasked and of the masked loop for a tile of 64 x 64 with D = 128. Of
# them 128 multiply. A tenth more than were counted:
AMPERE = (540, 660)


@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9"])
def test_kernels_for_ampere_and_ada_use_tensor_cores_and_registers(capability):
    attention = functools.partial(attend, capability=capability, mask=masks.Causal())
    found = gpu_kernels.compiled(
        gradients(attention), *arrays(T=1280), capability=capability
    )
    assert len(found) == 3  # forward; backward for queries, and for keys and values
    for kernel in found:
        assert kernel.mma > 0
        assert kernel.wgmma == 0
        assert kernel.spilled <= (0 if kernel.name == "jattn_forward" else SPILLED)
    (forward,) = [kernel for kernel in found if kernel.name == "jattn_forward"]
    if gpu_kernels.tools():
        pairs = zip(forward.loops[:2], AMPERE, strict=True)
        assert all(mine <= most for mine, most in pairs), forward.loops


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES)
def test_kernels_for_ada_compile_for_sizes(sizes):
    attention = functools.partial(attend, capability="8.9", modifier=BENT)
    kernels = gpu_kernels.compiled(attention, *arrays(**SIZES[sizes]), capability="8.9")
    assert [kernel.name for kernel in kernels] == ["jattn_forward"]
    assert kernels[0].mma > 0
    assert kernels[0].spilled == 0
