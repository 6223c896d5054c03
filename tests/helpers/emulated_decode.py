"""The kernel for caches on TPU, emulated: alone, or as the operation that it is part of."""

import functools
from unittest import mock

import jax

from jattn.caches import attend, by_kernel
from jattn.call.problem import apart
from jattn.implementations.sums import Sums
from jattn.implementations.tpu.decode.decoder import Decoder
from jattn.state import State
from tests.helpers import calls

SLOTS = 128  # so few in a step that small caches have several


def attend_state(kv, query, *, interpret=True, alone=True, **options) -> State:
    """Gives the state on TPU; with `alone`, nothing stands in for the kernel."""
    kernel, operation = Decoder(SLOTS, interpret), attend._decoded

    def decoded(problem, operands, source, end, sink, form):
        sentence = by_kernel.refusal(kernel, problem, operands, source)
        assert sentence is None, sentence
        if alone:
            return _alone(kernel, problem, operands, source, sink)
        return operation(problem, operands, source, end, sink, form, kernel)

    with mock.patch.object(attend, "_decoded", decoded):
        return kv.attend_state(query, **options)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _alone(kernel, problem, operands, source, sink):
    operands, spoil = apart(operands)
    sums = Sums(*kernel.forward(problem, operands, source.arrays()))
    return spoil(calls.finished(problem, sums, sink))
