"""Who is measured: jattn's implementations, and the peers in their own words.

Each function makes a candidate from a `Work`. It gives None where the implementation
refuses the case, or where the peer cannot say it. What a peer needs in another layout or
form is made before the clock starts.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

import jattn
from bench.measure import Pass, Work, compiled
from bench.plain import mask_and_bias, plainly
from jattn.implementations import dispatch

PASSES = ("forward", "forward+backward")
INPUTS = ("query", "key", "value")


class Candidate(NamedTuple):
    """One way to compute a row."""

    passes: dict[str, Pass]
    output: Callable[[], np.ndarray]  # BTND in float64


def own(work: Work, name: str) -> Candidate | None:
    """Makes one of jattn's implementations a candidate."""
    explanation = jattn.explain(*_three(work.inputs), **work.options)
    if explanation.refusals[name] is not None:
        return None
    attention = functools.partial(jattn.attention, implementation=name)
    return _jitted(lambda inputs: work.case.call(attention, inputs), work.inputs, work)


def chosen(work: Work) -> str:
    """Names the candidate that jattn is by itself."""
    explanation = jattn.explain(*_three(work.inputs), **work.options)
    return f"jattn {explanation.implementation}"


def jax_nn(work: Work) -> Candidate | None:
    """Makes `jax.nn`'s attention a candidate; its values have the head size of the keys."""
    plain = plainly(work)
    if plain is None or plain.soft_cap is not None or work.sizes.D != work.sizes.H:
        return None
    return _like_jax_nn(jax.nn.dot_product_attention, plain, work)


def tokamax(work: Work) -> Candidate | None:
    """Makes tokamax's attention a candidate, by the implementation that it chooses."""
    library = importlib.import_module("tokamax")
    plain = plainly(work)
    if plain is None:
        return None
    cap = {"logits_soft_cap": plain.soft_cap}
    return _like_jax_nn(library.dot_product_attention, plain, work, **cap)


def torch(work: Work) -> Candidate | None:
    """Makes torch's `scaled_dot_product_attention` a candidate: heads first, eager."""
    library = importlib.import_module("torch")
    plain = plainly(work)
    if plain is None or plain.soft_cap is not None:
        return None
    library.set_num_threads(num_cores())
    on_gpu = jax.default_backend() == "gpu" and library.cuda.is_available()
    tensor = functools.partial(_tensor, library, "cuda" if on_gpu else "cpu", work.dtype)
    arrays = [tensor(x, heads_first=True) for x in _three(work.inputs)]
    cotangent = tensor(work.cotangent, heads_first=True)
    mask = mask_and_bias(plain, work)
    attend = functools.partial(
        library.nn.functional.scaled_dot_product_attention,
        attn_mask=None if mask is None else tensor(mask),
        is_causal=plain.is_causal and mask is None,
        scale=plain.scale,
        enable_gqa=work.sizes.G > 1,
    )
    wait = library.cuda.synchronize if on_gpu else lambda: None

    def forward():
        with library.no_grad():
            output = attend(*arrays)
        wait()
        return output

    def both():
        leaves = [x.detach().requires_grad_() for x in arrays]
        gradients = library.autograd.grad(attend(*leaves), leaves, cotangent)
        wait()
        return gradients

    output = lambda: forward().transpose(1, 2).double().cpu().numpy()
    return Candidate(dict(zip(PASSES, map(Pass, (forward, both)), strict=True)), output)


PEERS: dict[str, Callable[[Work], Candidate | None]] = {
    "jax_nn": jax_nn,
    "torch": torch,
    "tokamax": tokamax,
}


def missing(peers) -> list[str]:
    """Lists the peers that are not installed."""
    return [x for x in peers if x != "jax_nn" and importlib.util.find_spec(x) is None]


def makers(peers) -> dict[str, Callable[[Work], Candidate | None]]:
    """Gives every candidate's name, and what makes it."""
    implementations = {
        f"jattn {name}": functools.partial(own, name=name)
        for name in dispatch.names(jax.default_backend())
    }
    return implementations | {name: PEERS[name] for name in peers}


def num_cores() -> int:
    """Counts the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _like_jax_nn(function, plain, work, **options) -> Candidate:
    """Makes a candidate of a function that takes the arguments of `jax.nn`'s."""
    options |= {"is_causal": plain.is_causal, "scale": plain.scale}
    inputs = dict(zip(INPUTS, _three(work.inputs), strict=True))
    inputs |= {"bias": plain.bias, "mask": plain.mask}
    return _jitted(lambda inputs: function(**inputs, **options), inputs, work)


def _jitted(attend: Callable, inputs: dict, work: Work) -> Candidate:
    """Makes a candidate of a function of named arrays, `INPUTS` among them."""

    def both(inputs, cotangent):
        attend_to = lambda *xs: attend(inputs | dict(zip(INPUTS, xs, strict=True)))
        # The output is returned too, so that its computation is not left out.
        output, pullback = jax.vjp(attend_to, *_three(inputs))
        return output, pullback(cotangent)

    forward = compiled(attend, inputs)
    passes = (forward, compiled(both, inputs, work.cotangent))
    output = lambda: np.asarray(forward.run(), np.float64)
    return Candidate(dict(zip(PASSES, passes, strict=True)), output)


def _three(inputs: dict) -> list[jax.Array]:
    return [inputs[name] for name in INPUTS]


def _tensor(library, device, dtype, array, heads_first=False):
    """Makes a torch tensor; BTNH as BNTH where it is to have its heads first."""
    is_boolean = array.dtype == np.bool_
    tensor = library.from_numpy(np.array(array, None if is_boolean else np.float64))
    if not is_boolean:
        tensor = tensor.to(getattr(library, dtype))
    tensor = tensor.to(device)
    return tensor.transpose(1, 2).contiguous() if heads_first else tensor
