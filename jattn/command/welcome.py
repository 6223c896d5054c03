"""`python -m jattn`: what is installed, a worked example, and a check that all works."""

import platform
import sys

import jax
import numpy as np

import jattn
from jattn import definition
from jattn.command.check import CHECKS, Result, check, implementations
from jattn.command.timing import compare
from jattn.pictures.numbers import bar


def run() -> int:
    """Prints everything; returns 1 if a check fails."""
    print_versions()
    print_example()
    failed = self_check()
    print_timing()
    if failed:
        print(f"\nChecks that failed: {failed}")
    return 1 if failed else 0


def print_versions() -> None:
    """Prints what is installed, and on which devices it runs."""
    print(f"jattn {jattn.__version__}, jax {jax.__version__}", end=", ")
    print(f"Python {platform.python_version()}")
    devices = jax.devices()
    kinds = sorted({device.device_kind for device in devices})
    print(f"{len(devices)} × {jax.default_backend()}: {', '.join(kinds)}")


def print_example() -> None:
    """Prints one query's attention to five embeddings, which are both keys and values."""
    embeddings, query = np.arange(1, 16).reshape(5, 3) / 10, np.full(3, 0.5)
    with jax.enable_x64(True):
        output, weights, _ = definition.attend(query, embeddings, embeddings, scale=1.0)
    print("\nOne query attends to five keys: the weights are softmax(query · key)")
    print(f"  query {_numbers(query)}")
    for embedding, weight in zip(embeddings, np.asarray(weights), strict=True):
        print(f"  key   {_numbers(embedding)}   weight {weight:.8f}  {bar(weight, 40)}")
    print(f"  output {_numbers(output, 7)}   the keys, as values, by their weights")


def self_check() -> int:
    """Checks every implementation that can run here; returns how many checks failed."""
    print("\nEvery implementation against the definition: largest errors of")
    print(f"  {'':<11}{'':<24}{'':<9} output   gradients")
    failed = 0
    for name, attend in implementations().items():
        results = []
        for case, dtype in CHECKS:
            progress(f"checking {name}: {case}, {dtype}")
            results.append(check(name, attend, case, dtype))
            progress("")
        failed += sum(not result.passed for result in results)
        sentences = {result.refusal for result in results}
        if len(sentences) == 1 and None not in sentences:
            print(f"  {name:<11}{_verdict(results[0])}")
            continue
        for (case, dtype), result in zip(CHECKS, results, strict=True):
            print(f"  {name:<11}{case:<24}{dtype:<9} {_verdict(result)}")
    return failed


def print_timing() -> None:
    """Prints how long a call takes, and how long the same call of `jax.nn` takes."""
    progress("timing jattn and jax.nn")
    taken = compare()
    progress("")
    print(f"\nForward, {taken.what}: medians of {taken.rounds} runs in turns")
    ours, theirs, ratio = 1e3 * taken.ours, 1e3 * taken.theirs, taken.ours / taken.theirs
    print(f"  jattn {ours:.2f} ms, jax.nn {theirs:.2f} ms, jattn / jax.nn = {ratio:.2f}")


def progress(text: str) -> None:
    """Shows on one line of a terminal what the command does; an empty text clears it."""
    if sys.stdout.isatty() and sys.stderr.isatty():
        sys.stdout.flush()
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _verdict(result: Result) -> str:
    if result.refusal is not None:
        return f"not taken: {result.refusal}"
    verdict = "ok" if result.passed else "FAILED"
    return f"{result.output_error:<8.1e} {result.gradient_error:<10.1e}{verdict}"


def _numbers(array, digits: int = 1) -> str:
    return "[" + " ".join(f"{x:.{digits}f}" for x in np.asarray(array)) + "]"
