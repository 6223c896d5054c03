"""`python -m jattn`: a self-check, attention on your own arrays, and pictures of masks."""

import argparse
import codecs
import io
import os
import sys

import jax

import jattn
from jattn.command import attend, mask, welcome
from jattn.command.expression import MASKS, signature
from jattn.command.refusal import Refusal

_ALLOWED = f"""A mask expression holds {", ".join(map(signature, MASKS))},
with whole numbers, None and lists of whole numbers, joined by &, |, ~ and parentheses."""
_ATTEND = """Attends from `query` to `key` and `value`, arrays of FILE.npz with the axes
TNH, SKH, SKD, or BTNH, BSKH, BSKD, or with the two axes T×H of one head. Prints the
strongest weights of each query. An array `tokens` of strings names the queries on the
page of --plot OUT.html. Writes nothing but what --out and --plot name."""
_MASK = "Draws a mask: rows are queries, columns are keys, █ may attend, · may not."


class _Parser(argparse.ArgumentParser):
    """Parser that reports an error in one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help.\n")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and gives its exit code: 0 success, 1 failed check, 2 refusal."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        code = welcome.run() if arguments.run is None else arguments.run(arguments)
        sys.stdout.flush()
    except Refusal as refusal:
        return _fail(arguments, str(refusal))
    except MemoryError:
        return _fail(arguments, "this takes more memory than there is.")
    except jax.errors.JaxRuntimeError as error:
        # XLA's way to say that an allocation failed; other errors are defects.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _fail(arguments, "this takes more memory than there is.")
    except BrokenPipeError:
        # The reader of stdout, such as `head`, has closed it. Python flushes stdout once
        # more at its exit and would raise again; so stdout now leads to nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as a shell reports it; below, 128 + SIGINT
    except KeyboardInterrupt:
        welcome.progress("")
        return 130
    return code


def _fail(arguments: argparse.Namespace, sentence: str) -> int:
    where = " ".join(filter(None, ("python -m jattn", arguments.command)))
    print(f"{where}: {' '.join(sentence.split())}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m jattn",
        description="With nothing: versions and devices, a worked example, a self-check of "
        "every implementation that runs here, and a small timing against jax.nn.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"jattn {jattn.__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, module, text in (("attend", attend, _ATTEND), ("mask", mask, _MASK)):
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=text,
            epilog=_ALLOWED,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _plain(error):
    """Replaces characters that stdout cannot write by similar ones in ASCII."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    written = error.object[error.start : error.end]
    return written.translate(_ASCII).encode("ascii", "replace").decode(), error.end


_ASCII = str.maketrans("█░·▉▊▋▌▍×", "#+.####|x")


if __name__ == "__main__":
    codecs.register_error("jattn", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="jattn")
    sys.exit(main())
