"""The ratios of a run, as bars."""

import io

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench.candidates import PASSES
from bench.report import ratio_text, shape_text

# Told apart by those who see red and green alike (Okabe and Ito).
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
GAP = 0.8  # between rows, in bars


def draw(facts: dict, records: list[dict]) -> bytes:
    """Draws how many times as long as jattn every candidate takes in every row: a PNG."""
    bars, centers, height = _place(records)
    names = list(dict.fromkeys(name for _, name, _ in bars))
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    figure = Figure(figsize=(10, 2.1 + 0.21 * height), layout="constrained")
    panels = figure.subplots(1, len(PASSES), sharex=True, sharey=True)
    for panel, label in zip(panels, PASSES, strict=True):
        _draw_panel(panel, label, bars, colors)
    labels = [
        f"{r['case']} ({r['chosen'].removeprefix('jattn ')})\n{shape_text(r['shape'])}"
        for r in records
    ]
    panels[0].set_yticks(centers, labels, fontsize=8)
    panels[0].set_ylim(height - GAP, -0.8)
    _draw_scale(panels[0], bars)
    figure.suptitle(_title(facts), fontsize=10.5)
    handles = [panels[0].barh(0, 0, color=colors[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _place(records):
    """Gives each bar's height, name and figures; rows' middles; the height of all."""
    bars, centers, y = [], [], 0.0
    for record in records:
        top = y
        for name, figures in record["candidates"].items():
            if name != record["chosen"]:
                bars.append((y, name, figures))
                y += 1
        centers.append((top + max(y - 1, top)) / 2)
        y = max(y, top + 1) + GAP
    return bars, centers, y


def _draw_panel(panel, label, bars, colors) -> None:
    panel.set_title(label, fontsize=10, pad=18)
    panel.set_xlabel("time ÷ time of jattn", fontsize=9)
    above = {"transform": panel.get_xaxis_transform(), "va": "bottom", "fontsize": 8}
    panel.text(1, 1, "← faster than jattn  ", ha="right", **above)
    panel.text(1, 1, "  slower than jattn →", ha="left", **above)
    panel.axvline(1, color="black", linewidth=0.8)
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)
    for y, name, figures in bars:
        is_ok = figures["status"] == "ok"
        x = figures["passes"][label]["ratio"] if is_ok else 1
        text = f"{name}: {figures['status']}"
        if is_ok:
            text = ratio_text(x) + ("" if figures["same"] else " ≠")
        panel.barh(y, x - 1, left=1, height=0.9, color=colors[name])
        panel.annotate(
            text,
            (x, y),
            (3 if x >= 1 else -3, 0),
            textcoords="offset points",
            ha="left" if x >= 1 else "right",
            va="center",
            fontsize=7.5,
            color="black" if is_ok else "gray",
        )


def _draw_scale(panel, bars) -> None:
    """Draws a logarithmic scale, so that half and double are as far from 1."""
    ratios = [
        figures["passes"][label]["ratio"]
        for _, _, figures in bars
        if figures["status"] == "ok"
        for label in PASSES
    ]
    low, high = min([0.5, *ratios]), max([2.0, *ratios])
    room = (high / low) ** 0.15
    panel.set_xscale("log")
    panel.set_xlim(low / room, high * room)
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    panel.xaxis.set_minor_locator(NullLocator())


def _title(facts: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        "Time relative to jattn, which runs the implementation in brackets "
        "(≠ computes something else)\n"
        f"{facts['device']}, {facts['cores']} cores, {facts['dtype']}; {versions}"
    )
