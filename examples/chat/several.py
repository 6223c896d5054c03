"""Several answers at once: to several prompts, or to one from which the best is kept."""

from collections.abc import Callable, Collection, Iterable, Sequence

import jax
import numpy as np

from examples.chat import layers
from examples.chat.writing import Drawn, Writer, write

_fork = jax.jit(lambda kv, source, target: kv.fork(source, target), donate_argnums=0)


def answers(
    writer: Writer, prompts: Sequence[Sequence[int]], ends: Collection[int], most: int
) -> list[list[int]]:
    """Continues prompts of any lengths in one batch."""
    rng = writer.rngs(range(len(prompts)))
    drawn = writer.read_prompts(prompts, rng)
    return [tokens for tokens, _ in _collected(write(writer, drawn, rng, ends, most))]


def continuations(
    writer: Writer,
    prompt: Sequence[int],
    ends: Collection[int],
    most: int,
    stopped: Callable = bool,
) -> list[tuple[list[int], float]]:
    """Continues one prompt in as many ways as the cache has examples.

    The prompt is read once and lies in memory once: the others share its pages. Only its
    last token is read by each, for that is where they part. `stopped` is asked before each
    step whether to write no more.

    Returns:
        The tokens of each, and the mean logarithm of their probabilities; best first.
    """
    B = writer.batch
    rng = writer.rngs(range(B))
    writer.read_prompts([prompt[:-1]], rng[:1])
    share(writer, 0, range(1, B))
    drawn = writer.read(np.full((B, 1), prompt[-1]), np.ones(B), rng)
    written = _collected(write(writer, tuple(drawn), rng, ends, most, stopped))
    scored = [(tokens, float(np.mean(likely))) for tokens, likely in written]
    return sorted(scored, key=lambda each: -each[1])


def share(writer: Writer, source: int, targets: Iterable[int]) -> None:
    """Makes examples `targets` copies of example `source`, in all layers."""
    if targets := list(targets):
        pair = [source] * len(targets), targets
        whose = (layers.of_all(writer.kv, writer.sizes, examples) for examples in pair)
        writer.kv = _fork(writer.kv, *whose)


def _collected(steps: Iterable[Drawn]) -> list[tuple[list[int], list[float]]]:
    """Collects each text's tokens until it ended, and their logarithmic probabilities."""
    texts: list[tuple[list[int], list[float]]] = []
    for step in steps:
        texts = texts or [([], []) for _ in step.tokens]
        for text, token, likely, alive in zip(texts, *step, strict=True):
            if alive:
                text[0].append(int(token))
                text[1].append(float(likely))
    return texts
