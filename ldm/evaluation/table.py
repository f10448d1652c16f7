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
from ldm.evaluation.copies import IDENTICAL, TrainingVolumes, find_copies
from ldm.evaluation.distances import (
    DRAWS,
    LEVEL,
    KernelDistance,
    PrincipalAxes,
    bootstrap,
    bootstrap_mean,
    detectable_shift,
    frechet_distance,
    frechet_of_moments,
    inception_score,
    interval,
    precision_recall,
    share_difference,
    share_interval,
    t_interval,
)
from ldm.evaluation.features import MEDICALNET, OWN, PLANES, RADIMAGENET, FeatureSpace, stacked
from ldm.evaluation.groups import GENERATED, HELD_OUT, MAX_VOLUMES, Comparison, subset
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

    def compare(
        self, statistic: Callable, samples: np.ndarray, held_out: np.ndarray, reference: np.ndarray
    ) -> "Metric":
        """Fill in a statistic of samples and of the reference against held-out scans, rows (N, ...) each,
        and their difference; returns the metric."""
        values, baselines = bootstrap(statistic, samples, reference, second=held_out)
        self.value, self.floor = statistic(samples, held_out), statistic(reference, held_out)
        self.interval, self.floor_interval = (interval(np.maximum(0, one)) for one in (values, baselines))
        self.difference = t_interval(values - baselines, self.value - self.floor, len(samples))
        self.counts = f"{len(samples)} on each side"
        return self


def all_metrics(groups: Comparison, nearest: dict | None) -> list[Metric]:
    """The whole table, in reading order.

    Args:
        nearest: as `nearest_training_volumes` returns it.
    """
    return [
        *feature_metrics(groups),
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
    for network in groups.held_out.features:
        metrics += kernel_metrics(groups, network)
    if OWN in networks:
        metrics += [own_frechet_metric(groups), *precision_metrics(groups)]
    else:
        about = "Needs the features of an autoencoder trained on such scans."
        metrics.append(Metric("mmd_own", DISTANCE, "Kernel distance (MMD²), own features", about))
        metrics[-1].missing = NO_AUTOENCODER
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
    if missing := groups.too_few(2):
        metric.missing, metric.counts = missing, groups.counts
        return [metric]
    space, (samples, held_out, reference) = standardised_rows(groups, network)
    distance, baseline = KernelDistance(samples, held_out), KernelDistance(reference, held_out)
    draws, baseline_draws = distance.bootstrap(), baseline.bootstrap()
    metric.value, metric.interval = distance.value, interval(draws)
    metric.floor, metric.floor_interval = baseline.value, interval(baseline_draws)
    metric.difference = t_interval(draws - baseline_draws, metric.value - metric.floor, groups.size)
    metric.p_value, metric.sees, tested = permutation_test(groups, network)
    metric.counts = f"{groups.size} on each side; in the test {tested}"
    metrics = [metric]
    for name, features in groups.degraded.features.items():
        degraded = KernelDistance(space(stacked(features[network])), held_out)
        row = Metric(f"mmd_{network}: {name}", DISTANCE, f"... of {name}", "For comparison.", better="")
        row.value, row.interval = degraded.value, interval(degraded.bootstrap())
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
    return p_value, detectable_shift(FeatureSpace(real)(real), n, m), counts


def _frechet(first: np.ndarray, second: np.ndarray) -> float:
    return frechet_distance(torch.from_numpy(first), torch.from_numpy(second))


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
    project = PrincipalAxes(torch.cat(sides), axes)
    samples, held_out, reference = map(project, sides)
    real = torch.cat([reference, held_out])
    scale = (real - real.mean(0)).square().sum(1).mean().sqrt()
    return metric.compare(_frechet, *((rows / scale).numpy() for rows in (samples, held_out, reference)))


def medicalnet_metric(groups: Comparison) -> Metric:
    """The published 3D Fréchet distance."""
    metric = Metric("fid_3d", DISTANCE, "3D FID (MedicalNet)")
    metric.about = "As published, in all features. It falls with the number of volumes: see the baseline."
    if missing := groups.too_few(2):
        metric.missing = missing
        return metric
    return metric.compare(_frechet, *(rows[0].numpy() for rows in groups.rows(MEDICALNET)))


def radimagenet_metric(groups: Comparison) -> Metric:
    """The published 2.5D Fréchet distance: the mean over three planes."""
    metric = Metric("fid_2.5d", DISTANCE, "2.5D FID (RadImageNet)")
    metric.about = "As published: the mean over sagittal, coronal and axial slices."
    metric.counts = f"{groups.size} on each side"
    if missing := groups.too_few(2):
        metric.missing = missing
        return metric
    per_plane, baselines = (
        [
            frechet_of_moments(*pair)
            for pair in zip(groups.slices[side], groups.slices["held_out"], strict=True)
        ]
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
        for metric in metrics:
            metric.missing = missing
        return metrics
    _, (samples, held_out, reference) = standardised_rows(groups, OWN)
    values, baselines = (precision_recall(held_out, rows, NEIGHBOURS) for rows in (samples, reference))
    for metric, found, baseline in zip(metrics, values, baselines, strict=True):
        metric.value, metric.interval = float(found.mean()), share_interval(found)
        metric.floor, metric.floor_interval = float(baseline.mean()), share_interval(baseline)
        metric.difference = share_difference(found, baseline)
        metric.counts = f"{groups.size} on each side"
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
    draws, baseline_draws = bootstrap_mean(samples), bootstrap_mean(real, seed=1)
    metric.value, metric.interval = float(samples.mean()), interval(draws)
    metric.floor, metric.floor_interval = float(real.mean()), interval(baseline_draws)
    metric.difference = t_interval(draws - baseline_draws, metric.value - metric.floor, count)
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
        for metric in metrics:
            metric.missing = missing
        return metrics
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
        ("psnr", "PSNR", "dB", "higher"),
        ("ssim", "SSIM", "", "higher"),
        ("l1", "Mean absolute error", "", "lower"),
    )
    scores = np.array(groups.held_out.reconstructions).reshape(-1, len(kinds))
    about = "Held-out scans, encoded and decoded; all voxels, data range 1."
    metrics = []
    for column, (key, name, unit, better) in zip(scores.T, kinds, strict=True):
        metric = Metric(f"reconstruction_{key}", "Reconstruction", name, about, unit=unit, better=better)
        metrics.append(metric)
        if not len(column):
            metric.missing = NO_AUTOENCODER
            continue
        metric.value = float(column.mean())
        metric.interval = t_interval(bootstrap_mean(column), metric.value, len(column))
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
    metric.counts = groups.counts
    if missing := groups.too_few(1):
        metric.missing = missing
        return [metric]
    samples, held_out, _ = (torch.stack(rows).numpy() for rows in groups.values("probabilities"))
    return [
        metric.compare(lambda rows, _: inception_score(torch.from_numpy(rows)), samples, held_out, held_out)
    ]


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
        for metric in metrics:
            metric.missing = NO_TRAINING
        return metrics
    found, samples, held_out = (
        nearest["found"],
        *(distances_of(nearest[key]) for key in (GENERATED, HELD_OUT)),
    )
    copies.about = (
        f"Closer to a training scan than {found.threshold:.3g}: half the held-out scans' median distance, or "
        f"{IDENTICAL:g} where that is larger."
    )
    flags = found.copies, found.leaks
    copies.value, copies.floor = (100 * float(np.mean(one)) for one in flags)
    copies.interval, copies.floor_interval = ([100 * limit for limit in share_interval(one)] for one in flags)
    copies.difference = [100 * limit for limit in share_difference(*flags)]
    rng, size = np.random.default_rng(0), min(len(samples), len(held_out))
    picked, picked_held_out = (rng.integers(len(one), size=(DRAWS, len(one))) for one in (samples, held_out))
    draws, baseline_draws = (
        np.median(samples[picked], axis=1),
        np.median(held_out[picked_held_out], axis=1),
    )
    median.value, median.floor = float(np.median(samples)), float(np.median(held_out))
    median.interval, median.floor_interval = interval(draws), interval(baseline_draws)
    median.difference = t_interval(draws - baseline_draws, median.value - median.floor, size)
    closer.value, closer.floor = 100 * found.closer, 50.0
    order = np.sign(held_out - samples[:, None])  # 1 where the sample is closer
    draws = np.array([order[np.ix_(i, j)].mean() for i, j in zip(picked, picked_held_out, strict=True)])
    closer.interval = interval(50 + 50 * draws)
    closer.difference = t_interval(50 * draws, closer.value - closer.floor, size)
    for metric in metrics:
        metric.counts = groups.counts
    return metrics
