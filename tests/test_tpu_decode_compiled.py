"""The kernel for caches compiles for TPUs that are not there, and copies no cache."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bench import tpu_decode
from bench.tpu import TOPOLOGIES
from tests.helpers.chips import AHEAD_OF_TIME, described

pytestmark = AHEAD_OF_TIME
# All kinds of caches on one chip, and one kind on all of them.
EACH = [("v6e", what, H) for _, what, H in tpu_decode.ROWS]
EACH += [(name, "decode", 128) for name in TOPOLOGIES if name != "v6e"]


def compiled(name, what, H):
    """The program of one token for each example, and the bytes of its cache."""
    mesh = Mesh(described(TOPOLOGIES[name])[:1].reshape(1), ("chip",))
    place = NamedSharding(mesh, PartitionSpec())

    def array(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    function, types = tpu_decode.call(what, H, array)
    with jax.set_mesh(mesh):
        program = jax.jit(function).trace(*types).lower(lowering_platforms=("tpu",))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(types[1]))
    return program.compile(), types[1], size


@pytest.mark.parametrize(("name", "what", "H"), EACH)
def test_a_token_is_one_kernel_and_no_copy_of_the_cache(name, what, H):
    program, kv, size = compiled(name, what, H)
    text = program.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    # On TPU7x the loop that mends a hidden NaN reads keys in tiles of 16 rows. XLA plans a
    # copy of them, half of the cache, for when it runs.
    most = 0.55 if name == "tpu7x" else 0.05
    assert program.memory_analysis().temp_size_in_bytes < most * size
    largest = max(jax.tree.leaves(kv), key=lambda x: np.prod(x.shape))
    shape = ",".join(map(str, largest.shape))
    # What always runs; the loop that mends a hidden NaN is in another computation.
    entry = text[text.index("\nENTRY ") :].splitlines()
    lines = [x.split(" = ")[1] for x in entry if " = " in x]
    made = {x.split("} ")[-1].split("(")[0] for x in lines if f"[{shape}]" in x[:80]}
    assert not {x for x in made if re.match("copy|fusion|transpose|convert", x)}, made
