"""A conversation: what was said stays in the cache, and only what is new is read.

The chat template writes all turns as one text. It begins with what was read before, so the
rest of it is what the model has to read now.
"""

import dataclasses
import signal
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from examples.chat import drafts, several, writing
from examples.chat.tokens import Streamed, Tokenizer
from examples.chat.writing import Writer
from examples.command import Refusal

_truncate = jax.jit(lambda kv, length: kv.truncate(length), donate_argnums=0)


@dataclasses.dataclass
class Conversation:
    """Turns of a user and of the model, with the cache that holds them.

    Attributes:
        empty: Makes the writer, whose cache is empty.
        tokenizer: For its texts.
        most: How many tokens an answer has at most.
        capacity: How many tokens the cache holds; None where it goes on for ever.
        draft: How many tokens are guessed at once; 0 for none.
        messages: The turns so far.
        text: What they are as one text, as far as it was written.
        tokens: The same as tokens.
        unread: How many tokens at the end of `tokens` are not in the cache yet.
        report: What is worth telling of the last answer.
    """

    empty: Callable[[], Writer]
    tokenizer: Tokenizer
    most: int
    capacity: int | None = None
    draft: int = 0
    messages: list[dict[str, str]] = dataclasses.field(default_factory=list)
    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    unread: int = 0
    report: str = ""

    def __post_init__(self):
        self.writer = self.empty()

    def reset(self) -> None:
        """Forgets all turns."""
        self.messages, self.text, self.tokens, self.unread = [], "", [], 0
        self.writer = self.empty()

    def ask(self, words: str, stopped: Callable = bool) -> Iterator[str]:
        """Asks, and gives the answer in pieces as they come.

        Raises:
            Refusal: If the cache is full.
        """
        start, calls = time.perf_counter(), self.writer.calls
        most = self._take_in(words)
        stream, before = Streamed(self.tokenizer), len(self.tokens)
        first = None
        try:
            for token in self._answer(most, stopped):
                first = time.perf_counter() - start if first is None else first
                self.tokens.append(token)
                yield stream.add(token)
        finally:  # also where nobody wants to hear the rest
            self._keep(stream)
            times = first or 0.0, time.perf_counter() - start
            self._tell(len(self.tokens) - before, self.writer.calls - calls, *times)

    def _take_in(self, words: str) -> int:
        """Adds a turn of the user, and says how many tokens the answer may have."""
        said = {"role": "user", "content": self.tokenizer.without_signs(words)}
        text = self.tokenizer.write([*self.messages, said])
        if not text.startswith(self.text):  # a template that writes old turns differently
            messages = self.messages
            self.reset()
            self.messages = messages
        new = self.tokenizer.encode(text[len(self.text) :])
        room = self._room(len(self.tokens) + len(new))
        self.messages.append(said)
        self.text, self.unread = text, self.unread + len(new)
        self.tokens += new
        return min(self.most, room)

    def _room(self, length: int) -> int:
        """Says how many tokens an answer may have after so many tokens."""
        if self.capacity is None:
            return self.most
        if length > self.capacity:
            raise Refusal(
                f"the conversation and this question have {length} tokens, the cache holds "
                f"{self.capacity}; /reset, or a larger --capacity."
            )
        return self.capacity + 1 - length  # the last token of an answer is not stored

    def _answer(self, most: int, stopped: Callable) -> Iterator[int]:
        """Gives an answer's tokens; `unread` says at each which are not in the cache."""
        unread, ends = self.tokens[-self.unread :], self.tokenizer.ends
        if self.writer.batch > 1:
            yield from self._best(unread, most, stopped)
            return
        rng = self.writer.rngs([0])
        drawn = self.writer.read_prompts([unread], rng)
        self.unread = 1  # the token that was drawn last
        if self.draft:
            text = [*self.tokens, int(drawn[0][0])]
            written = drafts.write(self.writer, text, ends, most, self.draft, stopped)
            yield from written
        else:
            for step in writing.write(self.writer, drawn, rng, ends, most, stopped):
                yield int(step.tokens[0])

    def _best(self, unread: list[int], most: int, stopped: Callable) -> Iterator[int]:
        """Gives the likeliest of several answers."""
        ends = self.tokenizer.ends
        found = several.continuations(self.writer, unread, ends, most, stopped)
        # The best answer is read again with the next question: the first example keeps the
        # question alone, and the pages of the others are free again.
        self._truncate(len(self.tokens))
        self.unread = len(found[0][0])
        yield from found[0][0]

    def _truncate(self, length: int) -> None:
        """Forgets what the first example has after so many tokens, and the others."""
        lengths = np.zeros((self.writer.sizes.layers, self.writer.batch), np.int32)
        lengths[:, 0] = length
        self.writer.kv = _truncate(self.writer.kv, jnp.asarray(lengths.reshape(-1)))

    def _keep(self, stream: Streamed) -> None:
        """Keeps what was answered as a turn."""
        if self.draft:  # a call verifies tokens that were perhaps not taken any more
            self._truncate(len(self.tokens) - self.unread)
        answer = self.tokenizer.decode(stream.tokens)
        self.messages.append({"role": "assistant", "content": answer})
        self.text += answer
        if stream.tokens and stream.tokens[-1] in self.tokenizer.ends:
            self.text += self.tokenizer.spelling[stream.tokens[-1]]

    def _tell(self, count: int, calls: int, first: float, seconds: float) -> None:
        self.report = f"{count} tokens in {calls} calls of the model"
        if self.writer.batch > 1:  # all answers were written before the best was given
            self.report += f", for the best of {self.writer.batch} in {seconds:.1f} s"
            return
        speed = (count - 1) / (seconds - first) if count > 1 and seconds > first else 0.0
        self.report += f", {speed:.1f} a second, the first after {first:.1f} s"


class Interrupted:
    """A context in which Ctrl-C is noted and stops nothing by itself.

    A cache is used up by the call that extends it, so no call may be torn.
    """

    def __init__(self):
        self.noted = False

    def __enter__(self):
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self._before)

    def __call__(self) -> bool:
        """Says whether Ctrl-C was pressed."""
        return self.noted

    def _note(self, *_):
        self.noted = True
