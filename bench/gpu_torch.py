"""The speed of torch's own attention on the same calls, where torch is installed."""

import time


def speeds(row, window: int, document: int):
    """Yields the name and the seconds of each function of torch that computes the row."""
    import torch
    from torch.nn.attention import flex_attention as flex
    from torch.nn.functional import scaled_dot_product_attention

    shapes = [(1, 16, x.shape[1], row.H) for x in row.arrays()]
    make = lambda shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    arrays = [make(shape).requires_grad_(row.gradients) for shape in shapes]
    past = row.T - shapes[0][2]

    def mask(b, h, q, k):
        causal = q + past >= k
        if row.what == "documents":
            return causal & (q // document == k // document)
        return causal & (q - k < window) if row.what == "window" else causal

    def bent(logit, b, h, q, k):
        slope = torch.exp2(-(h + 1) * (8 / 16))
        return 20 * torch.tanh(logit / 20) - slope * (q - k)

    if row.what == "causal":
        attend = lambda *xs: scaled_dot_product_attention(*xs, is_causal=True)
        yield "torch.sdpa", _clock(torch, attend, arrays, row.gradients)
    blocks = flex.create_block_mask(mask, None, None, shapes[0][2], row.T, device="cuda")
    compiled = torch.compile(flex.flex_attention)
    score = bent if row.what == "softcap+alibi" else None
    attend = lambda *xs: compiled(*xs, score_mod=score, block_mask=blocks)
    yield "torch.flex", _clock(torch, attend, arrays, row.gradients)


def _clock(torch, attend, arrays, gradients: bool) -> float:
    """Measures the median of five times ten calls, in seconds."""

    def once():
        output = attend(*arrays)
        if gradients:
            torch.autograd.grad(output, arrays, output.detach())

    once()
    found = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            once()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - start) / 10)
    return sorted(found)[2]
