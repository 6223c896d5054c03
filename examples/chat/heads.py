"""Finds heads by what they do: `python -m examples.chat.heads`.

A text of random tokens is read twice in a row, so that nothing but the repetition can be
known. Of each query in the second half, the weights are added up

    on the first token of all        many heads rest there when they have nothing to do
    on the token before it
    on the same token, before
    on the token after that one      an induction head: it finds what came next last time

and averaged over queries. References: Olsson et al., 2022, arXiv:2209.11895 (induction
heads); Xiao et al., 2024, arXiv:2309.17453 (sinks).
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np

import jattn
from examples import command
from examples.chat import options
from examples.chat.__main__ import loaded
from examples.chat.look import queries_keys
from jattn.masks import Causal

KINDS = ("the first token", "the token before", "the same token before", "what came next")
LENGTH = 64  # tokens that are repeated: enough for means, quick to look at


def main(argv: list[str] | None = None) -> int:
    """Prints the heads that do each thing most; 0 if that went well, 2 if it refused."""
    made = command.empty_parser("examples.chat.heads", __doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_options(made, [x for x in options.MODEL if x[0] in USED])
    made.add_argument("--best", type=command.whole, default=5, help="heads of each kind")
    return command.run("chat.heads", made, argv, find)


def find(arguments: argparse.Namespace) -> int:
    """Finds the heads, and prints them; gives 0."""
    command.check_installed(options.NEEDED, "chat")
    model, _ = loaded(arguments)
    tell(shares(model.params, model.sizes, arguments.seed), arguments.best)
    return 0


USED = ("--weights", "--dtype", "--seed", "--programs", "--devices")


def shares(params, sizes, seed: int = 0) -> np.ndarray:
    """Gives the share of weight that each head has on each kind of token, `4LN`."""
    random = np.random.default_rng(seed)
    half = random.choice(sizes.vocabulary, LENGTH, replace=False)
    # One token before all: the first of the repetition is then like the others.
    text = np.concatenate([random.integers(sizes.vocabulary, size=1), half, half])
    queries, keys = queries_keys(params, sizes, text.tolist())
    rows = jnp.arange(1 + LENGTH, 1 + 2 * LENGTH, dtype=jnp.int32)
    looks = jax.jit(lambda q, k: jattn.attention_weights(q, k, mask=Causal(), rows=rows))
    weights = np.stack([looks(*pair) for pair in zip(queries, keys, strict=True)])  # LNTS
    at = np.arange(LENGTH), np.asarray(rows)
    places = (0 * at[1], at[1] - 1, at[1] - LENGTH, at[1] - LENGTH + 1)
    return np.stack([weights[:, :, at[0], place].mean(-1) for place in places])


def tell(found: np.ndarray, best: int) -> None:
    """Prints the best heads of each kind, and the mean of all heads."""
    for kind, share in zip(KINDS, found, strict=True):
        order = np.argsort(-share, axis=None)[:best]
        heads = [np.unravel_index(i, share.shape) for i in order]
        print(f"{kind}: {100 * share.mean():.1f} % of the weight in the mean of all heads")
        for layer, head in heads:
            print(f"  layer {layer:2}, head {head}: {100 * share[layer, head]:5.1f} %")


if __name__ == "__main__":
    sys.exit(main())
