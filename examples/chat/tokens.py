"""Tokens: text becomes numbers and numbers text, as the metadata of the file say.

The vocabulary, the merges of the byte-pair encoding and the chat template are in the file.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from examples.command import Refusal

CONTROL = 3  # the type, in GGUF, of a token that is a sign and no text


class Tokenizer:
    """Encodes, decodes, and writes a conversation as the model has learnt to read it."""

    def __init__(self, metadata: Mapping[str, Any]):
        kind = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
        if kind != ("gpt2", "smollm"):
            raise Refusal(f"the tokenizer must be that of SmolLM, got {kind[0]}/{kind[1]}.")
        self.spelling = metadata["tokenizer.ggml.tokens"]
        types = metadata["tokenizer.ggml.token_type"]
        self.signs = [
            name for name, kind in zip(self.spelling, types, strict=True) if kind == CONTROL
        ]
        self.ends = {self.spelling.index(name) for name in ("<|im_end|>", "<|endoftext|>")}
        self._merges = [
            tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]
        ]
        self._template = metadata["tokenizer.chat_template"]

    @functools.cached_property
    def _encoding(self):
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        vocabulary = {name: number for number, name in enumerate(self.spelling)}
        made = Tokenizer(models.BPE(vocabulary, self._merges))
        # SmolLM takes each digit by itself, and then splits as GPT-2 does.
        digits = pre_tokenizers.Digits(individual_digits=True)
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
        made.decoder = decoders.ByteLevel()
        made.add_special_tokens([AddedToken(sign, normalized=False) for sign in self.signs])
        return made

    @functools.cached_property
    def _page(self):
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        # A template comes with the weights, from others: it may compute, and touch nothing.
        return ImmutableSandboxedEnvironment().from_string(self._template)

    def encode(self, text: str) -> list[int]:
        """Gives the tokens of a text, in which a sign such as <|im_end|> is one token."""
        return self._encoding.encode(text).ids

    def decode(self, tokens: Iterable[int]) -> str:
        """Gives the text of tokens, without signs."""
        return self._encoding.decode(list(tokens))

    def write(self, messages: list[dict[str, str]], answer: bool = True) -> str:
        """Writes a conversation as one text; with `answer`, as far as the model's turn."""
        return self._page.render(messages=messages, add_generation_prompt=answer)

    def without_signs(self, text: str) -> str:
        """Removes signs that a user typed: they could end a turn and begin another."""
        before = None
        while before != text:  # taking one out may leave another: "<|im_<|im_end|>end|>"
            before = text
            for sign in self.signs:
                text = text.replace(sign, "")
        return text

    def question(self, text: str) -> list[int]:
        """Gives the tokens of a conversation that begins with a question."""
        asked = [{"role": "user", "content": self.without_signs(text)}]
        return self.encode(self.write(asked))


class Streamed:
    """A text whose tokens come one by one; a letter of several tokens comes whole."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokens: list[int] = []
        self.text = ""
        self._tokenizer = tokenizer

    def add(self, token: int) -> str:
        """Gives what the token adds to the text that can be shown."""
        self.tokens.append(token)
        text = self._tokenizer.decode(self.tokens)
        if text.endswith("�"):  # the first bytes of a letter
            return ""
        new, self.text = text[len(self.text) :], text
        return new
