"""What was promised for the CPU, measured: `python -m bench.cpu [NAME …]`.

Every ratio is the median over rounds in which all calls take turns, as in `bench.speed`.
The limit of a row is measured in the same turns; `bench.limits` says what it is. A row that
seems to be faster than its limit ends the bench. `--threads 1` runs on one core.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp

import jattn
from bench import candidates, cpu_rows, limits, measure, report, rows
from bench.cpu_rows import BASE, both, forward, inputs_of
from jattn.arrays.shapes import Sizes
from jattn.masks import Causal, Window
from jattn.modifiers import ALiBi, SoftCap


def peak() -> None:
    """Measures the rates that limits are made of."""
    for dtype in ("float32", "bfloat16"):
        work = measure.pose(rows.find_case("plain"), rows.sizes_of(BASE), dtype)
        made = limits.rates(work)
        times = measure.interleave({name: rate.run for name, rate in made.items()}, 3.0)
        speeds = (rate.operations / min(times[name]) / 1e9 for name, rate in made.items())
        text = "along heads {:.0f} Gflop/s, along keys {:.0f}; exponentials {:.1f} G/s"
        print(f"{dtype} products {text.format(*speeds)}", flush=True)


def versus(table, dtype: str = "float32", limited: bool = True) -> dict[str, list[float]]:
    """Times each row beside the peers; says how many times longer torch takes, by pass.

    Args:
        table: Names of cases, and shapes.
        dtype: Of the inputs.
        limited: Whether products and exponentials limit the rows.
    """
    ahead: dict[str, list[float]] = {label: [] for label in candidates.PASSES}
    for name, shape in table:
        work = measure.pose(rows.find_case(name), rows.sizes_of(shape), dtype)
        makers = {"jattn": functools.partial(candidates.own, name=_chosen(work))}
        makers |= {"jax_nn": candidates.jax_nn}
        if not candidates.missing(["torch"]):
            makers["torch"] = candidates.torch
        made = {name: make(work) for name, make in makers.items()}
        rates = limits.rates(work) if limited else {}
        for label in candidates.PASSES:
            runs = {key: one.passes[label].run for key, one in made.items() if one}
            parts = {key: rate.run for key, rate in rates.items()}
            times = measure.interleave(runs | parts, 5.0)
            ratios = {key: measure.ratio(times[key], times["jattn"]) for key in runs}
            size = report.shape_text({x: getattr(work.sizes, x) for x in rows.LETTERS})
            row = f"{name:13} {size:32} {label:16}"
            text = f"{1e3 * statistics.median(times['jattn']):7.1f} ms"
            if limited:
                least = limits.limit(work, label, rates, times)
                share = limits.share(row, min(times["jattn"]), least)
                text += f" {100 * share:3.0f} % of the limit"
            peers = (f"{k} {r:.2f} ×" for k, r in ratios.items() if k != "jattn")
            print(f"{row} {text}; {', '.join(peers)}", flush=True)
            ahead[label].append(ratios.get("torch", float("nan")))
    return ahead


def long() -> None:
    """Times long sequences in float32."""
    ahead = versus(cpu_rows.LONG)
    ratios = [x for label in ahead.values() for x in label]
    mean = statistics.geometric_mean(ratios)
    print(f"torch / jattn: geometric mean {mean:.2f}, least {min(ratios):.2f}")


def causal() -> None:
    """Times causal rows of other lengths."""
    versus(cpu_rows.CAUSAL)


def masked() -> None:
    """Times documents, a window, and the bias of T5."""
    versus(cpu_rows.MASKED)


def short() -> None:
    """Times short sequences."""
    versus(cpu_rows.SHORT)


def query() -> None:
    """Times one query. Reading the keys is its limit, so no share is printed."""
    versus(cpu_rows.QUERY, limited=False)


def bfloat16() -> None:
    """Times half precision."""
    versus(cpu_rows.HALF, "bfloat16")


def shapes() -> None:
    """Compares the time per flop of other shapes."""
    table = (("", BASE), *cpu_rows.SHAPES)
    works = {
        name: measure.pose(rows.find_case("plain"), rows.sizes_of(shape), "float32")
        for name, shape in table
    }
    made = {name: candidates.own(work, _chosen(work)) for name, work in works.items()}
    for label in candidates.PASSES:
        runs = {name: one.passes[label].run for name, one in made.items()}
        times = measure.interleave(runs, 10.0)
        flops = {name: _flops(work.sizes, label) for name, work in works.items()}
        for name, _ in cpu_rows.SHAPES:
            per_flop = measure.ratio(times[name], times[""]) / flops[name] * flops[""]
            print(f"{name:28} {label:16} {per_flop:.2f} × the time per flop", flush=True)


def options() -> None:
    """Says what modifiers, a bias and dropout cost."""
    inputs, slopes = inputs_of(BASE), jnp.linspace(0.1, 1.0, BASE[2])
    bias = jax.random.normal(jax.random.key(7), (1, BASE[2], 1, BASE[1]))
    table = {
        "plain": {},
        "SoftCap": {"modifier": SoftCap(30.0)},
        "ALiBi": {"modifier": ALiBi()},
        "broadcast bias": {"bias": bias},
        "lambda, distance": {"modifier": lambda x, b, n, t, s: x - slopes[n] * (t - s)},
        "lambda, cosine": {"modifier": lambda x, b, n, t, s: x * jnp.cos(0.1 * s)},
        "dropout": {"dropout": jattn.Dropout(0.1, jax.random.key(3))},
    }
    for label, make in (("forward", forward), ("forward+backward", both)):
        runs = {name: make(inputs, **given).run for name, given in table.items()}
        times = measure.interleave(runs, 12.0)
        for name in list(table)[1:]:
            ratio = measure.ratio(times[name], times["plain"])
            print(f"{name:28} {label:16} {ratio:.2f} × plain", flush=True)


def window() -> None:
    """Times a window of 512 keys, by the length."""
    mask, base = Causal() & Window(511, 0), None
    for length in (4096, 16384, 65536):
        runs = {"": forward(inputs_of((1, length, 2, 64)), mask=mask).run}
        seconds = statistics.median(measure.interleave(runs, 4.0)[""])
        base = base or seconds / 4096
        print(
            f"window 512, T = {length:<12} forward          {1e3 * seconds:7.1f} ms, "
            f"{seconds / length / base:.2f} × the time per query at 4096",
            flush=True,
        )


def derivatives() -> None:
    """Times tangents beside the forward pass, Hessian-vector products beside gradients."""
    inputs = inputs_of(BASE)
    total = lambda inputs: jnp.sum(jnp.sin(jattn.attention(*inputs)))
    tangent = lambda inputs: jax.jvp(lambda x: jattn.attention(*x), (inputs,), (inputs,))
    product = lambda inputs: jax.jvp(jax.value_and_grad(total), (inputs,), (inputs,))
    runs = {
        "forward": measure.compiled(lambda inputs: jattn.attention(*inputs), inputs),
        "jvp": measure.compiled(tangent, inputs),
        "forward+backward": measure.compiled(jax.value_and_grad(total), inputs),
        "Hessian-vector product": measure.compiled(product, inputs),
    }
    times = measure.interleave({name: one.run for name, one in runs.items()}, 15.0)
    for one, base in zip(list(runs)[1::2], list(runs)[::2], strict=True):
        print(f"{one:28} {measure.ratio(times[one], times[base]):.2f} × {base}", flush=True)


def memory() -> None:
    """Counts bytes beside arguments and results."""
    for length in (16384, 32768, 131072):
        inputs = inputs_of((1, length, 1 if length > 10**5 else 2, 64))
        for label, make in (("forward", forward), ("forward+backward", both)):
            temporaries = make(inputs, mask=Causal()).temporaries / 2**20
            size = f"T = {length}, N = {inputs[0].shape[2]}, causal"
            print(f"{size:28} {label:16} {temporaries:.0f} MiB", flush=True)


def compiling() -> None:
    """Counts the seconds to trace, lower and compile."""
    for mask in (None, Causal()):  # what compiles once in a process, before it counts
        both(inputs_of((1, 512, 2, 64)), mask=mask)
    for name, given in (("plain", {}), ("causal", {"mask": Causal()})):
        for length in (2048, 65536):
            inputs = inputs_of((1, length, 2, 64))
            for label, make in (("forward", forward), ("forward+backward", both)):
                jax.clear_caches()
                seconds = make(inputs, **given).compile_seconds
                print(f"{name}, T = {length:<15} {label:16} {seconds:.2f} s", flush=True)


def longest() -> None:
    """Times T = 131072, causal, one head."""
    one = both(inputs_of((1, 131072, 1, 64)), mask=Causal())
    start = time.perf_counter()
    one.run()  # once: it takes so long that little is left of what a first call costs
    seconds = time.perf_counter() - start
    print(
        f"T = 131072, N = 1, causal    forward+backward {seconds:.1f} s, "
        f"{one.temporaries / 2**20:.0f} MiB",
        flush=True,
    )


def _flops(sizes: Sizes, label: str) -> int:
    """Counts the operations of all products."""
    pairs, both = sizes.B * sizes.N * sizes.T * sizes.S, label != "forward"
    return 2 * pairs * (4 * sizes.H + 3 * sizes.D if both else sizes.H + sizes.D)


def _chosen(work: measure.Work) -> str:
    return candidates.chosen(work).removeprefix("jattn ")


SECTIONS = {
    "peak": peak,
    "long": long,
    "causal": causal,
    "masked": masked,
    "short": short,
    "query": query,
    "bfloat16": bfloat16,
    "shapes": shapes,
    "options": options,
    "window": window,
    "derivatives": derivatives,
    "memory": memory,
    "compile": compiling,
    "longest": longest,
}


def main(arguments: list[str] | None = None) -> None:
    """Measures what is named, or everything."""
    report.run_sections("python -m bench.cpu", __doc__, SECTIONS, arguments)


if __name__ == "__main__":
    main()
