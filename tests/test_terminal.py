"""Pictures as text: what is drawn is what is given, within the width."""

import jax
import numpy as np
import pytest

import jattn
from jattn import terminal
from jattn.masks import Causal

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]


def body(text, lines):
    return text.splitlines()[-lines:]


def test_weights_are_shades_of_shares_of_the_largest():
    text = terminal.weights([[0.5, 0.2, 0.12, 0.02], [0.3, 0.0, 0.0, np.nan]])
    assert text.startswith("weight, shares of 0.50: ░ 0.1–0.3")
    assert text.splitlines()[0].endswith("? NaN")
    assert body(text, 2) == ["0 ██▒▒░░", "1 ▓▓    ??"]


def test_each_head_of_weights_has_its_name_and_its_tokens():
    weights = np.broadcast_to(np.eye(2), (3, 2, 2))
    text = terminal.weights(weights, query_tokens=["to", "be"], heads=[2, 0])
    head = ["   t b", "   o e", "to ██", "be   ██"]
    assert text.splitlines()[1:] == ["head 2", *head, "head 0", *head]


@pytest.mark.parametrize("length", [8, 64, 300])
@pytest.mark.parametrize("width", [40, 80])
def test_weights_fit_into_the_width(length, width):
    text = terminal.weights(np.eye(length), width=width)
    lines = text.splitlines()
    assert max(map(len, lines[2:])) <= width
    assert ("one cell" in lines[1]) == (length > min(width - len(str(length)) - 1, 64))
    assert lines[-1][-1] in "█▓"


def test_mask_of_a_table_is_drawn_in_whole_blocks():
    shape = jax.ShapeDtypeStruct((1024, 1, 1), "float32")
    table = jattn.block_table(Causal(), shape, shape, block=256)
    text = terminal.mask(table, 1024, width=12)
    assert "one cell: 256 × 256" in text
    assert body(text, 4) == ["  0 ░░······", "256 ██░░····", "512 ████░░··", "768 ██████░░"]


def test_entropy_is_the_mean_over_queries():
    entropies = [np.array([[1.0, 2], [3, 4]]), np.array([0.5])]
    text = terminal.entropy(entropies)
    assert body(text, 3) == [
        "head          0       1",
        "layer 0 ▓▓ 2.00 ██ 3.00",
        "layer 1 ░░ 0.50",
    ]
    assert body(terminal.entropy(entropies, width=20), 1) == ["layer 1 ░░"]


def test_received_has_a_bar_under_each_token_and_breaks_lines():
    received = np.stack([np.arange(9.0), np.full(9, 8.0)], 1)
    lines = terminal.received(received, WORDS, width=32).splitlines()
    assert lines[0] == "received: a bar of full height █ is 8.00"
    assert lines[1:4] == [
        "       the quick brown fox jumps",
        "head 0     ▁▁▁▁▁ ▂▂▂▂▂ ▃▃▃ ▄▄▄▄▄",
        "head 1 ███ █████ █████ ███ █████",
    ]
    assert " ".join(line.strip() for line in lines[1::3]) == " ".join(WORDS)


def test_tokens_are_shown_in_printable_letters():
    text = terminal.received([1.0, np.nan, 1.0], ["a\n", "incomprehensibilities", ""])
    assert body(text, 2) == ["a\\n incomprehen… ·", "███ ???????????? █"]


@pytest.mark.parametrize(
    ("draw", "sentence"),
    [
        (lambda: terminal.weights(np.ones(3)), "terminal.weights: `weights` must be BNTS"),
        (
            lambda: terminal.weights(np.ones((2, 3)), key_tokens=["a"]),
            "terminal.weights: `key_tokens` must have S=3 tokens, got 1",
        ),
        (
            lambda: terminal.mask(Causal(), 0),
            "`length` must be a whole number, at least 1, got 0",
        ),
        (lambda: terminal.mask(Causal(), 4.5), "terminal.mask: `length` must .* got 4.5"),
        (lambda: terminal.mask(Causal(), 4, True), "`key_length` must .* got True"),
        (lambda: terminal.entropy([]), r"`entropies` must be one array .* got shapes \[\]"),
        (lambda: terminal.entropy([np.ones((0, 2))]), r"got shapes \[\(0, 2\)\]"),
        (
            lambda: terminal.received(np.ones((2, 3, 4))),
            r"`received` must be SN or S, .* got shape \(2, 3, 4\); take one example",
        ),
        (
            lambda: terminal.received(np.ones(3), WORDS),
            "terminal.received: `tokens` must have S=3 tokens, got 9",
        ),
        (
            lambda: terminal.received(np.ones((3, 2)), heads=[2]),
            r"terminal.received: `heads` must be .* N=2 heads, whole numbers, got \[2\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(draw, sentence):
    with pytest.raises(ValueError, match=sentence):
        draw()


def test_numbers_below_zero_are_drawn_as_nothing():
    text = terminal.weights([[1.0, -1.0], [-0.5, 0.0]])
    assert body(text, 2) == ["0 ██", "1"]
    assert terminal.received([1.0, -0.5, -1.0]).splitlines()[-1].split() == ["█"]
