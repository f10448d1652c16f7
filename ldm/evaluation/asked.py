"""Do samples show what they were asked for? Sizes of structures by number, and distances by category."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage

from ldm import UserError, few
from ldm.data.labels import label_of
from ldm.diffusion.conditioning import MISSING
from ldm.evaluation import distances
from ldm.evaluation.distances import DRAWS, KernelDistance
from ldm.evaluation.features import OWN, FeatureSpace, stacked
from ldm.evaluation.groups import Comparison, VolumeGroup
from ldm.evaluation.table import Metric
from ldm.metrics import FOREGROUND

GROUP = "Conditions"
MOST_CATEGORIES = 8  # values of scans and samples, above which a column is no category
LEAST = 4  # volumes of a line, and of each side of a distance


@dataclass(frozen=True)
class Structure:
    """A part of the first channel that thresholds find, such as the ventricles of T1w: what is dark and deep.

    Args:
        name: of the structure.
        low, high: of its values, in the unit range.
        depth: in mm, how far inside the foreground, its holes filled, it lies at least.
    """

    name: str
    low: float
    high: float
    depth: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Structure | LabelStructure":
        """Of `ventricles=0:0.35:24`, `ventricles=label:3` or `ventricles=label:3,4`. Raises UserError: it has
        no such form."""
        name, _, numbers = text.partition("=")
        kind, _, value = numbers.partition(":")
        if name and kind == "label" and re.fullmatch("[0-9]{1,5}(,[0-9]{1,5})*", value):
            return LabelStructure(name, tuple(map(int, value.split(","))))
        try:
            low, high, *depth = map(float, numbers.split(":"))
        except ValueError:
            low, high, depth = 1.0, 0.0, []
        if not (name and low < high and len(depth) < 2 and all(one >= 0 for one in depth)):
            raise UserError(
                f"--structure {text}: expected NAME=LOW:HIGH or NAME=LOW:HIGH:DEPTH, such as "
                "ventricles=0:0.35:24: values from 0 to 1, and a depth in mm; or NAME=label:VALUE."
            )
        return cls(name, low, high, *depth)

    def millilitres(self, volume: torch.Tensor, spacing: Sequence[float]) -> float:
        """Its size in a volume (1, C, D, H, W) in the unit range, with voxels of `spacing` mm."""
        volume = volume[0, 0].cpu().numpy()
        inside = ndimage.binary_fill_holes(volume > FOREGROUND)
        found = inside & (volume >= self.low) & (volume < self.high)
        if self.depth:
            depth = ndimage.distance_transform_edt(np.pad(inside, 1), sampling=spacing)
            found &= depth[1:-1, 1:-1, 1:-1] > self.depth
        return float(found.sum() * np.prod(spacing) / 1000)


@dataclass(frozen=True)
class LabelStructure:
    """A structure that a label names.

    Args:
        name: of the structure.
        values: of the label, that belong to it.
        find: a volume (1, C, D, H, W) -> the label, (D, H, W).
    """

    name: str
    values: Sequence[int]
    find: Callable | None = None

    def found_by(self, segment: Callable | None, labels: Sequence[int]) -> "LabelStructure":
        """As a segmenter finds it, or else by the channels of labels that volumes have.

        Raises:
            UserError: neither knows its values.
        """
        known = segment.values if segment else labels
        if unknown := [value for value in self.values if value not in known]:
            where = f"has {few(known)}" if known else "is needed; give one by --segmenter"
            what = "the segmenter" if segment or not known else "label_values"
            raise UserError(f"--structure {self.name}=label:{unknown[0]}: {what} {where}.")

        def drawn(volume: torch.Tensor) -> np.ndarray:
            return label_of(volume[0, -len(labels) :].cpu().numpy(), labels)

        return replace(self, find=segment or drawn)

    def millilitres(self, volume: torch.Tensor, spacing: Sequence[float]) -> float:
        """As of `Structure`."""
        return float(np.isin(self.find(volume), self.values).sum() * np.prod(spacing) / 1000)


def known_values(values: dict) -> dict[str, str]:
    """Values of a table or a record that are known, as `--condition` writes them."""
    texts = {name: str(value).strip() for name, value in values.items()}
    return {
        name: text if _number(text) is None else f"{_number(text):.12g}"
        for name, text in texts.items()
        if text.lower() not in (*MISSING, "unknown", "none")
    }


def line(asked: np.ndarray, measured: np.ndarray) -> tuple[float, float]:
    """Pearson's correlation, and the slope by least squares; NaN where one of them is constant."""
    if np.ptp(asked) == 0 or np.ptp(measured) == 0:
        return float("nan"), float("nan")
    a, m = asked - asked.mean(), measured - measured.mean()
    return float((a @ m) / np.sqrt((a @ a) * (m @ m))), float((a @ m) / (a @ a))


def condition_metrics(groups: Comparison, values: dict[str, dict[str, dict]]) -> list[Metric]:
    """The rows of the table for what samples were asked for. A number that is the size of a structure is
    compared with that one, other numbers with all.

    Args:
        values: by group and volume, the conditions of a sample or the covariates of a scan, by name.
    """
    metrics, conditions = [], values[groups.generated.name]
    for name in sorted({name for one in conditions.values() for name in one}):
        scans = [one[name] for group in groups.groups for one in values[group.name].values() if name in one]
        if len(set(map(str, scans))) <= MOST_CATEGORIES:
            metrics += _by_category(groups, values, name)
        if any(_number(one.get(name)) is not None for one in conditions.values()):
            sizes = groups.generated.sizes
            for structure in [name] if name in sizes else sizes:
                metrics += _by_number(groups, values, name, structure)
    return metrics


def _by_number(groups: Comparison, values: dict, name: str, structure: str) -> list[Metric]:
    """Correlation and slope of a structure's size with a number, of samples and of all scans."""
    pairs = [_pairs([groups.generated], values, name, structure)]
    pairs += [_pairs([one for one in groups.groups if one is not groups.generated], values, name, structure)]
    texts = (f"Correlation of {structure} with {name}", f"Slope of {structure} over {name}")
    metrics = [
        Metric(f"{kind}_{structure}_{name}", GROUP, text, unit=unit, better="near baseline")
        for kind, text, unit in zip(
            ("correlation", "slope"), texts, ("", f"ml per unit of {name}"), strict=True
        )
    ]
    for i, metric in enumerate(metrics):
        if min(len(asked) for asked, _ in pairs) < LEAST:
            metric.missing = f"fewer than {LEAST} samples or scans with a value of {name}"
            continue
        metric.about = "Asked for and measured in samples; of real scans their own values."
        found, real = (line(*pair)[i] for pair in pairs)
        draws, real_draws = (_bootstrap(*pair)[:, i] for pair in pairs)
        metric.fill(found, real, draws, real_draws, min(len(asked) for asked, _ in pairs))
        metric.counts = f"{len(pairs[0][0])} samples, {len(pairs[1][0])} scans"
    return metrics


def _pairs(
    groups: Sequence[VolumeGroup], values: dict, name: str, structure: str
) -> tuple[np.ndarray, np.ndarray]:
    """Of the volumes that have a number: it, and the size of the structure in ml."""
    found = [
        (number, group.sizes[structure][i])
        for group in groups
        for i, volume in enumerate(group.names)
        if (number := _number(values[group.name].get(volume, {}).get(name))) is not None
    ]
    return tuple(np.array(found, dtype=float).reshape(-1, 2).T)


def _bootstrap(asked: np.ndarray, measured: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(0)
    chosen = rng.integers(len(asked), size=(DRAWS, len(asked)))
    return np.array([line(asked[some], measured[some]) for some in chosen])


def _by_category(groups: Comparison, values: dict, name: str) -> list[Metric]:
    """For each category, the kernel distance of the samples that were asked for it to the scans that have it,
    and beside it that of the scans that have another."""
    metrics = []
    if OWN not in groups.held_out.networks:
        return metrics
    scans = [one for one in groups.groups if one is not groups.generated]
    space = FeatureSpace(groups.reference.rows(OWN))
    for category in sorted({str(one[name]) for one in values[groups.generated.name].values() if name in one}):
        samples = _rows([groups.generated], values, name, category)
        same, others = (_rows(scans, values, name, category, have) for have in (True, False))
        metric = Metric(f"mmd_{OWN}_{name}_{category}", GROUP, f"Kernel distance, {name} {category}")
        metrics.append(metric)
        if min(map(len, (samples, same, others))) < LEAST:
            metric.missing = f"fewer than {LEAST} samples or scans with {name} {category}, or with another"
            continue
        metric.about = "Of samples to scans of this category. The baseline is that of other scans to them."
        rows = [space(stacked(one)) for one in (samples, same, others)]
        own, other = KernelDistance(rows[0], rows[1]), KernelDistance(rows[2], rows[1])
        metric.value, metric.floor = own.value, other.value
        metric.interval, metric.floor_interval = (distances.interval(one.bootstrap()) for one in (own, other))
        metric.counts = f"{len(samples)} samples, {len(same)} scans, {len(others)} others"
    return metrics


def _rows(
    groups: Sequence[VolumeGroup], values: dict, name: str, category: str, have: bool = True
) -> list[list]:
    """Own features of the volumes that have a category, or another one."""
    found = []
    for group in groups:
        for volume, features in zip(group.names, group.features[OWN], strict=True):
            value = values[group.name].get(volume, {}).get(name)
            if value is not None and (str(value) == category) == have:
                found.append(features)
    return found


def _number(value: object) -> float | None:
    """A value of a table or a record as a finite number, or None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None
