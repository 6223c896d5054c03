"""Pages: the numbers on them are those of the weights, and nothing of a user's is code."""

import base64
import dataclasses
import html
import importlib.resources
import json
import os
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import page
from jattn.masks import Causal, Prefix, Window
from jattn.page import assembly, blocks, inputs
from jattn.page.keeping import entries_of, threshold
from jattn.page.looks import Look, look
from jattn.page.packing import codes, packed, rounded, shares
from jattn.pictures.numbers import allowed, pool
from tests.helpers.draws import normal

WORDS = ["the", "cat", "sat", "on", "the", "mat", "because"]
DECAY = lambda logit, b, n, t, s: logit - 0.1 * (n * (t - s)).astype(logit.dtype)
STEP = 1.1 / 65280  # roots are in steps of 1/65280: at most √w/65280 at the weight w


def random_inputs(T=7, S=7, N=4, K=2, layers=2):
    queries = [2 * normal(layer, (T, N, 8)) for layer in range(layers)]
    return queries, [2 * normal(layers + layer, (S, K, 8)) for layer in range(layers)]


class Read:
    """What the script of a page reads, read in Python."""

    def __init__(self, made):
        element = lambda name: re.search(rf'id="{name}">(.*?)</script>', made.html)[1]
        self.facts = json.loads(element("facts"))
        data = zlib.decompress(base64.b64decode(element("numbers")))
        for name, (start, size, planes) in self.facts["arrays"].items():
            parts = np.frombuffer(data, np.uint8, size * planes, start)
            parts = parts.reshape(planes, size).astype(np.int64)
            setattr(self, name, (parts.T << 8 * np.arange(planes)).sum(-1))

    def weights(self):
        """The weights that the page has: slots × T × S."""
        T, S = self.facts["T"], self.facts["S"]
        dense = np.zeros((self.counts.size, S))
        row = np.repeat(np.arange(self.counts.size), self.counts)
        dense[row, self.keys] = (self.weights_ / 65280) ** 2
        return dense.reshape(-1, T, S)

    def by_slot(self, name):
        top = np.array(self.facts[name]["top"])[:, None]
        return top * (getattr(self, name).reshape(len(top), -1) / 65280) ** 2

    def __setattr__(self, name, value):
        self.__dict__["weights_" if name == "weights" else name] = value


def with_mean(heads):
    return np.concatenate([heads, np.mean(heads, axis=0, keepdims=True)])


# ---- the numbers ----


@pytest.mark.parametrize("options", [{"modifier": DECAY}, {"sink": 0.5, "scale": 0.3}])
def test_weights_on_the_page_are_those_of_attention(options):
    queries, keys = random_inputs()
    made = Read(page.weights(queries, keys, WORDS, mask=Causal(), **options))
    expected = [
        with_mean(jattn.attention_weights(*x, mask=Causal(), **options))
        for x in zip(queries, keys, strict=True)
    ]
    expected = np.concatenate(expected)
    np.testing.assert_allclose(made.weights(), expected, atol=STEP, rtol=0)
    assert made.facts["complete"]
    assert made.facts["exact"]
    assert made.facts["heads"] == [4, 4]
    assert made.facts["sink"] == ("sink" in options)
    np.testing.assert_allclose(made.facts["held"], 1, atol=1e-4)


def test_received_and_entropy_on_the_page_are_those_of_the_views():
    queries, keys = random_inputs()
    made = Read(page.weights(queries, keys, WORDS, mask=Causal()))
    for name, view in (
        ("received", jattn.attention_received),
        ("entropy", jattn.attention_entropy),
    ):
        expected = [view(*x, mask=Causal()).T for x in zip(queries, keys, strict=True)]
        expected = np.concatenate([with_mean(x) for x in expected])
        error = np.abs(made.by_slot(name) - expected) / expected.max(axis=1, keepdims=True)
        assert error.max() < STEP
        np.testing.assert_allclose(
            made.facts[name]["mean"], expected.mean(1), rtol=1e-4, atol=1e-6
        )


def test_pictures_of_a_long_text_are_weights_pooled():
    (query,), (key,) = random_inputs(70, 65, layers=1)
    seen = look(query, key, 1, {"mask": Window(9, 3), "sink": 0.3})
    weights = jattn.attention_weights(query, key, mask=Window(9, 3), sink=0.3)
    expected = with_mean(pool(np.asarray(weights), (3, 3)))
    np.testing.assert_allclose(seen.pictures, expected, atol=1e-6)


def test_layers_may_have_other_heads_and_other_options():
    queries, keys = random_inputs()
    queries[1] = queries[1][:, :2]
    masks = [Causal(), Window(1, 0)]
    made = Read(page.weights(queries, keys, mask=masks)).weights()
    layers = zip(queries, keys, masks, strict=True)
    expected = [with_mean(jattn.attention_weights(q, k, mask=m)) for q, k, m in layers]
    np.testing.assert_allclose(made, np.concatenate(expected), atol=STEP)


def test_queries_and_keys_may_be_other_texts():
    (query,), (key,) = random_inputs(7, 3, layers=1)
    made = Read(page.weights(query[None], key[None], WORDS, key_tokens=list("abc")))
    assert made.facts["tokens"] == WORDS
    assert made.facts["key_tokens"] == list("abc")
    assert made.facts["title"] == "Attention of 4 heads, 7 queries, 3 keys"
    expected = with_mean(jattn.attention_weights(query, key))
    np.testing.assert_allclose(made.weights(), expected, atol=STEP)
    # The picture of a short text has every pair; it has one byte for a root.
    drawn = (made.pictures.reshape(expected.shape) / 254) ** 2
    np.testing.assert_allclose(drawn, expected, atol=1.01 / 254)


def test_weights_that_are_no_numbers_are_none_on_the_page():
    (query, _), (key, _) = random_inputs()
    made = Read(page.weights(query.at[2].set(jnp.nan), key, WORDS, mask=Causal()))
    assert not made.weights()[:, 2].any()
    assert (made.entropy.reshape(-1, 7)[:, 2] == 65535).all()
    assert made.facts["entropy"]["mean"] == [None] * 5


# ---- the size ----


def random_look(T, N, k, rng):
    """Something like a layer: half of the heads are sharp, and some look at token 0."""
    keys = rng.integers(0, np.arange(1, T + 1)[:, None], (N + 1, T, k))
    keys = np.where(rng.random(keys.shape) < 0.1, 0, keys).astype(np.int32)
    drawn = rng.exponential(1, keys.shape) ** np.linspace(0.3, 3, N + 1)[:, None, None]
    weights = -np.sort(-drawn, axis=-1)
    weights = (0.8 * weights / weights.sum(-1, keepdims=True)).astype(np.float32)
    sums = rng.exponential(1, (N + 1, T))
    return Look(keys, weights, sums, sums, rng.random((N + 1, 32, 32)))


def long_page(monkeypatch, T, layers, N, limit):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(
        assembly, "look", lambda query, key, k, options: random_look(T, N, k, rng)
    )
    shape = jax.ShapeDtypeStruct((T, N, 64), "float32")
    facts = {"tokens": [f" w{i % 997}" for i in range(T)], "key_tokens": None}
    facts |= {"title": None, "T": T, "S": T}
    given = [(shape, shape)] * layers, [{"sink": None}] * layers, limit
    return assembly.attending("page.weights", facts, *given)


def test_page_of_a_long_text_has_the_size_asked_for(monkeypatch):
    made = long_page(monkeypatch, 1500, 4, 9, 1e6)
    assert 0.85e6 < len(made.html.encode()) <= 1e6
    read = Read(made)
    assert not read.facts["complete"]
    assert (read.counts >= 1).all()
    # Of the others those stay that are above one threshold.
    first = np.zeros(read.keys.size, bool)
    first[np.cumsum(read.counts) - read.counts] = True
    lowest = read.weights_[~first].min()
    rng = np.random.default_rng(0)
    every = np.concatenate(
        [codes(random_look(1500, 9, 69, rng).weights).reshape(-1, 69) for _ in range(4)]
    )
    assert (every[:, 1:] > lowest + 256).sum() <= (~first).sum()


@pytest.mark.slow
def test_page_of_4000_tokens_and_270_heads_takes_ten_megabytes(monkeypatch):
    made = long_page(monkeypatch, 4000, 30, 9, 1e7)
    assert 8.5e6 < len(made.html.encode()) <= 1e7
    assert Read(made).counts.mean() > 1.5


def test_page_that_cannot_be_so_small_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"page takes 0\.\d MB with one weight .* is 0.1;"):
        long_page(monkeypatch, 1500, 2, 4, 1e5)


def test_threshold_keeps_about_as_many_as_asked_and_all_firsts():
    seen = random_look(50, 3, 8, np.random.default_rng(1))
    entries = [entries_of(seen)]
    for most in (200, 500, 900, 1600):
        least = threshold(entries, most)
        count = (entries[0].codes[:, 1:] >= least).sum() + 200
        assert most - 8 <= count <= most
    assert threshold(entries, 10**6) == 1


def test_codes_keep_the_digits_of_small_weights():
    weights = np.array([0, 1e-6, 1e-3, 0.5, 1])
    np.testing.assert_allclose(shares(codes(weights)), weights, rtol=0.02)
    coarse = rounded(codes(weights))
    np.testing.assert_allclose(shares(coarse), weights, atol=1 / 255)
    assert (coarse % 256 == 0).all()
    assert list(coarse > 0) == [False, True, True, True, True]
    assert rounded(codes(np.array([np.nan]))) == 65535


def test_planes_of_zeros_take_no_room():
    numbers = np.random.default_rng(0).integers(0, 256, 10_000)
    _, one = packed({"patterns": numbers})
    _, three = packed({"keys": numbers})
    assert len(three) < 1.02 * len(one)


# ---- masks ----


def pairs_of(read):
    """Gives which pairs may attend, as the script of the page finds them."""
    (rows, columns), T, S = read.facts["block"], read.facts["T"], read.facts["S"]
    kinds = read.kinds.reshape(-(-T // rows), -(-S // columns))
    found = np.repeat(np.repeat(kinds == 2, rows, 0), columns, 1)
    size = -(-rows * columns // 8)
    bits = np.unpackbits(read.patterns.astype(np.uint8).reshape(-1, size), axis=1)
    for (i, j), pattern in zip(np.argwhere(kinds == 1), read.pattern_of, strict=True):
        block = bits[pattern - 1, : rows * columns].reshape(rows, columns)
        found[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = block
    return found[:T, :S]


@pytest.mark.parametrize(
    ("mask", "T", "S", "block"),
    [
        (Causal(), 50, 50, 8),
        (Prefix(3) | Window(5, 0), 33, 47, 8),
        (lambda b, n, t, s: (t * s) % 3 == 0, 20, 21, 6),
        (Causal(), 9, 9, None),
    ],
)
def test_pairs_of_a_mask_are_those_of_the_mask(mask, T, S, block):
    read = Read(page.mask(mask, T, S, block=block))
    np.testing.assert_array_equal(pairs_of(read), allowed(mask, T, S))


def test_blocks_of_a_mask_are_those_of_its_table_and_alike_ones_are_stored_once():
    shape = jax.ShapeDtypeStruct((1024, 1, 1), "float32")
    table = jattn.block_table(Causal(), shape, shape, block=64)
    read = Read(page.mask(table, 1024))
    np.testing.assert_array_equal(read.kinds, np.asarray(table.kinds).reshape(-1))
    assert list(read.pattern_of) == [1] * 16
    assert read.patterns.size == 64 * 64 / 8


@pytest.mark.parametrize("why", ["too many to ask", "too much room", "made with positions"])
def test_pairs_that_are_not_held_are_said_to_be_missing(why, monkeypatch):
    mask = Causal() & (lambda b, n, t, s: (t * t + s * s) % 5 < 3)
    shape = jax.ShapeDtypeStruct((64, 1, 1), "float32")
    if "positions" in why:
        positions = jnp.arange(64)
        mask = jattn.block_table(mask, shape, shape, query_position=positions, block=8)
    elif "ask" in why:
        monkeypatch.setattr(blocks, "_MOST_PAIRS", 100)
    else:
        monkeypatch.setattr(blocks, "_MOST_BYTES", 20)
    read = Read(page.mask(mask, 64, block=8))
    assert why in read.facts["why"]
    assert 0 in read.pattern_of


# ---- text of the user ----

NASTY = ["<script>alert(1)</script>", "</script>", "<!--", '&amp;"', "\n", "", "\ud83d"]


@pytest.mark.parametrize("make", ["weights", "received", "entropy", "mask"])
def test_tokens_and_titles_are_text(make):
    T = len(NASTY)
    (query, _), (key, _) = random_inputs()
    made = {
        "weights": lambda: page.weights(query, key, NASTY, title=NASTY[0], mask=Causal()),
        "received": lambda: page.received(np.ones((T, 2)), NASTY, title=NASTY[0]),
        "entropy": lambda: page.entropy([np.ones((T, 2))], NASTY, title=NASTY[0]),
        "mask": lambda: page.mask(Causal(), T, tokens=NASTY, title=NASTY[0]),
    }[make]()
    assert made.html.count("<script") == made.html.count("</script") == 3
    assert "<!--" not in made.html
    assert Read(made).facts["tokens"] == NASTY
    assert f"<title>{html.escape(NASTY[0])}</title>" in made.html
    assert made.html.encode()  # a surrogate half would not fit into a file


def test_page_asks_for_nothing_from_elsewhere():
    made = page.mask(Causal(), 4).html
    assert "default-src 'none'" in made
    assert re.findall(r"https?://[^\"' ]*", made) == []
    assert re.findall(r"\b(?:src|href)=|@import|url\(", made) == []


def test_templates_are_short_and_belong_to_the_package():
    files = list(importlib.resources.files("jattn.page").iterdir())
    names = {file.name for file in files}
    assert {"page.html", "heads.html", "mask.html", "style.css", *assembly.SCRIPTS} <= names
    for file in files:
        if file.is_file():
            assert len(file.read_text("utf-8").splitlines()) <= 250, file.name


# ---- the object ----


def test_page_is_saved_and_replaces_nothing_unasked(tmp_path):
    made, target = page.mask(Causal(), 4), tmp_path / "m.html"
    made.save(target)
    assert target.read_text("utf-8") == made.html
    target.write_text("mine")
    with pytest.raises(FileExistsError, match=r"m.html exists; give another name,"):
        made.save(str(target))
    assert target.read_text() == "mine"
    made.save(target, replace=True)
    assert target.read_text("utf-8") == made.html
    assert [path.name for path in tmp_path.iterdir()] == ["m.html"]


def test_a_link_stays_and_a_pipe_is_refused(tmp_path):
    made, link, real = page.mask(Causal(), 4), tmp_path / "m.html", tmp_path / "real.html"
    real.write_text("mine")
    link.symlink_to("real.html")
    made.save(link, replace=True)
    assert link.is_symlink()
    assert real.read_text("utf-8") == made.html
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="pipe is no file; give another name"):
        made.save(tmp_path / "pipe", replace=True)


def test_a_failed_write_leaves_no_trace(tmp_path):
    with pytest.raises(FileNotFoundError):
        page.mask(Causal(), 4).save(tmp_path / "no" / "m.html")
    broken = page.Page("\ud83d", "half a surrogate")
    with pytest.raises(UnicodeEncodeError):
        broken.save(tmp_path / "m.html")
    assert list(tmp_path.iterdir()) == []


def test_a_notebook_shows_the_page_in_a_frame_of_its_own():
    made = page.received([1.0, 2.0], ["a", "b"], title="<b>")
    shown = made._repr_html_()
    source = re.fullmatch(
        r'<iframe title="&lt;b&gt;" srcdoc="([^"]*)" [^<>]*></iframe>', shown
    )
    assert html.unescape(source[1]) == made.html
    assert 'sandbox="allow-scripts"' in shown
    assert repr(made) == "Page('<b>', 0.1 MB)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.html = ""


def test_received_and_entropy_take_one_layer_or_several():
    layer = np.arange(6.0).reshape(3, 2)
    for given in (layer, [layer], layer[None], [layer[None]]):
        np.testing.assert_allclose(
            Read(page.received(given)).by_slot("received"),
            [[0, 2, 4], [1, 3, 5], [0.5, 2.5, 4.5]],
            atol=1e-4,
        )
    assert Read(page.received([1.0, 2.0])).facts["heads"] == [1]
    assert Read(page.entropy([[3.0, 1.5], [0.5, 2.0]])).facts["entropy"]["mean"] == [
        *(3.0, 1.5, 2.25),
        *(0.5, 2.0, 1.25),
    ]


QUERY = jnp.zeros((3, 2, 4))
REFUSALS = {
    "layers": (lambda: page.weights([QUERY], []), "same number of layers, .* got 1 and 0"),
    "examples": (
        lambda: page.weights(jnp.zeros((2, 3, 2, 4)), QUERY),
        r"page.weights: `query` must be TNH of one example, .* got shape \(2, 3, 2, 4\)",
    ),
    "lengths": (
        lambda: page.weights([QUERY, QUERY[:2]], [QUERY, QUERY]),
        r"all layers must have the same T queries .* got \(T, S\) = \[\(2, 3\), \(3, 3\)\]",
    ),
    "no heads": (lambda: page.weights(QUERY[:, :0], QUERY[:, :0]), "got N=0"),
    "options": (
        lambda: page.weights([QUERY], [QUERY], scale=[1.0, 2.0]),
        "`scale` is a list of 2, but there are 1 layers; give one for each layer",
    ),
    "tokens": (
        lambda: page.weights(QUERY, QUERY, WORDS),
        "page.weights: `tokens` must have T=3 tokens, got 7; give one string for each",
    ),
    "one string": (lambda: page.weights(QUERY, QUERY, "abc"), "T=3 tokens, got one string"),
    "key tokens": (
        lambda: page.weights(QUERY, QUERY, key_tokens=["a"]),
        "`key_tokens` must have S=3 tokens, got 1",
    ),
    "received": (
        lambda: page.received(np.ones((2, 3, 4))),
        r"`received` must be SN or S, .* got shapes \[\(2, 3, 4\)\]",
    ),
    "entropy": (lambda: page.entropy([]), r"`entropies` must be TN or N, .* shapes \[\]"),
    "mask": (lambda: page.mask(Causal(), 0), "`length` must be a whole number, at least 1"),
    "half a query": (lambda: page.mask(Causal(), 4.5), "page.mask: `length` .* got 4.5"),
    "half a key": (lambda: page.mask(Causal(), 4, 4.5), "`key_length` must .* got 4.5"),
    "half a block": (lambda: page.mask(Causal(), 4, block=1.5), "`block` must .* got 1.5"),
    "table": (
        lambda: page.mask(jattn.block_table(Causal(), QUERY, QUERY, block=1), 4),
        r"page.mask: BlockTable\(1×1×3×3 in blocks of 1×1\) is not of 4 × 4 pairs",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused(name):
    make, sentence = REFUSALS[name]
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_list_is_one_option_for_each_layer():
    each = inputs.options_of("page", {"scale": [1, 2], "mask": None}, 2)
    assert each == [{"scale": 1, "mask": None}, {"scale": 2, "mask": None}]
