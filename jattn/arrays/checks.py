"""Arrays as a caller gives them: checked, aligned, and never silently cut to 32 bits."""

import contextlib
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.arrays.shapes import Sizes


def check_array(where: str, name: str, array) -> jax.Array:
    """Gives the argument as a JAX array that holds the same numbers.

    Raises:
        ValueError: If it is not an array, or holds an integer that JAX would cut to 32
            bits.
    """
    array = native(array)
    try:
        whole = jnp.asarray(array)
    except (TypeError, ValueError) as error:
        got = f"{type(array).__name__}; {error}"
        if isinstance(array, np.ndarray):  # of a dtype that JAX has not, as objects
            got = f"one of the dtype {array.dtype}; convert it with `.astype`."
        raise ValueError(f"{where}: `{name}` must be an array, got {got}") from None
    except OverflowError:
        raise ValueError(_too_wide(where, name, array)) from None
    given = getattr(array, "dtype", whole.dtype)
    is_cut = given != whole.dtype and jnp.issubdtype(given, jnp.integer)
    if is_cut and not fits(np.asarray(array), whole.dtype):
        raise ValueError(_too_wide(where, name, array))
    return whole


def native(array):
    """Gives an array of NumPy in the byte order of this machine, as JAX asks for."""
    if isinstance(array, np.ndarray) and not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="))
    return array


def _too_wide(where: str, name: str, array) -> str:
    got = str(array) if np.ndim(array) == 0 else f"{np.min(array)}…{np.max(array)}"
    return (
        f"{where}: `{name}` must hold integers of 32 bits while JAX's `jax_enable_x64` is "
        f"off, got {got}; number them anew from 0, or switch it on."
    )


def check_real(where: str, name: str, array) -> jax.Array:
    """Gives an argument of real numbers, whole or floating, as `check_array` does."""
    array = check_array(where, name, array)
    if _is_real(array.dtype):
        return array
    raise ValueError(
        f"{where}: `{name}` must hold real numbers, got {array.dtype}; convert it with "
        f"`.astype(float)`."
    )


def known_number(value) -> int | float | None:
    """Gives a real number that can be read now, also of an array; None for all others."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        is_one = value.size == 1 and is_known(value)
        return value.item() if is_one and _is_real(value.dtype) else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def is_word(value, words) -> bool:
    """Says whether a value is one of the words; an array or a list is none of them."""
    return isinstance(value, str) and value in words


def check_word(where: str, name: str, value, words) -> None:
    """Raises a ValueError for an argument that is neither None nor one of the words."""
    if value is not None and not is_word(value, words):
        known = ", ".join(f'"{word}"' for word in words)
        raise ValueError(
            f"{where}: `{name}` must be None or one of {known}, got {value!r}; give one of "
            f"these names, or leave it out."
        )


def check_flag(where: str, name: str, value) -> bool:
    """Gives an argument that is True or False, also of NumPy or JAX, as a `bool`.

    Raises:
        ValueError: If it is anything else: a text such as "no" would count as true.
    """
    is_one = getattr(value, "dtype", None) == jnp.bool_ and value.size == 1
    if isinstance(value, bool) or (is_one and is_known(value)):
        return bool(value)
    got = "a traced array" if isinstance(value, jax.core.Tracer) else repr(value)
    raise ValueError(
        f"{where}: `{name}` must be True or False, known before a program runs, got {got}; "
        f"give a `bool`."
    )


def _is_real(dtype) -> bool:
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer))


def check_callable(where: str, function, form: str, cure: str) -> None:
    """Raises for a `function` that cannot be called."""
    if not callable(function):
        raise ValueError(
            f"{where}: `function` must be a function {form}, got "
            f"{type(function).__name__}; {cure}."
        )


def check_arguments(where: str, name: str, function, arguments: str) -> None:
    """Checks that a function takes these arguments, as far as Python knows.

    Raises:
        ValueError: If it does not.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some functions in C
        return
    try:
        signature.bind(*arguments.split(", "))
    except TypeError as error:
        raise ValueError(
            f"{where}: `{name}` must be a function of ({arguments}), got one of "
            f"{signature}; {error}."
        ) from None


def check_integers(where: str, name: str, array) -> Any:
    """Gives an argument of integers as int32; unchanged where int32 may not hold it.

    The result is a NumPy array unless the argument was an array of JAX.

    Raises:
        ValueError: If it holds anything else, or an integer that JAX would cut to 32 bits.
    """
    if isinstance(array, list | tuple) and not array:
        array = np.zeros(0, np.int32)  # NumPy takes an empty list for one of floats
    checked = check_array(where, name, array)
    if not jnp.issubdtype(checked.dtype, jnp.integer):
        raise ValueError(
            f"{where}: `{name}` must hold integers, got {checked.dtype}; convert it with "
            f"`.astype(int)`."
        )
    with contextlib.suppress(TypeError):  # raised for a list that holds traced numbers
        # Inside `jit`, `jnp.asarray` would turn known numbers into a traced array.
        array = checked if isinstance(array, jax.Array) else np.asarray(array)
    array = native(array) if hasattr(array, "dtype") else checked
    # Asked of NumPy: inside `jit`, what JAX computes of known numbers is not known.
    known = is_known(array)
    if np.can_cast(array.dtype, np.int32) or (known and fits(np.asarray(array))):
        return array.astype(np.int32)
    return array


def is_known(array) -> bool:
    """Says whether the numbers of an array can be read now."""
    return not isinstance(array, jax.core.Tracer)


def are_numbers(tree) -> bool:
    """Says whether all arrays of a tree are single numbers that NumPy holds."""
    leaves = jax.tree.leaves(tree)
    return all(isinstance(x, np.ndarray | np.generic) and x.size == 1 for x in leaves)


def fits(array, dtype=np.int32):
    """Says whether an integer type, int32 by default, holds every number of an array."""
    if np.can_cast(array.dtype, dtype):
        return True
    ends = jnp.iinfo(dtype)
    low = True if jnp.issubdtype(array.dtype, jnp.unsignedinteger) else array >= ends.min
    return ((array <= ends.max) & low).all()


def saturate(array: jax.Array) -> jax.Array:
    """Gives integers as int32; numbers beyond its range become the nearest end of it."""
    if array.dtype == jnp.int32:
        return array
    ends = jnp.iinfo(jnp.int32)
    if jnp.iinfo(array.dtype).bits < ends.bits:  # which cannot be compared with the ends
        return array.astype(jnp.int32)
    unsigned = jnp.issubdtype(array.dtype, jnp.unsignedinteger)
    return array.clip(0 if unsigned else ends.min, ends.max).astype(jnp.int32)


def align(where: str, name: str, array, sizes: Sizes, axes: str = "NTS") -> jax.Array:
    """Gives the array with four axes BNTS, each of the letter's size or 1.

    `axes` names the last axes of `array`; the axes before them are batch axes, as many as
    the inputs have. Any axis may be 1, and leading axes may be left out.
    """
    array = check_array(where, name, array)
    full = (*sizes.batch, *(getattr(sizes, letter) for letter in axes))
    padded = (1,) * (len(full) - array.ndim) + array.shape
    fits = len(padded) == len(full) and all(
        have == 1 or have == want for have, want in zip(padded, full, strict=True)
    )
    # An array BS or BTS would broadcast by its last axes, as TS or NTS, if the sizes happen
    # to agree. The caller may have meant either, so it is refused.
    cure = _per_example(array, sizes) if axes == "NTS" else None
    if fits and cure and (array.ndim == 2 or array.dtype == jnp.bool_):
        other = "query" if array.ndim == 2 else "head"
        raise ValueError(
            f"{where}: `{name}` of shape {array.shape} may be meant for each example or "
            f"for each {other}, as there are as many of both; write `{name}{cure}` or "
            f"`{name}[None]`."
        )
    if not fits:
        letters = ("B" if sizes.batch else "") + axes
        advice = f"write `{name}{cure}`" if cure else "give each axis its size or 1"
        raise ValueError(
            f"{where}: `{name}` must broadcast to {letters} = {full}, got shape "
            f"{array.shape}; {advice}."
        )
    batch, rest = padded[: len(sizes.batch)], padded[len(sizes.batch) :]
    array = array.reshape(padded)
    # The batch of the inputs is one axis B inside the library; so is this array's.
    if all(size == 1 for size in batch):
        batch = (1,)
    else:  # several batch axes, some of them broadcast: count them as one
        array = jnp.broadcast_to(array, (*sizes.batch, *rest))
        batch = (sizes.B,)
    sides = dict(zip(axes, rest, strict=True))
    return array.reshape(*batch, *(sides.get(letter, 1) for letter in "NTS"))


def _per_example(array: jax.Array, sizes: Sizes) -> str | None:
    """Gives the index that makes BS or BTS broadcast to BNTS; None where it is neither."""
    count = len(sizes.batch)
    rest = array.shape[count:]
    known = rest in ((sizes.S,), (sizes.T, sizes.S), (1, sizes.S), (sizes.T, 1))
    if not known or array.shape[:count] != sizes.batch or math.prod(sizes.batch) == 1:
        return None
    return f"[{', '.join([':'] * count + ['None'] * (3 - len(rest)))}]"
