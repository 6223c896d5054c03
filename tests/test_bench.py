"""The bench measures what it says: right outputs and gradients, and figures that add up."""

import gc
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from bench import candidates, limits, measure, processor, report, rows, speed
from jattn import definition
from jattn.implementations import dispatch

SMALL = ["--shapes", "2,8,4,4,2", "--seconds", "0"]


def pose(name, shape=(2, 8, 4, 4, 2)):
    return measure.pose(rows.find_case(name), rows.sizes_of(shape), "float32")


def run(*arguments):
    return speed.main([*SMALL, *map(str, arguments)])


@pytest.fixture
def without_peers(monkeypatch):
    """As if only jax were installed."""
    monkeypatch.setattr(candidates.importlib.util, "find_spec", lambda name: None)


# The command.


def test_table_has_each_candidate_with_its_figures_or_a_word(capsys):
    assert run("--cases", "sink", "--peers", "jax_nn") == 0
    lines = capsys.readouterr().out.splitlines()
    few, own, _, peer = lines[lines.index("sink   B=2 T=8 N=4 H=4 K=2") + 2 :][:4]
    assert few.split() == ["jattn", "decode", "n/a"]  # it takes long buffers only
    assert own.startswith("jattn blockwise *")
    assert own.count("1.00") == 2
    assert own.endswith("MiB")
    assert peer.split() == ["jax_nn", "n/a"]
    expected = ["jattn", "blockwise", "1.00", "1.00", "1", "of", "1", "rows"]
    assert lines[-2].split() == expected
    assert lines[-1].split()[:2] == ["jattn", "dense"]


@pytest.mark.usefixtures("without_peers")
def test_missing_peers_are_named_and_left_out(capsys):
    assert run("--cases", "plain", "--peers", "tokamax,torch") == 0
    out = capsys.readouterr().out
    assert "tokamax: not installed, left out\ntorch: not installed, left out\n" in out
    assert "\ntorch  " not in out


def test_a_peer_that_fails_gives_its_reason_and_the_run_goes_on(capsys, monkeypatch):
    def fail(work):
        raise ValueError("not today\nnor tomorrow")

    monkeypatch.setitem(candidates.PEERS, "jax_nn", fail)
    assert run("--cases", "plain", "--peers", "jax_nn") == 0
    out = capsys.readouterr().out
    assert "  jax_nn: ValueError: not today\n" in out


def test_json_and_picture_hold_the_run(tmp_path):
    pytest.importorskip("matplotlib")
    figures, picture = tmp_path / "a.json", tmp_path / "a.png"
    options = ("--peers", "jax_nn", "--json", figures, "--plot", picture)
    assert run("--cases", "infinite_bias", *options) == 0
    held = json.loads(figures.read_text())
    assert held["header"]["versions"]["jattn"] == jattn.__version__
    (row,) = held["rows"]
    assert row["case"] == "infinite_bias"
    assert row["shape"] == {"B": 2, "T": 8, "N": 4, "H": 4, "K": 2, "S": 8, "D": 4}
    own, peer = row["candidates"]["jattn dense"], row["candidates"]["jax_nn"]
    assert own["error"] < 1e-5
    assert own["same"]
    assert peer["error"] is None  # NaN, in a row that sees nothing
    assert not peer["same"]
    for one in peer["passes"].values():
        assert one["seconds"] == np.median(one["all_seconds"]) > 0
        assert len(one["all_seconds"]) >= measure.MIN_ROUNDS
        assert one["compile_seconds"] > 0
        assert one["temporaries_bytes"] >= 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.iterdir()) == [figures, picture]


def test_what_was_measured_is_kept_on_interrupt(capsys, monkeypatch, tmp_path):
    first = speed.measure_row

    def measure_row(work, makers, seconds):
        if work.case.name == "causal":
            raise KeyboardInterrupt
        return first(work, makers, seconds)

    monkeypatch.setattr(speed, "measure_row", measure_row)
    path = tmp_path / "a.json"
    assert run("--cases", "plain,causal", "--peers", "", "--json", path) == 130
    assert len(json.loads(path.read_text())["rows"]) == 1
    assert "1 of 1 rows" in capsys.readouterr().out


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "old"
    path.write_text("old")

    def fail():
        with speed.report.replacing(path) as file:
            file.write(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "casual"], "no case 'casual'; the cases are plain, "),
        (["--peers", "pytorch"], "no peer 'pytorch'; the peers are jax_nn, torch, "),
        (["--shapes", "1,2,3"], "a shape is B,T,N,H[,K[,S[,D]]] in whole numbers"),
        (["--shapes", "1,2,3,4,2"], "a shape needs sizes ≥ 1 and N a multiple of K"),
        (["--cases", "segments", "--shapes", "1,4,2,4,2,8"], "'segments' does not fit T=4"),
        (["--json", "/no/such/file"], "/no/such is no folder"),
        (["--plot", "/"], "/ is a folder"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        speed.main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("bench.speed: ")
    assert message in lines[0]


def test_command_runs_as_a_module():
    command = [sys.executable, "-m", "bench.speed", "--cases", "plain", "--peers", "jax_nn"]
    folder = pathlib.Path(speed.__file__).parent.parent
    done = subprocess.run([*command, *SMALL], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "jax_nn" in done.stdout


# Rows.


def test_sizes_left_out_of_a_shape_follow_from_the_others():
    plain = rows.sizes_of((1, 2, 6, 4))
    assert (plain.K, plain.S, plain.D) == (6, 2, 4)
    full = rows.sizes_of(rows.parse_shape("1,2,6,4,3,5,7"))
    assert (full.batch, full.K, full.S, full.D) == ((1,), 3, 5, 7)


@pytest.mark.parametrize("quick", [False, True])
def test_every_row_of_the_tables_is_a_case_at_a_shape(quick):
    table = rows.QUICK if quick else rows.ROWS
    chosen = rows.choose(quick=quick)
    assert sorted(case.name for case, _ in chosen) == sorted(name for name, _ in table)
    assert all(sizes.N % sizes.K == 0 for _, sizes in chosen)


# Measures.


@pytest.fixture(autouse=True)
def unsettled(monkeypatch):
    """Leaves out the wait before a measurement: nothing here has anything to settle."""
    monkeypatch.setattr(measure, "SETTLE", 0)


def test_what_is_timed_settles_first(monkeypatch):
    now = [0.0]  # a clock that only the calls move, each by 3 ms
    calls = lambda: now.__setitem__(0, now[0] + 0.003)
    monkeypatch.setattr(measure, "SETTLE", 0.01)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    times = measure.interleave({"a": calls}, 0, rounds=1)
    assert times == {"a": [pytest.approx(0.003)]}
    assert now[0] == pytest.approx(0.003 * (1 + 4 + 1))  # warming up, settling, timed


def test_every_candidate_runs_in_every_round_and_goes_first_in_its_turn():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = measure.interleave(runs, 0)
    assert {name: len(x) for name, x in times.items()} == dict.fromkeys("abc", 5)
    rounds = np.reshape(calls[3:], (5, 6))  # after the warming up, twice each
    assert ["".join(x) for x in rounds[:3]] == ["aabbcc", "bbccaa", "ccaabb"]
    assert gc.isenabled()


def test_ratio_is_taken_within_rounds():
    base = [1.0, 10.0, 2.0]
    assert measure.ratio([2.0, 20.0, 4.0], base) == 2


@pytest.mark.parametrize("name", ["sink", "bias", "by_head_and_example"])
def test_exact_output_is_the_definition_in_float64(name):
    work = pose(name, (2, 70, 4, 4, 2, 9, 3))
    got = measure.exact_output(work)
    with jax.enable_x64(True):
        wide = jax.tree.map(measure._widen, work.inputs)
        attend = jax.jit(lambda inputs: work.case.call(definition.attention, inputs))
        want = np.asarray(attend(wide))
    assert got.shape == (2, 64, 4, 3)
    np.testing.assert_allclose(got, want[:, measure.sampled_rows(work.sizes)], atol=1e-13)


# Candidates.


def exact(work):
    """The definition's output, and its gradients of query, key and value."""

    @jax.jit
    def both(inputs, cotangent):
        call = lambda *xs: work.case.call(
            definition.attention, inputs | dict(zip(candidates.INPUTS, xs, strict=True))
        )
        output, pullback = jax.vjp(call, *(inputs[name] for name in candidates.INPUTS))
        return output, pullback(cotangent)

    return both(work.inputs, work.cotangent)


def assert_computes(candidate, work):
    """Output and gradients are those of the definition."""
    want, gradients = exact(work)
    np.testing.assert_allclose(candidate.output(), want, atol=1e-5)
    result = candidate.passes["forward+backward"].run()
    if isinstance(result[1], list | tuple):  # JAX: the output, and the gradients
        got = result[1]
    else:
        got = [np.swapaxes(x.numpy(), 1, 2) for x in result]
    for x, y in zip(got, gradients, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.parametrize("name", dispatch.DEFAULT_ORDER)
def test_own_candidate_computes_the_case(name):
    work = pose("captured")
    assert_computes(candidates.own(work, name), work)


EXPRESSIBLE = ["causal", "documents", "bias", "alibi", "scale", "at_an_offset"]


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_jax_nn_computes_the_case(name):
    work = pose(name)
    assert_computes(candidates.jax_nn(work), work)


@pytest.mark.parametrize("name", [*EXPRESSIBLE, "value_size"])
def test_torch_computes_the_case(name):
    pytest.importorskip("torch")
    work = pose(name, (2, 8, 4, 4, 2, 8, 3) if name == "value_size" else (2, 8, 4, 4, 2))
    assert_computes(candidates.torch(work), work)


@pytest.mark.parametrize("name", [*EXPRESSIBLE, "soft_cap"])
def test_tokamax_computes_the_case(name):
    pytest.importorskip("tokamax")
    work = pose(name)
    assert_computes(candidates.tokamax(work), work)


def test_causal_and_bias_together_reach_torch():
    pytest.importorskip("torch")
    work = pose("bias_per_key")
    assert_computes(candidates.torch(work), work)


@pytest.mark.parametrize("name", ["sink", "dropout", "captured", "everything"])
@pytest.mark.parametrize("peer", ["jax_nn", "torch"])
def test_a_peer_without_words_for_the_case_is_none(peer, name):
    if peer == "torch":
        pytest.importorskip("torch")
    assert candidates.PEERS[peer](pose(name)) is None


def test_jax_nn_has_no_words_for_another_value_size():
    assert candidates.jax_nn(pose("plain", (1, 4, 2, 4, 2, 4, 3))) is None


def test_a_mask_of_all_heads_and_examples_is_given_once():
    plain = measure_plain("window")
    assert plain.mask.shape == (1, 1, 8, 8)
    assert not plain.is_causal


def test_a_causal_case_is_a_flag():
    plain = measure_plain("causal")
    assert plain.is_causal
    assert plain.mask is None


def measure_plain(name):
    return candidates.plainly(pose(name))


def test_torch_dtype_is_that_of_the_work():
    torch = pytest.importorskip("torch")
    array = jnp.ones((1, 2, 3, 4), jnp.bfloat16)
    tensor = candidates._tensor(torch, "cpu", "bfloat16", array, heads_first=True)
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.bfloat16, (1, 3, 2, 4))


# Limits.


@pytest.mark.parametrize(
    ("name", "pairs"),
    [("plain", 64), ("causal", 36), ("window_open_to_the_left", 36), ("lengths", None)],
)
def test_a_limit_counts_the_pairs_that_the_mask_allows(name, pairs):
    work = pose(name)
    weights = jattn.attention_weights(
        work.inputs["query"], work.inputs["key"], **work.options
    )
    counted = limits.allowed_pairs(work)
    assert counted == int(jnp.sum(weights > 0))
    assert pairs is None or counted == 2 * 4 * pairs  # B = 2, N = 4


def test_a_limit_adds_products_and_exponentials():
    work = pose("causal")
    rates = {x: limits.Rate(lambda: None, 1.0) for x in ("inner", "outer", "exponential")}
    times = {"inner": [2.0, 1.0], "outer": [10.0, 20.0], "exponential": [100.0]}
    pairs = 2 * 4 * 36
    forward = limits.limit(work, "forward", rates, times)
    assert forward == pairs * (2 * 4 * 1.0 + 2 * 4 * 10.0 + 100.0)
    both = limits.limit(work, "forward+backward", rates, times)
    assert both == pairs * (6 * 4 * 1.0 + 8 * 4 * 10.0 + 2 * 100.0)


def test_a_share_above_one_ends_the_bench_with_a_sentence():
    assert limits.share("a row", 2.0, 1.0) == 0.5
    with pytest.raises(
        SystemExit, match=r"a row: 1000\.00 ms is less than the limit of 2000"
    ):
        limits.share("a  row", 1.0, 2.0)


def test_rates_are_timed_and_positive():
    made = limits.rates(pose("plain"))
    times = measure.interleave({name: rate.run for name, rate in made.items()}, 0.0, 2)
    assert limits.limit(pose("plain"), "forward", made, times) > 0


def test_processor_has_a_name():
    assert processor.name()
    assert processor.describe().startswith(processor.name())


def test_threads_are_checked(capsys):
    with pytest.raises(SystemExit):
        report.chosen("bench", None, {"peak": None}, ["--threads", "1000"])
    assert "--threads: must be 1 to" in capsys.readouterr().err
