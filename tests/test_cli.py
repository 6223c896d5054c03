"""`python -m jattn`, called in this process and once or twice in one of its own."""

import os
import re
import subprocess
import sys
import types
import zipfile

import jax
import numpy as np
import pytest

import jattn
from jattn import page
from jattn.__main__ import main
from jattn.command import attend, welcome
from jattn.implementations import dispatch
from jattn.masks import Causal, Window
from jattn.pictures import numbers


@pytest.fixture
def arrays(tmp_path, monkeypatch):
    """Query, key and value of two examples, in a.npz of the current folder."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0).standard_normal
    shapes = {"query": (2, 7, 4, 8), "key": (2, 7, 2, 8), "value": (2, 7, 2, 6)}
    arrays = {name: draw(shape).astype(np.float32) for name, shape in shapes.items()}
    np.savez("a.npz", **arrays)
    return arrays


def run(*arguments, stdout=subprocess.PIPE):
    command = [sys.executable, "-m", "jattn", *arguments]
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
    )


# ---- with nothing ----


def test_worked_example_shows_the_weights_and_the_output(capsys):
    welcome.print_example()
    printed = capsys.readouterr().out
    for number in ("0.06695687", "0.10500927", "0.16468731", "0.25828112", "0.40506543"):
        assert number in printed
    assert "[0.9488467 1.0488467 1.1488467]" in printed


def test_without_a_command_everything_is_checked_and_passes(capsys):
    assert main([]) == 0
    printed, progress = capsys.readouterr()
    assert f"jattn {jattn.__version__}, jax {jax.__version__}" in printed
    assert printed.count(" ok\n") == len(welcome.CHECKS) * len(dispatch.names("cpu"))
    assert "jattn / jax.nn = " in printed
    assert progress == ""  # this is no terminal


@pytest.fixture
def one_check(monkeypatch):
    monkeypatch.setattr(welcome, "CHECKS", (("lengths_differ", "float32"),))
    monkeypatch.setattr(welcome, "print_timing", lambda: None)


@pytest.mark.usefixtures("one_check")
def test_an_implementation_that_is_off_by_a_little_fails(monkeypatch, capsys):
    plain = dispatch.IMPLEMENTATIONS["dense"]

    def attend(problem, operands):
        sums = plain.attend(problem, operands)
        return sums._replace(output=sums.output * 1.0001)

    broken = types.SimpleNamespace(
        refusal=plain.refusal, leaves=plain.leaves, attend=attend
    )
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "broken", broken)
    assert main([]) == 1
    printed = capsys.readouterr().out
    assert re.search("broken .* FAILED\n", printed)
    assert "Checks that failed: 1\n" in printed


@pytest.mark.usefixtures("one_check")
def test_an_implementation_that_refuses_is_no_failure(monkeypatch, capsys):
    picky = types.SimpleNamespace(refusal=lambda problem, platform: "Not today.")
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "picky", picky)
    assert main([]) == 0
    assert "  picky      not taken: Not today.\n" in capsys.readouterr().out


def test_progress_is_shown_on_a_terminal_and_cleared(monkeypatch, capsys):
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    welcome.progress("checking")
    welcome.progress("")
    assert capsys.readouterr() == ("", "\r\x1b[Kchecking\r\x1b[K")


# ---- attend ----


def test_attend_writes_what_attention_gives(arrays):
    options = ["--mask", "Causal() & Window(2, 0)", "--scale", "0.7", "--out", "o.npz"]
    assert main(["attend", "a.npz", *options]) == 0
    options = {"mask": Causal() & Window(2, 0), "scale": 0.7}
    state = jattn.attention_state(**arrays, **options)
    weights = jattn.attention_weights(arrays["query"], arrays["key"], **options)
    with np.load("o.npz") as written:
        assert set(written.files) == {"output", "weights", "logsumexp"}
        np.testing.assert_array_equal(written["output"], state.output)
        np.testing.assert_array_equal(written["logsumexp"], state.logsumexp)
        np.testing.assert_allclose(written["weights"], weights, rtol=1e-6)


def test_attend_writes_the_same_weights_in_parts(arrays, monkeypatch):
    monkeypatch.setattr(attend, "_WEIGHTS_AT_ONCE", 3 * 2 * 4 * 7)
    assert main(["attend", "a.npz", "--out", "o.npz"]) == 0
    weights = jattn.attention_weights(arrays["query"], arrays["key"])
    with np.load("o.npz") as written:
        np.testing.assert_allclose(written["weights"], weights, rtol=1e-6)


def test_attend_prints_the_strongest_keys_of_each_query(arrays, capsys):
    np.savez("b.npz", query=[[[9.0]]], key=[[[0.0]], [[1.0]]], value=[[[1.0]], [[2.0]]])
    assert main(["attend", "b.npz", "--scale", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert "B=1 T=1 S=2 N=1 K=1 H=1 D=1, float64; blockwise on" in printed
    assert "     0       1 █████▊   0.711       0 ██▎      0.289\n" in printed


def test_attend_prints_a_long_input_in_part(arrays, capsys):
    long = np.ones((40, 6, 2), np.float32)
    np.savez("b.npz", query=long, key=long, value=long, bias=long)
    assert main(["attend", "b.npz", "--mask", "~Causal()"]) == 0
    printed = capsys.readouterr().out
    assert "… 24 more queries" in printed
    assert "… 2 more heads" in printed
    assert "    39       sees no key\n" in printed
    assert "not used: bias" in printed


def test_attend_computes_float64_in_float64(arrays):
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    np.savez("b.npz", **wide)
    assert main(["attend", "b.npz", "--out", "o.npz"]) == 0
    with jax.enable_x64(True), np.load("o.npz") as written:
        assert written["weights"].dtype == np.float64
        np.testing.assert_array_equal(written["output"], jattn.attention(**wide))


def test_attend_takes_two_axes_as_one_head(arrays, capsys):
    flat = {name: array[0, :, 0] for name, array in arrays.items()}
    np.savez("b.npz", **flat)
    assert main(["attend", "b.npz", "--out", "o.npz"]) == 0
    assert "two axes, T×H, are taken as one head" in capsys.readouterr().out
    expected = jattn.attention(*(array[:, None] for array in flat.values()))[:, 0]
    with np.load("o.npz") as written:
        np.testing.assert_array_equal(written["output"], expected)
        assert written["weights"].shape == (7, 7)
        assert written["logsumexp"].shape == (7,)


def test_attend_takes_arrays_without_queries_or_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, shape in {"no_queries": (0, 1, 2), "no_numbers": (3, 1, 0)}.items():
        none = dict.fromkeys(("query", "key", "value"), np.ones(shape, np.float32))
        np.savez(f"{name}.npz", **none)
        assert main(["attend", f"{name}.npz"]) == 0
        assert f"T={shape[0]}" in capsys.readouterr().out


def test_attend_draws_the_weights(arrays, tmp_path):
    assert main(["attend", "a.npz", "--plot", "o.png", "--out", "o.npz"]) == 0
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "o.npz", "o.png"]


def test_attend_writes_a_page_of_one_example(arrays, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attend, "_all_weights", None)  # never all at once
    monkeypatch.setattr(attend, "_MOST_BYTES", 2**9)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    one = {name: array[:1] for name, array in arrays.items()}
    words = [*"abcdef", "</script>"]
    np.savez("b.npz", **one, tokens=words)
    assert main(["attend", "b.npz", "--mask", "Causal()", "--plot", "o.html"]) == 0
    assert capsys.readouterr().out.endswith("\nwrote o.html\n")
    made = page.weights(one["query"], one["key"], words, mask=Causal(), title="b.npz")
    assert (tmp_path / "o.html").read_text("utf-8") == made.html
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["a.npz", "b.npz", "o.html"]
    assert main(["attend", "b.npz", "--plot", "o.html"]) == 2
    assert "o.html: the file exists; add --force" in capsys.readouterr().err


def test_attend_replaces_a_file_when_told_to(arrays, tmp_path):
    (tmp_path / "o.npz").write_text("old")
    assert main(["attend", "a.npz", "--out", "o.npz", "--force"]) == 0
    with np.load("o.npz") as written:
        assert "output" in written.files


@pytest.mark.parametrize("force", [["--force"], []])
def test_a_link_stays_and_what_it_leads_to_is_written(force, arrays, tmp_path):
    (tmp_path / "o.npz").symlink_to("real.npz")
    if force:
        (tmp_path / "real.npz").write_text("old")
    assert main(["attend", "a.npz", "--out", "o.npz", *force]) == 0
    assert (tmp_path / "o.npz").is_symlink()
    with np.load("real.npz") as written:
        assert "output" in written.files


ATTEND_REFUSALS = {
    "missing.npz": "missing.npz: No such file or directory",
    ".": ".: Is a directory",
    "junk.npz": "junk.npz: this is not an .npz file; save one with np.savez(file, query=…",
    "cut.npz": "cut.npz: this is not an .npz file",
    "one.npy": "one.npy: this is a single array",
    "no_key.npz": "no_key.npz: has no array `key`, only `query`; save one with",
    "objects.npz": "objects.npz: `query` cannot be read, Object arrays cannot be loaded",
    "words.npz": "words.npz: `query` must hold numbers that JAX knows, got dtype <U1",
    "bytes.npz": "bytes.npz: `query` must be an array, got a file of 4 bytes; write it",
    "whole.npz": "`query` must have one of the dtypes float16, bfloat16, float32, float64, "
    "got int64; convert it with",
    "sizes.npz": "sizes.npz: `key` has shape (3, 1, 4) = …SKH, but H=2 in `query`",
    "axes.npz": "axes.npz: `key` must have the axes SKH or more before them, got shape",
    "a.npz --mask Casual()": "--mask: mask expression, column 1: `Casual()` is not a mask",
    "a.npz --mask Window(-1,0)": "--mask: masks.Window: `left` must be ≥ 0",
    "a.npz --mask Lengths([1,2,3])": "`key_lengths` must have shape () or B = (2,)",
    "a.npz --scale nan": "argument --scale: must be a finite number, got 'nan'",
    "a.npz --scale x": "argument --scale: must be a finite number, got 'x'",
    "a.npz --out old.npz": "old.npz: the file exists; add --force to replace it",
    "a.npz --plot old.png": "old.png: the file exists; add --force to replace it",
    "a.npz --out a.npz --force": "a.npz: this is the input; write to another file",
    "a.npz --out no/o.npz": "no/o.npz: there is no folder no",
    f"a.npz --out {'o' * 300}": "o: cannot be written, File name too long",
    "a.npz --out pipe --force": "pipe: this is a device or a pipe; name a file",
    "a.npz --out lost": "lost: there is no folder ",
    "a.npz --out folder": "folder: this is a folder; name a file in it",
    "a.npz --out o.png --plot o.png": "--out and --plot name the same file",
    "a.npz --out=": "the name of a file to write is empty",
    "a.npz --plot=": "the name of a file to write is empty",
    "a.npz --plot o.xyz": "o.xyz: the ending must be one of html, ",
    "a.npz --plot o.html": "a.npz: a page shows one example, and there are 2; write them",
    "few.npz --plot o.html": "few.npz: there are 2 tokens, and T=3",
    "numbers.npz --plot o.html": "numbers.npz: `tokens` must be strings in one axis, got",
    "text.npz --plot o.html": "text.npz: `tokens` must be an array, got a file of 3 bytes",
    "none.npz --plot o.png": "none.npz: there are no weights to draw",
    "a.npz --sca 1": "unrecognized arguments: --sca 1",
    "": "the following arguments are required: FILE.npz",
}


@pytest.fixture
def bad_files(arrays, tmp_path):
    ones = lambda *shape: np.ones(shape, np.float32)
    (tmp_path / "junk.npz").write_text("hello")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:900])
    (tmp_path / "old.npz").write_text("old")
    (tmp_path / "old.png").write_text("old")
    (tmp_path / "folder").mkdir()
    os.mkfifo("pipe")
    (tmp_path / "lost").symlink_to("nowhere/o.npz")
    np.save("one.npy", ones(3))
    np.savez("no_key.npz", query=ones(3, 1, 2))
    np.savez("objects.npz", query=np.array([{}]), key=ones(1), value=ones(1))
    np.savez("words.npz", query=np.array(["a"]), key=ones(1), value=ones(1))
    np.savez("whole.npz", **{name: np.ones((3, 1, 2), np.int64) for name in arrays})
    np.savez("sizes.npz", query=ones(3, 1, 2), key=ones(3, 1, 4), value=ones(3, 1, 2))
    np.savez("axes.npz", query=ones(3, 1, 2), key=ones(3, 2), value=ones(3, 2))
    threes = {name: ones(3, 1, 2) for name in arrays}
    np.savez("few.npz", **threes, tokens=["a", "b"])
    np.savez("numbers.npz", **threes, tokens=ones(3))
    np.savez("text.npz", **threes)
    for name, entries in {"bytes": arrays, "text": ["tokens"]}.items():
        with zipfile.ZipFile(f"{name}.npz", "a") as file:
            for entry in entries:
                file.writestr(entry, b"text"[: 4 if name == "bytes" else 3])
    np.savez("none.npz", query=ones(0, 1, 2), key=ones(0, 1, 2), value=ones(0, 1, 2))


@pytest.mark.usefixtures("bad_files")
@pytest.mark.parametrize("arguments", ATTEND_REFUSALS)
def test_attend_refuses_in_one_line_and_writes_nothing(arguments, tmp_path, capsys):
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.iterdir()}
    assert main(["attend", *arguments.split()]) == 2
    printed, error = capsys.readouterr()
    assert (printed, error.count("\n")) == ("", 1)
    assert error.startswith("python -m jattn")
    assert ATTEND_REFUSALS[arguments] in error
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "command", [["attend", "a.npz"], ["mask", "Causal()", "--length=2"]]
)
def test_without_matplotlib_a_plot_names_the_extra(arrays, command, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*command, "--plot", "o.png"]) == 2
    assert "--plot needs matplotlib; pip install 'jattn[plot]'." in capsys.readouterr().err


def test_weights_too_large_to_hold_are_refused(arrays, monkeypatch, capsys):
    monkeypatch.setattr(attend, "_MOST_BYTES", 2**10)
    assert main(["attend", "a.npz", "--out", "o.npz"]) == 2
    assert "all weights, BNTS = (2, 4, 7, 7), take" in capsys.readouterr().err
    assert main(["attend", "a.npz"]) == 0


def test_a_failed_write_leaves_no_trace(arrays, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert main(["attend", "a.npz", "--out", "o.npz", "--plot", "o.png"]) == 2
    assert "o.png: cannot be written, No space left on device." in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


# ---- mask ----


def test_mask_is_drawn_as_text(capsys):
    assert main(["mask", "Causal() | Prefix(2)", "--length", "4"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Causal() | Prefix(2): 4 queries (rows) × 4 keys (columns)",
        "█ may attend  · may not",
        "  0",
        "0 ████····",
        "1 ████····",
        "2 ██████··",
        "3 ████████",
    ]


def test_large_mask_is_drawn_in_cells_as_wide_as_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "30")
    assert main(["mask", "Causal()", "--length", "100", "--key-length", "300"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == ("█ all may attend  ░ some  · none; one cell is 8 queries × 24 keys")
    assert lines[3] == " 0 ░░························"
    assert max(map(len, lines[2:])) <= 30


def test_mask_is_drawn_as_a_picture(tmp_path, capsys):
    target = tmp_path / "m.svg"
    assert main(["mask", "Causal()", "--length", "3", "--plot", str(target)]) == 0
    assert capsys.readouterr().out == f"wrote {target}\n"
    assert "<svg" in target.read_text()


def test_mask_is_written_as_a_page(tmp_path, capsys):
    target = tmp_path / "m.html"
    options = ["--length", "40", "--blocks", "8", "--plot", str(target)]
    assert main(["mask", "Causal()", *options]) == 0
    assert capsys.readouterr().out == f"wrote {target}\n"
    made = page.mask(Causal(), 40, block=8, title="Causal()")
    assert target.read_text("utf-8") == made.html


def test_blocks_of_a_mask_are_drawn_as_text(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setattr(numbers, "allowed", None)  # no pair is asked
    options = ["--length", "512", "--blocks", "128"]
    assert main(["mask", "Causal() & Window(130, 0)", *options]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Causal() & Window(130, 0): 512 queries (rows) × 512 keys (columns)",
        "█ all may attend  ░ some  · none; one cell is 128 queries × 128 keys",
        "blocks of 128 × 128: 43.8 % empty, 56.2 % partial, 0 % full",
        "    0",
        "  0 ░░······",
        "128 ░░░░····",
        "256 ░░░░░░··",
        "384 ··░░░░░░",
    ]


def test_a_block_larger_than_the_mask_is_the_mask(capsys):
    assert main(["mask", "Causal()", "--length", "3", "--blocks", "9" * 40]) == 0
    assert "blocks of 3 × 3: " in capsys.readouterr().out


def test_many_blocks_are_drawn_in_cells_of_whole_blocks(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "30")
    options = ["--length", "1000000", "--blocks", "1000"]
    assert main(["mask", "Causal()", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("one cell is 91000 queries × 91000 keys")
    assert lines[2] == "blocks of 1000 × 1000: 50 % empty, 0.1 % partial, 50 % full"
    assert max(map(len, lines[4:])) <= 30


def test_blocks_of_a_mask_are_drawn_as_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(numbers, "allowed", None)
    target = str(tmp_path / "m.svg")
    options = ["--length", "131072", "--blocks", "128", "--plot", target]
    assert main(["mask", "Causal()", *options]) == 0
    assert capsys.readouterr().out == f"wrote {target}\n"


MASK_REFUSALS = {
    ("Causal", "--length", "3"): "column 1: `Causal` is not a mask",
    ("Segments([1, 2])", "--length", "3"): "`query_ids` must broadcast to T = (3,)",
    ("Causal()", "--length", "0"): "argument --length: must be a whole number above 0",
    ("Causal()", "--length", "x"): "argument --length: must be a whole number above 0",
    ("Causal()",): "the following arguments are required: --length",
    ("Causal()", "--length", "1000000"): "1000000 × 1000000 pairs are too many to draw",
    ("Causal()", "--length", "9", "--blocks", "0"): "argument --blocks: must be a whole",
    ("Causal()", "--length", "1000000", "--blocks", "8"): "in blocks of 8 × 8 are too many",
    ("Segments([1, 2])", "--length", "3", "--blocks", "2"): "`query_ids` must broadcast",
    ("Causal()", "--length", "9" * 400, "--blocks", "8"): "in blocks of 8 × 8 are too many",
    ("Causal()", "--length", "3", "--plot", ""): "the name of a file to write is empty",
    ("Causal()", "--length", "3", "--plot", "no/m.png"): "no/m.png: there is no folder no",
}


@pytest.mark.parametrize("arguments", MASK_REFUSALS, ids=lambda x: " ".join(x)[:60])
def test_mask_refuses_in_one_line(arguments, capsys):
    assert main(["mask", *arguments]) == 2
    printed, error = capsys.readouterr()
    assert (printed, error.count("\n")) == ("", 1)
    assert MASK_REFUSALS[arguments] in error


# ---- as a command ----


@pytest.mark.parametrize("command", [[], ["attend"], ["mask"]])
def test_help_says_how_it_is_used(command, capsys):
    assert main([*command, "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: python -m jattn")


def test_an_unknown_command_is_refused(capsys):
    assert main(["attned"]) == 2
    assert "invalid choice: 'attned'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (MemoryError(), 2, "more memory than there is"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 2, "more memory"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_stops_a_command_is_said_in_its_code(error, code, said, monkeypatch, capsys):
    def stop():
        raise error

    monkeypatch.setattr(welcome, "run", stop)
    assert main([]) == code
    assert said in capsys.readouterr().err


def test_as_a_process_it_prints_and_exits():
    done = run("mask", "Causal()", "--length", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("0 ██··\n1 ████\n")


def test_a_reader_who_leaves_early_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = run("mask", "Causal()", "--length", "9", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
