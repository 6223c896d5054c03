"""What the processor is: its name, family, vectors and caches."""

import contextlib
import pathlib
import platform

# The widest vector unit that each flag of Linux stands for, the widest first.
VECTORS = {"avx512f": 512, "avx2": 256, "avx": 256, "sse2": 128, "asimd": 128, "neon": 128}


def name() -> str:
    """Gives what the processor calls itself, where it can be found out."""
    return _facts().get("model name") or platform.processor() or platform.machine()


def describe() -> str:
    """Gives name, family, model, vector width and caches in one line, as far as known."""
    facts, parts = _facts(), [name()]
    if "cpu family" in facts and "model" in facts:
        parts.append(f"family {facts['cpu family']} model {facts['model']}")
    flags = facts.get("flags", facts.get("Features", "")).split()
    widths = [f"{bits} bits ({x})" for x, bits in VECTORS.items() if x in flags]
    parts += [f"vectors of {width}" for width in widths[:1]]
    if found := caches():
        parts.append(", ".join(f"L{level} {size}" for level, size in found.items()))
    return "; ".join(parts)


def caches() -> dict[int, str]:
    """Gives the size of each level of data cache that the first core uses."""
    found = {}
    for folder in sorted(pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        with contextlib.suppress(OSError, ValueError):
            if (folder / "type").read_text().strip() != "Instruction":
                level = int((folder / "level").read_text())
                found[level] = (folder / "size").read_text().strip()
    return found


def _facts() -> dict[str, str]:
    """Reads what Linux says of the first core; nothing on other systems."""
    with contextlib.suppress(OSError):
        first = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
        pairs = (line.partition(":")[::2] for line in first.splitlines())
        return {key.strip(): value.strip() for key, value in pairs}
    return {}
