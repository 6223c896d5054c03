"""What `bench.chat` compares: SmolLM2 by jattn, `jax.nn`, torch and llama.cpp."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from bench import candidates
from examples.chat import layers, model, weights, writing

FILLED = 64  # tokens that are there before a step
PROMPT = 256  # tokens that are read


@functools.cache
def loaded() -> weights.Loaded:
    """Reads the model, once."""
    return weights.load(weights.find())


def words(batch: int, count: int) -> np.ndarray:
    """Draws tokens, `BT`."""
    random = np.random.default_rng(0)
    return random.integers(loaded().sizes.vocabulary, size=(batch, count))


def writer(batch: int, capacity: int, count: int = FILLED) -> writing.Writer:
    """Makes a writer whose texts have so many tokens."""
    params, sizes, _ = loaded()
    made = writing.Writer(params, sizes, layers.empty(sizes, batch, capacity))
    if count:
        made.read_prompts(words(batch, count).tolist(), made.rngs(range(batch)))
    return made


def shortened(kv, count: int):
    """Gives the cache with so many tokens; its pages stay, so that nothing moves."""
    return dataclasses.replace(kv, length=jnp.full_like(kv.length, count))


def by_jattn(batch: int, capacity: int):
    """Makes a step of all texts; each call is the same again."""
    made = writer(batch, capacity)
    token, count = words(batch, 1), np.ones(batch, np.int32)
    rngs = made.rngs(range(batch))

    def run():
        made.read(token, count, rngs)
        made.kv = shortened(made.kv, FILLED)

    return run


def by_jax_nn(batch: int, capacity: int, attend=None):
    """Makes the same with an array of keys and of values for each layer, donated."""
    params, sizes, _ = loaded()
    shape = batch, capacity, sizes.kv_heads, sizes.head_size
    held = [(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(sizes.layers)]
    token = jnp.asarray(words(batch, 1), jnp.int32)
    place = jnp.full((batch, 1), FILLED, jnp.int32)
    alone = {name: params[name] for name in ("embedding", "norm")}
    attend = Partial(attend or _plain, jnp.int32(FILLED))

    def run():
        x, turn = _begin(alone, sizes, token, place)
        number = jnp.zeros((), jnp.int32)
        for i, of_layer in enumerate(params["layers"]):
            rest = x, held[i], number, turn, attend
            x, held[i], number = model.layer(of_layer, sizes, *rest)
        jax.block_until_ready(_end(alone, sizes, x))

    return run


def _plain(length, kv, layer, query, key, value):
    del layer
    put = jax.lax.dynamic_update_slice_in_dim
    keys, values = (put(x, new, length, 1) for x, new in zip(kv, (key, value), strict=True))
    count = jnp.full(query.shape[:1], length + 1)
    attend = jax.nn.dot_product_attention
    return attend(query, keys, values, key_value_seq_lengths=count), (keys, values)


def nothing(length, kv, layer, query, key, value):
    """Leaves attention out: what is left is the rest of a step."""
    del length, layer, key, value
    return query, kv


_begin = jax.jit(model.begin)


@jax.jit
def _end(params, sizes, x):
    x = model.norm(x[:, -1], params["norm"], sizes.epsilon)
    return jnp.argmax(model.logits(params, x), axis=-1)


def jattn_writes(batch: int):
    """Makes a function that writes so many tokens after prompts, by jattn."""
    made = writer(batch, 2048, 0)
    prompts, rngs = words(batch, FILLED).tolist(), made.rngs(range(batch))

    def write(count: int):
        made.kv = shortened(made.kv, 0)
        drawn = made.read_prompts(prompts, rngs)
        for _ in writing.write(made, drawn, rngs, (), count):
            pass

    return write


@functools.cache
def torch_model():
    """Reads the model in torch, by transformers, once."""
    import torch
    import transformers

    path = weights.find()
    torch.set_num_threads(candidates.num_cores())
    read = transformers.LlamaForCausalLM.from_pretrained
    return read(str(path.parent), gguf_file=path.name, dtype=torch.float32).eval()


def torch_writes(batch: int):
    """Makes the same by `generate`; None where torch or transformers are missing."""
    if candidates.missing(["torch"]) or candidates.missing(["transformers"]):
        return None
    import torch

    prompt = torch.from_numpy(words(batch, FILLED))
    fixed = {
        "attention_mask": torch.ones_like(prompt),
        "do_sample": False,
        "pad_token_id": 2,
    }

    def write(count: int):
        many = {"max_new_tokens": count, "min_new_tokens": count}
        with torch.inference_mode():
            torch_model().generate(prompt, **many, **fixed)

    return write


def llama_writes(batch: int):
    """Makes the same by llama.cpp, for one text; None where it is missing."""
    del batch
    if candidates.missing(["llama_cpp"]):
        return None
    import llama_cpp

    cores = {"n_threads": candidates.num_cores(), "n_threads_batch": candidates.num_cores()}
    made = llama_cpp.Llama(str(weights.find()), n_ctx=2048, verbose=False, **cores)
    prompt = words(1, FILLED)[0].tolist()

    def write(count: int):
        made.reset()
        made.eval(prompt)
        for _ in range(count - 1):
            made.eval([made.sample(temp=0)])

    return write


def jattn_reads(made: writing.Writer):
    """Reads a prompt and draws what follows it, by jattn."""
    made.kv = shortened(made.kv, 0)
    made.read_prompts(words(1, PROMPT).tolist(), made.rngs([0]))


def torch_reads():
    """Reads a prompt in torch, with the logits of what follows it."""
    import torch

    with torch.inference_mode():
        torch_model()(torch.from_numpy(words(1, PROMPT)), logits_to_keep=1)
