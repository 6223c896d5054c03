"""The error of a rule that asks for a number while it is traced, in one sentence."""

import traceback
from pathlib import Path

import jax

_ERRORS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
_LIBRARIES = Path(__file__).parents[1], Path(jax.__file__).parent


def asks_for_a_number(error: Exception) -> bool:
    """Says whether an error was raised because a traced array has no number yet."""
    # Sets and dicts ask for a hash, and Python itself answers.
    unhashable = str(error).startswith("unhashable type") and "Tracer" in str(error)
    return isinstance(error, _ERRORS) or unhashable


def number_refused(error: Exception) -> str:
    """Says what a rule must do instead of asking for a number."""
    return (
        f"a function of positions must compute with traced arrays, for b, n, t and s have "
        f"no numbers yet, got {_place(error)}, which asks for a number; write `&`, `|`, "
        f"`~` for `and`, `or`, `not`, `(0 <= x) & (x < 3)` for `0 <= x < 3`, `jnp.where` "
        f"for `if`, `jnp.asarray(table)[t]` for `table[t]`, and functions of `jnp` for "
        f"those of Python and NumPy."
    )


def _place(error: Exception) -> str:
    """Names the innermost function of the caller's that the error came through."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if not any(path.is_relative_to(library) for library in _LIBRARIES):
            return f"`{frame.name}` in line {frame.lineno} of {path.name}"
    return "one"
