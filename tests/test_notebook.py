"""The notebook runs from its first cell to its last, and says what is stored in it."""

import pathlib

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "attention_basics.ipynb"
MOST_BYTES = 400_000  # pictures included


def printed(cell) -> str:
    """What a cell prints; pieces of it may arrive in several outputs."""
    return "".join(out.text for out in cell.outputs if out.output_type == "stream")


def pictures(cell) -> int:
    """How many pictures a cell shows."""
    return sum("image/png" in out.get("data", {}) for out in cell.outputs)


def read():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_notebook_prints_what_is_stored_and_shows_as_many_pictures():
    _, stored = read()
    notebook, found = read()
    where = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources=where
    ).execute()
    for old, new in zip(stored, found, strict=True):
        assert printed(new) == printed(old), new.source
        assert pictures(new) == pictures(old), new.source


def test_notebook_shows_the_numbers_of_the_lesson_and_a_picture_at_each_step():
    notebook, cells = read()
    nbformat.validate(notebook)
    everything = "".join(map(printed, cells))
    assert "[0.06695687 0.10500927 0.16468731 0.25828112 0.40506543]" in everything
    assert "[0.9488467 1.0488467 1.1488467]" in everything
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    steps = [cell for cell in cells if cell.id in STEPS]
    assert [cell.id for cell in steps] == STEPS
    assert all(pictures(cell) == 1 for cell in steps)
    assert NOTEBOOK.stat().st_size < MOST_BYTES


STEPS = [
    f"{step}-code"
    for step in (
        *("sequence", "embeddings", "roles", "scores", "softmax", "sum", "meaning"),
        *("vmap", "mask", "masked-weights", "jacobian"),
    )
]
