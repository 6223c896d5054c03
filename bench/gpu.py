"""What a GPU would run, compiled where there is none: `python -m bench.gpu`.

Compiles `jattn.attention` for an H100 from a description of one, forward and forward with
gradients. Prints the memory that XLA plans besides arguments and results, how many kernels
are launched, for how many loops and branches the host waits for a number of the device, and
whether cuDNN is called. A loop of unknown length counts as one turn. Nothing runs and
nothing is timed.
"""

import argparse
import dataclasses
import importlib.util
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import jattn
from bench.gpu_launches import Launches, count
from bench.gpu_rows import with_gradients
from jattn.implementations import cudnn
from jattn.masks import Causal, Segments, Window

TARGET = pathlib.Path(__file__).with_name("h100.txtpb")
MISSING = (
    "bench.gpu needs XLA's compiler for GPUs, of the version of jax: "
    "pip install --no-deps jax-cuda13-plugin=={0} jax-cuda13-pjrt=={0}"
)
CALL = "__cudnn$fmha"
COUNTED = ("kernels", "waits", "cuDNN")
DTYPE = jnp.bfloat16


def rows():
    """Gives a name, a mask, and B T N H K."""
    documents = Segments(jnp.arange(4096) // 512)
    return (
        ("no mask", None, (1, 4096, 16, 128, 16)),
        ("causal", Causal(), (1, 4096, 16, 128, 16)),
        ("causal, 4 heads a key", Causal(), (1, 4096, 16, 128, 4)),
        ("causal", Causal(), (1, 32768, 16, 128, 16)),
        ("window", Window(1023, 0), (1, 32768, 16, 128, 16)),
        ("documents", Causal() & documents, (1, 4096, 16, 128, 16)),
    )


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one program takes."""

    calls: int  # of cuDNN
    launches: Launches
    temporaries: int  # bytes
    seconds: float  # to lower and compile


def device():
    """Describes an H100 that is not there."""
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name="h100",
        target_config=TARGET.read_text(),
        topology="1x1x1",
    ).devices[0]


def structs(shape):
    """Describes query, key and value of B T N H K."""
    B, T, N, H, K = shape
    return [jax.ShapeDtypeStruct((B, T, heads, H), DTYPE) for heads in (N, K, K)]


def functions(mask, implementation):
    """Gives the forward pass, and the gradients of query, key and value with it."""

    def forward(query, key, value):
        return jattn.attention(query, key, value, mask=mask, implementation=implementation)

    return {"forward": forward, "fwd+bwd": with_gradients(forward)}


def compile_for(target, function, arguments) -> Compiled:
    """Compiles for a device that is described."""
    start = time.perf_counter()
    sharding = jax.sharding.SingleDeviceSharding(target)
    arguments = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arguments
    ]
    traced = jax.jit(function).trace(*arguments)
    lowered = traced.lower(lowering_platforms=("cuda",))
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    bytes_planned = compiled.memory_analysis().temp_size_in_bytes
    text = compiled.as_text()
    return Compiled(text.count(CALL), count(text), bytes_planned, seconds)


def main(arguments=None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        "python -m bench.gpu", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--rows", type=int, help="the first so many")
    parser.add_argument("--lower", action="store_true", help="lower what --run would time")
    parser.add_argument("--run", action="store_true", help="measure on this GPU")
    parser.add_argument("--json", default="gpu.json", help="where --run writes its lines")
    options = parser.parse_args(arguments)
    if options.run:
        from bench import gpu_day

        return gpu_day.run(options.json)
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        print(MISSING.format(jax.__version__), file=sys.stderr)
        return 1
    jax.config.update("jax_platforms", "cpu")  # a GPU that is here has no part in it
    if options.lower:
        from bench import gpu_day

        return gpu_day.lower()
    target = device()
    print(f"compiled for {target.device_kind}, {jnp.dtype(DTYPE).name}; nothing was run")
    if not cudnn.is_installed():
        print("cuDNN is not found: pip install --no-deps nvidia-cudnn-cu13")
    for name, mask, shape in rows()[: options.rows]:
        arguments = structs(shape)
        sizes = " ".join(f"{x}={size}" for x, size in zip("BTNHK", shape, strict=True))
        heads = (*("forward", *COUNTED), *("fwd+bwd", *COUNTED), "compile")
        print(f"\n{name}   {sizes}\n{'':10}" + "".join(f"{x:>11}" for x in heads))
        found = jattn.explain(*arguments, mask=mask, platform="gpu").refusals
        for implementation in ("cudnn", "blockwise"):
            print(f"{implementation:10}", end="", flush=True)
            if found[implementation] is not None:
                print(f"  {found[implementation]}")
            elif implementation == "cudnn" and not cudnn.is_installed():
                print("  not found")
            else:
                print(line(target, mask, implementation, arguments))
    return 0


def line(target, mask, implementation, arguments) -> str:
    """Writes the figures of an implementation."""
    # A name is checked for the device that is here; without one, cuDNN is lowered.
    choice = None if implementation == "cudnn" else implementation
    found = [
        compile_for(target, function, arguments)
        for function in functions(mask, choice).values()
    ]
    cells = []
    for one in found:
        kernels, waits = one.launches.kernels, one.launches.waits
        cells += [f"{one.temporaries / 2**20:.1f} MiB", kernels, waits, one.calls]
    cells.append("+".join(f"{one.seconds:.1f}" for one in found) + " s")
    return "".join(f"{cell:>11}" for cell in cells)


if __name__ == "__main__":
    sys.exit(main())
