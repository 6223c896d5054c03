"""Serving: any number of prompts through one cache of fixed size.

A request enters when an example is free, and as many pages as its prompt and its longest
answer need. In each round one request reads a piece of its prompt, and all others write one
token. A request that has ended leaves, and its pages are free. So no request waits for a
longer one, and none can run out of pages.
"""

import collections
import dataclasses
from collections.abc import Collection, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from examples.chat.writing import Writer, padded
from examples.command import Refusal

_release = jax.jit(lambda kv, chosen: kv.release(chosen), donate_argnums=0)


@dataclasses.dataclass
class Request:
    """A prompt, and what was answered so far."""

    number: int  # decides what is drawn for it
    prompt: list[int]
    answer: list[int] = dataclasses.field(default_factory=list)
    read: int = 0  # how many tokens of the prompt are in the cache


class Server:
    """A writer whose examples are lent to requests."""

    def __init__(self, writer: Writer, ends: Collection[int], most: int):
        self.writer, self.ends, self.most = writer, ends, most
        self.slots: list[Request | None] = [None] * writer.batch
        self.rngs = [writer.rng(0)] * writer.batch  # one of each example
        self.pages = writer.kv.num_pages // writer.sizes.layers  # of each layer

    def pages_for(self, prompt: list[int]) -> int:
        """Says how many pages of each layer a request needs, its last token not stored."""
        return -(-(len(prompt) + self.most - 1) // self.writer.kv.page_size)

    def check(self, prompts: Iterable[list[int]]) -> None:
        """Raises a Refusal if a prompt can never enter."""
        largest = min(self.pages, self.writer.kv.table.shape[1])
        for number, prompt in enumerate(prompts):
            if (needed := self.pages_for(prompt)) > largest:
                raise Refusal(
                    f"prompt {number + 1} of {len(prompt)} tokens needs {needed} pages "
                    f"with its answer, but there are {largest}; more --pages, or a smaller "
                    f"--length."
                )

    def serve(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Gives each request when it has been answered, in the order of their ends."""
        waiting = collections.deque(requests)
        self.check([request.prompt for request in waiting])
        while waiting or any(self.slots):
            self._admit(waiting)
            self._read_a_piece()
            self._write_a_token()
            yield from self._leaving()

    def _admit(self, waiting: collections.deque) -> None:
        """Lends free examples, as long as the next request finds enough pages."""
        lent = sum(self.pages_for(r.prompt) for r in self.slots if r is not None)
        for slot, there in enumerate(self.slots):
            if there is not None or not waiting:
                continue
            lent += self.pages_for(waiting[0].prompt)
            if lent > self.pages:
                return
            request = self.slots[slot] = waiting.popleft()
            self.rngs[slot] = self.writer.rng(request.number)

    def _read_a_piece(self) -> None:
        """Reads the next piece of one prompt, the one with the least left to read."""
        left = lambda slot: len(self.slots[slot].prompt) - self.slots[slot].read
        reading = [i for i, r in enumerate(self.slots) if r is not None and left(i)]
        if not reading:
            return
        slot = min(reading, key=left)
        request, length = self.slots[slot], self.writer.piece
        piece = request.prompt[request.read : request.read + length]
        rng = jnp.stack([self.rngs[slot]])
        token, _ = self.writer.read(padded([piece], length), [len(piece)], rng, slot)
        request.read += len(piece)
        if not left(slot):
            request.answer.append(int(token[0]))

    def _write_a_token(self) -> None:
        """Writes one token of each request that has been read and has not ended."""
        writing = [
            r is not None and bool(r.answer) and not self._ended(r) for r in self.slots
        ]
        if not any(writing):
            return
        last = [
            r.answer[-1:] if on else [] for r, on in zip(self.slots, writing, strict=True)
        ]
        rng = jnp.stack(self.rngs)
        token, _ = self.writer.read(padded(last, 1), np.array(writing, np.int32), rng)
        for request, new, on in zip(self.slots, token, writing, strict=True):
            if on:
                request.answer.append(int(new))

    def _ended(self, request: Request) -> bool:
        return len(request.answer) >= self.most or request.answer[-1] in self.ends

    def _leaving(self) -> list[Request]:
        """Frees examples and pages of the requests that have ended, and gives these."""
        over = [r is not None and bool(r.answer) and self._ended(r) for r in self.slots]
        if not any(over):
            return []
        chosen = jnp.tile(jnp.array(over), self.writer.sizes.layers)
        self.writer.kv = _release(self.writer.kv, chosen)
        gone = [r for r, out in zip(self.slots, over, strict=True) if out]
        self.slots = [None if out else r for r, out in zip(self.slots, over, strict=True)]
        return gone
