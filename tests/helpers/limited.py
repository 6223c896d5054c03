"""Functions in a process of their own, under a time limit, as a deadlock would hang."""

import importlib
import multiprocessing
import sys
import traceback


class Worker:
    """A process that runs functions by name; it is replaced when one fails or hangs."""

    def __init__(self, prepare: str | None = None):
        self.prepare, self.process, self.pipe = prepare, None, None

    def run(self, name: str, *arguments, seconds: float):
        """Gives the result of `module:function`; fails if it raises or takes longer."""
        if self.process is None:
            self._start()
        self.pipe.send((name, arguments))
        if not self.pipe.poll(seconds):
            self.stop()
            raise TimeoutError(f"{name}{arguments} did not end in {seconds} s.")
        try:
            is_right, result = self.pipe.recv()
        except EOFError:
            is_right, result = False, "the process died"
        if not is_right:
            self.stop()  # the emulator's state is not trusted after an error
            raise AssertionError(f"{name}{arguments}: {result}")
        return result

    def stop(self):
        """Ends the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
        self.process = None

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, self.prepare), daemon=True
        )
        self.process.start()
        theirs.close()


def _serve(pipe, prepare):
    if prepare is not None:
        _named(prepare)()
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = True, _named(name)(*arguments)
        except BaseException:  # noqa: BLE001  (the test shall show it)
            answer = False, traceback.format_exc(limit=-8)
        sys.stdout.flush()
        pipe.send(answer)


def _named(name: str):
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)
