"""Logits to compare the chat model with: by numpy, and by transformers' Llama in torch.

`python -m tests.helpers.chat` writes `tests/chat_logits.json`: those of a tiny model, whose
weights are random, by numpy, to be tested anywhere; of the real one by transformers.
"""

import json
import pathlib

import jax
import numpy as np

from bench.chat_candidates import torch_model
from examples.chat.model import Sizes, shapes

STORED = pathlib.Path(__file__).parent.parent / "chat_logits.json"
TINY = Sizes(
    vocabulary=32,
    layers=2,
    width=16,
    hidden=24,
    heads=4,
    kv_heads=2,
    head_size=8,
    context=64,
)
QUESTION = "Why is the sky blue?"
TINY_TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
# The names in transformers of what a layer has.
NAMES = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "hidden_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def tiny_weights(sizes: Sizes = TINY) -> dict:
    """Draws weights, the same everywhere; attention is neither flat nor sharp."""
    random = np.random.default_rng(0)

    def draw(shape):
        scale = 2 * shape[-1] ** -0.5 if len(shape) == 3 else 1.0  # a matrix of each layer
        return (scale * random.standard_normal(shape)).astype(np.float32)

    return jax.tree.map(draw, shapes(sizes), is_leaf=lambda x: isinstance(x, tuple))


def reference(sizes: Sizes, weights: dict, tokens, attended=None) -> np.ndarray:
    """Computes the logits by numpy in float64, one token and one head at a time.

    The weights of attention go into `attended`, layers × heads × queries × keys.
    """
    wide = jax.tree.map(np.float64, weights)
    H, group = sizes.head_size, sizes.heads // sizes.kv_heads
    norm = lambda x, weight: (
        weight * x / np.sqrt(np.mean(x**2, -1)[:, None] + sizes.epsilon)
    )
    angle = np.outer(np.arange(len(tokens)), sizes.base ** (-np.arange(0, H, 2) / H))

    def heads(x, turned):
        x = x.reshape(len(x), -1, H)
        if not turned:
            return x
        pairs = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * np.exp(1j * angle)[:, None]
        return np.concatenate([pairs.real, pairs.imag], -1)

    x = wide["embedding"][np.asarray(tokens)]
    for layer in range(sizes.layers):
        w = {name: stack[layer] for name, stack in wide["layers"].items()}
        y, output = norm(x, w["attention_norm"]), np.zeros((len(x), sizes.heads, H))
        q, k, v = (heads(y @ w[n].T, n != "value") for n in ("query", "key", "value"))
        for t, n in np.ndindex(len(x), sizes.heads):
            logits = k[: t + 1, n // group] @ q[t, n] / np.sqrt(H)
            e = np.exp(logits - logits.max())
            output[t, n] = e / e.sum() @ v[: t + 1, n // group]
            if attended is not None:
                attended[layer, n, t, : t + 1] = e / e.sum()
        x = x + output.reshape(len(x), -1) @ w["output"].T
        y = norm(x, w["hidden_norm"])
        gate = y @ w["gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["up"].T)) @ w["down"].T
    return norm(x, wide["norm"]) @ wide["embedding"].T


def llama(sizes: Sizes, weights: dict):
    """Makes the same model in torch."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_size,
        max_position_embeddings=sizes.context,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.base},
        rms_norm_eps=sizes.epsilon,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    state = {
        "model.embed_tokens.weight": weights["embedding"],
        "lm_head.weight": weights["embedding"],
        "model.norm.weight": weights["norm"],
    }
    for name, theirs in NAMES.items():
        for layer, weight in enumerate(weights["layers"][name]):
            state[f"model.layers.{layer}.{theirs}.weight"] = weight
    tensors = {name: torch.from_numpy(np.array(x)) for name, x in state.items()}
    model.load_state_dict(tensors, strict=True)
    return model


def logits(model, tokens) -> np.ndarray:
    """Computes the logits after each token, by torch."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).logits[0].numpy()


def main() -> None:
    """Writes the file."""
    from examples.chat import weights
    from examples.chat.tokens import Tokenizer

    path = weights.find()
    tokenizer = Tokenizer(weights.load(path).metadata)
    tokens = tokenizer.question(QUESTION)
    real = logits(torch_model(), tokens)[-1]
    chosen = [*map(int, np.argsort(-real)[:8]), 0, 1000, 20_000, 49_000]
    stored = {
        "tiny": tiny(),
        "tokens": tokens,
        "real": {str(token): round(float(real[token]), 4) for token in chosen},
    }
    STORED.write_text(json.dumps(stored, indent=1) + "\n")


def tiny() -> list[list[float]]:
    """Computes some logits of the tiny model."""
    rows = reference(TINY, tiny_weights(), TINY_TOKENS)[[0, 5, 11], :8]
    return [[round(float(x), 5) for x in row] for row in rows]


if __name__ == "__main__":
    main()
