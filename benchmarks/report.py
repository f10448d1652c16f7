"""The figures of a benchmark as markdown."""

import math
import statistics
from collections.abc import Sequence

from benchmarks import reference

NAMES = {
    "autoencoder": "autoencoder step",
    "diffusion": "diffusion step",
    "sampling": "a volume, drawn and decoded",
    "decoding": "decoding",
}
SIDES = ("reference", "ours")


def shown_time(side: dict) -> str:
    """Median and range in seconds, and the share of the arithmetic floor where it is known."""
    seconds = side["seconds"]
    text = f"{statistics.median(seconds):.3g} s ({min(seconds):.3g}–{max(seconds):.3g})"
    return text + (f", {side['floor_share']:.1%} of the floor" if "floor_share" in side else "")


def table(rows: Sequence[dict]) -> str:
    """Markdown: a line a part."""
    lines = [
        "| | reference | ours | ratio | reference GB | ours GB | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [NAMES[row["part"]], *(shown_time(row[side]) for side in SIDES)]
        cells.append(f"{row['ratio']:.2f} ({row['ratio_low']:.2f}–{row['ratio_high']:.2f})")
        peaks = [row[side].get("peak_bytes", math.nan) for side in SIDES]
        cells += [f"{peak / 1e9:.3g}" for peak in peaks] + [f"{peaks[0] / peaks[1]:.2f}" if peaks[1] else ""]
        lines.append(f"| {' | '.join(cell.replace('nan', '') for cell in cells)} |")
    return "\n".join(lines)


def quality_report(result: dict) -> str:
    """Markdown: distance over time, distance by sampler, and what follows."""
    lines = [
        f"Own-feature distance (MMD^2, 90 % bootstrap interval) of {result['samples']} volumes to "
        f"{result['held_out']} held-out ones, after training on {result['training']}. Not comparable with "
        "published figures, nor between autoencoders.",
        f"Real against real, training against held-out: {shown_distance(result['floor'])}; reconstructions "
        f"of training volumes: {shown_distance(result['reconstructions'])}.",
        f"Both train for {result['minutes']:g} minutes, batch {result['batch_size']}, learning rate "
        f"{result['lr']:g}: the reference at that rate throughout, without average, its samples not clipped "
        "to -1 .. 1; ours as the config says, encoding included.",
        "",
        "| share of the time | reference: s, steps | distance | ours: s, steps | distance |",
        "|---|---|---|---|---|",
    ]
    for marks in zip(*(result["marks"][side] for side in SIDES), strict=True):
        cells = [f"{marks[0]['share']:.3g}"]
        for mark in marks:
            cells += [f"{mark['seconds']:.0f}, {mark['steps']}", shown_distance(mark)]
        lines.append(f"| {' | '.join(cells)} |")
    samplers = [result["marks"][side][-1]["sampler"] for side in SIDES]
    end = result["end"]
    lines += [
        "",
        f"Samplers of these: reference {samplers[0]} steps (more accurate per step than its own), ours "
        f"{samplers[1]} steps. At the end:",
        "",
        "| | distance | s a volume | ratio |",
        "|---|---|---|---|",
        f"| reference, ddpm {reference.STEPS} steps | {shown_distance(end)} | {end['seconds']:.3g} | 1 |",
    ]
    for one in result["by_steps"]:
        name, speedup = f"ours, {one['sampler']} {one['steps']} steps", end["seconds"] / one["seconds"]
        lines.append(f"| {name} | {shown_distance(one)} | {one['seconds']:.3g} | {speedup:.1f} |")
    return "\n".join([*lines, "", *shown_conclusions(result)])


def shown_distance(score: dict) -> str:
    """Value and interval."""
    return f"{score['distance']:.3g} ({score['low']:.3g} to {score['high']:.3g})"


def shown_conclusions(result: dict) -> list[str]:
    """Time to the reference's quality, a sample at equal quality, and whether the end differs at all."""
    low, high = result["difference"]
    reached = "not reached" if result["reached"] is None else f"{result['reached']:.3g} of the time"
    faster = "none" if result["speedup"] is None else f"{result['speedup']:.1f} times as fast"
    steps = "" if result["speedup"] is None else f" ({result['speedup_steps']} steps)"
    return [
        f"Time to the quality that the reference has at its end, by the better of its samplers: {reached}.",
        f"A volume of ours no worse than the reference's by its own sampler: {faster}{steps}.",
        f"Ours less the reference's distance at the end, 90 % interval: {low:.3g} to {high:.3g}.",
    ]
