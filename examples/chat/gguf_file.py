"""A GGUF file: metadata, and tensors by their names.

GGUF is the file of llama.cpp:

    magic, version, how many tensors, how many values
    name, type and value, so many times: sizes, vocabulary, chat template
    name, shape, type and place of each tensor
    the numbers of the tensors, most of them rounded to 4 or 8 bits in blocks

`gguf` knows the types and undoes the rounding. Its own reader makes an array of each word
of the vocabulary, which takes 6 s; what is here takes a tenth of a second.
"""

import pathlib
import struct
from typing import Any, NamedTuple

import numpy as np

MAGIC = 0x46554747  # "GGUF", little-endian
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
# The other types of values, as NumPy calls them.
NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


class Tensor(NamedTuple):
    """A tensor as it is stored."""

    data: np.ndarray  # bytes, a row for each row of the tensor
    kind: Any  # a `gguf.GGMLQuantizationType`

    def array(self) -> np.ndarray:
        """Gives its numbers in float32."""
        import gguf

        return gguf.dequantize(self.data, self.kind)


def read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads the metadata of a file, and says where its tensors are.

    Raises:
        ValueError: If it is no such file, or is broken.
    """
    data = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else b""
    cursor = _Cursor(memoryview(data))
    magic, version = cursor.number("<u4"), cursor.number("<u4")
    if magic != MAGIC or version not in VERSIONS:
        raise ValueError("it does not begin as a GGUF file of version 2 or 3 does")
    tensors, values = cursor.number("<u8"), cursor.number("<u8")
    metadata = {}
    for _ in range(values):
        name = cursor.string()
        metadata[name] = cursor.value(cursor.number("<u4"))
    infos = [_info(cursor) for _ in range(tensors)]
    unit = metadata.get("general.alignment", 32)
    start = -(-cursor.place // unit) * unit
    return metadata, {name: _tensor(cursor, start, *rest) for name, *rest in infos}


def _info(cursor: "_Cursor"):
    """Reads the name, shape, type and place of a tensor."""
    name = cursor.string()
    shape = cursor.numbers("<u8", cursor.number("<u4"))[::-1].tolist()  # the last is first
    return name, shape, cursor.number("<u4"), cursor.number("<u8")


def _tensor(cursor: "_Cursor", start: int, shape: list[int], kind: int, place: int):
    import gguf

    kind = gguf.GGMLQuantizationType(kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]  # numbers of a block, and its bytes
    *rows, numbers = shape
    shape = [*rows, numbers // block * size]
    cursor.place = start + place
    count = int(np.prod(shape, dtype=object))
    return Tensor(cursor.numbers("<u1", count).reshape(shape), kind)


class _Cursor:
    """A place in the bytes of a file; to read moves it on."""

    def __init__(self, data: memoryview):
        self.data, self.place = data, 0

    def numbers(self, dtype: str, count: int) -> np.ndarray:
        size = np.dtype(dtype).itemsize * count
        if self.place + size > len(self.data):
            raise ValueError("it ends too early")
        found = np.frombuffer(self.data, dtype, count, self.place)
        self.place += size
        return found

    def number(self, dtype: str):
        return self.numbers(dtype, 1)[0].item()

    def string(self) -> str:
        # As `number` and `numbers` do, but in less time: there are 100,000 of them.
        try:
            (length,) = struct.unpack_from("<Q", self.data, self.place)
        except struct.error:
            raise ValueError("it ends too early") from None
        first, self.place = self.place + 8, self.place + 8 + length
        if self.place > len(self.data):
            raise ValueError("it ends too early")
        return bytes(self.data[first : self.place]).decode()

    def value(self, kind: int):
        """Reads a value of a type: a number, a string, or a list of them."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.number("<u4"), self.number("<u8")
            if kind in NUMBERS:
                return self.numbers(NUMBERS[kind], count).tolist()
            if kind != STRING:  # the format allows lists of lists; no known file has one
                raise ValueError(f"a list of type {kind} is not known")
            return [self.string() for _ in range(count)]
        if kind not in NUMBERS:
            raise ValueError(f"a value of type {kind} is not known")
        return self.number(NUMBERS[kind])
