"""The command: `python -m bench.speed --help`."""

import argparse
import importlib.util
import pathlib
import statistics
import sys

from bench import candidates, measure, report, rows

# What a peer may raise for a case that it was thought to take; the run goes on.
REFUSALS = (ValueError, TypeError, RuntimeError, ExceptionGroup)
INTERRUPTED = 130  # as the shell counts Ctrl-C


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = _parse(arguments)
    missing = candidates.missing(options.peers)
    makers = candidates.makers([name for name in options.peers if name not in missing])
    facts = report.header(options.dtype, options.peers, missing)
    print(report.opening(facts), flush=True)
    records, bar = [], _progress(len(options.rows))
    try:
        for case, sizes in options.rows:
            bar.set_description(case.name)
            work = measure.pose(case, sizes, options.dtype)
            records.append(measure_row(work, makers, options.seconds))
            bar.clear()
            print(report.table(records[-1]), flush=True)
            bar.update()
    except KeyboardInterrupt:
        print("\nbench.speed: stopped; here is what was measured", file=sys.stderr)
    bar.close()
    if records:
        print(report.closing(records))
        _write(options, facts, records)
    return 0 if len(records) == len(options.rows) else INTERRUPTED


def measure_row(work: measure.Work, makers, seconds: float) -> dict:
    """Takes all figures of one row, of every candidate."""
    made, figures = _make(work, makers)
    exact, chosen = measure.exact_output(work), candidates.chosen(work)
    for name, candidate in made.items():
        error = measure.error(candidate.output(), exact, work.sizes)
        figures[name] |= {"error": error, "passes": {}}
    for name in made:
        limit = measure.MARGIN * figures[chosen]["error"]
        figures[name]["same"] = figures[name]["error"] <= limit  # a NaN is not the same
    for label in candidates.PASSES:
        passes = {name: candidate.passes[label] for name, candidate in made.items()}
        for name, measured in _time(passes, chosen, seconds).items():
            figures[name]["passes"][label] = measured
    shape = {letter: getattr(work.sizes, letter) for letter in rows.LETTERS}
    return {"case": work.case.name, "shape": shape, "chosen": chosen, "candidates": figures}


def _make(work: measure.Work, makers):
    """Makes the candidates that can take the work, and says the status of every one."""
    made, figures = {}, {}
    for name, make in makers.items():
        try:
            candidate = make(work)
            if candidate is not None:
                for one in candidate.passes.values():
                    one.run()  # what fails, fails here
                made[name] = candidate
            figures[name] = {"status": "n/a" if candidate is None else "ok"}
        except REFUSALS as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            figures[name] = {"status": "failed", "reason": reason}
    return made, figures


def _time(passes: dict[str, measure.Pass], chosen: str, seconds: float) -> dict:
    """Takes the figures of one pass, of every candidate."""
    runs = {name: one.run for name, one in passes.items()}
    times = measure.interleave(runs, seconds)
    return {
        name: {
            "seconds": statistics.median(times[name]),
            "spread": measure.spread(times[name]),
            "ratio": measure.ratio(times[name], times[chosen]),
            "compile_seconds": one.compile_seconds,
            "temporaries_bytes": one.temporaries,
            "all_seconds": times[name],
        }
        for name, one in passes.items()
    }


def _write(options, facts: dict, records: list[dict]) -> None:
    if options.json:
        report.write_json(options.json, facts, records)
    if options.plot:
        from bench import picture  # needs matplotlib, which the rest does not

        with report.replacing(options.plot) as file:
            file.write(picture.draw(facts, records))


class _Parser(argparse.ArgumentParser):
    """One line for an error, and exit code 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def _parse(arguments) -> argparse.Namespace:
    parser = _Parser(
        "bench.speed", description="Times jattn beside its peers.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--cases", metavar="NAME,…", type=_names, help="of jattn.testing.CASES")
    add("--shapes", metavar="B,T,N,H[,K[,S[,D]]]", nargs="+", help="one or more")
    add("--peers", metavar="NAME,…", type=_names, default=list(candidates.PEERS))
    add("--dtype", default="float32", choices=("float16", "bfloat16", "float32"))
    add("--quick", action="store_true", help="smaller and fewer: about a minute")
    add("--seconds", type=float, metavar="S", help="of timing per row and pass")
    add("--json", type=pathlib.Path, metavar="FILE", help="write every figure")
    add("--plot", type=pathlib.Path, metavar="PNG", help="draw the ratios")
    options = parser.parse_args(arguments)
    try:
        _check(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def _check(options: argparse.Namespace) -> None:
    """Completes the options, or raises a sentence: now, not after minutes of work."""
    shapes = options.shapes and [rows.parse_shape(text) for text in options.shapes]
    options.rows = rows.choose(options.cases, shapes, options.quick)
    for name in options.peers:
        if name not in candidates.PEERS:
            peers = ", ".join(candidates.PEERS)
            raise ValueError(f"no peer {name!r}; the peers are {peers}")
    for path in (options.json, options.plot):
        if path and path.is_dir():
            raise ValueError(f"{path} is a folder; name a file in it")
        if path and not path.parent.is_dir():
            raise ValueError(f"{path.parent} is no folder; make it first")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install '.[bench]'")
    if options.seconds is None:
        options.seconds = 0.7 if options.quick else 3.0


def _names(text: str) -> list[str]:
    """Names between commas, each once."""
    return list(dict.fromkeys(name for name in text.split(",") if name))


class _NoBar:
    """What stands for a progress bar where there is none."""

    def __getattr__(self, name):
        return lambda *arguments: None


def _progress(total: int):
    """Shows a bar on stderr, where that is a terminal and tqdm is installed."""
    if importlib.util.find_spec("tqdm") is None:
        return _NoBar()
    from tqdm import tqdm

    return tqdm(total=total, unit="row", leave=False, disable=None)


if __name__ == "__main__":
    sys.exit(main())
