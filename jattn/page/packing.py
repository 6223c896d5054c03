"""Arrays as compressed bytes, written in letters, for the script of a page to read.

An array of whole numbers is cut into planes: all lowest bytes, then all second bytes, and
so on. A plane of zeros takes almost no room when compressed, so one format serves small
numbers and large ones.

A share from 0 to 1, such as a weight, is stored as its square root in steps of 1/65280,
where 65280 = 255 · 256. So small weights keep their digits. If room is short, the root is
rounded to steps of 256/65280 = 1/255, and the lower plane is all zeros. Near the weight w
the error is at most √w / 65280, or √w / 255 if rounded. The code 65535 stands for NaN.
"""

import base64
import zlib

import numpy as np

__all__ = ["BYTES", "STEPS", "bytes_of", "codes", "packed", "rounded", "shares"]

STEPS = 65280  # 255 · 256, the largest multiple of 256 in 16 bits
UNKNOWN = 65535  # the code of NaN, which no share has
_COARSE = 256  # the lower byte of a multiple of 256 is 0
# How many planes each array of a page has. 3 bytes can number 16 million keys or patterns.
BYTES = {
    "counts": 2,
    "keys": 3,
    "weights": 2,
    "received": 2,
    "entropy": 2,
    "pictures": 1,
    "kinds": 1,
    "pattern_of": 3,
    "patterns": 1,
}


def codes(shares: np.ndarray) -> np.ndarray:
    """Codes shares as whole numbers, uint16: their square roots in steps of 1/STEPS."""
    roots = np.sqrt(np.clip(np.nan_to_num(shares), 0, 1))
    return np.where(np.isnan(shares), UNKNOWN, np.rint(roots * STEPS)).astype(np.uint16)


def rounded(codes: np.ndarray) -> np.ndarray:
    """Rounds codes to steps of 256, to save room; a code above 0 stays above 0."""
    near = np.rint(codes / _COARSE).astype(np.uint16) * np.uint16(_COARSE)
    near = np.where((codes > 0) & (near == 0), np.uint16(_COARSE), near)
    return np.where(codes == UNKNOWN, np.uint16(UNKNOWN), near)


def shares(codes: np.ndarray) -> np.ndarray:
    """Computes the shares that codes stand for."""
    return np.square(codes / STEPS)


def bytes_of(shares: np.ndarray) -> np.ndarray:
    """Codes shares in one byte, for pictures: roots in steps of 1/254; 255 is NaN."""
    roots = np.sqrt(np.clip(np.nan_to_num(shares), 0, 1))
    return np.where(np.isnan(shares), 255, np.rint(254 * roots)).astype(np.uint8)


def packed(arrays: dict[str, np.ndarray]) -> tuple[dict[str, list[int]], str]:
    """Writes arrays of whole numbers as letters.

    Args:
        arrays: The arrays by their names in BYTES.

    Returns:
        For each array where it begins in the bytes, how many numbers it has and how many
        planes; and all bytes, deflated and in base 64.
    """
    where, planes, start = {}, [], 0
    for name, array in arrays.items():
        array = np.ascontiguousarray(array).reshape(-1)
        where[name] = [start, array.size, BYTES[name]]
        start += array.size * BYTES[name]
        shifts = range(0, 8 * BYTES[name], 8)
        planes += [(array >> shift).astype(np.uint8).tobytes() for shift in shifts]
    # 6 is zlib's default; 9 takes four times as long and saves 1 %.
    return where, base64.b64encode(zlib.compress(b"".join(planes), 6)).decode()
