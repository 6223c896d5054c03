"""What a call would do: which implementation, why not the others, and at what cost."""

import dataclasses

from jattn.dispatch import choose, refusals
from jattn.problem import Problem


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A call, explained; `print` it for a table.

    Attributes:
        implementation: The one that runs.
        platform: What it runs on.
        shapes: The letters and their sizes.
        dtype: Of the inputs.
        refusals: For every implementation its reason for not running, or None.
        flops: Floating-point operations of the two products, forward.
        bytes_moved: Bytes of the inputs and the output.
        logits_bytes: What all logits take, if they are held at once.
    """

    implementation: str
    platform: str
    shapes: dict[str, int]
    dtype: str
    refusals: dict[str, str | None]
    flops: int
    bytes_moved: int
    logits_bytes: int

    def __str__(self) -> str:
        shapes = " ".join(f"{letter}={size}" for letter, size in self.shapes.items())
        rows = [
            ("implementation", f"{self.implementation} on {self.platform}"),
            ("shapes", f"{shapes}, {self.dtype}"),
            ("forward", f"{_unit(self.flops)}flop in two products"),
            ("inputs, output", f"{_unit(self.bytes_moved)}B"),
            ("all logits", f"{_unit(self.logits_bytes)}B if held at once"),
        ]
        for name, sentence in self.refusals.items():
            if name != self.implementation:
                rows.append((f"not {name}", sentence or "comes later in the order"))
        return "\n".join(f"{label:<16}{text}" for label, text in rows)


def explain(where: str, problem: Problem, platform: str, implementation) -> Explanation:
    """Explains a problem, as `jattn.explain` does a call."""
    sizes = problem.sizes
    B, T, S, N, K, H, D = (getattr(sizes, letter) for letter in "BTSNKHD")
    item = problem.dtype.itemsize
    return Explanation(
        implementation=choose(where, problem, platform, implementation),
        platform=platform,
        shapes={letter: getattr(sizes, letter) for letter in "BTSNKHD"},
        dtype=problem.dtype.name,
        refusals=refusals(problem, platform),
        flops=2 * B * N * T * S * (H + D),
        bytes_moved=item * B * (T * N * (H + D) + S * K * (H + D)),
        logits_bytes=problem.wide.itemsize * B * N * T * S,
    )


def _unit(amount: int) -> str:
    """A number with three digits and a unit's prefix: 1.23 G."""
    value = float(amount)
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} P"
