"""How good are label maps that were drawn without images? Sizes of structures, whether any is missing, the
parts they fall into, overlap, and copies of training maps; each beside the same of real maps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy import ndimage
from scipy.stats import wasserstein_distance

from ldm import counted
from ldm.data.labels import shown, structure_sizes
from ldm.data.preprocessing import largest_share
from ldm.evaluation import distances, verdicts
from ldm.evaluation.copies import Neighbour, find_copies
from ldm.evaluation.groups import GENERATED, HELD_OUT, TRAINING, Comparison, subset
from ldm.evaluation.reading import EXAMPLES, Reader, Source, volumes_of
from ldm.evaluation.table import SHIFT_TOLERANCE, Metric, copy_metrics, distances_of
from ldm.metrics import mean_dice
from ldm.models.autoencoder import Autoencoder
from ldm.system.messages import progress_bar
from ldm.system.ranks import Run

GROUP = "Structures"
LONGEST = 48  # voxels along the longest side of the maps that overlap is measured on
MAX_PAIRS = 100  # of maps, for their overlap
OVERLAP_TOLERANCE = [-0.05, 0.05]  # of the Dice of two maps
PARTS_TOLERANCE = [-np.inf, 0.5]  # of the mean number of parts of a structure


@dataclass
class MapGroup:
    """What is kept of the label maps of a group.

    Attributes:
        sizes: ml by structure, of each map.
        parts: numbers of connected components of each label, of each map.
        small: indices of labels, (d, h, w) uint8 of each map.
        overlaps: Dice of neighbours, pairs that share no map.
        reconstructions: Dice with what the autoencoder gives back.
    """

    name: str
    sizes: dict[str, list[float]]
    names: list[str] = field(default_factory=list)
    parts: list[np.ndarray] = field(default_factory=list)
    small: list[np.ndarray] = field(default_factory=list)
    overlaps: list[float] = field(default_factory=list)
    reconstructions: list[float] = field(default_factory=list)
    networks: tuple = ()  # no features

    def __len__(self) -> int:
        return len(self.names)


@torch.inference_mode()
def read_maps(
    sources: dict[str, Source],
    read: Reader,
    structures: dict[str, Sequence[int]],
    encoder: Autoencoder | None,
    run: Run,
) -> tuple[Comparison, dict[str, list[tuple[str, np.ndarray]]]]:
    """Read all label maps once.

    Args:
        read: onto the grid of the samples, with channels of labels alone.
        structures: whose sizes are measured: values of labels by name.
        encoder: the autoencoder, or None.

    Returns:
        The groups, and of each a few examples for the report: (name, (D, H, W)).
    """
    values, groups, examples = read.preprocessing.labels, {}, {}
    voxel, indices = float(np.prod(read.preprocessing.spacing)), range(1, len(values) + 1)
    structures = {name: [values.index(one) + 1 for one in some] for name, some in structures.items()}
    step = -(-max(read.size) // LONGEST)
    for name, source in sources.items():
        group = groups[name] = MapGroup(name, {structure: [] for structure in structures})
        chosen = set(sorted(case.name for case in source.cases)[:EXAMPLES])
        examples[name] = []
        for case, volume in volumes_of(source, read, run):
            index = largest_share(volume[0].cpu().numpy(), indices)
            for structure, ml in structure_sizes(index, voxel, structures).items():
                group.sizes[structure].append(ml)
            group.names.append(case.name)
            group.parts.append(parts_of(index, len(values)))
            group.small.append(index[::step, ::step, ::step])
            if len(group) % 2 == 0 and len(group.overlaps) < MAX_PAIRS:
                group.overlaps.append(overlap(*group.small[-2:], len(values)))
            if name == HELD_OUT and encoder:
                group.reconstructions.append(float(mean_dice(encoder.reconstruct(volume), volume)))
            if case.name in chosen:
                examples[name].append((case.name, shown(volume[0], len(values)).cpu().numpy()))
        examples[name].sort(key=lambda example: example[0])
    return Comparison(groups[HELD_OUT], groups[GENERATED], groups.get(TRAINING), None), examples


def parts_of(index: np.ndarray, labels: int) -> np.ndarray:
    """How many connected components, also across edges and corners, each of so many labels has in a map of
    their indices from 1, (D, H, W) -> (L,)."""
    return np.array([ndimage.label(index == i, np.ones((3, 3, 3)))[1] for i in range(1, labels + 1)])


def overlap(first: np.ndarray, second: np.ndarray, labels: int) -> float:
    """Dice of two maps of indices, the mean over the labels that either has; 0 where neither has one."""
    joint = np.bincount(
        first.astype(np.int64).ravel() * (labels + 1) + second.ravel(), minlength=(labels + 1) ** 2
    ).reshape(labels + 1, labels + 1)
    sizes = (joint.sum(0) + joint.sum(1))[1:]
    return float((2 * joint.diagonal()[1:][sizes > 0] / sizes[sizes > 0]).mean()) if sizes.any() else 0.0


def nearest_maps(groups: Comparison, labels: int, run: Run) -> dict | None:
    """As `table.nearest_training_volumes`, by 1 - Dice, of each map as it is and mirrored left to right; None
    without training maps."""
    if groups.training is None:
        return None

    def nearest(small: np.ndarray) -> Neighbour:
        found = [
            (1 - overlap(one, other, labels), i, mirrored)
            for mirrored, one in ((False, small), (True, small[::-1]))
            for i, other in enumerate(groups.training.small)
        ]
        distance, index, mirrored = min(found)
        return Neighbour(index, distance, mirrored)

    result = {
        group.name: [
            nearest(one) for one in progress_bar(run, "nearest training map", items=group.small, unit="map")
        ]
        for group in (groups.generated, groups.held_out)
    }
    return {**result, "found": find_copies(*map(distances_of, (result[GENERATED], result[HELD_OUT])))}


# ---------------------------------------------------------------- the table


def map_metrics(groups: Comparison, nearest: dict | None, names: dict[int, str]) -> list[Metric]:
    """The table, in reading order; `names` are those of the labels, by value, in the order of the maps'."""
    return [
        *structure_metrics(groups, list(names.values())),
        overlap_metric(groups),
        reconstruction_metric(groups),
        *copies(groups, nearest),
    ]


def structure_metrics(groups: Comparison, names: Sequence[str]) -> list[Metric]:
    """Missing structures, sizes and parts."""
    missing = Metric("missing", GROUP, "Maps that lack a structure", unit="%")
    missing.about = "Of the labels that every held-out map has."
    parts = Metric("parts", GROUP, "Parts of a structure", better="near baseline")
    parts.about = "Connected components of each label that a map has, the mean over labels."
    parts.tolerance = PARTS_TOLERANCE
    metrics = [missing, parts]
    samples, held_out, reference = (np.array(one) for one in groups.values("parts"))
    always = (np.array(groups.held_out.parts) > 0).all(0)
    if not always.any():
        missing.missing = "no label is in every held-out map"
    lacking = [(one[:, always] == 0).any(1).astype(float) for one in (samples, reference)]
    if always.any():
        missing.fill_shares(*lacking, 100).counts = f"{len(samples)} on each side"
    real = np.concatenate([held_out, reference])
    _fill_means(parts, *(one.sum(1) / np.maximum(1, (one > 0).sum(1)) for one in (samples, real)))
    for i, name in enumerate(names):
        row = Metric(f"parts_{name}", GROUP, f"Parts of {name}", better="near baseline")
        metrics.append(_fill_means(row, samples[:, i], real[:, i]))
    for name in groups.generated.sizes:
        metrics.append(row := Metric(f"size_{name}", GROUP, f"Size of {name}", unit="ml"))
        one, other, third = (
            np.array([group.sizes[name][i] for i in indices]) for group, indices in groups.sides.values()
        )
        every = [np.array(group.sizes[name]) for group in (groups.generated, groups.held_out)]
        means = [f"{some.mean():.3g} ± {some.std():.2g}" for some in every]
        row.about = f"Wasserstein distance of the distributions. Samples {means[0]}, held-out {means[1]} ml."
        row.tolerance = [0.0, SHIFT_TOLERANCE * float(np.concatenate([other, third]).std())]
        row.compare(wasserstein_distance, one, other, third)
    return metrics


def _fill_means(metric: Metric, samples: np.ndarray, real: np.ndarray) -> Metric:
    """A mean over samples beside that over real maps."""
    count = min(len(samples), len(real))
    draws = distances.bootstrap_mean(samples), distances.bootstrap_mean(real, seed=1)
    metric.counts = f"{len(samples)} samples, {len(real)} real"
    return metric.fill(float(samples.mean()), float(real.mean()), *draws, count)


def overlap_metric(groups: Comparison) -> Metric:
    """Dice between two samples, and between two real maps."""
    metric = Metric("overlap", "Diversity", "Dice between two samples", better="near baseline")
    metric.about = "Above that of two real maps, samples are less diverse."
    metric.tolerance = OVERLAP_TOLERANCE
    real = groups.held_out.overlaps + (groups.training.overlaps if groups.training else [])
    pairs = groups.generated.overlaps, real
    count = min(map(len, pairs))
    if not count:
        metric.missing = f"needs 2 maps of each; there are {groups.counts}"
        return metric
    samples, real = (np.array(one)[subset(len(one), count, side)] for side, one in enumerate(pairs))
    _fill_means(metric, samples, real).counts = f"{counted(count, 'pair{s}')} of each"
    return metric


def reconstruction_metric(groups: Comparison) -> Metric:
    """Held-out maps, encoded and decoded by the autoencoder."""
    metric = Metric("reconstruction_dice", "Reconstruction", "Dice of reconstructions", better="higher")
    scores = np.array(groups.held_out.reconstructions)
    if not len(scores):
        metric.missing = "no autoencoder: give --autoencoder FILE, or -c and -e"
        return metric
    metric.value, metric.counts = float(scores.mean()), f"{len(scores)} held-out"
    limits = distances.t_interval(distances.bootstrap_mean(scores), metric.value, len(scores))
    metric.interval = limits and np.clip(limits, 0, 1).tolist()
    return metric


def copies(groups: Comparison, nearest: dict | None) -> list[Metric]:
    """Copies of training maps, and distances to them, by Dice."""
    metrics = copy_metrics(groups, nearest)
    if nearest:
        metrics[1].about = "Median over samples of 1 - Dice, mirrored or not; baseline: over held-out maps."
    return metrics


def size_charts(groups: Comparison, nearest: dict | None) -> list[dict]:
    """For the report: the sizes of structures and the distances to the nearest training map, by group."""
    charts = [
        {"title": name, "x": "ml", "groups": {group.name: group.sizes[name] for group in groups.groups}}
        for name in groups.generated.sizes
    ]
    if nearest:
        each = {name: distances_of(nearest[name]).tolist() for name in (HELD_OUT, GENERATED)}
        charts.append({"title": "Distance to the nearest training map", "x": "1 - Dice", "groups": each})
    return charts


# ---------------------------------------------------------------- conclusions


def map_verdicts(metrics: Sequence[Metric], nearest: dict | None, counts: dict[str, int]) -> list[dict]:
    """The conclusions, most important first, as `verdicts.verdicts` gives them."""
    found = {metric.key: metric for metric in metrics}
    parts = found["parts"]
    lines = [
        verdicts.copies(nearest, counts),
        missing_line(found["missing"]),
        verdicts.anatomy([one for key, one in found.items() if key.startswith("size_")], "structure sizes"),
        verdicts.compared(
            parts,
            f"{parts.value:.2f} parts a structure in samples, {parts.floor:.2f} in real maps",
            alike="Structures of samples hang together as those of real maps do",
            less="Structures of samples fall into fewer parts than those of real maps",
            more="Structures of samples fall into more parts than those of real maps",
            unknown="Too few maps to tell whether structures of samples hang together",
        ),
        diversity_line(found["overlap"]),
        verdicts.numbers(counts),
    ]
    return [{"tone": tone, "text": text} for tone, text in filter(None, lines)]


def missing_line(metric: Metric) -> tuple[str, str]:
    """Whether samples lack structures."""
    if metric.missing:
        return "none", f"Missing structures were not looked for: {metric.missing}."
    if not metric.value:
        return "good", "No sample lacks a structure that every held-out map has."
    return "bad", f"{metric.value:.2g}% of the samples lack a structure that every held-out map has."


def diversity_line(metric: Metric) -> tuple[str, str]:
    """Overlap of samples compared with that of real maps."""
    if metric.missing:
        return "none", f"The diversity of samples was not measured: {metric.missing}."
    return verdicts.compared(
        metric,
        f"Dice {metric.value:.2f} between two samples, {metric.floor:.2f} between two real maps",
        alike="Samples are as diverse as real maps",
        more="Samples are less diverse than real maps",
        less="Samples are less similar to each other than real maps are",
        unknown="Too few maps to tell whether samples are as diverse as real ones",
    )


def as_pictures(read: Reader) -> Callable:
    """A reader of what pictures show of maps, (1, 1, D, H, W)."""
    labels = len(read.preprocessing.labels)

    def read_picture(case) -> torch.Tensor:
        return shown(read(case)[0], labels)[None, None]

    return read_picture
