"""The kernel for caches on TPU, emulated: with nothing that stands in for it."""

from unittest import mock

from jattn.caches import attend, by_kernel
from jattn.implementations.tpu.decode.decoder import Decoder
from jattn.state import State

SLOTS = 128  # so few in a step that small caches have several


def attend_state(kv, query, *, interpret=True, mends=False, **options) -> State:
    """What `kv.attend_state` gives on TPU.

    With `mends`, what the kernel leaves as NaN is computed again, as it is there; without
    it, a NaN stays.
    """
    # Of another size, or `jit` would find the program that was traced without mending.
    kernel = Decoder(2 * SLOTS if mends else SLOTS, interpret)
    inner = attend._decoded

    def decoded(problem, operands, source, end, sink, whole):
        sentence = by_kernel.refusal(kernel, problem, operands, source)
        assert sentence is None, sentence
        return inner(problem, operands, source, end, sink, whole, kernel)

    with mock.patch.object(attend, "_decoded", decoded):
        if mends:
            return kv.attend_state(query, **options)
        keep = lambda predicate, mend, otherwise, *operands: otherwise(*operands)
        with mock.patch.object(by_kernel, "cond_any", keep):
            return kv.attend_state(query, **options)
