"""The page of an evaluation: one HTML file that opens by double click and takes nothing from elsewhere."""

import base64
import hashlib
import io
import json
import math
import re
import zlib
from collections.abc import Sequence
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
SIDE = 128  # voxels a side that the viewer shows at most,
VOXELS = 16_000_000  # and those of all its volumes together: some 8 MB of brains
PIXELS = 540  # width of a picture of three planes

# Told apart by the colour-blind: of the sets, and of whatever else a chart shows.
COLOURS = {"held-out": "#0072b2", "generated": "#d55e00", "training": "#009e73"}
OTHERS = ("#556070", "#7b4fa3", "#a07a00", "#b03a7a")
MARKS = {
    "good": ("✓", "Good"),
    "warn": ("!", "Caution"),
    "bad": ("✕", "Bad"),
    "none": ("i", "For information"),
}

BETTER = {"lower": "↓ lower", "higher": "↑ higher", "near floor": "≈ near floor", "": "to compare"}


def write_report(
    path: Path,
    metrics: dict,
    *,
    spacing: Sequence[float],
    shown: dict[str, Sequence[tuple[str, np.ndarray]]],
    pairs: Sequence[dict],
    curves: Sequence[dict],
    spreads: Sequence[dict],
    log: Sequence[dict],
) -> None:
    """Write the page: verdicts, figures, slices, a viewer, closest pairs, distributions and curves.

    Volumes are (D, H, W) in RAS in [0, 1], all on one grid; what lies outside [0, 1] is shown as 0 or 1.

    Args:
        metrics: the content of `metrics.json`.
        spacing: mm between voxels: right, anterior, superior.
        shown: for each set its named volumes for the slices and the viewer, one at least.
        pairs: closest generated and training volumes, closest first: "generated" and "training" (names),
            "distance", "limit", "flagged" and "volumes" (the two).
        curves: "title", "x", "y" (labels), "log" (whether y is logarithmic) and "series", each with "name",
            "x", "y" and, or None, "low" and "high".
        spreads: "title", "x" (label with unit) and "groups": for each set its numbers.
        log: entries of the training log.

    Raises:
        OSError: the disk failed or is full; the file is named.
    """
    volumes, viewed = _viewer_volumes(shown, spacing)
    template = TEMPLATE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        # The browser itself refuses whatever is not in the file, and any script but the template's.
        "policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'",
        "title": escape(metrics["title"]),
        "about": _about(metrics, shown, spacing),
        "verdicts": _section("verdict", "Verdict", _verdicts(metrics["verdicts"], metrics["notes"])),
        "figures": _section("figures", "Figures", _table(metrics["figures"])),
        "slices": _section("slices", "Side by side", _side_by_side(shown, spacing)),
        "viewed": viewed,
        "volumes": json.dumps(volumes).replace("<", "\\u003c"),  # no name may close the element
        "pairs": _section("pairs", "Closest training volumes", _pairs(pairs, spacing)),
        "spreads": _section("spreads", "Distributions", _charts([_spread(one) for one in spreads])),
        "curves": _section("curves", "Curves", _charts([_curve(one) for one in curves])),
        "losses": _section("losses", "Training", _losses(log)),
        "settings": _section("settings", "Settings", _settings(metrics["settings"])),
    }
    page = re.sub(
        r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template
    )  # once: no part is filled in again
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
    """The heading of a set of volumes, with its colour."""
    return f'<span class="dot {escape(kind)}"></span>{escape(kind[:1].upper() + kind[1:])}'


def _about(metrics: dict, shown: dict, spacing: Sequence[float]) -> str:
    sets = "\n".join(
        f"<div><dt>{_name(kind)}</dt>"
        f"<dd>{counted(one['volumes'], 'volume{s}')}, {escape(str(one['folder']))}</dd></div>"
        for kind, one in metrics["sets"].items()
    )
    shape = next(volume.shape for named in shown.values() for _, volume in named)
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
        lines.append(f"<tr>{_figure(row)}</tr>")
    headings = ("Figure", "Value", "Floor", "Value and floor", "Better", "From")
    columns = "".join(f'<th scope="col">{one}</th>' for one in headings)
    return (
        '<p class="soft">The floor is what real scans score against real scans by the same computation: no '
        "generator is expected to do better. Value and floor are of equal numbers of volumes, but for "
        "copies. In brackets below a number: its 95 % interval; p: how often two sets of one kind are as far "
        "apart by chance. In the drawings, from zero: the value with its interval (dot, line) and the floor "
        "with its interval (bar, band); below them the interval of value minus floor.</p>\n"
        f"<table>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n{chr(10).join(lines)}\n</tbody></table>"
    )


def _figure(row: dict) -> str:
    """The cells of a figure."""
    head = f'<th scope="row">{escape(row["name"])}<small>{escape(row["about"])}</small></th>'
    counts = f'<td data-label="From"><small>{escape(row["counts"])}</small></td>'
    if row["value"] is None:
        reason = escape(row["missing"] or "It was not computed.")
        return f'{head}<td class="missing" colspan="4">{reason}</td>{counts}'
    value, floor = _with_interval(row, "value", "interval"), _with_interval(row, "floor", "floor_interval")
    return (
        f'{head}<td class="number" data-label="Value">{value}</td>'
        f'<td class="number" data-label="Floor">{floor}</td>'
        f'<td data-label="Drawn">{_drawing(row)}</td>'
        f'<td class="better" data-label="Better">{BETTER[row["better"]]}</td>{counts}'
    )


def _with_interval(row: dict, value: str, interval: str) -> str:
    unit = f" {escape(row['unit'])}" if row["unit"] and row[value] is not None else ""
    text = f"<span><b>{_number(row[value])}</b>{unit}"
    if row[interval] is not None:
        text += f"<small>{_interval(row[interval])}</small>"
    if value == "value" and row.get("p_value") is not None:
        text += f"<small>p = {_number(row['p_value'])}</small>"
    return text + "</span>"


def _interval(interval: Sequence[float]) -> str:
    return f"[{_number(interval[0])}, {_number(interval[1])}]"


def _drawing(row: dict) -> str:
    """A figure and its floor on one line that begins at zero, and how many floors it is."""
    value, floor = row["value"], row["floor"]
    if floor is None:  # nothing to see it beside
        return ""
    numbers = [0, value, floor, *(row["interval"] or ()), *(row["floor_interval"] or ())]
    low, high = min(numbers), max(numbers)
    if low == high:
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
    label = f"value {_number(value)}, floor {_number(floor)}"
    times = f"<small>{_number(value / floor)} × floor</small>" if floor > 0 and value > 0 else ""
    if row.get("difference") is not None:
        times += f"<small>difference {_interval(row['difference'])}</small>"
    return (
        f'<span><svg width="160" height="22" viewBox="0 0 160 22" role="img" aria-label="{label}">'
        f"{''.join(marks)}</svg>{times}</span>"
    )


# ---------------------------------------------------------------- pictures


def _png(picture: np.ndarray, width: int, height: int) -> str:
    """A grey picture in [0, 1], scaled, as a data URI."""
    image = Image.fromarray(picture.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    Image.fromarray(np.uint8(np.clip(np.asarray(image), 0, 1) * 255 + 0.5)).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _planes(volume: np.ndarray, spacing: Sequence[float], name: str) -> str:
    """The middle slices of (D, H, W), each with its true proportions and the letters of its sides.

    As radiology has them: the subject's right is on the left and, in the sagittal plane, the front.
    """
    sagittal, coronal, axial = (
        figures.upright(volume, plane, index)
        for plane, index in zip(figures.PLANES, figures.middle(volume.shape), strict=True)
    )
    right, anterior, superior = (n * mm for n, mm in zip(volume.shape, spacing, strict=True))
    scale = PIXELS / (2 * right + anterior)
    html = ""
    for plane, picture, across, down, letters in (
        ("axial", axial, right, anterior, "RLAP"),
        ("coronal", coronal, right, superior, "RLSI"),
        ("sagittal", sagittal, anterior, superior, "APSI"),
    ):
        width, height = max(1, round(across * scale)), max(1, round(down * scale))
        sides = "".join(f'<b class="{side}">{one}</b>' for side, one in zip("lrtb", letters, strict=True))
        html += (
            f'<div class="plane" style="flex:{across:.4g} 1 0"><img src="{_png(picture, width, height)}" '
            f'width="{width}" height="{height}" alt="{escape(name)}, {plane} slice">{sides}</div>'
        )
    return f'<div class="planes">{html}</div>'


def _side_by_side(shown: dict, spacing: Sequence[float]) -> str:
    kinds = [kind for kind, named in shown.items() if named]
    cells = []
    for row in zip_longest(*(shown[kind] for kind in kinds)):
        for kind, one in zip(kinds, row, strict=True):
            if one is None:
                cells.append("<div></div>")
                continue
            name, volume = one
            planes = _planes(volume, spacing, f"{kind}: {name}")
            caption = f"<figcaption>{_name(kind)}: {escape(name)}</figcaption>"
            cells.append(f"<figure>{planes}{caption}</figure>")
    return (
        '<p class="soft">Middle slices: axial, coronal, and sagittal beside the midline. Radiological '
        "convention: the subject's right is on the left of the picture. Black is intensity 0, white 1.</p>\n"
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
        numbers = f"distance {_number(pair['distance'])}, limit {_number(pair['limit'])}"
        cards.append(f'<figure class="pair{flagged}">{badge} {numbers}{pictures}</figure>')
    return (
        '<p class="soft">The generated volumes that are closest to a training volume, closest first. A pair '
        "is flagged as a likely copy where its distance is below the limit. The difference of a copy is "
        "black.</p>\n"
        f'<div class="pairs">\n{chr(10).join(cards)}\n</div>'
    )


def _viewer_volumes(shown: dict, spacing: Sequence[float]) -> tuple[dict, str]:
    """What the viewer reads: bytes (255 for intensity 1), deflated, in base64; and a sentence on them.

    Volumes too large are averaged over blocks of whole voxels until none has more than `SIDE` a side, nor
    all of them more than `VOXELS`.
    """
    named = [(kind, name, volume) for kind, one in shown.items() for name, volume in one]
    full = named[0][2].shape

    def blocks(side: int) -> list[int]:
        return [-(-n // side) for n in full]

    def grid(side: int) -> list[int]:
        return [-(-n // block) for n, block in zip(full, blocks(side), strict=True)]

    side = next(
        side for side in range(SIDE, 0, -1) if side == 1 or len(named) * math.prod(grid(side)) <= VOXELS
    )
    volumes = []
    for kind, name, volume in named:
        voxels = torch.as_tensor(np.clip(volume, 0, 1), dtype=torch.float32)[None, None]
        voxels = F.avg_pool3d(voxels, blocks(side), ceil_mode=True)[0, 0].mul(255).round().byte()
        packed = zlib.compress(voxels.numpy().tobytes(), 9)
        volumes.append({"set": kind, "name": name, "data": base64.b64encode(packed).decode()})
    millimetres = [float(mm) * block for mm, block in zip(spacing, blocks(side), strict=True)]
    text = (
        "Two volumes side by side, in planes that scroll together. Radiological convention: the subject's "
        "right is on the left, in the sagittal plane the front. Positions are from the centre of the grid. "
        "Intensities are in 256 steps."
    )
    if blocks(side) != [1, 1, 1]:
        text += (
            f" <strong>Shown here are means of {_times(blocks(side))} voxels</strong>, {_times(grid(side))} "
            f"of {_times(millimetres)} mm; all figures are of the whole volumes of {_times(full)}."
        )
    return {"shape": grid(side), "spacing": millimetres, "volumes": volumes}, text


# ---------------------------------------------------------------- charts


def _plain(text: str) -> str:
    """Text of which matplotlib makes no formula, and which fits."""
    return brief(text, 40).replace("$", r"\$")


def _svg(figure: Figure, title: str) -> str:
    """A figure as an image of curves: the same in every browser, with no font nor name to clash."""
    file = io.BytesIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "report"}):
        figure.savefig(file, format="svg", metadata={"Date": None}, dpi=200)
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure class="chart"><img src="data:image/svg+xml;base64,{data}" alt="{escape(title)}"></figure>'
    )


def _charts(charts: Sequence[str]) -> str:
    return f'<div class="charts">\n{chr(10).join(charts)}\n</div>' if charts else ""


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


def _spread(spread: dict) -> str:
    """Each number as a point; over them the box of the quartiles and the median."""
    groups = {kind: np.asarray(numbers, float) for kind, numbers in spread["groups"].items()}
    groups = {kind: numbers[np.isfinite(numbers)] for kind, numbers in groups.items()}
    figure, axis = _axes(1.1 + 0.55 * len(groups), title=spread["title"], xlabel=spread["x"])
    draws = np.random.default_rng(0)
    for row, (kind, numbers) in enumerate(groups.items()):
        colour = COLOURS.get(kind, OTHERS[0])
        axis.scatter(
            numbers,
            row + draws.uniform(-0.28, 0.28, len(numbers)),
            s=11,
            color=colour,
            alpha=0.45,
            lw=0,
            rasterized=len(numbers) > 300,  # one picture instead of many elements
        )
        if len(numbers):
            low, median, high = np.quantile(numbers, (0.25, 0.5, 0.75))
            axis.barh(row, high - low, left=low, height=0.62, fill=False, edgecolor=colour, lw=1.4)
            axis.plot([median, median], [row - 0.31, row + 0.31], color=colour, lw=2.6, solid_capstyle="butt")
    axis.set_yticks(range(len(groups)), [_plain(f"{kind} ({len(one)})") for kind, one in groups.items()])
    axis.set_ylim(len(groups) - 0.4, -0.6)  # the first on top
    axis.grid(visible=False, axis="y")
    return _svg(figure, f"{spread['title']}, {spread['x']}, of " + ", ".join(groups))


def _losses(log: Sequence[dict]) -> str:
    return _svg(figures.loss_figure(log), "Training and held-out losses by step") if log else ""
