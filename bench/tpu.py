"""Counts the instructions of the kernels for TPU, compiled for chips that are not there.

    pip install 'jax[tpu]' && python -m bench.tpu [v5e v6e v5p tpu7x]

Each row is compiled ahead of time, in a process of its own, and beside it splash attention
by the same compiler. The figures are VLIW bundles per executed block of 512 × 512: of full
blocks; of partial ones, two at once and then one alone, where two are computed at once;
`causal` weighs them as a causal mask over 4096 queries does. They leave out stalls and
copies: nothing here is a time.
"""

import argparse
import glob
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile

from bench import tpu_decode
from bench.tpu_calls import BLOCK, LENGTH, own, splash

TOPOLOGIES = {
    "v5e": "v5e:2x2",
    "v6e": "v6e:2x2",
    "v5p": "v5p:2x2x1",
    "tpu7x": "tpu7x:2x2x1",
}
# name, what runs, head size, which of the kernels, against which row of splash
ROWS = (
    ("splash forward, D=128", "splash", 128, "fwd", None),
    ("splash forward, D=64", "splash", 64, "fwd", None),
    ("splash fused backward, D=128", "splash_backward", 128, "dkv", None),
    ("causal forward, D=128", "causal", 128, "forward", 0),
    ("causal forward, D=64", "causal", 64, "forward", 1),
    ("softcap and ALiBi by a lambda, D=128", "modified", 128, "forward", 0),
    ("documents and causal, D=128", "documents", 128, "forward", 0),
    ("causal backward, D=128", "causal_backward", 128, "backward", 2),
)
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}


def compile_row(topology: str, what: str, D: int) -> None:
    """Compiles, in a process of its own, and prints the temporaries' bytes."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    chip = described.devices[0]
    place = jax.sharding.SingleDeviceSharding(chip)
    array = lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(
        shape, dtype, sharding=place
    )
    if what.startswith("decode"):
        function, shapes = tpu_decode.call(what, D, array)
    elif what.startswith("splash"):
        function, shapes = splash(backward="backward" in what), [array(4, LENGTH, D)] * 3
    else:
        function = own(what)
        shapes = [array(1, LENGTH, 4, D)] * 3 + [array(LENGTH, dtype="int32")]
    with jax.set_mesh(jax.sharding.Mesh(np.array([chip]), ("chip",))):
        lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",))
    memory = lowered.compile().memory_analysis()
    print(json.dumps({"temporaries": memory.temp_size_in_bytes}))


def bundles(listing: str, utilization: str) -> list[dict]:
    """Finds the innermost regions of a kernel that hold much of its matrix products."""
    with open(utilization) as file:
        lines = file.read().splitlines()
    at = next(i for i, line in enumerate(lines) if "CAPAC" in line)
    names = [name.strip() for name in lines[at + 1].split(",")]
    numbers = [x.split() for x in lines if re.fullmatch(r"[\d ]+", x) and x.strip()]
    rows = [list(map(int, x)) for x in numbers][1:]
    opened, regions = {}, set()
    with open(listing) as file:
        for line in file:
            found = re.match(r"\s*(0x[0-9a-f]+|0)\s*(?:[A-Z]{2})?\s*:", line)
            if not found:
                continue
            here = int(found[1], 16)
            for word, name in re.findall(r"(?<!/)(Start|End) region ?(\d+)", line):
                if word == "Start":
                    opened[name] = here
                elif name in opened:
                    regions.add((opened.pop(name), here))
    matrix = names.index("MXU" if "MXU" in names else "MATMUL")
    work = lambda a, b, column: sum(row[column] for row in rows[a : b + 1])
    total = work(0, len(rows), matrix)
    large = [x for x in regions if total and work(*x, matrix) >= 0.1 * total]
    inner = [
        (a, b)
        for a, b in large
        if not any((a, b) != (c, d) and a <= c and d <= b for c, d in large)
    ]
    least = min((work(*x, matrix) for x in inner), default=0)
    spill = names.index("VSTORE:SPILL")
    found = []
    for region in inner:
        a, b = region
        two = len(inner) == 3 and work(*region, matrix) > least  # and one alone
        blocks = 2 if two else 1
        each = round((b - a + 1) / blocks)
        found.append({"blocks": blocks, "bundles": each, "spills": work(a, b, spill)})
    return sorted(found, key=lambda x: (-x["blocks"], x["bundles"]))


def count(topology: str, what: str, D: int, kernel: str):
    """Counts the regions of the kernel of that name, and the temporaries of the program."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        run = subprocess.run(
            [sys.executable, "-m", "bench.tpu", "--compile", topology, what, str(D)],
            env=os.environ | ENVIRONMENT | {"LIBTPU_INIT_ARGS": flags},
            capture_output=True,
            text=True,
        )
        if run.returncode:
            raise SystemExit(f"bench.tpu: {what} does not compile\n{run.stderr[-2000:]}")
        for listing in sorted(glob.glob(f"{folder}/*final_bundles.txt")):
            name = re.match(r"\d+-(.*)-\d+-final_bundles", os.path.basename(listing))
            skipped = ("analysis", "<late", "-TLP-")
            if not name or kernel not in name[1] or any(x in listing for x in skipped):
                continue
            pattern = f"{folder}/*-{glob.escape(name[1])}-*final_hlo-static-per-bundle*.txt"
            regions = bundles(listing, glob.glob(pattern)[0])
            if regions:
                memory = json.loads(run.stdout.splitlines()[-1])["temporaries"]
                return regions, memory
    raise SystemExit(f"bench.tpu: no kernel named {kernel} in {what}")


def causal(regions: list[dict]) -> float:
    """Bundles per block, as a causal mask weighs full and partial ones, and halves."""
    blocks = LENGTH // BLOCK
    counts = [blocks * (blocks - 1) // 2, blocks]
    if len(regions) == 3:  # two blocks of keys at once, or one of them alone
        counts = [(blocks // 2) * (blocks // 2 - 1), blocks // 2, blocks // 2]
    elif len(regions) == 1:
        counts = [sum(counts)]
    weights = [count * x["blocks"] for count, x in zip(counts, regions, strict=True)]
    pairs = zip(weights, regions, strict=True)
    return sum(weight * x["bundles"] for weight, x in pairs) / sum(weights)


def main(arguments: list[str] | None = None) -> None:
    """Counts for the chips that are named, or for all."""
    parser = argparse.ArgumentParser(
        "python -m bench.tpu", description=__doc__, allow_abbrev=False
    )
    chips = ", ".join(TOPOLOGIES)
    parser.add_argument("names", nargs="*", metavar="CHIP", help=f"all by default: {chips}")
    # What the process of one row is called with: topology, what runs, head size.
    parser.add_argument("--compile", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.names) - set(TOPOLOGIES):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {chips}")
    if chosen.compile:
        topology, what, size = chosen.compile
        compile_row(topology, what, int(size))
    else:
        print_table(chosen.names or list(TOPOLOGIES))


def print_table(names: list[str]) -> None:
    """Prints a row for each chip and kernel."""
    if importlib.util.find_spec("libtpu") is None:
        raise SystemExit("bench.tpu: libtpu is missing; pip install 'jax[tpu]'.")
    version = importlib.metadata.version
    versions = [f"{name} {version(name)}" for name in ("jax", "libtpu")]
    print(f"{', '.join(versions)}; compiled ahead of time, not run\n")
    print("| chip | kernel | full | partial | causal | spills | temporaries | splash |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        means = []
        for row, what, D, kernel, against in ROWS:
            regions, memory = count(TOPOLOGIES[name], what, D, kernel)
            means.append(causal(regions))
            ratio = "" if against is None else f"{means[-1] / means[against]:.2f} ×"
            listed = (regions * 2)[:2] if len(regions) == 1 else regions
            cells = [
                listed[0]["bundles"],
                " / ".join(str(x["bundles"]) for x in listed[1:]),
            ]
            cells.append(f"{means[-1]:.0f}")
            spills = " / ".join(str(x["spills"]) for x in regions)
            cells += [spills, f"{memory / 2**20:.1f} MiB", ratio]
            print(f"| {name} | {row} | " + " | ".join(map(str, cells)) + " |", flush=True)
    print_decoding(names)


def print_decoding(names: list[str]) -> None:
    """Prints a row for each chip and call of a cache: bundles for 1024 slots of a head."""
    print("\n| chip | cache | full | partial | spills | temporaries |")
    print("|---|---|---|---|---|---|")
    for name in names:
        for row, what, H in tpu_decode.ROWS:
            regions, memory = count(TOPOLOGIES[name], what, H, "decode")
            full, *others = (str(x["bundles"]) for x in regions)
            spills = " / ".join(str(x["spills"]) for x in regions)
            cells = (
                name,
                row,
                full,
                " / ".join(others),
                spills,
                f"{memory / 2**20:.1f} MiB",
            )
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
