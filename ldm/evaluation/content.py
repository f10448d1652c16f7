"""What the report shows beside the table of metrics: closest pairs, curves and distributions."""

from collections.abc import Callable

import numpy as np

from ldm.data.cases import Case
from ldm.evaluation.groups import GENERATED, HELD_OUT, TRAINING, Comparison
from ldm.evaluation.reading import Source
from ldm.evaluation.table import distances_of, tissue_ml
from ldm.metrics import BINS, TISSUES

PAIRS = 8  # closest pairs with pictures


def nearest_scans(groups: Comparison, nearest: dict | None) -> list[dict]:
    """For metrics.json: each sample and its nearest training scan, the closest first."""
    if nearest is None:
        return []
    rows = [
        {
            "generated": name,
            "training": groups.training.names[neighbour.index],
            "distance": neighbour.distance,
            "mirrored": neighbour.mirrored,
            "copy": bool(copy),
        }
        for name, neighbour, copy in zip(
            groups.generated.names, nearest[GENERATED], nearest["found"].copies, strict=True
        )
    ]
    return sorted(rows, key=lambda row: row["distance"])


def closest_pairs(
    rows: list[dict], nearest: dict | None, sources: dict[str, Source], read: Callable
) -> list[dict]:
    """The first of `nearest_scans`, with the two volumes of each, read again."""
    cases = {name: {case.name: case for case in source.cases} for name, source in sources.items()}

    def volume(case: Case) -> np.ndarray:
        return read(case)[0, 0].cpu().numpy()

    pairs = []
    for row in rows[:PAIRS]:
        sample, scan = (volume(cases[name][row[name]]) for name in (GENERATED, TRAINING))
        pairs.append(
            {
                "generated": row["generated"],
                "training": row["training"] + " (mirrored)" * row["mirrored"],
                "distance": row["distance"],
                "limit": nearest["found"].threshold,
                "flagged": row["copy"],
                "volumes": (sample, scan[::-1] if row["mirrored"] else scan),
            }
        )
    return pairs


def curves(groups: Comparison) -> list[dict]:
    """Mean spectrum and histogram of each group, with the 5th and 95th percentile over volumes."""

    def series(key: str, x: np.ndarray) -> list[dict]:
        found = []
        for group in groups.groups:
            rows = np.array(getattr(group, key))
            low, high = np.quantile(rows, [0.05, 0.95], axis=0).tolist()
            one = {"name": group.name, "x": x.tolist(), "y": rows.mean(0).tolist(), "low": low, "high": high}
            found.append(one)
        return found

    return [
        {
            "title": "Power spectrum",
            "x": "frequency (cycles/voxel)",
            "y": "power",
            "log": True,
            "series": series("spectra", groups.held_out.spectrum.frequencies),
        },
        {
            "title": "Foreground intensities",
            "x": "intensity (unit range)",
            "y": "share of voxels",
            "log": False,
            "series": series("histograms", (np.arange(BINS) + 0.5) / BINS),
        },
    ]


def distributions(groups: Comparison, nearest: dict | None) -> list[dict]:
    """Tissue volumes, and distances to the nearest training scan, of each volume."""
    found = [
        {
            "title": "Foreground volume" if name == "foreground" else f"{name.capitalize()} tissue",
            "x": "ml",
            "groups": {group.name: tissue_ml(group.tissues, name).tolist() for group in groups.groups},
        }
        for name in ("foreground", *TISSUES)
    ]
    if nearest:
        distances = {name: distances_of(nearest[name]).tolist() for name in (HELD_OUT, GENERATED)}
        found.append({"title": "Distance to the nearest training scan", "x": "distance", "groups": distances})
    return found
