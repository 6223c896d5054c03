"""Answers each line of a file, many at a time, over one cache of fixed size.

Answers are written as they come, one JSON object a line. The same command goes on after
Ctrl-C, and after its prompts were added to.
"""

import argparse
import json
import pathlib
import sys

from examples import command
from examples.chat.__main__ import cache_dtype, loaded, writer_of
from examples.chat.options import MODEL, NEEDED, add_options
from examples.command import Refusal, check_installed, empty_parser, whole

SERVING = (
    ("--at-once", whole, "N", 8, "prompts in the cache at most"),
    ("--pages", whole, "N", 64, "pages of 64 tokens in each layer"),
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; 0 if it went to the end, 2 if it refused, 130 if it was stopped."""
    goes_on = "stopped; the same command goes on."
    return command.run("chat.batch", parser(), argv, run, goes_on)


def parser() -> argparse.ArgumentParser:
    """Makes the options of the command."""
    made = empty_parser("examples.chat.batch", __doc__)
    made.add_argument("prompts", help="a file with a prompt in each line")
    made.add_argument(
        "--out", metavar="FILE", required=True, help="where the answers go, as JSON lines"
    )
    add_options(made, MODEL + SERVING)
    return made


def run(arguments: argparse.Namespace) -> int:
    """Answers the prompts that have no answer yet; gives 0."""
    check_installed([*NEEDED, "tqdm"], "chat")
    from examples.chat.serving import Request, Server

    prompts = read_prompts(arguments.prompts)
    out = pathlib.Path(arguments.out)
    done = answered(out, prompts)
    model, tokenizer = loaded(arguments)
    server = Server(made_writer(arguments, model), tokenizer.ends, arguments.length)
    requests = [
        Request(number, tokenizer.question(words))
        for number, words in enumerate(prompts)
        if number not in done
    ]
    server.check([request.prompt for request in requests])
    save(server, requests, tokenizer, prompts, out)
    return 0


def save(server, requests, tokenizer, prompts, out: pathlib.Path) -> None:
    """Serves, and appends each answer to the file when it is there."""
    from tqdm import tqdm

    before = len(prompts) - len(requests)
    with (
        open(out, "a", encoding="utf-8") as file,
        tqdm(total=len(prompts), initial=before, unit=" prompts") as bar,
    ):
        for request in server.serve(requests):
            number = request.number
            line = {"number": number, "prompt": prompts[number]}
            line |= {
                "answer": tokenizer.decode(request.answer),
                "tokens": len(request.answer),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            bar.update()


def made_writer(arguments: argparse.Namespace, model):
    """Makes a writer over a pool of pages."""
    from examples.chat import layers

    most = min(arguments.pages * layers.PAGE, model.sizes.context)
    kv = layers.empty(
        model.sizes, arguments.at_once, most, cache_dtype(arguments), pages=arguments.pages
    )
    return writer_of(arguments, model, kv)


def read_prompts(path: str) -> list[str]:
    """Reads the lines of a file that are not empty."""
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{path}: cannot be read ({error}).") from None
    return [line for line in lines if line.strip()]


def answered(out: pathlib.Path, prompts: list[str]) -> set[int]:
    """Gives the numbers of prompts with an answer, and removes half a line at the end.

    Raises:
        Refusal: If the file holds something else, or answers to other prompts.
    """
    try:
        text = out.read_bytes() if out.exists() else b""
        whole_lines = text[: text.rfind(b"\n") + 1]
        done = [json.loads(line) for line in whole_lines.decode().splitlines()]
        numbers = {line["number"]: line["prompt"] for line in done}
        same = all(prompts[number] == words for number, words in numbers.items())
    except (ValueError, TypeError, KeyError, IndexError, OSError):
        same = False
    if not same:
        raise Refusal(
            f"{out}: holds something else than answers to these prompts; name a new --out."
        )
    if whole_lines != text:  # the program was stopped within a line
        out.write_bytes(whole_lines)
    return set(numbers)


if __name__ == "__main__":
    sys.exit(main())
