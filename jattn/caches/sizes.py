"""The sizes that a cache is made with: whole numbers, or a sentence that names the one."""

import operator

from jattn.arrays.integers import is_number


def batch_axes(where: str, batch_size) -> tuple[int, ...]:
    """Gives the axes of examples, from one number or from several."""
    several = isinstance(batch_size, tuple | list)
    axes = tuple(batch_size) if several else (batch_size,)
    for size in axes:
        check_sizes(where, batch_size=(size, 0))
    return tuple(map(operator.index, axes))


def check_sizes(where: str, **sizes) -> None:
    """Raises for a size that is no whole number, or is less than it can be.

    Args:
        where: The public function.
        **sizes: By the name of its argument, each size and the least that it can be.
    """
    for name, (size, least) in sizes.items():
        if not is_number(size) or size < least:
            raise ValueError(
                f"{where}: `{name}` must be a whole number, at least {least}, got "
                f"{size!r}; memory is laid out before a program runs, so give a number "
                f"of Python."
            )
