"""One HTML file that needs nothing else: no server, no network, no other file.

Everything that comes from the user, such as tokens and a title, goes into the page as JSON
in which `<`, `>` and `&` are written as numbers. So a token `</script>` does not end the
script of the page, and the script shows it as text.
"""

import contextlib
import dataclasses
import html
import importlib.resources
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jattn.arrays.checks import check_flag

__all__ = ["Page", "document", "replacing"]

_SAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}
_FRAME = (
    '<iframe title="{title}" srcdoc="{page}" sandbox="allow-scripts" loading="lazy" '
    'style="width:100%;height:720px;border:0;border-radius:8px"></iframe>'
)


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """Gives the name of a temporary file beside `path`; it replaces `path` at success.

    A link stays: the file that it leads to is replaced.
    """
    path = os.path.realpath(path)
    temporary = f"{path}.{os.getpid()}.part"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # a name may be too long to be asked for
            os.remove(temporary)


@dataclasses.dataclass(frozen=True)
class Page:
    """A page that opens in any browser, without a network; a notebook shows it.

    Attributes:
        html: The whole page, as text.
        title: The text above the page.
    """

    html: str = dataclasses.field(repr=False)
    title: str = ""

    def save(self, path, *, replace: bool = False) -> None:
        """Writes the page to a file; if that fails, no part of a file is left.

        A link stays: the file that it leads to is written.

        Args:
            path: The name of the file, such as `"weights.html"`.
            replace: Whether an existing file may be replaced.

        Raises:
            ValueError: If `path` is no name of a file, or `replace` no bool.
            FileExistsError: If the file exists and `replace` is False, or it is a device, a
                pipe or a folder.
        """
        replace = check_flag("Page.save", "replace", replace)
        path = _name_of(path)
        if os.path.exists(path) and not replace:
            raise FileExistsError(
                f"Page.save: the file {path} exists; give another name, or `replace=True`."
            )
        if os.path.exists(path) and not os.path.isfile(path):
            raise FileExistsError(f"Page.save: {path} is no file; give another name.")
        with (
            replacing(path) as temporary,
            open(temporary, "w", encoding="utf-8", newline="\n") as file,
        ):
            file.write(self.html)

    def __repr__(self) -> str:
        return f"Page({self.title!r}, {len(self.html) / 1e6:.1f} MB)"

    def _repr_html_(self) -> str:
        """Gives the page in its own frame, so that it and a notebook share no style."""
        return _FRAME.format(title=html.escape(self.title), page=html.escape(self.html))


def _name_of(path) -> str:
    """Gives the name of a file as text; raises a ValueError where it is none."""
    try:
        return os.fsdecode(path)
    except TypeError:
        raise ValueError(
            f"Page.save: `path` must be the name of a file, got {path!r}; give a `str` or "
            f"a `pathlib.Path`."
        ) from None


def document(
    body: str, scripts: Sequence[str], facts: dict[str, Any], numbers: str
) -> Page:
    """Puts a page together.

    Args:
        body: The name of the template between the header and the scripts.
        scripts: The names of the scripts, in their order.
        facts: The facts that the scripts read as JSON; the header also shows `title`.
        numbers: The letters that `packing.packed` gives, which need no escape.

    Returns:
        The page.
    """
    facts = {**facts, "title": str(facts["title"])}
    parts = {
        "title": plain(facts["title"]),
        "style": _template("style.css"),
        "body": _template(body),
        "facts": _json(facts),
        "numbers": numbers,
        "script": "\n".join(_template(name) for name in scripts),
    }
    # One pass over the template, so that a `{{…}}` in a user's text is not replaced.
    fill = lambda found: parts[found[1]]
    page = re.sub(r"\{\{(\w+)\}\}", fill, _template("page.html"))
    return Page(page, facts["title"])


def plain(text: str) -> str:
    """Escapes text for HTML, in ASCII: half a surrogate pair cannot be written in UTF-8."""
    return html.escape(text).encode("ascii", "xmlcharrefreplace").decode()


def _json(facts: dict[str, Any]) -> str:
    """Writes JSON that may stand inside a `<script>` element."""
    text = json.dumps(facts, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&]", lambda found: _SAFE[found[0]], text)


def _template(name: str) -> str:
    return importlib.resources.files("jattn.page").joinpath(name).read_text("utf-8")
