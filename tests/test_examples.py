"""Small examples print what they promise; commands refuse what they do not know."""

import importlib
import pathlib
import subprocess
import sys

import pytest

from examples import seed

ROOT = pathlib.Path(seed.__file__).parent.parent
COMMANDS = [
    *(f"bench.{name}" for name in ("speed", "cpu", "gpu", "tables", "tpu")),
    *("examples.seed", "examples.language_model.__main__"),
    *("bench.chat", "examples.chat.heads"),
    "jattn.__main__",
]


def test_seed_prints_the_numbers_of_the_notebook(capsys):
    seed.main([])
    printed = capsys.readouterr().out
    assert "[0.06695687 0.10500927 0.16468731 0.25828112 0.40506543]" in printed
    assert printed.count("[0.9488467 1.0488467 1.1488467]") == 2


def test_seed_runs_as_a_module():
    command = [sys.executable, "-m", "examples.seed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0.40506543]" in done.stdout


def call(command, *arguments):
    """The exit code of a command in this process."""
    try:
        return importlib.import_module(command).main(list(arguments)) or 0
    except SystemExit as stop:
        return stop.code or 0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    assert call(command, "--help") == 0
    assert "usage: " in capsys.readouterr().out


@pytest.mark.parametrize("unknown", ["--nonsense", "nonsense"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_what_it_does_not_know(command, unknown, capsys):
    assert call(command, unknown) == 2
    found = capsys.readouterr()
    assert "nonsense" in found.err
    assert found.out == ""
