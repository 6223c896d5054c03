"""The speed of torch's own attention on the same calls, where torch is installed."""

import functools

from bench.gpu_measure import clock


def calls(row, window: int, document: int):
    """Yields a name and a function without arguments for each of torch that can do it.

    flex_attention takes some seconds to compile: it does so for the rows of T = 4096 and
    16384 with heads of 128.
    """
    import torch
    from torch._dynamo import config
    from torch.nn.attention import flex_attention as flex
    from torch.nn.functional import scaled_dot_product_attention

    # After 8 programs of one function torch compiles no more, and makes all the logits.
    config.recompile_limit = 64
    shapes = [(1, 16, x.shape[1], row.H) for x in row.arrays()]
    make = lambda shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    arrays = [make(shape).requires_grad_(row.gradients) for shape in shapes]

    def mask(b, h, q, k):
        causal = q >= k
        if row.what == "documents":
            return causal & (q // document == k // document)
        return causal & (q - k < window) if row.what == "window" else causal

    def bent(logit, b, h, q, k):
        slope = torch.exp2(-(h + 1) * (8 / 16))
        return 20 * torch.tanh(logit / 20) - slope * (q - k)

    if row.what in ("causal", "decode"):
        is_causal = row.what == "causal"  # one query sees all keys
        attend = functools.partial(scaled_dot_product_attention, is_causal=is_causal)
        yield "torch.sdpa", _ready(torch, attend, arrays, row.gradients)
    if row.H != 128 or row.T not in (4096, 16384) or row.what == "decode":
        return
    blocks = flex.create_block_mask(mask, None, None, row.T, row.T, device="cuda")
    score = bent if row.what == "softcap+alibi" else None
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    attend = functools.partial(compiled, score_mod=score, block_mask=blocks)
    yield "torch.flex", _ready(torch, attend, arrays, row.gradients)


def _ready(torch, attend, arrays, gradients: bool):
    """Gives a function that attends to arrays, after its first call."""

    def call():
        output = attend(*arrays)
        if gradients:
            torch.autograd.grad(output, arrays, output.detach())

    call()
    return call


def times(call, count: int) -> tuple[float, float]:
    """Measures a call in a graph of the device, and by the host, in seconds."""
    import torch

    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch asks for before it captures a graph
        call()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        call()
    wait = lambda _: torch.cuda.synchronize()
    in_graph, by_host = (clock(x, wait, count) for x in (graph.replay, call))
    return in_graph, by_host
