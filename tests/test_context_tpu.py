"""A ring compiled for TPUs that are not there: each transfer has a kernel beside it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jattn
from jattn import Context, masks
from tests.helpers.chips import AHEAD_OF_TIME, described

pytestmark = [*AHEAD_OF_TIME, pytest.mark.slow]
STARTS = r"\s*(?:ROOT )?(%\S+) = .* collective-permute-start\("
DONE = r" collective-permute-done\((?:\([^)]*\) )?(%\S+?)[),]"


def transfers(program):
    """Says of each transfer how much it sends, and whether a kernel runs meanwhile."""
    lines, started, found = program.as_text().splitlines(), {}, []
    for i, line in enumerate(lines):
        if match := re.match(STARTS, line):
            started[match[1]] = i
        elif match := re.search(DONE, line):
            between = lines[started[match[1]] + 1 : i]
            size = re.search(r"= \w+\[([\d,]*)\]", line)[1]
            beside = any("tpu_custom_call" in x for x in between)
            found.append((np.prod([int(x) for x in size.split(",")]), beside))
    return found


@pytest.mark.parametrize("derivative", [False, True])
def test_each_transfer_has_a_kernel_beside_it(derivative):
    mesh = Mesh(described("v5e:4x4").reshape(-1), ("x",))
    place = NamedSharding(mesh, P(None, "x"))
    arrays = [
        jax.ShapeDtypeStruct((1, 16384, heads, 128), jnp.bfloat16, sharding=place)
        for heads in (8, 2, 2)
    ]
    context = Context("x", strategy="ring", mesh=mesh)

    def loss(*inputs):
        output = jattn.attention(*inputs, mask=masks.Causal(), context=context)
        return jnp.sum(output.astype(jnp.float32) ** 2)

    call = jax.grad(loss, (0, 1, 2)) if derivative else loss
    program = jax.jit(call).trace(*arrays).lower(lowering_platforms=("tpu",)).compile()
    sent = [beside for size, beside in transfers(program) if size == 1024 * 2 * 128]
    # Going backward the last hop takes cotangents home, when all work is done.
    assert sent.count(True) == (6 if derivative else 2)
    assert sent.count(False) == (2 if derivative else 0)
