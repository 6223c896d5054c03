"""Real text that every Python ships, as tokens: the 460 kB of `pydoc_data.topics`.

Tokens are those of a byte-pair encoding, learnt here: bytes, and pairs of tokens that stood
together often. Any text has tokens, and they decode to the same text.
"""

import collections
import itertools
import re
from collections.abc import Iterable, Mapping
from pydoc_data.topics import topics
from typing import NamedTuple

# What a token stays within: a word or a run of signs with the space before it, or spaces.
WORDS = re.compile(r" ?[^\W\d_]+| ?\d| ?[^\s\w]+| ?_+|\s+(?=\s)|\s+")
DOCUMENT = 0  # the token that begins each document


class Split(NamedTuple):
    """Documents to learn from and documents to be judged by, by their names."""

    train: dict[str, str]
    validation: dict[str, str]


def load(every: int = 10) -> Split:
    """Reads the topics; every tenth is for validation.

    The topics repeat each other: a fifth of their text stands in two or more of them. Each
    paragraph is kept only in the shortest topic that has it, so that the text that judges
    has not been learnt.
    """
    documents = without_repetition(topics)
    judges = set(sorted(documents)[every // 2 :: every])
    return Split(
        {name: text for name, text in documents.items() if name not in judges},
        {name: text for name, text in documents.items() if name in judges},
    )


def without_repetition(documents: Mapping[str, str]) -> dict[str, str]:
    """Keeps each paragraph only in the shortest document that has it."""
    seen: set[str] = set()
    kept = {}
    for name in sorted(documents, key=lambda name: (len(documents[name]), name)):
        paragraphs = []
        for paragraph in documents[name].strip().split("\n\n"):
            words = " ".join(paragraph.split())
            if words not in seen:
                seen.add(words)
                paragraphs.append(paragraph)
        if paragraphs:
            kept[name] = "\n\n".join(paragraphs) + "\n"
    return dict(sorted(kept.items()))


class Tokens:
    """A byte-pair encoding: token 0 begins a document, 1 to 256 are bytes, then pairs.

    Reference: Sennrich et al., 2016, arXiv:1508.07909; on bytes, Radford et al., 2019.
    """

    def __init__(self, merges: Iterable[tuple[int, int]]):
        self.merges = {tuple(pair): 257 + i for i, pair in enumerate(merges)}
        self.spelling = [b"", *(bytes([i]) for i in range(256))]
        for left, right in self.merges:
            self.spelling.append(self.spelling[left] + self.spelling[right])
        self._words: dict[str, list[int]] = {}  # those encoded before

    def __len__(self) -> int:
        return len(self.spelling)

    def encode(self, text: str) -> list[int]:
        """Gives the tokens of a text."""
        return [token for word in WORDS.findall(text) for token in self._word(word)]

    def decode(self, tokens: Iterable[int]) -> str:
        """Gives the text of tokens; bytes that are no letter become �."""
        return b"".join(self.spelling[token] for token in tokens).decode(errors="replace")

    def _word(self, word: str) -> list[int]:
        if word not in self._words:
            tokens = [1 + byte for byte in word.encode()]
            while len(tokens) > 1:
                # The pair that was learnt first is joined first.
                pair = min(itertools.pairwise(tokens), key=self._rank)
                if pair not in self.merges:
                    break
                tokens = join(tokens, pair, self.merges[pair])
            self._words[word] = tokens
        return self._words[word]

    def _rank(self, pair: tuple[int, int]) -> float:
        return self.merges.get(pair, float("inf"))


def learn_tokens(texts: Iterable[str], size: int) -> Tokens:
    """Learns tokens: time and again, the pair that stands together most becomes one.

    Pairs that are as frequent are taken in the order of their tokens, so the same texts
    give the same tokens.
    """
    counts = collections.Counter(word for text in texts for word in WORDS.findall(text))
    words = [[1 + byte for byte in word.encode()] for word in counts]
    times = list(counts.values())
    pairs: collections.Counter = collections.Counter()
    places = collections.defaultdict(set)  # the words where a pair stands
    for i, word in enumerate(words):
        for pair in itertools.pairwise(word):
            pairs[pair] += times[i]
            places[pair].add(i)
    merges: list[tuple[int, int]] = []
    while len(merges) < size - 257:
        pair, count = min(pairs.items(), key=lambda item: (-item[1], item[0]))
        if count < 2:
            break
        token = 257 + len(merges)
        merges.append(pair)
        for i in places.pop(pair):
            for old in itertools.pairwise(words[i]):
                pairs[old] -= times[i]
            words[i] = join(words[i], pair, token)
            for new in itertools.pairwise(words[i]):
                pairs[new] += times[i]
                places[new].add(i)
        del pairs[pair]
    return Tokens(merges)


def join(tokens: list[int], pair: tuple[int, int], token: int) -> list[int]:
    """Makes each such pair of tokens one."""
    joined = []
    for each in tokens:
        if joined and (joined[-1], each) == pair:
            joined[-1] = token
        else:
            joined.append(each)
    return joined
