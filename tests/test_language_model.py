"""The example learns, resumes, writes and refuses as it says."""

import dataclasses
import functools
import itertools
import shlex
import signal

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("optax")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tqdm")

from flax import nnx

from examples.language_model import (
    attending,
    checkpoints,
    packing,
    placing,
    run,
    text,
    timing,
    training,
)
from examples.language_model.__main__ import main
from examples.language_model.model import LanguageModel
from examples.language_model.settings import Plan, Sizes

SIZES = Sizes(vocabulary=32, layers=2, width=16, heads=4, kv_heads=2)
SMALL = dataclasses.replace(SIZES, layers=1)  # quick to compile
PLAN = Plan(steps=6, rows=2, length=24, rate=0.03)


@pytest.fixture(autouse=True)
def standard():
    """The promotion of a user: that of optax is not strict. JAX has started."""
    jax.devices()
    with jax.numpy_dtype_promotion("standard"):
        yield


def documents(count=12):
    """Documents that count upwards from somewhere, and so can be learnt."""
    random = np.random.default_rng(0)
    return [
        list(1 + (random.integers(31) + np.arange(random.integers(3, 20))) % 31)
        for _ in range(count)
    ]


def stream():
    return packing.Stream(documents(), PLAN.length, PLAN.rows, PLAN.seed)


def losses(attend, steps=PLAN.steps, place=training.ONE_DEVICE):
    """The loss before each step."""
    model, optimizer = training.begin(SMALL, PLAN)
    place.weights(model, optimizer)
    step, batches = training.make_step(attend), stream()
    return [float(step(model, optimizer, place.batch(batches[i]))) for i in range(steps)]


@functools.cache
def noisy_model():
    """One whose layers all count: what adds to the stream starts as 0."""
    model = LanguageModel(SIZES, rngs=nnx.Rngs(0))
    rngs = nnx.Rngs(1)
    noisy = lambda x: x + 0.3 * jax.random.normal(rngs(), x.shape)
    nnx.update(model, jax.tree.map(noisy, nnx.state(model, nnx.Param)))
    return model


@nnx.jit
def _logits(model, batch):
    attend = attending.within_documents(batch.document)
    return model(batch.tokens, batch.position, attend)


def logits(batch):
    return _logits(noisy_model(), batch)


# The text and its packing.


def test_documents_for_validation_share_no_paragraph_with_the_others():
    learnt, judges = text.load()
    paragraphs = lambda documents: {
        " ".join(paragraph.split())
        for document in documents.values()
        for paragraph in document.split("\n\n")
    }
    assert len(learnt) > 60
    assert len(judges) > 5
    assert not paragraphs(learnt) & paragraphs(judges)


def test_pairs_that_stand_together_most_become_tokens():
    tokens = text.learn_tokens(["abab abab cab"], 259)
    assert [tokens.spelling[257:]] == [[b"ab", b"abab"]]
    assert tokens.decode(tokens.encode("abab")) == "abab"
    assert tokens.encode("abab") == [258]


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(st.text())
def test_any_text_is_that_of_its_tokens(sentence):
    tokens = text.learn_tokens(["the cat and the hat, that the cat sat at"], 270)
    assert tokens.decode(tokens.encode(sentence)) == sentence


def test_packed_rows_are_the_documents_one_after_the_other():
    packed = packing.pack([[5, 6, 7], [8], [9, 10]], 4)
    expected = {
        "tokens": [[0, 5, 6, 7], [0, 8, 0, 9]],
        "targets": [[5, 6, 7, 0], [8, 0, 9, 10]],
        "document": [[1, 1, 1, 1], [1, 1, 2, 2]],
        "position": [[0, 1, 2, 3], [0, 1, 0, 1]],
    }
    for name, rows in expected.items():
        np.testing.assert_array_equal(getattr(packed, name), rows, name)


def test_positions_start_anew_in_a_document_that_began_in_another_row():
    packed = packing.pack([[5, 6, 7, 8], [9, 10, 11]], 4, start=1)
    np.testing.assert_array_equal(packed.tokens, [[5, 6, 7, 8], [0, 9, 10, 11]])
    np.testing.assert_array_equal(packed.position, [[0, 1, 2, 3], [0, 1, 2, 3]])


def test_a_batch_is_a_function_of_its_number():
    late, early = stream(), stream()
    in_turn = [early[i] for i in range(2 * early.batches)]
    for i in (len(in_turn) - 1, 0):
        jax.tree.map(np.testing.assert_array_equal, late[i], in_turn[i])
    assert not np.array_equal(in_turn[0].tokens, in_turn[early.batches].tokens)


def test_a_token_sees_its_document_and_nothing_else():
    # The logits of a document are those that it has alone.
    first, second = documents(2)
    packed = packing.pack([first, second], len(first) + len(second) + 1)
    alone = packing.pack([second], len(second))
    both, one = logits(packed)[0, len(first) + 1 :], logits(alone)[0]
    np.testing.assert_allclose(both, one, atol=1e-5)


# The model with other ways to attend.


def test_losses_are_those_with_jax_nn_and_those_without_skipping():
    ours, *others = [losses(way) for way in timing.WAYS.values()]
    assert ours[-1] < ours[0] - 0.2  # it has learnt, and so its attention counts
    for other in others:
        np.testing.assert_allclose(other, ours, rtol=1e-5)


@pytest.mark.slow
def test_losses_on_many_devices_are_those_on_one():
    place = placing.place(4, PLAN.length)
    assert place.mesh.size == 4
    found = losses(place.attending, place=place)
    np.testing.assert_allclose(found, losses(attending.within_documents), rtol=1e-5)


def test_logits_with_a_cache_are_those_without():
    parts = (4, 1, 1, 4)
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 32, (2, sum(parts))))
    position = jnp.broadcast_to(jnp.arange(sum(parts)), tokens.shape)
    whole = logits(packing.Batch(tokens, tokens, jnp.zeros_like(tokens), position))
    cache = attending.empty_caches(SIZES, 2, room=13)
    extend, found = nnx.jit(attending.extend), []
    for start, end in itertools.pairwise(np.cumsum((0, *parts))):
        part, cache = extend(noisy_model(), tokens[:, start:end], cache)
        found.append(part)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), whole, atol=1e-5)
    assert cache[0].length == sum(parts)


def test_weights_that_are_watched_sum_to_1_before_the_word():
    tokens = list(range(1, 10))
    weights = run.look(noisy_model(), tokens)
    assert weights.shape == (SIZES.layers, SIZES.heads, len(tokens))
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)


# Stopping and going on.


class Interrupted(packing.Stream):
    """Ctrl-C comes while the batch of step 2 is made."""

    def __getitem__(self, step):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return super().__getitem__(step)


def trained(folder, batches):
    model, optimizer = training.begin(SMALL, PLAN)
    history = checkpoints.History(PLAN.steps)
    with checkpoints.Checkpoints(folder) as saved:
        saved.restore(model, optimizer, history)
        training.train(model, optimizer, batches, lambda model: 1.0, history, saved, 1e9)
    return model, optimizer, history


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    model, optimizer, history = trained(tmp_path / "whole", stream())
    interrupted = Interrupted(documents(), PLAN.length, PLAN.rows, PLAN.seed)
    stopped = trained(tmp_path / "parts", interrupted)[2]
    assert stopped.done == 3  # the step at hand was ended
    after = trained(tmp_path / "parts", stream())
    assert after[2].done == history.done == PLAN.steps
    equal = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
    equal(nnx.state(after[0]), nnx.state(model))
    equal(nnx.state(after[1]), nnx.state(optimizer))
    equal(after[2].train, history.train)
    assert signal.getsignal(signal.SIGINT) == handler


# The command.

TINY = shlex.split("""--layers 1 --width 8 --heads 2 --kv-heads 1 --vocabulary 300
    --length 64 --word for --steps 2 --tokens 3 --rounds 1""")


def command(tmp_path, *arguments):
    return main([*TINY, "--out", str(tmp_path / "run"), *arguments])


def test_command_trains_writes_and_draws(tmp_path, capsys):
    assert command(tmp_path) == 0
    out = capsys.readouterr().out
    assert 'The "while" statement|' in out
    assert "blocks between documents skipped" in out
    for name in ("loss.png", "attention.png"):
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")
    # With other settings it does not go on.
    assert command(tmp_path, "--steps", "3") == 2
    there = "the run there has steps 2, but this one has steps 3; give the same options"
    assert there in capsys.readouterr().err


@pytest.mark.slow
def test_command_goes_on_with_other_devices(tmp_path, capsys):
    at_once = command(tmp_path / "one", "--steps", "4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "Stream", Interrupted)
        stopped = command(tmp_path, "--steps", "4", "--devices", "2")
    assert (at_once, stopped) == (0, 130)
    assert command(tmp_path, "--steps", "4", "--devices", "4") == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("step")]
    assert len(lines) == 2
    assert lines[0] == lines[1]


REFUSALS = {
    "--devices 3": "--length 64 must be a multiple of --devices 3",
    "--devices 64": "--devices 64 are more than there are: 8",
    "--heads 3": "--width 8 must be a multiple of twice --heads 3",
    "--heads 4 --kv-heads 3": "--heads 4 must be a multiple of --kv-heads 3",
    "--steps 0": "argument --steps: must be a whole number above 0, got '0'",
    "--rate nan": "argument --rate: must be a number from 0 on, got 'nan'",
    "--length 99999": "--rows 1 of --length 99999 are more than there is",
    "--layer 1": "--layer 1 is not there: they are 0 to 0",
    "--word zebra": "--word: 'zebra' is not within the first 64 tokens of a document",
    "--prompt " + 65 * "x": "--prompt has 65 tokens, and with what follows",
    "--out {folder}": "folder: this folder holds something else; name a new one by --out",
    "--out {folder}/mine": "mine: this is a file; name a folder by --out",
}


@pytest.mark.parametrize("arguments", REFUSALS)
def test_command_refuses_in_a_sentence(tmp_path, capsys, arguments):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    given = arguments.format(folder=tmp_path / "folder").split()
    assert command(tmp_path, *given) == 2
    assert REFUSALS[arguments] in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "mine"]
