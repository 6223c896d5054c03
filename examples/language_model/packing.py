"""Documents packed into rows: one after the other, and cut where a row is full.

No token is padding. Each knows its document and where it stands in it, and the next token
is its target; that of a document's last token is the one that begins the next document.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from examples.language_model.text import DOCUMENT


class Batch(NamedTuple):
    """Rows of tokens; each array is `BT`."""

    tokens: np.ndarray
    targets: np.ndarray  # the next tokens
    document: np.ndarray  # which document of the row
    position: np.ndarray  # within the document; 0, 1, … also in one that began earlier


def pack(documents: Sequence[Sequence[int]], length: int, start: int = 0) -> Batch:
    """Packs documents, in this order, into as many rows of this length as they fill.

    Args:
        documents: The tokens of each.
        length: The length of a row, T.
        start: How many tokens to leave out at first.
    """
    begun = [token for document in documents for token in (DOCUMENT, *document)]
    stream = np.array([*begun, DOCUMENT], np.int32)[start:]
    rows = (len(stream) - 1) // length
    tokens = stream[: rows * length].reshape(rows, length)
    targets = stream[1 : rows * length + 1].reshape(rows, length)
    document = np.cumsum(tokens == DOCUMENT, axis=1, dtype=np.int32)
    place = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    first = np.where((tokens == DOCUMENT) | (place == 0), place, 0)
    return Batch(tokens, targets, document, place - np.maximum.accumulate(first, axis=1))


class Stream:
    """Batches without end, each a function of its number alone: nothing to keep.

    Each epoch has the documents in another order and cuts them at other places.
    """

    def __init__(self, documents, length: int, rows: int, seed: int):
        self.documents, self.length, self.rows, self.seed = documents, length, rows, seed
        total = sum(len(document) + 1 for document in documents)
        # Every epoch leaves out up to a row at its start, and has as many batches.
        self.batches = (total // length - 1) // rows
        self._epoch: tuple[int, Batch] | None = None  # the last one asked for

    def __getitem__(self, step: int) -> Batch:
        epoch, number = divmod(step, self.batches)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._shuffled(epoch)
        part = slice(number * self.rows, (number + 1) * self.rows)
        return Batch(*(array[part] for array in self._epoch[1]))

    def _shuffled(self, epoch: int) -> Batch:
        random = np.random.default_rng([self.seed, epoch])
        documents = [self.documents[i] for i in random.permutation(len(self.documents))]
        start = int(random.integers(self.length))
        rows = pack(documents, self.length, start)
        order = random.permutation(len(rows.tokens))
        return Batch(*(array[order] for array in rows))
