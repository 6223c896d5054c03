"""What decides what a model becomes, besides the text."""

import dataclasses

from examples.command import Refusal


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large a model is."""

    vocabulary: int = 1024
    layers: int = 4
    width: int = 256
    heads: int = 4  # of the queries: N
    kv_heads: int = 2  # of the keys and values: K

    def __post_init__(self):
        if self.width % (2 * self.heads):
            raise Refusal(
                f"--width {self.width} must be a multiple of twice --heads {self.heads}, "
                f"for each head has an even size."
            )
        if self.heads % self.kv_heads:
            raise Refusal(
                f"--heads {self.heads} must be a multiple of --kv-heads {self.kv_heads}."
            )

    @property
    def head_size(self) -> int:
        """Gives the size H of each head."""
        return self.width // self.heads


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a model is trained."""

    steps: int = 300
    rows: int = 1  # of each step
    length: int = 2048  # of a row, in tokens
    rate: float = 3e-3  # of learning, at its highest
    seed: int = 0
