"""The page of an evaluation: one self-contained HTML file."""

import base64
import hashlib
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Sequence
from html import escape
from itertools import cycle, zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ldm import brief, counted, figures
from ldm.system.files import written_whole

TEMPLATE = Path(__file__).with_name("report.html")
SIDE = 128  # largest side in voxels of a volume in the viewer
VOXELS = 16_000_000  # of all volumes in the viewer: some 8 MB of brains
PIXELS = 540  # width of a picture of three planes

# Colour-blind safe: of the groups, and of other series.
COLOURS = {"held-out": "#0072b2", "generated": "#d55e00", "training": "#009e73"}
OTHERS = ("#556070", "#7b4fa3", "#a07a00", "#b03a7a")
MARKS = {
    "good": ("✓", "Good"),
    "warn": ("!", "Caution"),
    "bad": ("✕", "Bad"),
    "none": ("i", "For information"),
}

BETTER = {"lower": "↓ lower", "higher": "↑ higher", "near baseline": "≈ baseline", "": "for comparison"}


def write_report(
    path: Path,
    metrics: dict,
    *,
    spacing: Sequence[float],
    examples: dict[str, Sequence[tuple[str, np.ndarray]]],
    pairs: Sequence[dict],
    curves: Sequence[dict],
    distributions: Sequence[dict],
    log: Sequence[dict],
) -> None:
    """Write the page: conclusions, metrics, slices, a viewer, closest pairs, distributions and curves.

    Volumes are (D, H, W) in RAS, all on one grid; intensities outside [0, 1] are clipped.

    Args:
        metrics: the content of `metrics.json`.
        spacing: mm between voxels along right, anterior, superior.
        examples: for each group the named volumes of the slices and the viewer, at least one.
        pairs: generated volumes and their nearest training scans, closest first: "generated" and "training"
            (names), "distance", "limit", "flagged" and "volumes" (both).
        curves: "title", "x", "y" (labels), "log" (scale of y) and "series", each with "name", "x", "y" and
            "low" and "high", which may be None.
        distributions: "title", "x" (label with unit) and "groups": the numbers of each group.
        log: entries of the training log.

    Raises:
        OSError: the disk failed or is full; the file is named.
    """
    volumes, viewed = _viewer_volumes(examples, spacing)
    template = TEMPLATE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    losses = _svg(figures.loss_figure(log), "Training and held-out losses by step") if log else ""
    parts = {
        # The browser refuses anything that is not in the file, and any script but the template's.
        "policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'",
        "title": escape(metrics["title"]),
        "about": _about(metrics, examples, spacing),
        "verdicts": _section("verdict", "Conclusions", _verdicts(metrics["verdicts"], metrics["notes"])),
        "metrics": _section("metrics", "Metrics", _table(metrics["figures"])),
        "slices": _section("slices", "Slices", _side_by_side(examples, spacing)),
        "viewed": viewed,
        "volumes": json.dumps(volumes).replace("<", "\\u003c"),  # no name may close the element
        "pairs": _section("pairs", "Closest training scans", _pairs(pairs, spacing)),
        "distributions": _section("distributions", "Distributions", _charts(_distribution, distributions)),
        "curves": _section("curves", "Curves", _charts(_curve, curves)),
        "losses": _section("losses", "Training", losses),
        "settings": _section("settings", "Settings", _settings(metrics["settings"])),
    }
    # In one pass, so that {{...}} in the parts stays as it is.
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
    with written_whole(path) as file:
        file.write(page.encode())


# ---------------------------------------------------------------- words and numbers


def _section(name: str, heading: str, body: str) -> str:
    return f'<section id="{name}">\n<h2>{heading}</h2>\n{body}\n</section>' if body else ""


def _number(value: float | None) -> str:
    """Three digits, as a reader writes them: 0.312, 28.1, 0.4, 15400, 3.1 × 10⁻⁵."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    digits, _, power = f"{value:.2e}".partition("e")
    if value == 0 or -4 < int(power) < 6:
        text = f"{float(f'{digits}e{power}'):.6f}".rstrip("0").rstrip(".")
    else:
        raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        text = f"{float(digits):g} × 10{raised}"
    return text.replace("-", "−")


def _name(kind: str) -> str:
    """The name of a group, with its colour."""
    return f'<span class="dot {escape(kind)}"></span>{escape(kind[:1].upper() + kind[1:])}'


def _about(metrics: dict, examples: dict, spacing: Sequence[float]) -> str:
    sets = "\n".join(
        f"<div><dt>{_name(kind)}</dt>"
        f"<dd>{counted(one['volumes'], 'volume{s}')}, {escape(str(one['folder']))}</dd></div>"
        for kind, one in metrics["sets"].items()
    )
    shape = next(volume.shape for named in examples.values() for _, volume in named)
    grid = f"{_times(shape)} voxels of {_times(spacing)} mm"
    return f'<div class="soft">{escape(metrics["made"])}; {grid}</div>\n<dl class="sets">\n{sets}\n</dl>'


def _times(numbers: Sequence[float]) -> str:
    return " × ".join(f"{one:.3g}" for one in numbers)


def _verdicts(verdicts: Sequence[dict], notes: Sequence[str]) -> str:
    items = "\n".join(
        f'<li><span class="mark {tone}" aria-hidden="true">{MARKS[tone][0]}</span>'
        f'<span><span class="hidden">{MARKS[tone][1]}: </span>{escape(text)}</span></li>'
        for tone, text in ((one["tone"], one["text"]) for one in verdicts)
    )
    noted = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<ul class="verdicts">\n{items}\n</ul>' + (f'\n<ul class="notes">{noted}</ul>' if notes else "")


def _settings(settings: dict) -> str:
    rows = "\n".join(f"<dt>{escape(key)}</dt><dd>{escape(str(one))}</dd>" for key, one in settings.items())
    return rows and f'<dl class="settings">\n{rows}\n</dl>'


# ---------------------------------------------------------------- the table


def _table(rows: Sequence[dict]) -> str:
    if not rows:
        return ""
    lines, group = [], None
    for row in rows:
        if row["group"] != group:
            group = row["group"]
            lines.append(f'<tr class="group"><th colspan="6" scope="colgroup">{escape(group)}</th></tr>')
        lines.append(f"<tr>{_cells(row)}</tr>")
    headings = ("Metric", "Samples", "Real vs real", "Both", "Better", "Volumes")
    columns = "".join(f'<th scope="col">{one}</th>' for one in headings)
    return (
        '<p class="soft">Real vs real is the baseline: the same metric of other real scans in place of '
        "samples, which no generator is expected to beat. Both use the same number of volumes, except for "
        "copies. In brackets: 95 % confidence intervals; p: p-value of the permutation test. Drawings, from "
        "zero: samples (dot, line for the interval) and baseline (bar, band); below them the interval of "
        "their difference.</p>\n"
        f"<table>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n{chr(10).join(lines)}\n</tbody></table>"
    )


def _cells(row: dict) -> str:
    """The cells of a metric."""
    head = f'<th scope="row">{escape(row["name"])}<small>{escape(row["about"])}</small></th>'
    counts = f'<td data-label="Volumes"><small>{escape(row["counts"])}</small></td>'
    if row["value"] is None:
        reason = escape(row["missing"] or "Not computed.")
        return f'{head}<td class="missing" colspan="4">{reason}</td>{counts}'
    return (
        f'{head}<td class="number" data-label="Samples">{_with_interval(row, "value", "interval")}</td>'
        f'<td class="number" data-label="Real vs real">{_with_interval(row, "floor", "floor_interval")}</td>'
        f'<td data-label="Both">{_drawing(row)}</td>'
        f'<td class="better" data-label="Better">{BETTER[row["better"]]}</td>{counts}'
    )


def _with_interval(row: dict, value: str, interval: str) -> str:
    unit = f" {escape(row['unit'])}" if row["unit"] and row[value] is not None else ""
    text = f"<b>{_number(row[value])}</b>{unit}"
    if row[interval] is not None:
        text += f"<small>{_interval(row[interval])}</small>"
    if value == "value" and row.get("p_value") is not None:
        text += f"<small>p = {_number(row['p_value'])}</small>"
    return f"<span>{text}</span>"


def _interval(interval: Sequence[float]) -> str:
    return f"[{_number(interval[0])}, {_number(interval[1])}]"


def _drawing(row: dict) -> str:
    """A value and its baseline on one axis from zero, their ratio and their difference."""
    value, floor = row["value"], row["floor"]
    numbers = [0, value, floor or 0, *(row["interval"] or ()), *(row["floor_interval"] or ())]
    low, high = min(numbers), max(numbers)
    if floor is None or low == high:
        return ""

    def x(number: float) -> float:
        return round(6 + 148 * (number - low) / (high - low), 1)

    marks = ['<path class="axis" d="M6 11H154"/>', f'<path class="axis" d="M{x(0)} 5V17"/>']
    if row["floor_interval"] is not None:
        a, b = map(x, row["floor_interval"])
        marks.append(f'<rect class="band" x="{a}" y="3" width="{max(b - a, 1):.1f}" height="16"/>')
    marks.append(f'<path class="floor" d="M{x(floor)} 2V20"/>')
    if row["interval"] is not None:
        a, b = map(x, row["interval"])
        marks.append(f'<path class="whisker" d="M{a} 11H{b}"/>')
    marks.append(f'<circle class="value" cx="{x(value)}" cy="11" r="4"/>')
    label = f"samples {_number(value)}, real vs real {_number(floor)}"
    times = f"<small>{_number(value / floor)} × baseline</small>" if floor > 0 and value > 0 else ""
    if row.get("difference") is not None:
        times += f"<small>difference {_interval(row['difference'])}</small>"
    return (
        f'<span><svg width="160" height="22" viewBox="0 0 160 22" role="img" aria-label="{label}">'
        f"{''.join(marks)}</svg>{times}</span>"
    )


# ---------------------------------------------------------------- pictures


def _png(picture: np.ndarray) -> str:
    """A grey picture in [0, 1] as a data URI."""
    file = io.BytesIO()
    Image.fromarray(np.uint8(np.clip(picture, 0, 1) * 255 + 0.5)).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _planes(volume: np.ndarray, spacing: Sequence[float], name: str) -> str:
    """The middle axial, coronal and sagittal slice of (D, H, W), with letters at their edges."""
    right, anterior, _ = (n * mm for n, mm in zip(volume.shape, spacing, strict=True))
    slices = figures.cut(volume, spacing, (2 * right + anterior) / PIXELS)
    html = ""
    for plane, picture in list(zip(figures.PLANES, slices, strict=True))[::-1]:
        (height, width), letters = picture.shape, zip("lrtb", figures.EDGES[plane], strict=True)
        sides = "".join(f'<b class="{side}">{letter}</b>' for side, letter in letters)
        html += (
            f'<div class="plane" style="flex:{width} 1 0"><img src="{_png(picture)}" width="{width}" '
            f'height="{height}" alt="{escape(name)}, {plane} slice">{sides}</div>'
        )
    return f'<div class="planes">{html}</div>'


def _side_by_side(examples: dict, spacing: Sequence[float]) -> str:
    kinds = [kind for kind, named in examples.items() if named]
    cells = []
    for row in zip_longest(*(examples[kind] for kind in kinds)):
        for kind, example in zip(kinds, row, strict=True):
            if example is None:
                cells.append("<div></div>")
                continue
            name, volume = example
            caption = f"<figcaption>{_name(kind)}: {escape(name)}</figcaption>"
            cells.append(f"<figure>{_planes(volume, spacing, f'{kind}: {name}')}{caption}</figure>")
    return (
        '<p class="soft">Middle axial and coronal slices, and a sagittal slice beside the midline, in '
        "radiological convention: the subject's right is on the left. Black is intensity 0, white 1.</p>\n"
        f'<div class="side-by-side" style="--sets:{len(kinds)}">\n{chr(10).join(cells)}\n</div>'
    )


def _pairs(pairs: Sequence[dict], spacing: Sequence[float]) -> str:
    if not pairs:
        return ""
    cards = []
    for pair in pairs:
        flagged = " flagged" if pair["flagged"] else ""
        generated, training = pair["volumes"]
        rows = (
            ("generated", pair["generated"], generated),
            ("training", pair["training"], training),
            ("absolute difference", "", np.abs(np.subtract(generated, training))),
        )
        pictures = "".join(
            f"{_planes(volume, spacing, f'{kind} {name}')}<figcaption>{kind.capitalize()}"
            f"{': ' * bool(name)}{escape(name)}</figcaption>"
            for kind, name, volume in rows
        )
        badge = f'<span class="badge{flagged}">{"Flagged" if flagged else "Not flagged"}</span>'
        numbers = f"distance {_number(pair['distance'])}, threshold {_number(pair['limit'])}"
        cards.append(f'<figure class="pair{flagged}">{badge} {numbers}{pictures}</figure>')
    return (
        '<p class="soft">The samples that are closest to a training scan, closest first. A pair is flagged '
        "as a likely copy if its distance is below the threshold; the difference of a copy is black.</p>\n"
        f'<div class="pairs">\n{chr(10).join(cards)}\n</div>'
    )


def _viewer_volumes(examples: dict, spacing: Sequence[float]) -> tuple[dict, str]:
    """The volumes for the viewer: bytes (255 for intensity 1), deflated, in base64; and a text on them.

    Large volumes are averaged over blocks of voxels, to at most `SIDE` voxels a side and `VOXELS` in all.
    """
    named = [(kind, name, volume) for kind, one in examples.items() for name, volume in one]
    full = named[0][2].shape

    for side in range(SIDE, 0, -1):
        blocks = [-(-n // side) for n in full]
        grid = [-(-n // block) for n, block in zip(full, blocks, strict=True)]
        if len(named) * math.prod(grid) <= VOXELS:
            break
    volumes = []
    for kind, name, volume in named:
        voxels = torch.as_tensor(np.clip(volume, 0, 1), dtype=torch.float32)[None, None]
        voxels = F.avg_pool3d(voxels, blocks, ceil_mode=True)[0, 0].mul(255).round().byte()
        packed = zlib.compress(voxels.numpy().tobytes(), 9)
        volumes.append({"set": kind, "name": name, "data": base64.b64encode(packed).decode()})
    millimetres = [float(mm) * block for mm, block in zip(spacing, blocks, strict=True)]
    text = (
        "Two volumes side by side, which scroll together, in radiological convention. Positions are relative "
        "to the centre of the grid. Intensities are rounded to 256 steps."
    )
    if max(blocks) > 1:
        text += (
            f" <strong>Shown are means of {_times(blocks)} voxels</strong>, {_times(grid)} of "
            f"{_times(millimetres)} mm; all metrics use the full resolution of {_times(full)}."
        )
    return {"shape": grid, "spacing": millimetres, "volumes": volumes}, text


# ---------------------------------------------------------------- charts


def _plain(text: str) -> str:
    """Short text that matplotlib does not read as a formula."""
    return brief(text, 40).replace("$", r"\$")


def _svg(figure: Figure, title: str) -> str:
    """A figure as an SVG image with text as paths, which looks the same in every browser."""
    file = io.BytesIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "report"}):
        figure.savefig(file, format="svg", metadata={"Date": None}, dpi=200)
    data = base64.b64encode(file.getvalue()).decode()
    source = f"data:image/svg+xml;base64,{data}"
    return f'<figure class="chart"><img src="{source}" alt="{escape(title)}"></figure>'


def _charts(draw: Callable[[dict], str], charts: Sequence[dict]) -> str:
    return f'<div class="charts">\n{chr(10).join(map(draw, charts))}\n</div>' if charts else ""


def _axes(height: float, **labels: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, height), layout="constrained")
    axis = figure.subplots()
    axis.set(**{key: _plain(label) for key, label in labels.items()})
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.set_axisbelow(True)
    return figure, axis


def _curve(curve: dict) -> str:
    figure, axis = _axes(3.4, title=curve["title"], xlabel=curve["x"], ylabel=curve["y"])
    others = cycle(OTHERS)
    for series in curve["series"]:
        colour = COLOURS.get(series["name"]) or next(others)
        (line,) = axis.plot(series["x"], series["y"], "-", color=colour, label=_plain(series["name"]))
        line.set_marker("o" if len(series["x"]) == 1 else "")
        if series.get("low") is not None:
            axis.fill_between(series["x"], series["low"], series["high"], color=colour, alpha=0.18, lw=0)
    axis.set_yscale("log" if curve["log"] else "linear")
    if axis.lines:
        axis.legend(frameon=False)
    return _svg(figure, f"{curve['title']}: {curve['y']} by {curve['x']}")


def _distribution(chart: dict) -> str:
    """Each number as a point, with a box of the quartiles and the median."""
    groups = {kind: np.asarray(numbers, float) for kind, numbers in chart["groups"].items()}
    figure, axis = _axes(1.1 + 0.55 * len(groups), title=chart["title"], xlabel=chart["x"])
    draws = np.random.default_rng(0)
    for row, (kind, numbers) in enumerate(groups.items()):
        colour = COLOURS.get(kind, OTHERS[0])
        # Many points are one image instead of as many elements.
        look = {"s": 11, "color": colour, "alpha": 0.45, "lw": 0, "rasterized": len(numbers) > 300}
        axis.scatter(numbers, row + draws.uniform(-0.28, 0.28, len(numbers)), **look)
        if len(numbers):
            low, median, high = np.quantile(numbers, (0.25, 0.5, 0.75))
            axis.barh(row, high - low, left=low, height=0.62, fill=False, edgecolor=colour, lw=1.4)
            axis.plot([median, median], [row - 0.31, row + 0.31], color=colour, lw=2.6, solid_capstyle="butt")
    axis.set_yticks(range(len(groups)), [_plain(f"{kind} ({len(one)})") for kind, one in groups.items()])
    axis.set_ylim(len(groups) - 0.4, -0.6)  # the first on top
    axis.grid(visible=False, axis="y")
    return _svg(figure, f"{chart['title']}, {chart['x']}, of " + ", ".join(groups))
