"""The table of metrics: generated volumes against held-out scans, each metric beside its real-vs-real
baseline, with confidence intervals and the number of volumes, or with the reason why it is missing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from scipy.stats import wasserstein_distance

from ldm import counted
from ldm.evaluation import anatomy, distances
from ldm.evaluation.copies import IDENTICAL, TrainingVolumes, find_copies
from ldm.evaluation.distances import DRAWS, LEVEL, KernelDistance, distance_kernel
from ldm.evaluation.features import ANATOMY, MEDICALNET, OWN, PLANES, RADIMAGENET, FeatureSpace, stacked
from ldm.evaluation.groups import GENERATED, HELD_OUT, JOINED, MAX_VOLUMES, Comparison, subset
from ldm.metrics import histogram_distance, spectrum_distance

NEIGHBOURS = 3  # of precision and recall
MAX_AXES = 16  # principal axes of the Fréchet distance in own features
VOLUMES_PER_AXIS = 3
HIGH_FREQUENCY = 0.25  # cycles/voxel

# Differences from real scans that do not matter:
MS_SSIM_TOLERANCE = [-0.02, 0.02]
SHARPNESS_TOLERANCE = [-0.2, 0.25]  # of the ratio of high-frequency power
SHIFT_TOLERANCE = 0.5  # standard deviations

NO_AUTOENCODER = "no autoencoder: give --autoencoder FILE, or -c and -e"
NO_TRAINING = "no training scans: give --train DIR, or -c and -e"


@dataclass
class Metric:
    """A row of the table; its fields are the keys in metrics.json.

    `value` compares the generated volumes with held-out scans, `floor` is the real-vs-real baseline: the same
    metric of other real scans, with the same number of volumes. Both have 95 % intervals. `difference` is the
    interval of value minus baseline, `tolerance` the differences that do not matter. `p_value` is that of a
    permutation test of samples against held-out scans; where it finds no difference, `sees` is the smallest
    shift, in standard deviations, that it detects with 80 % power. `better` is "lower", "higher", "near
    baseline" or, for rows to compare with, "". `missing` says why there is no value.
    """

    key: str
    group: str
    name: str
    about: str = ""
    value: float | None = None
    interval: list[float] | None = None
    floor: float | None = None
    floor_interval: list[float] | None = None
    difference: list[float] | None = None
    tolerance: list[float] | None = None
    p_value: float | None = None
    sees: float | None = None
    unit: str = ""
    better: str = "lower"
    counts: str = ""
    missing: str | None = None

    def as_json(self) -> dict:
        """As metrics.json holds it: numbers that are not finite become null."""
        content = asdict(self)
        for key, value in content.items():
            numbers = value if isinstance(value, list) else [value]
            if any(isinstance(one, float) and not math.isfinite(one) for one in numbers):
                content[key] = None
        if content["value"] is None and not content["missing"]:
            content["missing"] = "not finite for these volumes"
        return content

    def fill(
        self, value: float, floor: float, draws: np.ndarray, baseline_draws: np.ndarray, count: int
    ) -> "Metric":
        """Fill in a value, its baseline and the intervals, from their bootstrap draws; `count` volumes on
        each side. Returns the metric."""
        self.value, self.floor = value, floor
        self.interval, self.floor_interval = distances.interval(draws), distances.interval(baseline_draws)
        self.difference = distances.t_interval(draws - baseline_draws, value - floor, count)
        return self

    def fill_shares(self, found: np.ndarray, baseline: np.ndarray, scale: float = 1) -> "Metric":
        """The same for proportions, from values 0 or 1 of single volumes, times `scale`."""
        self.value, self.floor = scale * float(found.mean()), scale * float(baseline.mean())
        limits = (
            distances.share_interval(found),
            distances.share_interval(baseline),
            distances.share_difference(found, baseline),
        )
        self.interval, self.floor_interval, self.difference = ([scale * x for x in one] for one in limits)
        return self

    def compare(
        self, statistic: Callable, samples: np.ndarray, held_out: np.ndarray, reference: np.ndarray
    ) -> "Metric":
        """The same for a statistic, not below 0, of samples and of the reference against held-out scans, rows
        (N, ...) each."""
        draws = distances.bootstrap(statistic, samples, reference, second=held_out)
        self.fill(statistic(samples, held_out), statistic(reference, held_out), *draws, len(samples))
        self.interval, self.floor_interval = (distances.interval(np.maximum(0, one)) for one in draws)
        self.counts = f"{len(samples)} on each side"
        return self


def _without_value(metrics: list[Metric], why: str) -> list[Metric]:
    for metric in metrics:
        metric.missing = why
    return metrics


def all_metrics(groups: Comparison, nearest: dict | None) -> list[Metric]:
    """The whole table, in reading order.

    Args:
        nearest: as `nearest_training_volumes` returns it.
    """
    return [
        *feature_metrics(groups),
        *anatomy_metrics(groups),
        *similarity_metrics(groups),
        *appearance_metrics(groups),
        *tissue_metrics(groups),
        *reconstruction_metrics(groups),
        *copy_metrics(groups, nearest),
        *classifier_metrics(groups),
    ]


# ---------------------------------------------------------------- distances in feature space

DISTANCE = "Distance to held-out scans"
NETWORK_NAMES = {OWN: "own features", MEDICALNET: "MedicalNet"}


def feature_metrics(groups: Comparison) -> list[Metric]:
    """Kernel and Fréchet distances, precision and recall, in each network's features."""
    networks, metrics = groups.held_out.networks, []
    for network in dict.fromkeys((*(one for one in groups.held_out.features if one != ANATOMY), OWN)):
        metrics += kernel_metrics(groups, network)
    if OWN in networks:
        metrics += [own_frechet_metric(groups), *precision_metrics(groups)]
    if MEDICALNET in networks:
        metrics.append(medicalnet_metric(groups))
    if RADIMAGENET in networks:
        metrics.append(radimagenet_metric(groups))
    return metrics


def standardised_rows(groups: Comparison, network: str) -> tuple[FeatureSpace, list[torch.Tensor]]:
    """The feature space of the reference group, and samples, held-out and reference scans in it."""
    space = FeatureSpace(groups.reference.rows(network))
    return space, [space(rows) for rows in groups.rows(network)]


def kernel_metrics(groups: Comparison, network: str) -> list[Metric]:
    """The kernel distance of the samples, with the permutation test, and of degraded scans."""
    metric = Metric(f"mmd_{network}", DISTANCE, f"Kernel distance (MMD²), {NETWORK_NAMES[network]}")
    metric.about = "Unbiased: about 0 for volumes of one distribution, whatever their number."
    missing = groups.too_few(2) if network in groups.held_out.networks else NO_AUTOENCODER
    if missing:
        return _without_value([metric], missing)
    space, (samples, held_out, reference) = standardised_rows(groups, network)
    distance, baseline = KernelDistance(samples, held_out), KernelDistance(reference, held_out)
    metric.fill(distance.value, baseline.value, distance.bootstrap(), baseline.bootstrap(), groups.size)
    metric.p_value, metric.sees, tested = permutation_test(groups, network)
    metric.counts = f"{groups.size} on each side; in the test {tested}"
    metrics = [metric]
    for name, features in groups.degraded.features.items():
        if not features[network]:  # no halves of a single scan
            continue
        degraded = KernelDistance(space(stacked(features[network])), held_out)
        row = Metric(f"mmd_{network}: {name}", DISTANCE, f"... of {name}", "For comparison.", better="")
        row.value, row.interval = degraded.value, distances.interval(degraded.bootstrap())
        row.counts = f"{len(features[network])} real, {len(held_out)} held-out"
        metrics.append(row)
    return metrics


def permutation_test(groups: Comparison, network: str) -> tuple[float | None, float | None, str]:
    """Do samples differ from held-out scans? Exact: it uses one volume per subject, and features standardised
    by both groups together, so that volumes are exchangeable under the null hypothesis.

    Returns:
        The p-value, None with too few subjects; where it is above `LEVEL`, the shift that the test detects;
        and the number of volumes in words.
    """
    pair = groups.generated, groups.held_out
    indices = [group.one_per_subject for group in pair]
    indices = [[one[i] for i in subset(len(one), MAX_VOLUMES, side)] for side, one in enumerate(indices)]
    samples, held_out = (group.rows(network, of) for group, of in zip(pair, indices, strict=True))
    n, m = map(len, indices)
    counts = f"{n} generated and {m} held-out"
    if min(n, m) < 2:
        return None, None, f"{counts}, too few"
    pooled = [torch.cat(layer) for layer in zip(samples, held_out, strict=True)]
    rows = FeatureSpace(pooled)(pooled)
    p_value = KernelDistance(rows[:n], rows[n:]).p_value()
    if p_value <= LEVEL:
        return p_value, None, counts
    real = held_out
    if groups.training:
        training = groups.training.rows(network, groups.training.one_per_subject)
        real = [torch.cat(layer) for layer in zip(held_out, training, strict=True)]
    return p_value, distances.detectable_shift(FeatureSpace(real)(real), n, m), counts


def _frechet(first: np.ndarray, second: np.ndarray) -> float:
    return distances.frechet_distance(torch.from_numpy(first), torch.from_numpy(second))


def own_frechet_metric(groups: Comparison) -> Metric:
    """The Fréchet distance along the principal axes of all volumes."""
    metric = Metric("frechet_own", DISTANCE, "Fréchet distance, own features")
    if missing := groups.too_few(2 * VOLUMES_PER_AXIS):
        metric.about, metric.missing = "Along the first principal axes.", missing
        return metric
    axes = min(MAX_AXES, groups.size // VOLUMES_PER_AXIS)
    metric.about = (
        f"Along the first {axes} principal axes, as many as the number of volumes allows; 1 is the variance "
        "of real scans."
    )
    _, sides = standardised_rows(groups, OWN)
    # Axes of all three sides: those of the two real ones alone would favour the baseline.
    project = distances.PrincipalAxes(torch.cat(sides), axes)
    samples, held_out, reference = map(project, sides)
    real = torch.cat([reference, held_out])
    scale = (real - real.mean(0)).square().sum(1).mean().sqrt()
    return metric.compare(_frechet, *((rows / scale).numpy() for rows in (samples, held_out, reference)))


def medicalnet_metric(groups: Comparison) -> Metric:
    """The published 3D Fréchet distance."""
    about = "As published, in all features. It falls with the number of volumes: see the baseline."
    metric = Metric("fid_3d", DISTANCE, "3D FID (MedicalNet)", about, missing=groups.too_few(2))
    if metric.missing:
        return metric
    return metric.compare(_frechet, *(rows[0].numpy() for rows in groups.rows(MEDICALNET)))


def radimagenet_metric(groups: Comparison) -> Metric:
    """The published 2.5D Fréchet distance: the mean over three planes."""
    about = "As published: the mean over sagittal, coronal and axial slices."
    metric = Metric("fid_2.5d", DISTANCE, "2.5D FID (RadImageNet)", about, missing=groups.too_few(2))
    if metric.missing:
        return metric
    metric.counts = f"{groups.size} on each side"
    held_out = groups.slices["held_out"]
    per_plane, baselines = (
        [distances.frechet_of_moments(*pair) for pair in zip(groups.slices[side], held_out, strict=True)]
        for side in ("samples", "reference")
    )
    planes = ", ".join(f"{plane} {value:.4g}" for plane, value in zip(PLANES, per_plane, strict=True))
    metric.about += f" Samples: {planes}. No interval, since slices are not kept."
    metric.value, metric.floor = float(np.mean(per_plane)), float(np.mean(baselines))
    return metric


def precision_metrics(groups: Comparison) -> list[Metric]:
    """Precision and recall in own features."""
    metrics = [
        Metric(key, DISTANCE, f"{key.capitalize()}, own features", about, better="higher")
        for key, about in (
            ("precision", "Share of samples within the nearest-neighbour balls of real scans."),
            ("recall", "Share of held-out scans within those of samples."),
        )
    ]
    if missing := groups.too_few(NEIGHBOURS + 1):
        return _without_value(metrics, missing)
    _, (samples, held_out, reference) = standardised_rows(groups, OWN)
    found, baselines = (
        distances.precision_recall(held_out, rows, NEIGHBOURS) for rows in (samples, reference)
    )
    for metric, *shares in zip(metrics, found, baselines, strict=True):
        metric.fill_shares(*shares).counts = f"{groups.size} on each side"
    return metrics


def anatomy_metrics(groups: Comparison) -> list[Metric]:
    """The anatomy distance of the samples, with the permutation test; at each scale; of degraded scans."""
    metric = Metric(ANATOMY, DISTANCE, "Anatomy distance", missing=NO_TRAINING)
    scales = [f"{scale:g} mm" for scale in anatomy.SCALES]
    metric.about = (
        f"Energy distance of volumes smoothed by {' and '.join(scales)}, along the principal axes of other "
        "scans: large structures and how they fit together. Unbiased, as the kernel distance is."
    )
    if groups.training is None:
        return [metric]
    sides, others = groups.independent
    size = len(sides["reference"][1])
    if size < 2 or len(others) < anatomy.MIN_SCANS:
        needed = f"2 volumes on each side and {anatomy.MIN_SCANS} training scans beside them"
        metric.missing = f"needs {needed}, of different subjects; there are {groups.counts}"
        return [metric]
    others = others[: anatomy.MAX_SCANS]
    space = anatomy.AnatomySpace(groups.training.rows(ANATOMY, others))
    samples, held_out, reference = (space(group.rows(ANATOMY, indices)) for group, indices in sides.values())

    def filled(one: Metric, chosen: slice) -> Metric:
        first, second, real = (anatomy.all_scales(side[chosen]) for side in (samples, held_out, reference))
        distance = KernelDistance(first, second, distance_kernel)
        baseline = KernelDistance(real, second, distance_kernel)
        one.counts, one.missing = f"{size} on each side, axes of {len(others)} other scans", None
        return one.fill(distance.value, baseline.value, distance.bootstrap(), baseline.bootstrap(), size)

    metrics = [filled(metric, slice(None))]
    # Exact, since the axes are those of other subjects: one volume of each subject, all of them.
    tested = [
        anatomy.all_scales(space(group.rows(ANATOMY, group.one_per_subject[:MAX_VOLUMES])))
        for group in (groups.generated, groups.held_out)
    ]
    metric.p_value = KernelDistance(*tested, distance_kernel).p_value()
    metric.counts += f"; in the test {len(tested[0])} generated and {len(tested[1])} held-out"
    for i, scale in enumerate(scales):
        row = Metric(f"{ANATOMY}: {scale}", DISTANCE, f"... at {scale} alone")
        metrics.append(filled(row, slice(i, i + 1)))
    # Of scans of the reference alone: those of other subjects are closer to the axes.
    last = sides["reference"][1][-1]
    for name, features in groups.degraded.features.items():
        rows = features[ANATOMY][: last if name == JOINED else last + 1]
        if not rows:
            continue
        degraded = KernelDistance(
            anatomy.all_scales(space(stacked(rows))), anatomy.all_scales(held_out), distance_kernel
        )
        row = Metric(f"{ANATOMY}: {name}", DISTANCE, f"... of {name}", "For comparison.", better="")
        row.value, row.interval = degraded.value, distances.interval(degraded.bootstrap())
        row.counts = f"{len(rows)} real, {size} held-out"
        metrics.append(row)
    return metrics


# ---------------------------------------------------------------- diversity, appearance, anatomy


def similarity_metrics(groups: Comparison) -> list[Metric]:
    """MS-SSIM between samples, and between real scans."""
    metric = Metric("ms_ssim", "Diversity", "MS-SSIM between samples", better="near baseline")
    metric.about = (
        "Similarity of two samples, 0 to 1; above that of two real scans, samples are less diverse."
    )
    metric.tolerance = MS_SSIM_TOLERANCE
    # Held-out scans alone are few; training scans are as real.
    real = groups.held_out.similarities + (groups.training.similarities if groups.training else [])
    pairs = groups.generated.similarities, real
    count = min(map(len, pairs))
    if count < 1:
        metric.missing = f"needs 2 volumes of each, large enough for its window; there are {groups.counts}"
        return [metric]
    samples, real = (np.array(one)[subset(len(one), count, side)] for side, one in enumerate(pairs))
    means = float(samples.mean()), float(real.mean())
    metric.fill(*means, distances.bootstrap_mean(samples), distances.bootstrap_mean(real, seed=1), count)
    metric.counts = f"{counted(count, 'pair{s}')} of each"
    return [metric]


def appearance_metrics(groups: Comparison) -> list[Metric]:
    """Power spectrum and intensities."""
    group = "Sharpness and intensity"
    spectrum = Metric("spectrum", group, "Power spectrum", "Mean difference over all frequencies.", unit="dB")
    sharpness = Metric("fine_power", group, "High-frequency power", better="near baseline")
    sharpness.about = f"Power at {HIGH_FREQUENCY}-0.5 cycles/voxel, as a share of the held-out scans'."
    sharpness.tolerance = SHARPNESS_TOLERANCE
    histogram = Metric("histogram", group, "Intensity histogram", unit="%")
    histogram.about = "Wasserstein distance of the intensities, as a share of the intensity range."
    metrics = [spectrum, sharpness, histogram]
    if missing := groups.too_few(1):
        return _without_value(metrics, missing)
    high = groups.held_out.spectrum.frequencies >= HIGH_FREQUENCY

    def power_ratio(a: np.ndarray, b: np.ndarray) -> float:
        return float(a[:, high].mean() / b[:, high].mean()) if high.any() and b[:, high].any() else math.nan

    spectra, histograms = ([np.array(one) for one in groups.values(key)] for key in ("spectra", "histograms"))
    spectrum.compare(spectrum_distance, *spectra)
    sharpness.compare(power_ratio, *spectra)
    histogram.compare(lambda a, b: 100 * histogram_distance(a, b), *histograms)
    return metrics


TISSUE_NAMES = {
    "foreground": "Foreground volume",
    "dark": "Dark tissue (fluid in T1w)",
    "middle": "Middle tissue (grey matter in T1w)",
    "bright": "Bright tissue (white matter in T1w)",
}


def tissue_metrics(groups: Comparison) -> list[Metric]:
    """Volumes of the foreground and of its three intensity classes."""
    metrics = []
    for tissue, name in TISSUE_NAMES.items():
        samples, held_out, reference = (tissue_ml(tissues, tissue) for tissues in groups.values("tissues"))
        metrics.append(metric := Metric(f"tissue_{tissue}", "Anatomy", name, unit="ml"))
        size = min(map(len, (samples, held_out, reference)))
        if not size:
            metric.missing = groups.too_few(1) or "too few grey values to tell tissues apart"
            continue
        all_samples, all_scans = (
            _mean_and_std(tissue_ml(group.tissues, tissue)) for group in (groups.generated, groups.held_out)
        )
        metric.about = (
            f"Wasserstein distance of the distributions. Samples {all_samples} ml, held-out scans "
            f"{all_scans} ml."
        )
        metric.tolerance = [0.0, SHIFT_TOLERANCE * float(np.concatenate([held_out, reference]).std())]
        metric.compare(wasserstein_distance, samples[:size], held_out[:size], reference[:size])
    return metrics


def tissue_ml(tissues: Sequence, name: str) -> np.ndarray:
    """The finite volumes of a tissue, in ml."""
    values = np.array([getattr(one, name) for one in tissues], dtype=float)
    return values[np.isfinite(values)]


def _mean_and_std(values: np.ndarray) -> str:
    mean = values.mean()
    digits = max(0, 2 - math.floor(math.log10(mean))) if mean > 0 else 0
    return f"{mean:.{digits}f}" + (f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else "")


def reconstruction_metrics(groups: Comparison) -> list[Metric]:
    """Held-out scans, encoded and decoded by the autoencoder."""
    kinds = (
        ("psnr", "PSNR", "dB", "higher", (-np.inf, np.inf)),
        ("ssim", "SSIM", "", "higher", (-1, 1)),
        ("l1", "Mean absolute error", "", "lower", (0, np.inf)),
    )
    about = "Held-out scans, encoded and decoded; all voxels, data range 1."
    metrics = [
        Metric(f"reconstruction_{key}", "Reconstruction", name, about, unit=unit, better=better)
        for key, name, unit, better, _ in kinds
    ]
    if not groups.held_out.reconstructions:
        return _without_value(metrics, NO_AUTOENCODER)
    columns = np.transpose(groups.held_out.reconstructions)
    for metric, column, (*_, possible) in zip(metrics, columns, kinds, strict=True):
        metric.value = float(column.mean())
        limits = distances.t_interval(distances.bootstrap_mean(column), metric.value, len(column))
        metric.interval = limits and np.clip(limits, *possible).tolist()
        metric.counts = f"{len(column)} held-out"
    return metrics


def classifier_metrics(groups: Comparison) -> list[Metric]:
    """The Inception Score, where a classifier is given."""
    if not groups.generated.classifier:
        return []
    metric = Metric("inception_score", "Classifier", "Inception Score", better="near baseline")
    metric.about = (
        "From 1 (all samples of one class) to the number of classes (all of them, each clearly one)."
    )
    if missing := groups.too_few(1):
        return _without_value([metric], missing)
    samples, held_out, _ = (torch.stack(rows).numpy() for rows in groups.values("probabilities"))

    def score(rows: np.ndarray, _: np.ndarray) -> float:
        return distances.inception_score(torch.from_numpy(rows))

    return [metric.compare(score, samples, held_out, held_out)]


# ---------------------------------------------------------------- copies


def nearest_training_volumes(
    groups: Comparison, device: torch.device, progress: Callable = iter
) -> dict | None:
    """The nearest training scan of each sample and of each held-out scan; None without training scans.

    Returns:
        "generated" and "held-out": a list of `copies.Neighbour` each; "found": `copies.Copies`.
    """
    if groups.training is None:
        return None
    training = TrainingVolumes(groups.training.thumbnails, device)
    nearest = {
        group.name: [training.nearest(thumbnail) for thumbnail in progress(group.thumbnails)]
        for group in (groups.generated, groups.held_out)
    }
    return {**nearest, "found": find_copies(*map(distances_of, (nearest[GENERATED], nearest[HELD_OUT])))}


def distances_of(neighbours: Sequence) -> np.ndarray:
    """Distances (N,) to the nearest training scans."""
    return np.array([neighbour.distance for neighbour in neighbours])


def copy_metrics(groups: Comparison, nearest: dict | None) -> list[Metric]:
    """Copies of training scans, and distances to them."""
    group = "Copies of training scans"
    copies = Metric("copies", group, "Samples that are copies", unit="%")
    median = Metric("nearest", group, "Distance to the nearest training scan", better="near baseline")
    median.about = (
        "Median over samples; baseline: over held-out scans. sqrt(2 - 2 r), r the largest correlation after "
        "smoothing, over shifts and mirroring."
    )
    closer = Metric("closer", group, "Samples closer than held-out scans", unit="%", better="near baseline")
    closer.about = (
        "Share of pairs of a sample and a held-out scan in which the sample is closer to the training scans; "
        "50 % expected by chance. Blur alone raises it."
    )
    metrics = [copies, median, closer]
    if nearest is None:
        return _without_value(metrics, NO_TRAINING)
    found = nearest["found"]
    samples, held_out = (distances_of(nearest[key]) for key in (GENERATED, HELD_OUT))
    copies.about = (
        f"Closer to a training scan than {found.threshold:.3g}: half the held-out scans' median distance, or "
        f"{IDENTICAL:g} where that is larger."
    )
    copies.fill_shares(found.copies, found.leaks, 100)
    rng, size = np.random.default_rng(0), min(len(samples), len(held_out))
    picked, picked_held_out = (rng.integers(len(one), size=(DRAWS, len(one))) for one in (samples, held_out))
    draws = np.median(samples[picked], axis=1), np.median(held_out[picked_held_out], axis=1)
    median.fill(float(np.median(samples)), float(np.median(held_out)), *draws, size)
    closer.value, closer.floor = 100 * found.closer, 50.0
    order = np.sign(held_out - samples[:, None])  # 1 where the sample is closer
    draws = np.array([order[np.ix_(i, j)].mean() for i, j in zip(picked, picked_held_out, strict=True)])
    closer.interval = distances.interval(50 + 50 * draws)
    closer.difference = distances.t_interval(50 * draws, closer.value - closer.floor, size)
    for metric in metrics:
        metric.counts = groups.counts
    return metrics
