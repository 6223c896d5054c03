"""The options of a call, by name and type, written once for all public functions."""

from collections.abc import Callable
from typing import Any, Literal, TypedDict

from jax.typing import ArrayLike

from jattn.dropout import Dropout
from jattn.masks import Mask
from jattn.modifiers import Modifier

# One of `jattn.masks`, a function (b, n, t, s) → bool, or Booleans that broadcast to BNTS.
MaskLike = Mask | Callable[..., Any] | ArrayLike
# One of `jattn.modifiers`, or a function (logit, b, n, t, s) → logit.
ModifierLike = Modifier | Callable[..., Any]
# The position of the first query or key, or of each: `T` or `BT`, `S` or `BS`.
PositionLike = ArrayLike
Implementation = Literal["blockwise", "dense", "tpu", "cudnn", "gpu", "decode"]


class MaskOptions(TypedDict, total=False):
    """The options that decide which pairs count; see `attention`."""

    mask: MaskLike | None
    query_position: PositionLike | None
    key_position: PositionLike | None


class LogitOptions(MaskOptions, total=False):
    """The options that decide the logits; see `attention`."""

    bias: ArrayLike | None
    modifier: ModifierLike | None
    scale: ArrayLike | None


class WeightOptions(LogitOptions, total=False):
    """The options that decide the weights before dropout; see `attention`."""

    sink: ArrayLike | None


class Options(WeightOptions, total=False):
    """The options that decide the output; see `attention`."""

    dropout: Dropout | None


def checked(where: str, options: Any, known: Any) -> dict[str, Any]:
    """Checks that the function has all these options, and gives them as a dict.

    Raises:
        TypeError: If it does not have one, as Python does for an unknown keyword.
    """
    names = sorted(known.__optional_keys__)
    for name in options:
        if name not in names:
            raise TypeError(
                f"{where}() got an unexpected keyword argument {name!r}; its options are "
                f"{', '.join(names)}."
            )
    return dict(options)
