"""The five tokens of a first lesson on attention: `python -m examples.seed`.

A notebook for beginners computes attention for one query in NumPy. This program takes the
same steps with `jattn`, and then the same in one call. It prints the notebook's numbers.
"""

import argparse

import jax
import jax.numpy as jnp

import jattn
from jattn.definition import scores, softmax, weighted_sum

SEQUENCE = [1, 2, 3, 4, 5]
EMBEDDING = {
    1: [0.1, 0.2, 0.3],
    2: [0.4, 0.5, 0.6],
    3: [0.7, 0.8, 0.9],
    4: [1.0, 1.1, 1.2],
    5: [1.3, 1.4, 1.5],
}
QUERY = [0.5, 0.5, 0.5]


def main(arguments: list[str] | None = None) -> None:
    """Prints the weights and the weighted sum, step by step and by one call."""
    argparse.ArgumentParser(
        "python -m examples.seed", description=__doc__, allow_abbrev=False
    ).parse_args(arguments)
    with jax.enable_x64(True):  # NumPy counts in float64, and the notebook with it
        query = jnp.array(QUERY)
        key = value = jnp.array([EMBEDDING[token] for token in SEQUENCE])
        weights = softmax(scores(query, key))
        print("Input sequence:   ", SEQUENCE)
        print("Attention weights:", weights)
        print("Weighted sum:     ", weighted_sum(weights, value))

        # For a model: many queries and heads at once, so the arrays have axes for both.
        one_query, heads = query[None, None], key[:, None]  # 1 query, 5 keys, 1 head
        output = jattn.attention(one_query, heads, heads, scale=1)
        print("jattn.attention:  ", output[0, 0])


if __name__ == "__main__":
    main()
