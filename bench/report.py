"""The figures of a run, as lines of text and as JSON."""

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import tempfile
from collections.abc import Iterator

import jax

import jattn
from bench import processor
from bench.candidates import PASSES, missing, num_cores

LEGEND = """\
× jattn   time by that of jattn's own choice, marked *: above 1, jattn is faster
±         half the range that holds the middle half of the times
error     largest |output − output in float64|, over some of the queries; ≠ if it is more
          than 30 times jattn's: not the same function, at empty rows for instance
compile, temporaries   of forward / of forward+backward"""
COLUMNS = (
    ("", 16, "<"),
    ("forward", 16, ">"),
    ("× jattn", 10, ">"),
    ("fwd+bwd", 18, ">"),
    ("× jattn", 10, ">"),
    ("error", 11, ">"),
    ("compile", 15, ">"),
    ("temporaries", 19, ">"),
)


def header(dtype: str, peers, missing) -> dict:
    """Says where and with what a run is made."""
    versions = {"jattn": jattn.__version__, "jax": jax.__version__}
    installed = [name for name in peers if name not in ("jax_nn", *missing)]
    versions |= {name: importlib.metadata.version(name) for name in installed}
    device = jax.devices()[0]
    return {
        "device": processor.describe() if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "cores": num_cores(),
        "python": platform.python_version(),
        "versions": versions,
        "dtype": dtype,
        "missing": list(missing),
    }


def opening(facts: dict) -> str:
    """Writes the header, and what the columns mean."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        f"{facts['platform']}: {facts['device']}, {facts['cores']} cores, {facts['dtype']}",
        f"{versions}, Python {facts['python']}",
        *(f"{name}: not installed, left out" for name in facts["missing"]),
    ]
    return "\n".join([*lines, "", LEGEND])


def table(record: dict) -> str:
    """Writes one row of the run: its name, and a line for each candidate."""
    lines = ["", f"{record['case']}   {shape_text(record['shape'])}"]
    lines.append(_line(name for name, _, _ in COLUMNS))
    for name, figures in record["candidates"].items():
        star = " *" if name == record["chosen"] else ""
        is_ok = figures["status"] == "ok"
        cells = _cells(figures) if is_ok else [figures["status"]]
        lines.append(_line([name + star, *cells]))
    reasons = [
        f"  {name}: {figures['reason']}"
        for name, figures in record["candidates"].items()
        if figures.get("reason")
    ]
    return "\n".join(lines + reasons)


def shape_text(shape: dict[str, int]) -> str:
    """Writes the letters and sizes, without those that follow from others."""
    follows = {"K": "N", "S": "T", "D": "H"}
    return " ".join(
        f"{letter}={size}"
        for letter, size in shape.items()
        if letter not in follows or size != shape[follows[letter]]
    )


def _line(cells) -> str:
    columns = zip(cells, COLUMNS, strict=False)
    return "".join(f"{cell:{side}{width}}" for cell, (_, width, side) in columns).rstrip()


def _cells(figures: dict) -> Iterator[str]:
    passes = [figures["passes"][name] for name in PASSES]
    for one in passes:
        yield f"{duration(one['seconds'])} ±{100 * one['spread']:2.0f}%"
        yield ratio_text(one["ratio"])
    yield f"{figures['error']:.1e}" + ("  " if figures["same"] else " ≠")
    compiling = [one["compile_seconds"] for one in passes]
    yield "–" if None in compiling else " / ".join(f"{x:.1f}" for x in compiling) + " s"
    memory = [one["temporaries_bytes"] for one in passes]
    mebibytes = (f"{x / 2**20:.3g}" for x in memory if x is not None)
    yield "–" if None in memory else " / ".join(mebibytes) + " MiB"


def ratio_text(ratio: float) -> str:
    """Writes a ratio in three digits, or four."""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"


def duration(seconds: float) -> str:
    """Writes a time in three digits."""
    for unit, size in (("s ", 1), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def closing(records: list[dict]) -> str:
    """Writes the mean ratio of each candidate, over the rows that it has."""
    lines = ["", _line(["geometric mean", "forward", "× jattn", "fwd+bwd", "× jattn"])]
    for name in dict.fromkeys(name for record in records for name in record["candidates"]):
        every = [record["candidates"][name] for record in records]
        every = [figures["passes"] for figures in every if figures["status"] == "ok"]
        if every:
            means = [
                statistics.geometric_mean(x[label]["ratio"] for x in every)
                for label in PASSES
            ]
            count = f"{len(every)} of {len(records)} rows"
            lines.append(
                _line([name, "", *map(ratio_text, (means[0],)), "", ratio_text(means[1])])
                + f"   {count}"
            )
    return "\n".join(lines)


def write_json(path: pathlib.Path, facts: dict, records: list[dict]) -> None:
    """Writes all figures, with every single time; what is not finite becomes null."""
    text = json.dumps(_finite({"header": facts, "rows": records}), indent=1)
    with replacing(path) as file:
        file.write(text.encode() + b"\n")


@contextlib.contextmanager
def replacing(path: pathlib.Path):
    """Opens a binary file that takes the place of `path` when all of it is written."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _finite(x):
    if isinstance(x, dict):
        return {name: _finite(y) for name, y in x.items()}
    if isinstance(x, list):
        return [_finite(y) for y in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def chosen(program: str, description: str | None, sections, arguments) -> list[str]:
    """Reads which sections of a bench are named; all of them where none is.

    Keeps to as many cores as `--threads` says, and lets each program run in the thread that
    calls it with `--inline`. Both have to be before JAX starts.
    """
    parser = argparse.ArgumentParser(program, description=description, allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(sections))
    parser.add_argument("--threads", type=int, metavar="N", help="cores to use, on Linux")
    text = "start no thread for a call: jax_cpu_enable_async_dispatch=False"
    parser.add_argument("--inline", action="store_true", help=text)
    chosen = parser.parse_args(arguments)
    names = chosen.names or list(sections)
    if unknown := set(names) - set(sections):
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(sections)}")
    if chosen.threads is not None:
        if not hasattr(os, "sched_setaffinity"):
            parser.error("--threads: this system cannot keep a program to some cores")
        if not 1 <= chosen.threads <= num_cores():
            parser.error(f"--threads: must be 1 to {num_cores()}, got {chosen.threads}")
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: chosen.threads])
    if chosen.inline:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    return names


def run_sections(program: str, description: str | None, sections, arguments) -> None:
    """Runs the named sections of a bench beside torch, under a line of what it runs on."""
    names = chosen(program, description, sections, arguments)
    facts = header("float32", ["torch"], missing(["torch"]))
    print(opening(facts).split("\n\n")[0])
    for name in names:
        print(f"\n{name}: {sections[name].__doc__}")
        sections[name]()
