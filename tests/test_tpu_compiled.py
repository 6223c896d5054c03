"""The kernels compile for TPUs that are not there, by the libtpu of `jax[tpu]`."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jattn
from bench.tpu import TOPOLOGIES
from jattn import masks, modifiers
from tests.helpers.chips import AHEAD_OF_TIME, described

pytestmark = AHEAD_OF_TIME
KERNEL = 'custom_call_target="tpu_custom_call"'


@contextlib.contextmanager
def chips(name, shape, axes):
    mesh = Mesh(described(TOPOLOGIES[name])[: np.prod(shape)].reshape(shape), axes)
    with jax.set_mesh(mesh):
        yield mesh


def compiled(function, mesh, spec, *shapes, dtype="bfloat16"):
    place = NamedSharding(mesh, spec)
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in shapes]
    lowered = jax.jit(function).trace(*arrays).lower(lowering_platforms=("tpu",))
    return lowered.compile()


def gradients(attend):
    total = lambda *xs: jnp.sum(attend(*xs).astype(jnp.float32))
    return jax.grad(total, (0, 1, 2))


def shapes(T, S=None, N=2, K=1, H=128, D=128, B=1):
    S = T if S is None else S
    return (B, T, N, H), (B, S, K, H), (B, S, K, D)


def kernels(program) -> int:
    return program.as_text().count(KERNEL)


@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize("T", [128, 131072])
def test_gradients_compile_for_short_and_long_inputs(name, T):
    attend = lambda *xs: jattn.attention(*xs, mask=masks.Causal())
    with chips(name, (1,), ("chip",)) as mesh:
        program = compiled(gradients(attend), mesh, PartitionSpec(), *shapes(T, N=1))
    assert kernels(program) == 2
    inputs = 4 * 131072 * 128 * 4  # queries and the like, in float32
    assert program.memory_analysis().temp_size_in_bytes < 4 * inputs


SIZES = {
    "grouped": shapes(600, 1100, N=8, K=2, H=64, D=64),
    "values of another size": shapes(256, H=192, D=128),
    "small heads": shapes(200, H=80, D=96),
    "large heads": shapes(256, H=256, D=256),
    "one query": shapes(1, 2048, N=8, K=2),
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_compile_for_sizes(sizes, dtype):
    with chips("v5e", (1,), ("chip",)) as mesh:
        program = compiled(
            gradients(jattn.attention), mesh, PartitionSpec(), *SIZES[sizes], dtype=dtype
        )
    assert kernels(program) == 2


IDS = jnp.arange(512) // 100
OPTIONS = {
    "documents": {"mask": lambda b, n, t, s: (t >= s) & (IDS[t] == IDS[s])},
    "window": {"mask": masks.Window(100, 0) | masks.Prefix(7)},
    "lengths": {"mask": masks.Lengths(jnp.array([300]))},
    "explicit": {"mask": masks.Explicit(jnp.ones((512, 512), bool))},
    "heads": {"mask": lambda b, n, t, s: (t + s) % 3 != n},
    "modifiers": {
        "mask": masks.Segments(IDS, padding_id=4),
        "modifier": modifiers.SoftCap(30.0) >> modifiers.ALiBi(),
        "bias": jnp.zeros((1, 512, 512)),
    },
    "dropout": {"dropout": jattn.Dropout(0.1, jax.random.key(0))},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_compile_for_masks_and_modifiers(options):
    attend = lambda *xs: jattn.attention(*xs, **OPTIONS[options])
    with chips("v6e", (1,), ("chip",)) as mesh:
        program = compiled(gradients(attend), mesh, PartitionSpec(), *shapes(512))
    assert kernels(program) == 2


def test_second_derivatives_compile_beside_kernels():
    attend = lambda *xs: jattn.attention(*xs, mask=masks.Causal())
    hessian = lambda *xs: jax.jvp(gradients(attend), xs, xs)[1]
    with chips("v6e", (1,), ("chip",)) as mesh:
        program = compiled(hessian, mesh, PartitionSpec(), *shapes(512))
    assert kernels(program) == 1  # forward


def test_four_chips_run_a_kernel_each_on_their_batch_and_heads():
    spec = PartitionSpec("data", None, "model", None)
    with chips("v5e", (2, 2), ("data", "model")) as mesh:
        attend = jax.shard_map(
            lambda *xs: jattn.attention(*xs, mask=masks.Causal()),
            mesh=mesh,
            in_specs=(spec,) * 3,
            out_specs=spec,
        )
        program = compiled(gradients(attend), mesh, spec, *shapes(1024, B=2, N=8, K=4))
    assert kernels(program) == 2  # forward and backward
    collectives = "all-gather|all-reduce|all-to-all|collective-permute"
    assert not re.search(rf"\b({collectives})(-start)?\(", program.as_text())
