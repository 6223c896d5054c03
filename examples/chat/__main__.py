"""Talks with SmolLM2, a language model of 135 million weights, whose attention is jattn's.

With a question in quotes it answers that, and with several all of them at once. Without
one it is a conversation: /reset begins a new one, Ctrl-C stops an answer, Ctrl-D ends.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import pathlib
import sys
from typing import Any

from examples import command
from examples.chat.options import check, keep_programs, parser
from examples.command import Refusal


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 0 if it went to the end, 2 if it refused, 130 if it was stopped."""
    return command.run("chat", parser(__doc__), argv, talk)


def loaded(arguments: argparse.Namespace, meanwhile=None):
    """Gives the weights and the tokenizer that were asked for; see `weights.load`."""
    from examples.chat import devices, weights
    from examples.chat.tokens import Tokenizer

    keep_programs(arguments.programs)
    devices.ask_for(arguments.devices)
    file = weights.find(arguments.weights)
    model = weights.load(file, arguments.dtype, meanwhile)
    if arguments.devices > 1:
        on = devices.mesh(arguments.devices)
        params = devices.spread_weights(model.params, model.sizes, on)
        model = model._replace(params=params)
    return model, Tokenizer(model.metadata)


def cache_dtype(arguments: argparse.Namespace) -> Any:
    """Gives the dtype of keys and values: that of the weights, unless they are rounded."""
    return "int8" if arguments.cache == "int8" else arguments.dtype


def talk(arguments: argparse.Namespace) -> int:
    """Answers what was asked, or converses."""
    check(arguments)
    from examples.chat import look
    from examples.chat.conversation import Conversation

    if arguments.look:
        look.check(arguments.look)
    model, tokenizer = loaded(arguments, functools.partial(compile_ahead, arguments))
    if len(arguments.question) > 1:
        return answer_all(arguments, model, tokenizer)
    conversation = Conversation(
        lambda: made_writer(arguments, model, arguments.best_of),
        tokenizer,
        most=arguments.length,
        capacity=None if arguments.window else arguments.capacity,
        draft=arguments.draft,
    )
    if not arguments.question:
        return converse(conversation)
    stopped = answer(conversation, arguments.question[0])
    if arguments.look:
        save_page(arguments.look, conversation, model)
    return 130 if stopped else 0


def save_page(path: str, conversation, model) -> None:
    """Writes what every head attends to, over the question and the answer."""
    from examples.chat import look

    of_model = model.params, model.sizes
    title = conversation.messages[0]["content"]
    title = title if len(title) <= 60 else f"{title[:59]}…"
    made = look.page_of(*of_model, conversation.tokenizer, conversation.tokens, title)
    made.save(path)
    megabytes = pathlib.Path(path).stat().st_size / 1e6
    print(f"{path}: {len(conversation.tokens)} tokens, {megabytes:.1f} MB", file=sys.stderr)


def compile_ahead(arguments: argparse.Namespace, sizes) -> None:
    """Compiles the programs, by calling them with zeros, while the weights are read."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from examples.chat import model, weights

    if arguments.devices > 1 or jax.default_backend() != "cpu":
        return  # there the programs are others
    dtype, expected = arguments.dtype, model.shapes(sizes)
    of_layers = expected.pop("layers").items()  # one layer will do: all are alike
    params = {name: jnp.zeros(shape, dtype) for name, shape in expected.items()}
    params["layers"] = [{name: jnp.zeros(shape[1:], dtype) for name, shape in of_layers}]
    asked = max(len(arguments.question), 1)
    batch = max(asked, arguments.best_of)

    def call(rows: int, length: int) -> None:
        writer = made_writer(arguments, weights.Loaded(params, sizes, {}), batch)
        writer.read(np.zeros((rows, length)), np.ones(rows), writer.rngs(range(rows)))

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        list(threads.map(call, (asked, batch), (arguments.piece, 1)))


def made_writer(arguments: argparse.Namespace, model, batch: int):
    """Makes a writer with an empty cache for so many texts."""
    from examples.chat import layers

    dtype = cache_dtype(arguments)
    if arguments.window:
        kv = layers.rolling(model.sizes, batch, arguments.window, arguments.sinks, dtype)
    else:
        kv = layers.empty(model.sizes, batch, arguments.capacity, dtype)
    return writer_of(arguments, model, kv)


def writer_of(arguments: argparse.Namespace, model, kv):
    """Makes a writer over a cache, on as many devices as were asked for."""
    from examples.chat import devices
    from examples.chat.sampling import Sampling
    from examples.chat.writing import Writer

    if arguments.devices > 1:
        kv = devices.spread_cache(kv, model.sizes, devices.mesh(arguments.devices))
    sampling = Sampling(arguments.temperature, arguments.top_p)
    return Writer(model.params, model.sizes, kv, sampling, arguments.seed, arguments.piece)


def answer(conversation, words: str) -> bool:
    """Prints an answer as it comes, and says whether Ctrl-C stopped it."""
    from examples.chat.conversation import Interrupted

    with Interrupted() as stopped:
        for text in conversation.ask(words, stopped):
            print(text, end="", flush=True)
    print(flush=True)
    print(conversation.report, file=sys.stderr)
    return stopped()


def answer_all(arguments: argparse.Namespace, model, tokenizer) -> int:
    """Answers several questions in one batch, and prints each with its answer."""
    from examples.chat import several

    prompts = [tokenizer.question(words) for words in arguments.question]
    longest = max(map(len, prompts))
    most = min(arguments.length, arguments.capacity + 1 - longest)
    if most < 1:
        raise Refusal(f"a question of {longest} tokens needs a larger --capacity.")
    writer = made_writer(arguments, model, len(prompts))
    answers = several.answers(writer, prompts, tokenizer.ends, most)
    for words, tokens in zip(arguments.question, answers, strict=True):
        print(f"> {words}\n{tokenizer.decode(tokens)}\n")
    return 0


def converse(conversation) -> int:
    """Asks for words and answers them, until there are none."""
    with contextlib.suppress(ImportError):  # a terminal without it
        import readline  # noqa: F401  (arrow keys, and earlier lines)
    while True:
        try:
            words = input("> ").strip()
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends the conversation.)")
            continue
        except EOFError:
            print()
            return 0
        if words == "/reset":
            conversation.reset()
        elif words:
            try:
                answer(conversation, words)
            except Refusal as refusal:
                print(f"chat: {refusal}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
