"""Files of the user: checked before any computation, and never written in part."""

import contextlib
import importlib.util
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from jattn.command.refusal import Refusal
from jattn.page import document

_BROKEN = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


def read(path: str, names: Sequence[str]) -> tuple[list[np.ndarray], list[str]]:
    """Reads the named arrays of an .npz file, and the names of its other arrays.

    Raises:
        Refusal: If the file cannot be read, or does not give one of the named arrays.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
            entries = np.load(file, allow_pickle=False)
        except OSError as error:
            raise Refusal(f"{path}: {error.strerror or error}.") from None
        except _BROKEN:
            raise Refusal(f"{path}: this is not an .npz file; {_advice(names)}.") from None
        if not isinstance(entries, np.lib.npyio.NpzFile):
            raise Refusal(f"{path}: this is a single array; {_advice(names)}.")
        stack.enter_context(entries)
        arrays = [_entry(entries, path, name, names) for name in names]
        return arrays, sorted(set(entries.files) - set(names))


def read_words(path: str, name: str) -> list[str]:
    """Reads an array of strings from an .npz file that `read` has checked.

    Raises:
        Refusal: If the array is not one axis of strings.
    """
    with np.load(path, allow_pickle=False) as entries:
        words = _array(entries, path, name)
    if words.dtype.kind != "U" or words.ndim != 1:
        raise Refusal(
            f"{path}: `{name}` must be strings in one axis, got {words.dtype} of shape "
            f"{words.shape}."
        )
    return words.tolist()


def check_target(path: str, force: bool, source: str | None = None) -> None:
    """Checks, before any computation, that a file can be written.

    Raises:
        Refusal: If the file exists and must not be replaced, or its folder cannot be used.
    """
    if not path:
        raise Refusal("the name of a file to write is empty; name one, or leave it out.")
    leads_to = os.path.realpath(path) if os.path.islink(path) else path
    folder = os.path.dirname(leads_to) or "."
    if not os.path.isdir(folder):
        raise Refusal(f"{path}: there is no folder {folder}.")
    if os.path.isdir(path):
        raise Refusal(f"{path}: this is a folder; name a file in it.")
    if os.path.exists(path) and not os.path.isfile(path):
        raise Refusal(f"{path}: this is a device or a pipe; name a file.")
    if source and _are_same(path, source):
        raise Refusal(f"{path}: this is the input; write to another file.")
    if os.path.exists(path) and not force:
        raise Refusal(f"{path}: the file exists; add --force to replace it.")
    if not os.access(folder, os.W_OK):
        raise Refusal(f"{path}: the folder {folder} cannot be written to.")


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """Does what `document.replacing` does; an error of writing becomes a refusal."""
    try:
        with document.replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise Refusal(f"{path}: cannot be written, {error.strerror or error}.") from None


def is_page(path: str | None) -> bool:
    """Says whether a file will be a page for a browser: its name ends in .html."""
    return path is not None and _kind(path) == "html"


def check_picture(path: str) -> None:
    """Checks, before any computation, that a picture of this name can be drawn.

    Raises:
        Refusal: If matplotlib is missing or does not know this kind of file.
    """
    if is_page(path):
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise Refusal("--plot needs matplotlib; pip install 'jattn[plot]'.")
    from jattn.pictures.panels import kinds

    if _kind(path) not in kinds():
        raise Refusal(f"{path}: the ending must be one of html, {', '.join(kinds())}.")


def save_picture(figure, path: str, temporary: str) -> None:
    """Writes a figure under a temporary name, in the format of the ending of `path`."""
    figure.savefig(temporary, format=_kind(path))


def _are_same(path: str, source: str) -> bool:
    both = os.path.exists(path) and os.path.exists(source)
    return both and os.path.samefile(path, source)


def _kind(path: str) -> str:
    return os.path.splitext(path)[1].lower().removeprefix(".")


def _entry(entries, path: str, name: str, names: Sequence[str]) -> np.ndarray:
    if name not in entries.files:
        has = ", ".join(f"`{other}`" for other in entries.files) or "nothing"
        raise Refusal(f"{path}: has no array `{name}`, only {has}; {_advice(names)}.")
    array = _array(entries, path, name)
    # NumPy's long double has more than 8 bytes, which JAX does not support.
    is_long = array.dtype.kind == "f" and array.dtype.itemsize > 8
    if is_long or array.dtype.kind not in "biufc":
        raise Refusal(
            f"{path}: `{name}` must hold numbers that JAX knows, got dtype {array.dtype}; "
            f"save float16, float32 or float64 (np.savez does not keep bfloat16)."
        )
    return array


def _array(entries, path: str, name: str) -> np.ndarray:
    """Reads one entry; NumPy gives an entry that is no array as its bytes."""
    try:
        array = entries[name]
    except _BROKEN as error:
        reason = str(error).rstrip(".")
        raise Refusal(f"{path}: `{name}` cannot be read, {reason}.") from None
    if not isinstance(array, np.ndarray):
        raise Refusal(
            f"{path}: `{name}` must be an array, got a file of {len(array)} bytes; write "
            f"it with np.savez(file, {name}=…)."
        )
    return array


def _advice(names: Sequence[str]) -> str:
    return f"save one with np.savez(file, {', '.join(f'{name}=…' for name in names)})"
