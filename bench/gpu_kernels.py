"""What kernels are compiled to, where there is no GPU: `python -m bench.gpu_kernels`.

The plugin of `jax[cuda13]` compiles a kernel of Pallas by `ptxas`; here its report and its
PTX are kept, and the instructions of its loops are counted. Nothing runs.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from unittest import mock

import jax

from bench.gpu import device
from jattn.implementations.gpu.refusal import HOPPER

# KiB of shared memory that a program can have, from NVIDIA's table of compute capabilities.
SHARED = {"8.0": 163, "8.6": 99, "8.9": 99, HOPPER: 227}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one kernel is compiled to."""

    name: str
    wgmma: int  # instructions of the tensor cores, in PTX
    mma: int  # likewise, those that Ampere has
    spilled: int  # bytes that do not fit the registers
    registers: int  # of a thread, before the groups share them out
    loops: tuple[int, ...]  # instructions of a turn of each loop that multiplies


def compiled(function, *arguments, capability=HOPPER) -> list[Kernel]:
    """Compiles a function of arrays for a GPU, and describes its kernels.

    A kernel that this process has compiled before is not compiled again, and is left out.
    """
    place = jax.sharding.SingleDeviceSharding(device())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments
    )
    with _kept() as folder, _described_as(capability):
        traced = jax.jit(function).trace(*arguments)
        traced.lower(lowering_platforms=("cuda",)).compile()
        return [_described(path) for path in sorted(folder.glob("*.ptx"))]


@contextlib.contextmanager
def _described_as(capability: str):
    """Makes Mosaic compile for a compute capability; without a GPU it takes Hopper's.

    A kernel that takes more shared memory than these devices have raises an error.
    """
    from jax.experimental.mosaic.gpu import core, utils

    numbers = tuple(map(int, capability.split(".")))
    bound = SHARED[capability] * 1024
    with (
        mock.patch.object(utils, "_infer_arch", return_value=numbers),
        mock.patch.object(core, "_SMEM_SIZE_BOUND", bound),
    ):
        yield


@contextlib.contextmanager
def _kept():
    """Makes Mosaic write what it compiles to a folder."""
    with tempfile.TemporaryDirectory() as folder:
        names = ("MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_PTXAS")
        settings = {"MOSAIC_GPU_DUMP_TO": folder} | dict.fromkeys(names, "1")
        with mock.patch.dict(os.environ, settings):
            yield pathlib.Path(folder)


def _described(path: pathlib.Path) -> Kernel:
    text, report = path.read_text(), path.with_suffix(".ptxas").read_text()
    number = lambda pattern: int((re.findall(pattern, report) or ["0"])[0])
    entry = re.search(r"\.entry (\w+?)_mosaic_gpu", text)
    return Kernel(
        name=entry[1] if entry else path.stem,
        wgmma=text.count("wgmma.mma_async"),
        mma=text.count("mma.sync.aligned"),
        spilled=number(r"(\d+) bytes spill stores"),
        registers=number(r"Used (\d+) reg"),
        loops=tuple(loops(path)) if tools() else (),
    )


def tools() -> dict[str, str]:
    """Finds the assembler and the disassembler; none of them if one is absent."""
    spec = importlib.util.find_spec("nvidia")
    places = [f"{x}/cu13/bin" for x in (spec.submodule_search_locations if spec else ())]
    path = os.pathsep.join([*places, os.environ.get("PATH", "")])
    found = {name: shutil.which(name, path=path) for name in ("ptxas", "nvdisasm")}
    return {k: x for k, x in found.items() if x} if all(found.values()) else {}


def loops(path: pathlib.Path) -> list[int]:
    """Counts the instructions of each loop that multiplies, the shortest one first."""
    names = tools()
    binary = path.with_suffix(".cubin")
    target = re.search(r"\.target (\w+)", path.read_text())[1]
    subprocess.run([names["ptxas"], f"-arch={target}", path, "-o", binary], check=True)
    listing = subprocess.run(
        [names["nvdisasm"], "-c", binary], check=True, capture_output=True, text=True
    ).stdout
    instructions, spans = _spans(listing)
    multiplies = lambda a, b: sum("HGMMA" in x or "HMMA" in x for x in instructions[a:b])
    spans = [x for x in spans if multiplies(*x)]
    inside = lambda x, y: x != y and y[0] <= x[0] and x[1] <= y[1]
    inner = [x for x in spans if not any(inside(y, x) for y in spans)]
    # Threads that wait spin in loops of their own, some of which overlap half a loop.
    most = max((multiplies(*x) for x in inner), default=0)
    return sorted(b - a for a, b in inner if multiplies(a, b) == most)


def _spans(listing: str):
    """Gives the instructions, and where a jump back begins and ends."""
    instructions, labels, spans = [], {}, []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found[1])
            jump = re.search(r"BRA.*?(\.L_x_\d+)", found[1])
            if jump and jump[1] in labels:
                spans.append((labels[jump[1]], len(instructions)))
    return instructions, spans


def main(arguments: list[str] | None = None) -> None:
    """Prints what the forward kernels are compiled to, for each compute capability."""
    from bench import gpu_rows

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capability", nargs="*", default=list(SHARED), help="such as 8.6")
    row = "{:12}{:16}{:>9}{:>9}{:>11}   {}"
    head = ("capability", "call", "multiply", "spilled", "registers")
    print(row.format(*head, "instructions of a turn of each loop"))
    for capability in parser.parse_args(arguments).capability:
        for what in ("causal", "documents", "softcap+alibi"):
            call = gpu_rows.Row(what, 4096)
            forward = functools.partial(
                gpu_rows.by_kernels, capability=capability, **call.options
            )
            for found in compiled(forward, *call.arrays(), capability=capability):
                multiply = f"{found.wgmma or found.mma}"
                counts = multiply, found.spilled, found.registers, found.loops
                print(row.format(capability, what, *map(str, counts)), flush=True)


if __name__ == "__main__":
    main()
