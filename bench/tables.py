"""What skipping blocks costs and what it gives: `python -m bench.tables [NAME …]`.

Every ratio is one of medians over rounds in which both calls alternate, so that they meet
the same machine. Of `documents`, `causal` and `window` it is to the same call without a
mask; of `jax.nn` and `torch` it is how many times faster jattn is than they are when given
the equivalent dense mask.
"""

import functools
import importlib.util
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import jattn
from bench import measure
from bench.report import chosen
from jattn.masks import Causal, Window

H = 64


def seconds(*functions, rounds: int) -> list[float]:
    """Takes the median time of each, all called in turn."""
    runs = {str(i): measure.waiting(f) for i, f in enumerate(functions)}
    times = measure.interleave(runs, 0.0, rounds)
    return [statistics.median(times[name]) for name in runs]


def inputs(length: int, heads: int = 1):
    """Draws query, key and value, BTNH."""
    shape = (1, length, heads, H)
    return [jax.random.normal(jax.random.key(i), shape) for i in range(3)]


def document_causal(ids):
    """Makes the mask of causal attention within documents, as a user would write it."""
    return lambda b, n, t, s: (t >= s) & (ids[t] == ids[s])


def document(ids):
    """Makes the mask of attention within documents."""
    return lambda b, n, t, s: ids[t] == ids[s]


def forward(mask, arrays):
    """Compiles a call."""
    function = jax.jit(lambda mask, *x: jattn.attention(*x, mask=mask))
    return functools.partial(function, mask, *arrays)


def both(attend, arrays, *options):
    """Compiles a call and its gradients."""
    total = lambda arrays, *rest: jnp.sum(attend(*arrays, *rest))
    return functools.partial(jax.jit(jax.value_and_grad(total)), arrays, *options)


def table() -> None:
    """Times the table of 131072 × 131072 pairs in 512-blocks, with 1000 documents."""
    length = 131072
    ids = np.sort(np.random.default_rng(0).integers(0, 1000, length)).astype(np.int32)
    shape = jax.ShapeDtypeStruct((length, 1, H), "float32")
    make = lambda ids: (
        jattn.block_table(document_causal(ids), shape, shape, block=512).kinds
    )
    ids = jnp.asarray(ids)
    (traced,) = seconds(functools.partial(jax.jit(make), ids), rounds=20)
    (known,) = seconds(lambda: make(ids), rounds=5)
    print(f"table             traced {1e3 * traced:.1f} ms, in NumPy {1e3 * known:.1f} ms")


def compile_time() -> None:
    """Says what a document mask adds to the time of compiling."""
    arrays, ids = inputs(4096), jnp.arange(4096) // 512

    def compiled(masked):
        attend = lambda ids, *x: jattn.attention(*x, mask=masked and document_causal(ids))
        jax.clear_caches()
        wall, processor = time.perf_counter(), time.process_time()
        jax.jit(attend).lower(ids, *arrays).compile()
        return time.perf_counter() - wall, time.process_time() - processor

    compiled(None), compiled(True)  # what is imported once
    times = [(*compiled(None), *compiled(True)) for _ in range(5)]
    plain, plain_cpu, masked, masked_cpu = map(statistics.median, zip(*times, strict=True))
    print(
        f"compile           {plain:.2f} s plain, {masked:.2f} s with documents; "
        f"of processor time {plain_cpu:.2f} s and {masked_cpu:.2f} s"
    )


def payoff(name: str, length: int, make_mask, operand, rounds: int) -> None:
    """Divides the time with a mask by the time without, forward and with gradients."""
    arrays = inputs(length)
    attend = lambda q, k, v, operand: jattn.attention(
        q, k, v, mask=None if make_mask is None else make_mask(operand)
    )
    plain = lambda q, k, v: jattn.attention(q, k, v)
    one, other = seconds(
        functools.partial(jax.jit(attend), *arrays, operand),
        functools.partial(jax.jit(plain), *arrays),
        rounds=rounds,
    )
    print(f"{name:18}forward {one:.3f} s / {other:.3f} s = {one / other:.3f}", flush=True)
    one, other = seconds(
        both(attend, arrays, operand), both(plain, arrays), rounds=max(rounds // 2, 1)
    )
    print(f"{'':18}gradients {one:.3f} s / {other:.3f} s = {one / other:.3f}", flush=True)


def documents() -> None:
    """Times sixteen equal documents."""
    payoff("documents 16384", 16384, document, jnp.arange(16384) // 1024, 5)


def causal() -> None:
    """Times causal attention."""
    for length, rounds in ((16384, 5), (8192, 9)):
        payoff(f"causal {length}", length, lambda _: Causal(), None, rounds)


def window() -> None:
    """Times a window of 1024 keys."""
    mask = lambda _: Causal() & Window(1023, 0)
    payoff("window 65536", 65536, mask, None, 1)


def versus_jax() -> None:
    """Times eight documents, against `jax.nn` with the dense mask."""
    length, arrays = 8192, inputs(8192)
    ids = jnp.arange(length) // 1024
    dense = (ids[:, None] == ids)[None, None]
    ours = lambda q, k, v, ids: jattn.attention(q, k, v, mask=document(ids))
    theirs = lambda q, k, v, dense: jax.nn.dot_product_attention(q, k, v, mask=dense)
    calls = [(ours, ids), (theirs, dense)]
    one, other = seconds(
        *(functools.partial(jax.jit(f), *arrays, mask) for f, mask in calls), rounds=5
    )
    report("jax.nn", one, other)
    one, other = seconds(*(both(f, arrays, mask) for f, mask in calls), rounds=3)
    report("jax.nn gradients", one, other)


def versus_torch() -> None:
    """Times eight documents, against torch with the dense mask."""
    if importlib.util.find_spec("torch") is None:
        print("torch             missing")
        return
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    length, arrays = 8192, inputs(8192)
    ids = jnp.arange(length) // 1024
    dense = torch.from_numpy(np.array(ids[:, None] == ids))
    tensors = [torch.from_numpy(np.array(x.swapaxes(1, 2))) for x in arrays]
    ours = lambda q, k, v, ids: jattn.attention(q, k, v, mask=document(ids))

    def theirs():
        sdpa(*tensors, attn_mask=dense)

    def theirs_with_gradients():
        given = [x.detach().requires_grad_() for x in tensors]
        sdpa(*given, attn_mask=dense).sum().backward()

    call = functools.partial(jax.jit(ours), *arrays, ids)
    report("torch", *seconds(call, theirs, rounds=5))
    call = both(ours, arrays, ids)
    report("torch gradients", *seconds(call, theirs_with_gradients, rounds=3))


def report(name: str, one: float, other: float) -> None:
    """Prints how many times faster the first is."""
    print(f"{name:18}{other:.3f} s / {one:.3f} s = {other / one:.1f} ×", flush=True)


NAMES = {
    "table": table,
    "compile": compile_time,
    "documents": documents,
    "causal": causal,
    "window": window,
    "jax.nn": versus_jax,
    "torch": versus_torch,
}


def main(arguments: list[str] | None = None) -> None:
    """Measures what is named, or everything."""
    names = chosen("python -m bench.tables", __doc__, NAMES, arguments)
    print(f"jattn {jattn.__version__}, jax {jax.__version__}, {jax.devices()[0]}")
    for name in names:
        NAMES[name]()


if __name__ == "__main__":
    main()
