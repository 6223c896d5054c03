"""Mask expressions as text, such as `Causal() & Window(4, 0)`.

The text is parsed; it is never executed as Python. An expression is a mask, or expressions
joined by `&`, `|`, `~` and parentheses. As in Python, `~` binds first, then `&`, then `|`.
A mask is one of MASKS with its arguments, by place or by name. An argument is a whole
number, None, or a list of whole numbers.
"""

import ast
import inspect
import warnings
from types import NoneType
from typing import Any

import numpy as np

from jattn import masks

__all__ = ["MASKS", "parse", "signature"]

# Every mask that an expression may name, with the types of its arguments.
MASKS: dict[str, dict[str, tuple[type, ...]]] = {
    "Causal": {"offset": (int,)},
    "Window": {"left": (int, NoneType), "right": (int, NoneType)},
    "Prefix": {"length": (int, list)},
    "Segments": {
        "query_ids": (list,),
        "key_ids": (list, NoneType),
        "padding_id": (int, NoneType),
    },
    "Lengths": {"key_lengths": (int, list), "query_lengths": (int, list, NoneType)},
}

_KINDS = {int: "a whole number", list: "a list of whole numbers", NoneType: "None"}
_MOST_OPERATORS = 100  # far fewer than would exhaust Python's stack by nesting


class _Fault(Exception):
    """A fault in the text: a sentence, and where the fault is, as a range of bytes.

    In the sentence, {} stands for the text in this range.
    """

    def __init__(self, sentence: str, start: int = 0, end: int = 0):
        super().__init__(sentence)
        self.start, self.end = start, end

    @classmethod
    def at(cls, node: ast.expr, sentence: str) -> "_Fault":
        """Makes the fault of one part of the expression."""
        return cls(sentence, node.col_offset, node.end_col_offset or node.col_offset)


def parse(text: str) -> masks.Mask:
    """Reads a mask expression.

    Args:
        text: Named masks with their arguments, joined by `&`, `|`, `~` and parentheses.

    Returns:
        The mask.

    Raises:
        ValueError: If the text has anything else; the message says what, at which column,
            and what is allowed. Also if a mask refuses its arguments.

    Example:
        >>> bool(parse("Causal() & Window(4, 0)")(b=0, n=0, t=9, s=7))
        True
    """
    # Each character stays one column, so that columns in messages fit the user's text.
    line = "".join(c if c.isprintable() else " " for c in text)
    source = line.strip()
    try:
        return _mask(_tree(source))
    except _Fault as fault:
        before, here = source.encode()[: fault.start], source.encode()[: fault.end]
        column = len(line) - len(line.lstrip()) + len(before.decode()) + 1
        sentence = str(fault).replace("{}", _quote(here[fault.start :].decode()))
        raise ValueError(f"mask expression, column {column}: {sentence}") from None


def signature(name: str) -> str:
    """Says how a mask is written, with its defaults: `Causal(offset=0)`."""
    parameters = inspect.signature(getattr(masks, name)).parameters.values()
    written = [
        x.name if x.default is x.empty else f"{x.name}={x.default}" for x in parameters
    ]
    return f"{name}({', '.join(written)})"


def _tree(source: str) -> ast.expr:
    """Parses the text to Python's syntax tree; refuses one too deep to walk."""
    if not source:
        raise _Fault(f"nothing is written. {_allowed()}")
    try:
        with warnings.catch_warnings():
            # The parser may warn of a wrong escape in a string; strings are refused below.
            warnings.simplefilter("ignore")
            tree = ast.parse(source, mode="eval").body
    except SyntaxError as error:
        start = len(source[: max((error.offset or 1) - 1, 0)].encode())
        raise _Fault(f"{error.msg.rstrip('.')}. {_allowed()}", start) from None
    except (ValueError, MemoryError, RecursionError):
        raise _Fault(f"this cannot be read as Python. {_allowed()}") from None
    operators = ast.BitAnd | ast.BitOr | ast.Invert
    if sum(isinstance(node, operators) for node in ast.walk(tree)) > _MOST_OPERATORS:
        raise _Fault(f"there are more than {_MOST_OPERATORS} operators; write fewer.")
    return tree


def _mask(node: ast.expr) -> masks.Mask:
    match node:
        case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
            return _mask(left) & _mask(right)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _mask(left) | _mask(right)
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            return ~_mask(operand)
        case ast.Call(func=ast.Name(id=name)) if name in MASKS:
            return _call(name, node)
    raise _no_mask(node)


def _no_mask(node: ast.expr) -> _Fault:
    """Makes the fault of a part that is not a mask, with a guess at what was meant."""
    hint = ""
    match node:
        case ast.BoolOp():
            hint = " (write & for `and`, | for `or`)"
        case ast.UnaryOp(op=ast.Not()):
            hint = " (write ~ for `not`)"
        case ast.Name(id=name) if name in MASKS:
            hint = f" (write {signature(name)})"
    return _Fault.at(node, f"{{}} is not a mask{hint}. {_allowed()}")


def _call(name: str, node: ast.Call) -> masks.Mask:
    """Makes the named mask from its written arguments, after a check of their types."""
    arguments = [_value(argument) for argument in node.args]
    named = {keyword.arg or "**": _value(keyword.value) for keyword in node.keywords}
    cls = getattr(masks, name)
    try:
        if len(named) < len(node.keywords):
            raise TypeError("an argument is named twice")
        bound = inspect.signature(cls).bind(*arguments, **named).arguments
    except TypeError as error:
        raise _Fault.at(node, f"{signature(name)}: {error}.") from None
    for argument, value in bound.items():
        kinds = MASKS[name][argument]
        if not isinstance(value, kinds):
            want = " or ".join(_KINDS[kind] for kind in kinds)
            got = _KINDS[type(value)]
            sentence = f"{signature(name)}: `{argument}` must be {want}, got {got}."
            raise _Fault.at(node, sentence)
        if isinstance(value, list):
            bound[argument] = np.array(value, np.int32)
    return cls(**bound)


def _value(node: ast.expr) -> Any:
    """Reads a whole number, None, or a list of whole numbers."""
    match node:
        case ast.Constant(value=None):
            return None
        case ast.List(elts=elements):
            return [_number(element) for element in elements]
    return _number(node, "a whole number, None or a list of whole numbers")


def _number(node: ast.expr, want: str = "a whole number") -> int:
    operand, sign = node, 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        operand, sign = node.operand, -1
    number = operand.value if isinstance(operand, ast.Constant) else None
    if isinstance(number, bool) or not isinstance(number, int):  # True is an int in Python
        raise _Fault.at(node, f"an argument must be {want}, got {{}}.")
    if not -(2**31) <= sign * number < 2**31:
        raise _Fault.at(node, "{} does not fit into 32 bits.")
    return sign * number


def _quote(written: str) -> str:
    return f"`{written}`" if len(written) <= 40 else f"`{written[:39]}…`"


def _allowed() -> str:
    written = ", ".join(map(signature, MASKS))
    return f"Allowed: {written}, joined by &, |, ~ and parentheses."
