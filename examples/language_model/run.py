"""A run from its text to its pictures."""

import argparse
import dataclasses
import hashlib
import pathlib
import platform
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.command import Refusal
from examples.language_model import (
    checkpoints,
    packing,
    pictures,
    placing,
    text,
    timing,
    training,
    writing,
)
from examples.language_model.attending import watching
from examples.language_model.model import LanguageModel
from examples.language_model.settings import Plan, Sizes

SHOWN = 120  # tokens of the picture of weights, at most


class Data(NamedTuple):
    """The text, as tokens."""

    tokens: text.Tokens
    stream: packing.Stream
    validation: packing.Batch
    judges: dict[str, str]  # the documents for validation
    bytes_per_token: float  # of these


def run(sizes: Sizes, plan: Plan, arguments: argparse.Namespace) -> int:
    """Trains or goes on, then shows what was learnt; 130 if it was stopped before."""
    place = placing.place(arguments.devices, plan.length)
    data = prepare(sizes.vocabulary, plan)
    sizes = dataclasses.replace(sizes, vocabulary=len(data.tokens))
    prompt = data.tokens.encode(arguments.prompt)
    if len(prompt) >= plan.length:
        raise Refusal(
            f"--prompt has {len(prompt)} tokens, and with what follows it must fit into "
            f"--length {plan.length}."
        )
    layer = sizes.layers // 2 if arguments.layer is None else arguments.layer
    if layer >= sizes.layers:
        raise Refusal(f"--layer {layer} is not there: they are 0 to {sizes.layers - 1}.")
    example = find_word(data, arguments.word, min(SHOWN, plan.length))
    folder = checkpoints.open_folder(arguments.out, identity(sizes, plan))
    model, optimizer = training.begin(sizes, plan)
    history = checkpoints.History(plan.steps)
    judge = training.make_judge(data.validation, place)
    with checkpoints.Checkpoints(folder) as saved:
        saved.restore(model, optimizer, history)
        print(describe(data, sizes, plan, model, history))
        shown = history, saved, arguments.save_every
        training.train(model, optimizer, data.stream, judge, *shown, place=place)
    placing.back(model, optimizer)
    if history.done < plan.steps:
        print(
            f"language_model: stopped and saved after step {history.done}; the same "
            f"command goes on from there.",
            file=sys.stderr,
        )
        return 130

    room = min(len(prompt) + 1 + arguments.tokens, plan.length)
    style = {"temperature": arguments.temperature, "seed": plan.seed}
    written = writing.write(model, sizes, prompt, room, **style)
    print(f"\n{arguments.prompt}|{data.tokens.decode(written)}\n")
    save_pictures(folder, data, model, history, example, layer)
    if arguments.rounds:
        print(f"\n{measure(model, optimizer, data.stream, arguments.rounds)}")
    return 0


def prepare(vocabulary: int, plan: Plan) -> Data:
    """Reads the topics, learns tokens from those to learn from, and packs them."""
    learnt, judges = text.load()
    tokens = text.learn_tokens(learnt.values(), vocabulary)
    encode = lambda documents: [tokens.encode(each) for each in documents.values()]
    train, validation = encode(learnt), encode(judges)
    stream = packing.Stream(train, plan.length, plan.rows, plan.seed)
    packed = packing.pack(validation, plan.length)
    if stream.batches < 1 or not len(packed.tokens):
        raise Refusal(
            f"--rows {plan.rows} of --length {plan.length} are more than there is: "
            f"{sum(map(len, train))} tokens to learn from, {sum(map(len, validation))} for "
            f"validation; give less."
        )
    size = sum(len(each.encode()) for each in judges.values())
    return Data(tokens, stream, packed, judges, size / sum(map(len, validation)))


def identity(sizes: Sizes, plan: Plan) -> dict:
    """Gathers all that decides what the model becomes; the text differs between Pythons."""
    whole = "\0".join(text.topics[name] for name in sorted(text.topics))
    python = ".".join(platform.python_version_tuple()[:2])
    source = f"of Python {python} ({hashlib.sha256(whole.encode()).hexdigest()[:8]})"
    return {"text": source, **dataclasses.asdict(sizes), **dataclasses.asdict(plan)}


def describe(data: Data, sizes: Sizes, plan: Plan, model: LanguageModel, history) -> str:
    """Says what is trained on what, in a few lines."""
    documents, batches = data.stream.documents, data.stream.batches
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    lines = [
        f"text     {len(documents)} documents, {sum(map(len, documents))} tokens of "
        f"{sizes.vocabulary} kinds; {len(data.judges)} more documents for validation",
        f"model    {sizes.layers} layers of width {sizes.width}; {sizes.heads} heads on "
        f"{sizes.kv_heads} of keys and values; {count / 1e6:.2f} million parameters",
        f"training {plan.steps} steps of {plan.rows} × {plan.length} tokens, {batches} "
        f"steps to read all once",
    ]
    if history.done:
        lines.append(f"going on after step {history.done}")
    return "\n".join(lines)


class Example(NamedTuple):
    """A word in a document for validation."""

    document: str
    tokens: list[int]  # from the start of the document up to the word


def find_word(data: Data, word: str, most: int) -> Example:
    """Finds the place of the word that has most before it, if that can still be shown.

    Raises:
        Refusal: If there is none.
    """
    places = []
    for name, document in data.judges.items():
        tokens = [text.DOCUMENT, *data.tokens.encode(document)][:most]
        for end in range(2, len(tokens) + 1):
            if data.tokens.decode(tokens[:end]).endswith(word) and word.strip():
                places.append(Example(name, tokens[:end]))
    if not places:
        raise Refusal(
            f"--word: {word!r} is not within the first {most} tokens of a document for "
            f"validation; these are {', '.join(data.judges)}."
        )
    return max(places, key=lambda place: len(place.tokens))


def look(model: LanguageModel, tokens: Sequence[int]) -> np.ndarray:
    """Gives the weights of the last token, layer by layer: for each head, of each token."""

    @nnx.jit
    def weights(model, row):
        seen: list[jax.Array] = []
        attend = watching(jnp.zeros_like(row), row.shape[1] - 1, seen)
        model(row, jnp.arange(row.shape[1])[None], attend)
        return jnp.concatenate(seen)

    return np.asarray(weights(model, jnp.array([tokens])))


def save_pictures(
    folder: pathlib.Path, data: Data, model, history, example: Example, layer: int
) -> None:
    """Writes the loss curve, and what a word attends to in a layer."""
    weights = look(model, example.tokens)[layer]
    pieces = [data.tokens.decode([token]) or "▸" for token in example.tokens]
    figures = {
        "loss.png": pictures.loss_curve(history, data.bytes_per_token),
        "attention.png": pictures.attended(
            pieces,
            weights,
            [f"head {n}" for n in range(len(weights))],
            f"What “{pieces[-1].strip()}” attends to in layer {layer}",
            f"from the document “{example.document}”, which was not learnt; ▸ is its start",
        ),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=160)
        print(f"wrote    {folder / name}")


def measure(model, optimizer, stream: packing.Stream, rounds: int) -> str:
    """Says how long a step takes, with and without document skipping."""
    batches = [stream[i * stream.batches // rounds] for i in range(rounds)]
    times = timing.step_times(model, optimizer, batches)
    share = timing.share_within_documents(batches)
    lines = [
        f"one step, the mean of {rounds}; of all pairs of a token and one before it, "
        f"{share:.0%} are in one document"
    ]
    lines += [f"  {seconds:7.3f} s   {name}" for name, seconds in times.items()]
    return "\n".join(lines)
