"""Functions that stay one program where `jax.disable_jit` is on.

Inside of them `where` chooses NaN for what has no number. Run one operation after the
other, that constant would be an array of its own, which `jax.debug_nans` reports.
"""

import functools
from collections.abc import Callable

import jax


def compiled(static: tuple[int, ...] = ()) -> Callable[[Callable], Callable]:
    """Makes a function one program in every mode; `static` arguments are hashed."""

    def decorate(function):
        program = jax.jit(function, static_argnums=static)

        @functools.wraps(function)
        def run(*arguments):
            with jax.disable_jit(False):
                return program(*arguments)

        return run

    return decorate
