"""The figures of benchmarks/loaders.py as tables, and the ratios that they must show."""

from collections.abc import Sequence
from typing import Any

from benchmarks.rivals import CEILING, LABELS, OURS

# Issue: ours over the best rival, whatever its decoder, by pixels of a side.
BEST_RIVAL_BOUNDS = {"64": 2.5, "256": 1.5}
# Ours over each of these as it comes, at 64 px.
AS_THEY_COME_BOUND = 4.0
AS_THEY_COME = ("stock_webdataset", "lightning_litdata", "mosaicml_streaming")


def checks(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every promised ratio: what, value (None: could not be measured), bound, holds."""
    found: list[tuple[str, float | None, float]] = []
    for size, bound in BEST_RIVAL_BOUNDS.items():
        rates = _rates(report, size)
        ours = rates.pop((OURS, "ours"), None)
        best = max(rates, key=lambda row: rates[row], default=None)
        name = f"{LABELS[best[0]]} ({best[1]} decoder)" if best else "no rival"
        ratio = ours / rates[best] if ours and best else None
        found.append((f"{size} px: best rival, {name}", ratio, bound))
    rates = _rates(report, "64")
    for name in AS_THEY_COME:
        ours, theirs = rates.get((OURS, "ours")), rates.get((name, "stock"))
        ratio = ours / theirs if ours and theirs else None
        found.append((f"64 px: {LABELS[name]} as it comes", ratio, AS_THEY_COME_BOUND))
    return [
        {
            "what": what,
            "ratio": ratio,
            "bound": bound,
            "holds": ratio is not None and ratio >= bound,
        }
        for what, ratio, bound in found
    ]


def _rates(report: dict[str, Any], size: str) -> dict[tuple[str, str], float]:
    rows = report["sizes"].get(size, {}).get("speed", [])
    return {
        (row["loader"], row["decoder"]): row["images_per_second"]
        for row in rows
        if row["loader"] != CEILING and row["images_per_second"]
    }


def print_tables(report: dict[str, Any]) -> None:
    """Print everything as Markdown."""
    footnotes = [f"{LABELS[name]} is absent: {why}" for name, why in report["absent"].items()]
    for size, figures in report["sizes"].items():
        mean_kb = figures["bytes"] / figures["count"] / 1e3
        print(f"\n{figures['count']:,} JPEG pictures of {size} px, {mean_kb:.1f} kB each\n")
        if "speed" in figures:
            _print_table(
                [
                    *("loader", "decoder", "images/s", "of the ceiling", "lowest to highest"),
                    *("CPU us/image", "batch"),
                ],
                [_speed_cells(row, footnotes) for row in figures["speed"]],
            )
        if "ranks" in figures:
            worlds = next(iter(figures["ranks"].values()), {})
            _print_table(
                ["loader", *(f"{world} ranks: twice, never" for world in worlds)],
                [
                    [LABELS[name], *(_rank_cell(result, footnotes) for result in worlds.values())]
                    for name, worlds in figures["ranks"].items()
                ],
            )
        if "resume" in figures:
            _print_table(
                ["loader", "resume, s", "MB read", "epoch with the resume: twice, never"],
                [
                    [LABELS[name], *_resume_cells(result, footnotes)]
                    for name, result in figures["resume"].items()
                ],
            )
    for number, text in enumerate(footnotes, 1):
        print(f"[{number}] {text}")
    for check in report["checks"]:
        ratio = "not measured" if check["ratio"] is None else f"{check['ratio']:.2f} x"
        verdict = "holds" if check["holds"] else "DOES NOT HOLD"
        print(f"{check['what']}: {ratio}, promised >= {check['bound']:g}: {verdict}")


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print(f"| {' | '.join(cells)} |")
    print()


def _note(footnotes: list[str], text: str) -> str:
    if text not in footnotes:
        footnotes.append(text)
    return f"[{footnotes.index(text) + 1}]"


def _speed_cells(row: dict[str, Any], footnotes: list[str]) -> list[str]:
    name = "2 threads, decoding alone" if row["loader"] == CEILING else LABELS[row["loader"]]
    decoder = "simplejpeg" if row["loader"] == CEILING else row["decoder"]
    if row["images_per_second"] is None:
        mark = _note(footnotes, f"{name} failed: {row['failure']}")
        return [name, decoder, f"- {mark}", "-", "-", "-", "-"]
    rate, lowest, highest = row["images_per_second"], min(row["runs"]), max(row["runs"])
    spread = f"{lowest:,.0f} to {highest:,.0f}"
    share, cpu = f"{row['share']:.2f}", f"{row['cpu_us']:.0f}"
    return [name, decoder, f"{rate:,.0f}", share, spread, cpu, row["batch"]]


def _rank_cell(result: dict[str, Any], footnotes: list[str]) -> str:
    if "failure" in result:
        return f"- {_note(footnotes, 'failed: ' + result['failure'])}"
    cell = f"{result['duplicates']:,}, {result['misses']:,}"
    if len(set(result["steps"])) > 1:
        text = "ranks take different numbers of steps: {}".format(result["steps"])
        cell += f" {_note(footnotes, text)}"
    if result["wrong_pixels"]:
        cell += f" {_note(footnotes, '{:,} pictures differ'.format(result['wrong_pixels']))}"
    return cell


def _resume_cells(result: dict[str, Any], footnotes: list[str]) -> list[str]:
    if "failure" in result:
        return [f"- {_note(footnotes, 'failed: ' + result['failure'])}", "-", "-"]
    seconds = f"{result['seconds']:.2f}"
    if result["how"] == "skip":
        mark = _note(footnotes, "has no state: what was delivered is read again and dropped")
        seconds += f" {mark}"
    counts = f"{result['duplicates']:,}, {result['misses']:,}"
    return [seconds, f"{result['bytes'] / 1e6:.1f}", counts]
