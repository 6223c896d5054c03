"""Named cases: inputs and options of calls, each with one special feature."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.arrays.checks import check_flag
from jattn.arrays.shapes import Sizes
from jattn.dropout import Dropout
from jattn.masks import Causal, Explicit, Lengths, Prefix, Segments, Window
from jattn.modifiers import ALiBi, Bias, RelativeBias, SoftCap, log_bucket
from jattn.testing.makers import _booleans, _fixed, _ids, _infinite_bias, _lengths, _normal

Inputs = dict[str, Any]
SMALL = Sizes(batch=(2,), T=7, S=7, N=4, K=2, H=8, D=8)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """Inputs and options of a call, under a name.

    Attributes:
        name: What is special about the case.
        options: Makes the keyword arguments of `attention` from the inputs.
        extra: Further inputs besides query, key and value: functions of the sizes and of a
            NumPy generator.
        sizes: The sizes of the inputs, unless the caller gives others.
        adjust: Changes the inputs, for cases about special values.
        smooth: Whether finite differences can check the case. It needs finite inputs, and
            logits small enough that a small step changes the weights little.
    """

    name: str
    options: Callable[[Inputs], Inputs]
    extra: dict[str, Callable[[Sizes, np.random.Generator], np.ndarray]]
    sizes: Sizes = SMALL
    adjust: Callable[[Inputs], Inputs] = lambda inputs: inputs
    smooth: bool = True

    def __post_init__(self):
        check_flag("testing.Case", "smooth", self.smooth)

    def call(self, function: Callable, inputs: Inputs):
        """Calls a function of `attention`'s signature."""
        options = self.options(inputs)
        return function(inputs["query"], inputs["key"], inputs["value"], **options)


def random_inputs(case: Case, dtype="float32", *, sizes=None, seed: int = 0) -> Inputs:
    """Makes the inputs of a case by name: normal numbers; floating ones in `dtype`."""
    sizes = case.sizes if sizes is None else sizes
    rng = np.random.default_rng(seed)
    inputs: Inputs = {
        "query": rng.standard_normal((*sizes.batch, sizes.T, sizes.N, sizes.H)),
        "key": rng.standard_normal((*sizes.batch, sizes.S, sizes.K, sizes.H)),
        "value": rng.standard_normal((*sizes.batch, sizes.S, sizes.K, sizes.D)),
    }
    inputs |= {name: make(sizes, rng) for name, make in case.extra.items()}
    return jax.tree.map(lambda x: cast(x, dtype), case.adjust(inputs))


def cast(x, dtype):
    """Makes an array; a floating one is converted to `dtype`."""
    x = np.asarray(x)
    floating = np.issubdtype(x.dtype, np.floating) or x.dtype.name == "bfloat16"
    return jnp.asarray(x.astype(jnp.dtype(dtype)) if floating else x)


def _dropout(x):
    return {"dropout": Dropout(0.3, jax.random.key(7)), "mask": Causal()}


def _captured(x):
    """Makes a modifier as a user would: a function that captures two floating arrays."""
    heat, decay = x["heat"], x["decay"]

    def bend(logit, b, n, t, s):
        distance = jnp.abs(t - s).astype(logit.dtype)
        return (
            logit * heat[n].astype(logit.dtype) - decay[n, t].astype(logit.dtype) * distance
        )

    return {"modifier": bend}


def _documents(x):
    document = x["document"]
    return {"mask": lambda b, n, t, s: (t >= s) & (document[b, t] == document[b, s])}


def _case(name, options=lambda inputs: {}, *, extra=None, **different):
    """Makes a case from its functions, and the sizes and fields that are not default."""
    letters = {field.name for field in dataclasses.fields(Sizes)}
    sizes = {letter: different.pop(letter) for letter in letters & set(different)}
    return Case(
        name, options, extra or {}, dataclasses.replace(SMALL, **sizes), **different
    )


def _large(inputs: Inputs) -> Inputs:
    # Logits of some thousands: exp(logit) alone would overflow float32.
    return inputs | {"query": inputs["query"] * 5e3}


CASES = (
    _case("plain"),
    _case("unbatched", batch=(), T=5),
    _case("two_batch_axes", batch=(2, 3), T=4, S=5),
    _case("no_batch_at_all", batch=(0,)),
    _case("one_head", N=1, K=1),
    _case("ungrouped", N=3, K=3),
    _case("head_size_one", H=1, D=1),
    _case("value_size", H=6, D=3),
    _case("lengths_differ", T=5, S=9),
    _case("one_query", T=1, S=9),
    _case("one_key", T=5, S=1),
    _case("no_keys", T=5, S=0),
    _case("no_queries", T=0, S=5),
    _case("large_logits", adjust=_large, smooth=False),
    _case("causal", lambda x: {"mask": Causal()}),
    _case("causal_at_the_end", lambda x: {"mask": Causal(4)}, T=5, S=9),
    _case("causal_with_empty_rows", lambda x: {"mask": Causal(-3)}),
    _case("one_visible_key", lambda x: {"mask": Window(0, 0)}),
    _case("window", lambda x: {"mask": Window(2, 1)}, T=9, S=8),
    _case("window_open_to_the_left", lambda x: {"mask": Window(None, 0)}),
    _case("prefix", lambda x: {"mask": Prefix(3) | Causal()}),
    _case(
        "prefix_per_example",
        lambda x: {"mask": Prefix(x["length"]) | Causal()},
        extra={"length": _lengths("S")},
    ),
    _case(
        "segments",
        lambda x: {"mask": Segments(x["ids"])},
        extra={"ids": _ids("T")},
    ),
    _case(
        "segments_with_padding",
        lambda x: {"mask": Segments(x["query_ids"], x["key_ids"], padding_id=0)},
        extra={"query_ids": _ids("T"), "key_ids": _ids("S")},
        T=6,
        S=8,
    ),
    _case(
        "lengths",
        lambda x: {"mask": Lengths(x["key_lengths"], x["query_lengths"])},
        extra={"key_lengths": _lengths("S"), "query_lengths": _lengths("T")},
    ),
    _case("explicit", lambda x: {"mask": Explicit(x["array"])}, extra={"array": _booleans}),
    _case(
        "algebra",
        lambda x: {"mask": ~(Causal(-2) | Explicit(x["array"])) & Window(5, 3)},
        extra={"array": _booleans},
    ),
    _case("documents", _documents, extra={"document": _ids("S")}),
    _case("nothing_visible", lambda x: {"mask": lambda b, n, t, s: s < 0}),
    _case(
        "by_head_and_example", lambda x: {"mask": lambda b, n, t, s: (t + s + b) % 4 != n}
    ),
    _case("bias", lambda x: {"bias": x["bias"]}, extra={"bias": _normal("N", "T", "S")}),
    _case(
        "bias_per_key",
        lambda x: {"bias": x["bias"], "mask": Causal()},
        extra={"bias": _normal("N", "1", "S")},
    ),
    _case(
        "bias_per_example",
        lambda x: {"bias": x["bias"]},
        extra={"bias": _normal("B", "1", "1", "S")},
    ),
    _case(
        "infinite_bias",
        lambda x: {"bias": x["bias"]},
        extra={"bias": _infinite_bias},
        smooth=False,
    ),
    _case(
        "soft_cap",
        lambda x: {"modifier": SoftCap(x["cap"]), "mask": Causal()},
        extra={"cap": _fixed(1.5)},
    ),
    _case("alibi", lambda x: {"modifier": ALiBi(), "mask": Causal()}),
    _case(
        "alibi_with_slopes",
        lambda x: {"modifier": ALiBi(x["slopes"])},
        extra={"slopes": _normal("N")},
    ),
    _case(
        "relative_bias",
        lambda x: {"modifier": RelativeBias(x["table"], bucket=log_bucket(8, 16))},
        extra={"table": lambda sizes, rng: rng.standard_normal((sizes.N, 8))},
    ),
    _case(
        "capped_bias",
        lambda x: {"modifier": Bias(x["inner"]) >> SoftCap(2.0), "bias": x["bias"]},
        extra={"inner": _normal("N", "T", "1"), "bias": _normal("T", "S")},
    ),
    _case("captured", _captured, extra={"heat": _normal("N"), "decay": _normal("N", "T")}),
    _case("scale", lambda x: {"scale": x["scale"]}, extra={"scale": _fixed(0.7)}),
    _case(
        "sink",
        lambda x: {"sink": x["sink"], "mask": Causal(-2)},
        extra={"sink": _normal("N")},
    ),
    _case(
        "at_an_offset",
        lambda x: {"mask": Causal(), "query_position": 4, "modifier": ALiBi()},
        T=3,
        S=7,
    ),
    _case(
        "positions",
        lambda x: {
            "mask": Causal(),
            "query_position": x["query_position"],
            "key_position": x["key_position"],
        },
        extra={"query_position": _ids("T", 9), "key_position": _ids("S", 9)},
    ),
    _case("dropout", _dropout),
    _case(
        "everything",
        lambda x: {
            "mask": Causal(1) & Segments(x["ids"]) | Prefix(1),
            "bias": x["bias"],
            "modifier": SoftCap(x["cap"]) >> ALiBi(x["slopes"]),
            "sink": x["sink"],
            "scale": x["scale"],
            "query_position": 1,
            "dropout": Dropout(0.2, jax.random.key(3)),
        },
        extra={
            "ids": _ids("T"),
            "bias": _normal("B", "1", "T", "S"),
            "cap": _fixed(2.0),
            "slopes": _normal("N"),
            "sink": _normal("N"),
            "scale": _fixed(0.4),
        },
    ),
)
