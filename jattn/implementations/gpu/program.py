"""One program of the grid: what it reads, and the turns of its groups of threads.

Two groups of 128 threads compute, each 64 rows. They visit the blocks of the inner side in
the order of the schedule. How the blocks arrive in shared memory is the machine's matter.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jattn.implementations.gpu.layout import BLOCK, ROWS


class Source(NamedTuple):
    """An input in global memory, and where a row of its head begins and how long it is."""

    ref: Any
    first: Any
    size: int

    def at(self, b, rows):
        """Gives some rows of an example."""
        return self.ref.at[b, rows, pl.ds(self.first, self.size)]


class Program(NamedTuple):
    """What is known of a program before anything is copied.

    Attributes:
        call: The call.
        given: The arguments, in global memory.
        at: The example and the head.
        group: The number of this group of threads.
        rows: The rows of this group, as a slice of all of them.
        own: The inputs that the rows read.
        inner: The inputs that are read block by block.
        order: A function from the number of a step to its inner block.
        full: How many steps need no mask.
        live: How many steps there are.
    """

    call: Any
    given: Any
    at: tuple
    group: Any
    rows: Any
    own: list[Source]
    inner: list[Source]
    order: Callable
    full: Any
    live: Any

    def inner_rows(self, j):
        """Gives the inner rows of a step, as a slice of all of them."""
        return pl.ds(self.order(j) * self.call.plan.inner, self.call.plan.inner)

    def context(self, own, streams, *, begin=lambda j: None, turn=lambda: None):
        """Gives a group what it computes with."""
        return Context(
            self, self.call, self.given, self.at, self.rows, own, streams, begin, turn
        )


class Context(NamedTuple):
    """What a computing group knows.

    Attributes:
        program: The program.
        call: The call.
        given: The arguments, in global memory.
        at: The example and the head.
        rows: The rows of this group, as a slice of all of them.
        own: What the rows read, in shared memory.
        streams: The blocks of the other side: their `memory`, and functions to `wait` for
            the block of a stage and to `release` it.
        begin: A function of a step that is called before it.
        turn: A function that waits for this group's turn.
    """

    program: Program
    call: Any
    given: Any
    at: tuple
    rows: Any
    own: tuple
    streams: tuple
    begin: Callable
    turn: Callable

    def in_turns(self, loop: Callable):
        """Runs a loop whose steps take two turns each; the two groups alternate."""
        pl.when(self.program.group == 1)(self.turn)
        result = loop()
        pl.when(self.program.group == 0)(self.turn)
        return result

    def loop(self, step: Callable, start):
        """Runs `step(masked, j, carry)` on full blocks, then on partial ones."""
        full, live = self.program.full, self.program.live

        def run(masked, j, carry):
            self.begin(j)
            return step(masked, j, carry)

        unmasked = functools.partial(run, False)
        if not self.call.is_masked:
            return lax.fori_loop(0, live, unmasked, start)
        carry = lax.fori_loop(0, full, unmasked, start)
        return lax.fori_loop(full, live, functools.partial(run, True), carry)

    def first(self, j):
        """Gives the stage of a step, and the first of the inner rows that it reads."""
        plan = self.call.plan
        return lax.rem(j, np.int32(plan.stages)), self.program.order(j) * plan.inner


def run_program(call: Any, kernel, given: Any, own: int, outputs, memory):
    """Runs one program of the grid."""
    b, n, block = (lax.axis_index(x) for x in ("example", "head", "block"))
    if call.by_query:  # under a causal mask the last queries have most to do
        block = lax.axis_size("block") - 1 - block
    group = lax.axis_index("group")
    rows = pl.ds(block * BLOCK + group * ROWS, ROWS)
    order, full, live = (_of(x, (b, n)) for x in given.steps)
    steps = functools.partial(order, block), full(block), live(block)
    inputs = _sources(call, given.inputs, n, own)
    program = Program(call, given, (b, n), group, rows, inputs[:own], inputs[own:], *steps)
    call.machine.run(program, kernel, outputs, memory)


def _of(ref, at):
    """Gives a function that reads the numbers of an example and a head from a table."""
    b, n = (0 if size == 1 else i for size, i in zip(ref.shape[:2], at, strict=True))
    return lambda *place: ref[(b, n, *place)]


def _sources(call: Any, refs, n, own: int):
    """Gives the inputs with the place of the head that this program reads of each."""
    sizes = call.problem.sizes
    places = (n, sizes.N), (lax.div(n, np.int32(sizes.G)), sizes.K)  # queries, keys
    places = places if call.by_query else places[::-1]
    found = []
    for i, ref in enumerate(refs):
        head, count = places[i >= own]
        size = ref.shape[2] // count
        found.append(Source(ref, head * np.int32(size), size))
    return found
