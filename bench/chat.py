"""A real language model, end to end: `python -m bench.chat [NAME …]`.

SmolLM2 of `examples/chat`, in float32, by jattn; the same functions with `jax.nn` and plain
arrays as a cache; transformers' Llama in torch; llama.cpp on its own weights of 4 and 8
bits. What is not installed is left out. Every ratio is of medians over rounds in which all
calls take turns, as in `bench.speed`.
"""

import dataclasses
import functools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from bench import candidates, measure, report
from examples.chat import layers, model, weights, writing

CAPACITIES, BATCHES = (128, 2048, 8192), (1, 8)
FILLED = 64  # tokens that are there before a step
STEPS = 16  # tokens that are written after a prompt
PROMPT = 256  # tokens that are read
SECONDS = 5.0  # of each row
ROUNDS = 3  # at least, of calls that take seconds
QUESTION = "Why is the sky blue?"


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
    """One step of all texts; each call is the same again."""
    made = writer(batch, capacity)
    token, count = words(batch, 1), np.ones(batch, np.int32)
    rngs = made.rngs(range(batch))

    def run():
        made.read(token, count, rngs)
        made.kv = shortened(made.kv, FILLED)

    return run


def by_jax_nn(batch: int, capacity: int, attend=None):
    """The same with an array of keys and one of values for each layer, donated."""
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


def _nothing(length, kv, layer, query, key, value):
    """Leaves attention out: what is left is the rest of a step."""
    del length, layer, key, value
    return query, kv


_begin = jax.jit(model.begin)


@jax.jit
def _end(params, sizes, x):
    x = model.norm(x[:, -1], params["norm"], sizes.epsilon)
    return jnp.argmax(model.logits(params, x), axis=-1)


def step() -> None:
    """Times a step by the capacity of the cache and the number of texts."""
    print(f"a step, {FILLED} tokens filled")
    for batch in BATCHES:
        for capacity in CAPACITIES:
            runs = {
                "jattn": by_jattn(batch, capacity),
                "jax.nn": by_jax_nn(batch, capacity),
            }
            tell(
                f"batch {batch}, capacity {capacity}",
                measure.interleave(runs, SECONDS),
                batch,
            )
    print("the same capacities in turns")
    runs = {f"capacity {capacity}": by_jattn(1, capacity) for capacity in CAPACITIES}
    tell("jattn, batch 1", measure.interleave(runs, SECONDS), 1)
    runs = {f"batch {batch}": by_jattn(batch, 2048) for batch in BATCHES}
    times = measure.interleave(runs, SECONDS)
    more = BATCHES[-1] / measure.ratio(times[f"batch {BATCHES[-1]}"], times["batch 1"])
    print(f"{BATCHES[-1]} texts at once: {more:.2f} times the tokens a second of one")


def tell(label: str, times: dict[str, list[float]], tokens: int) -> None:
    """Prints milliseconds, tokens a second, and ratios to the first."""
    base = next(iter(times))
    for name, taken in times.items():
        middle = statistics.median(taken)
        more = measure.ratio(taken, times[base])
        print(
            f"  {label:28} {name:24} {1e3 * middle:8.1f} ms {tokens / middle:8.1f} tokens/s"
            f"   × {more:.2f} of {base}",
            flush=True,
        )


def generate() -> None:
    """Times whole generation: tokens after the first, for a prompt of 64."""
    for batch in BATCHES:
        makers = {"jattn": _jattn_writes, "torch generate": _torch_writes}
        if batch == 1:
            makers["llama.cpp, its Q4_1 and Q8_0"] = _llama_writes
        ready = {name: make(batch) for name, make in makers.items()}
        runs = {}
        for name, write in ready.items():
            if write is not None:
                runs[name] = functools.partial(write, 1 + STEPS)
                runs[f"{name}, the first alone"] = functools.partial(write, 1)
        times = measure.interleave(runs, SECONDS, ROUNDS)
        steps = {
            name: [(a - b) / STEPS for a, b in zip(times[name], first, strict=True)]
            for name in runs
            if (first := times.get(f"{name}, the first alone"))
        }
        tell(f"batch {batch}, capacity 2048", steps, batch)


def _jattn_writes(batch: int):
    made = writer(batch, 2048, 0)
    prompts, rngs = words(batch, FILLED).tolist(), made.rngs(range(batch))

    def write(count: int):
        made.kv = shortened(made.kv, 0)
        drawn = made.read_prompts(prompts, rngs)
        for _ in writing.write(made, drawn, rngs, (), count):
            pass

    return write


@functools.cache
def _torch_model():
    import torch
    import transformers

    path = weights.find()
    torch.set_num_threads(candidates.num_cores())
    read = transformers.LlamaForCausalLM.from_pretrained
    return read(str(path.parent), gguf_file=path.name, dtype=torch.float32).eval()


def _torch_writes(batch: int):
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
            _torch_model().generate(prompt, **many, **fixed)

    return write


def _llama_writes(batch: int):
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


def prompt() -> None:
    """Times how a prompt is read, in pieces and at once."""
    runs = {}
    for piece in (64, PROMPT):
        made = writer(1, 2048, 0)
        made.piece = piece
        runs[f"jattn, pieces of {piece}"] = functools.partial(_read, made)
    if not candidates.missing(["torch"]) and not candidates.missing(["transformers"]):
        runs["torch"] = _torch_reads
    tell(f"{PROMPT} tokens", measure.interleave(runs, SECONDS, ROUNDS), PROMPT)


def _read(made: writing.Writer):
    made.kv = shortened(made.kv, 0)
    made.read_prompts(words(1, PROMPT).tolist(), made.rngs([0]))


def _torch_reads():
    import torch

    with torch.inference_mode():
        _torch_model()(torch.from_numpy(words(1, PROMPT)), logits_to_keep=1)


def attention() -> None:
    """Says which share of a step is attention: by leaving it out."""
    for batch in BATCHES:
        runs = {"jattn": by_jattn(batch, 2048), "without": by_jax_nn(batch, 2048, _nothing)}
        times = measure.interleave(runs, SECONDS)
        share = 1 - measure.ratio(times["without"], times["jattn"])
        print(f"  batch {batch}, {FILLED} of 2048 filled: {100 * share:.0f} % of a step")


def start() -> None:
    """Times a first start, with nothing compiled yet, and a second one; and its memory."""
    here = pathlib.Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first start", "next start"):
            command = [sys.executable, "-m", "examples.chat", QUESTION]
            command += ["--programs", folder, "--length", "64"]
            begun, first = time.perf_counter(), None
            process = subprocess.Popen(
                command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            os.read(process.stdout.fileno(), 1)
            first = time.perf_counter() - begun
            process.stdout.read()
            _, _, used = os.wait4(process.pid, 0)
            seconds, size = time.perf_counter() - begun, used.ru_maxrss / 1024
            print(
                f"  {name}: the first token after {first:.1f} s, 64 tokens after "
                f"{seconds:.1f} s; {size:.0f} MiB at most"
            )


def memory() -> None:
    """Says what weights and caches take."""
    params, sizes, _ = loaded()
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree)) / 2**20
    print(f"  weights in float32: {size(params):.0f} MiB")
    for capacity in CAPACITIES:
        both = (size(layers.empty(sizes, 1, capacity, x)) for x in ("float32", "int8"))
        print("  a cache of {}: {:.0f} MiB; in int8 {:.0f} MiB".format(capacity, *both))


SECTIONS = {
    "start": start,
    "prompt": prompt,
    "step": step,
    "generate": generate,
    "attention": attention,
    "memory": memory,
}


def main(arguments: list[str] | None = None) -> None:
    """Measures what is named, or everything."""
    report.run_sections("python -m bench.chat", __doc__, SECTIONS, arguments)


if __name__ == "__main__":
    main()
