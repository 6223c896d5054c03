"""A real language model, end to end: `python -m bench.chat [NAME …]`.

SmolLM2 of `examples/chat`, in float32, by jattn; the same functions with `jax.nn` and plain
arrays as a cache; transformers' Llama in torch; llama.cpp on its own weights of 4 and 8
bits. What is not installed is left out. Every ratio is of medians over rounds in which all
calls take turns, as in `bench.speed`.
"""

import functools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax

from bench import candidates, measure, report
from bench import chat_candidates as given
from examples.chat import layers

CAPACITIES, BATCHES = (128, 2048, 8192), (1, 8)
STEPS = 16  # tokens that are written after a prompt
SECONDS = 5.0  # of each row
ROUNDS = 3  # at least, of calls that take seconds
QUESTION = "Why is the sky blue?"


def step() -> None:
    """Times a step by the capacity of the cache and the number of texts."""
    print(f"a step, {given.FILLED} tokens filled")
    for batch in BATCHES:
        for capacity in CAPACITIES:
            runs = {
                "jattn": given.by_jattn(batch, capacity),
                "jax.nn": given.by_jax_nn(batch, capacity),
            }
            tell(
                f"batch {batch}, capacity {capacity}",
                measure.interleave(runs, SECONDS),
                batch,
            )
    print("the same capacities in turns")
    runs = {f"capacity {capacity}": given.by_jattn(1, capacity) for capacity in CAPACITIES}
    tell("jattn, batch 1", measure.interleave(runs, SECONDS), 1)
    runs = {f"batch {batch}": given.by_jattn(batch, 2048) for batch in BATCHES}
    times = measure.interleave(runs, SECONDS)
    more = BATCHES[-1] / measure.ratio(times[f"batch {BATCHES[-1]}"], times["batch 1"])
    print(f"{BATCHES[-1]} texts at once: {more:.2f} times the tokens a second of one")


def tell(label: str, times: dict[str, list[float]], tokens: int) -> None:
    """Prints milliseconds, tokens a second, and ratios to the first."""
    base = next(iter(times))
    for name, taken in times.items():
        middle = statistics.median(taken)
        more = measure.ratio(taken, times[base])
        print(
            f"  {label:28} {name:24} {1e3 * middle:8.1f} ms {tokens / middle:8.1f} tokens/s"
            f"   × {more:.2f} of {base}",
            flush=True,
        )


def generate() -> None:
    """Times whole generation: tokens after the first, for a prompt of 64."""
    for batch in BATCHES:
        makers = {"jattn": given.jattn_writes, "torch generate": given.torch_writes}
        if batch == 1:
            makers["llama.cpp, its Q4_1 and Q8_0"] = given.llama_writes
        ready = {name: make(batch) for name, make in makers.items()}
        runs = {}
        for name, write in ready.items():
            if write is not None:
                runs[name] = functools.partial(write, 1 + STEPS)
                runs[f"{name}, the first alone"] = functools.partial(write, 1)
        times = measure.interleave(runs, SECONDS, ROUNDS)
        steps = {
            name: [(a - b) / STEPS for a, b in zip(times[name], first, strict=True)]
            for name in runs
            if (first := times.get(f"{name}, the first alone"))
        }
        tell(f"batch {batch}, capacity 2048", steps, batch)


def prompt() -> None:
    """Times how a prompt is read, in pieces and at once."""
    runs = {}
    for piece in (64, given.PROMPT):
        made = given.writer(1, 2048, 0)
        made.piece = piece
        runs[f"jattn, pieces of {piece}"] = functools.partial(given.jattn_reads, made)
    if not candidates.missing(["torch"]) and not candidates.missing(["transformers"]):
        runs["torch"] = given.torch_reads
    tell(f"{given.PROMPT} tokens", measure.interleave(runs, SECONDS, ROUNDS), given.PROMPT)


def attention() -> None:
    """Says which share of a step is attention: by leaving it out."""
    for batch in BATCHES:
        runs = {
            "jattn": given.by_jattn(batch, 2048),
            "without": given.by_jax_nn(batch, 2048, given.nothing),
        }
        times = measure.interleave(runs, SECONDS)
        share = 1 - measure.ratio(times["without"], times["jattn"])
        print(
            f"  batch {batch}, {given.FILLED} of 2048 filled: {100 * share:.0f} % of a step"
        )


def start() -> None:
    """Times a first start, with nothing compiled yet, and a second one; and its memory."""
    here = pathlib.Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first start", "next start"):
            command = [sys.executable, "-m", "examples.chat", QUESTION]
            command += ["--programs", folder, "--length", "64"]
            begun, first = time.perf_counter(), None
            process = subprocess.Popen(
                command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            os.read(process.stdout.fileno(), 1)
            first = time.perf_counter() - begun
            process.stdout.read()
            _, _, used = os.wait4(process.pid, 0)
            seconds, size = time.perf_counter() - begun, used.ru_maxrss / 1024
            print(
                f"  {name}: the first token after {first:.1f} s, 64 tokens after "
                f"{seconds:.1f} s; {size:.0f} MiB at most"
            )


def memory() -> None:
    """Says what weights and caches take."""
    params, sizes, _ = given.loaded()
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree)) / 2**20
    print(f"  weights in float32: {size(params):.0f} MiB")
    for capacity in CAPACITIES:
        both = (size(layers.empty(sizes, 1, capacity, x)) for x in ("float32", "int8"))
        print("  a cache of {}: {:.0f} MiB; in int8 {:.0f} MiB".format(capacity, *both))


SECTIONS = {
    "start": start,
    "prompt": prompt,
    "step": step,
    "generate": generate,
    "attention": attention,
    "memory": memory,
}


def main(arguments: list[str] | None = None) -> None:
    """Measures what is named, or everything."""
    report.run_sections("python -m bench.chat", __doc__, SECTIONS, arguments)


if __name__ == "__main__":
    main()
