"""What a call would do, as a table: which implementation runs, why no other, its cost."""

import dataclasses
import html

from jattn.blocks.kinds import percent
from jattn.context.account import Devices


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of pairs that an implementation visits.

    Attributes:
        sizes: How many queries and keys a block has.
        counts: How many blocks there are of queries and of keys.
        empty: The share of blocks that are skipped; None if known only when the call runs.
        partial: The share of blocks that need the mask; None likewise.
        pairs: How many pairs the blocks that are not skipped have; None likewise.
    """

    sizes: tuple[int, int]
    counts: tuple[int, int]
    empty: float | None = None
    partial: float | None = None
    pairs: int | None = None

    def __str__(self) -> str:
        text = f"{_times(self.counts)} blocks of {_times(self.sizes)}"
        if self.empty is None or self.partial is None:
            return f"known when it runs (of {text})"
        empty, partial = percent(self.empty), percent(self.partial)
        return f"{empty} skipped, {partial} partial (of {text})"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The explanation of a call; `print` shows it as a table, and so does a notebook.

    Attributes:
        implementation: The implementation that runs.
        platform: What it runs on.
        shapes: The letters and their sizes.
        dtype: The dtype of the inputs.
        refusals: For every implementation its reason for not running, or None.
        flops: Floating-point operations of the two products, forward.
        bytes_moved: Bytes of the inputs and the output.
        logits_bytes: Bytes of all logits, if they are held at once.
        blocks: Which blocks are skipped; None where no block can be skipped.
        flops_visited: The part of `flops` in blocks that are not skipped; None if it is
            known only when the call runs.
        devices: How devices share the call, where a `context` is given.
        gathered: What XLA will gather, where arrays on several devices have none.
    """

    implementation: str
    platform: str
    shapes: dict[str, int]
    dtype: str
    refusals: dict[str, str | None]
    flops: int
    bytes_moved: int
    logits_bytes: int
    blocks: Blocks | None = None
    flops_visited: int | None = None
    devices: Devices | None = None
    gathered: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return "\n".join(f"{label:<16}{text}" for label, text in self._rows())

    def _repr_html_(self) -> str:
        """Gives the table as HTML, which a notebook shows."""
        cells = (map(html.escape, row) for row in self._rows())
        rows = (f"<tr><th>{label}</th><td>{text}</td></tr>" for label, text in cells)
        return f"<table>{''.join(rows)}</table>"

    def _rows(self) -> list[tuple[str, str]]:
        """Gives the label and the text of each row of the table."""
        shapes = " ".join(f"{letter}={size}" for letter, size in self.shapes.items())
        rows = [
            ("implementation", f"{self.implementation} on {self.platform}"),
            ("shapes", f"{shapes}, {self.dtype}"),
            ("forward", f"{_unit(self.flops)}flop in two products"),
        ]
        if self.blocks is not None:
            rows.append(("blocks", str(self.blocks)))
        if self.flops_visited is not None:
            rows.append(("not skipped", f"{_unit(self.flops_visited)}flop"))
        rows.append(("inputs, output", f"{_unit(self.bytes_moved)}B"))
        rows.append(("all logits", f"{_unit(self.logits_bytes)}B if held at once"))
        for name, sentence in self.refusals.items():
            if name != self.implementation:
                rows.append((f"not {name}", sentence or "comes later in the order"))
        across = [] if self.devices is None else self.devices.rows()
        return [*rows, *across, *self.gathered]


def _times(pair: tuple[int, int]) -> str:
    return f"{pair[0]} × {pair[1]}"


def _unit(amount: int) -> str:
    """Writes a number with three digits and a unit's prefix: 1.23 G."""
    value = float(amount)
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} P"
