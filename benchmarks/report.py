"""The figures of benchmarks/loaders.py as tables, and the ratios that they must show."""

from collections.abc import Sequence
from typing import Any

from benchmarks.rivals import CEILING, LABELS, OURS

# Required ratio of ours to the best rival with any decoder, by pixels of a side.
BEST_RIVAL_BOUNDS = {"64": 2.5, "256": 1.5}
# Required ratio of ours to each of these with its own decoder, at 64 px.
AS_THEY_COME_BOUND = 4.0
AS_THEY_COME = ("stock_webdataset", "lightning_litdata", "mosaicml_streaming")

NOTHING = "-"


def checks(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every promised ratio: what, ratio (None: could not be measured), bound, holds."""
    found: list[tuple[str, float | None, float]] = []
    for size, bound in BEST_RIVAL_BOUNDS.items():
        rates = _rates(report, size)
        ours = rates.pop((OURS, "ours"), None)
        best = max(rates, key=lambda row: rates[row], default=None)
        name = f"{LABELS[best[0]]} with {_decoder(best[1])}" if best else "none"
        ratio = ours / rates[best] if ours and best else None
        found.append((f"{size} px, over the best rival ({name})", ratio, bound))
    rates = _rates(report, "64")
    for name in AS_THEY_COME:
        ours, theirs = rates.get((OURS, "ours")), rates.get((name, "stock"))
        ratio = ours / theirs if ours and theirs else None
        found.append((f"64 px, over {LABELS[name]} as it comes", ratio, AS_THEY_COME_BOUND))
    return [
        {"what": what, "ratio": ratio, "bound": bound, "holds": bool(ratio and ratio >= bound)}
        for what, ratio, bound in found
    ]


def _rates(report: dict[str, Any], size: str) -> dict[tuple[str, str], float]:
    rows = report["sizes"].get(size, {}).get("speed", [])
    return {
        (row["loader"], row["decoder"]): row["images_per_second"]
        for row in rows
        if row["loader"] != CEILING and row["images_per_second"]
    }


def _decoder(name: str) -> str:
    return {"stock": "its own decoder", "ours": "our decoder"}[name]


class _Footnotes:
    """Texts that cells of the tables refer to by number."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"[{self.texts.index(text) + 1}]"


def print_tables(report: dict[str, Any]) -> None:
    """Print everything as Markdown, the sizes side by side."""
    sizes, notes = report["sizes"], _Footnotes()
    for size, figures in sizes.items():
        mean_kb = figures["bytes"] / figures["count"] / 1e3
        print(f"{figures['count']:,} JPEG pictures of {size} px, {mean_kb:.1f} kB each")
    print()
    speeds = {size: figures["speed"] for size, figures in sizes.items() if "speed" in figures}
    if speeds:
        columns = [f"{size} px: images/s|of the ceiling|CPU us/image" for size in speeds]
        rows = [_speed_row(row, notes) for row in zip(*speeds.values(), strict=True)]
        _print_table("|".join(["loader|decoder", *columns, "batch"]), rows)
        print(f"{_spread(speeds)}\n")
    ranks = next((figures["ranks"] for figures in sizes.values() if "ranks" in figures), {})
    resumes = {size: figures["resume"] for size, figures in sizes.items() if "resume" in figures}
    names = list(ranks or next(iter(resumes.values()), {}))
    if names:
        worlds = list(next(iter(ranks.values()), {}))
        columns = [f"{world} ranks: twice, never" for world in worlds]
        columns += [f"{size} px: resume, s|MB read|twice, never" for size in resumes]
        rows = []
        for name in names:
            cells = [_rank_cell(ranks[name][world], notes) for world in worlds]
            for by_name in resumes.values():
                cells += _resume_cells(by_name[name], notes)
            rows.append([LABELS[name], *cells])
        _print_table("|".join(["loader", *columns]), rows)
    for number, text in enumerate(notes.texts, 1):
        print(f"[{number}] {text}")
    for name, reason in report["absent"].items():
        print(f"{LABELS[name]} is absent: {reason}")
    for check in report["checks"]:
        ratio = f"{check['ratio']:.2f} x" if check["ratio"] else "not measured"
        verdict = "holds" if check["holds"] else "DOES NOT HOLD"
        print(f"{check['what']}: {ratio}, promised {check['bound']:g} x: {verdict}")


def _print_table(header: str, rows: Sequence[Sequence[str]]) -> None:
    names = header.split("|")
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    for row in (names, ["-" * width for width in widths], *rows):
        cells = [
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print(f"| {' | '.join(cells)} |")
    print()


def _speed_row(by_size: Sequence[dict[str, Any]], notes: _Footnotes) -> list[str]:
    """One loader and decoder, over all sizes."""
    first = by_size[0]
    is_ceiling = first["loader"] == CEILING
    name = "decoding alone, in memory" if is_ceiling else LABELS[first["loader"]]
    cells = [name, "simplejpeg" if is_ceiling else first["decoder"]]
    for row in by_size:
        if row["images_per_second"] is None:
            cells += [f"{NOTHING} {notes.mark('failed: ' + row['failure'])}", NOTHING, NOTHING]
        else:
            share, cpu = f"{row['share']:.2f}", f"{row['cpu_us']:.0f}"
            cells += [f"{row['images_per_second']:,.0f}", share, cpu]
    return [*cells, first.get("batch", NOTHING).split(" ")[0]]


def _spread(speeds: dict[str, list[dict[str, Any]]]) -> str:
    spreads = [
        max(abs(run / row["images_per_second"] - 1) for run in row["runs"])
        for rows in speeds.values()
        for row in rows
        if row["images_per_second"]
    ]
    return f"No run is further than {max(spreads, default=0):.0%} from the median of its row."


def _rank_cell(result: dict[str, Any], notes: _Footnotes) -> str:
    if "failure" in result:
        return f"{NOTHING} {notes.mark('failed: ' + result['failure'])}"
    cell = f"{result['duplicates']:,}, {result['misses']:,}"
    if len(set(result["steps"])) > 1:
        cell += f" {notes.mark('the ranks take different numbers of steps')}"
    if result["wrong_pixels"]:
        cell += " " + notes.mark(f"{result['wrong_pixels']:,} pictures differ from Pillow's")
    return cell


def _resume_cells(result: dict[str, Any], notes: _Footnotes) -> list[str]:
    if "failure" in result:
        return [f"{NOTHING} {notes.mark('failed: ' + result['failure'])}", NOTHING, NOTHING]
    seconds = f"{result['seconds']:.2f}"
    if result["how"] == "skip":
        seconds += f" {notes.mark('it has no state: what was delivered is read again and dropped')}"
    counts = f"{result['duplicates']:,}, {result['misses']:,}"
    return [seconds, f"{result['bytes'] / 1e6:.1f}", counts]
