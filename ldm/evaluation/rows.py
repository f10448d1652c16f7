"""How a set of generated volumes compares with real ones: figures, each beside the same figure of real
volumes against real ones (its floor), with an interval and the number of volumes, or with the reason why
there is none.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from scipy.stats import wasserstein_distance

from ldm import counted
from ldm.evaluation import copies
from ldm.evaluation.distances import (
    DRAWS,
    LEVEL,
    KernelDistance,
    PrincipalAxes,
    bootstrap,
    bootstrap_mean,
    difference_interval,
    frechet_distance,
    frechet_of_moments,
    inception_score,
    interval,
    precision_recall,
    share_difference,
    share_interval,
    smallest_shift_seen,
)
from ldm.evaluation.features import PLANES, FeatureSpace, stacked
from ldm.evaluation.volumes import MEDICALNET, MOST, OWN, RADIMAGENET, Sets, drawn
from ldm.metrics import Tissues, histogram_distance, spectrum_distance

NEIGHBOURS = 3  # of precision and recall
AXES = 16  # at most, of the Fréchet distance in own features
ROWS_AN_AXIS = 3  # volumes at least for each of them
FINE = 0.25  # cycles a voxel, above which detail is fine

# Differences from scans that do not matter:
ALIKE = [-0.02, 0.02]  # of MS-SSIM
SHARP = [-0.2, 0.25]  # of the share of fine detail
HALF = 0.5  # standard deviations, of tissue volumes


@dataclass
class Figure:
    """A line of the table: `value` of the generated volumes, `floor` the same of real volumes against real
    ones, each with a 95 % interval, with as many volumes on each side. `difference` is the interval of value
    minus floor, of volumes drawn alike; `tolerance` what it may be without mattering. `p_value` is that of a
    permutation test of samples and held-out volumes; where it does not tell them apart, `sees` is the least
    difference, in standard deviations, that it finds in four of five cases. `better` is "lower", "higher",
    "near floor" or "" where it is there to compare with; `missing` says why there is no value."""

    key: str
    group: str
    name: str
    about: str
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

    def plain(self) -> dict:
        """As JSON holds it: numbers that are not finite become null."""
        content = asdict(self)
        for key, value in content.items():
            if isinstance(value, float) and not math.isfinite(value):
                content[key] = None
            if isinstance(value, list) and not all(map(math.isfinite, value)):
                content[key] = None
        if content["value"] is None and not content["missing"]:
            content["missing"] = "it is not finite for these volumes"
        return content


def all_figures(sets: Sets, nearest: dict | None) -> list[Figure]:
    """The whole table, in the order in which it is read.

    Args:
        nearest: of `nearest_training_volumes`, or None where there is no training set.
    """
    return [
        *feature_figures(sets),
        *similarity_figures(sets),
        *appearance_figures(sets),
        *tissue_figures(sets),
        *reconstruction_figures(sets),
        *copy_figures(sets, nearest),
        *classifier_figures(sets),
    ]


# ---------------------------------------------------------------- distances in features

DISTANCE = "Distance to held-out scans"
CALLED = {OWN: "own features", MEDICALNET: "MedicalNet"}


def feature_figures(sets: Sets) -> list[Figure]:
    """Kernel and Fréchet distances, precision and recall, in each network's features."""
    found = []
    for network in sets.held_out.features:
        found += kernel_figures(sets, network)
    if OWN in sets.held_out.features:
        found += [own_frechet_figure(sets), *precision_figures(sets)]
    else:
        about = "Distances in the features of an autoencoder trained on such scans."
        why = "no autoencoder is named: give --autoencoder FILE, or -c and -e"
        found.append(Figure("mmd_own", DISTANCE, "Kernel distance (MMD²), own features", about, missing=why))
    if MEDICALNET in sets.held_out.features:
        found.append(medicalnet_figure(sets))
    if RADIMAGENET in sets.held_out.networks:
        found.append(radimagenet_figure(sets))
    return found


def spaces(sets: Sets, network: str) -> tuple[Callable, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The feature space, and the rows of the samples, the held-out volumes and the floor's first set."""
    space = FeatureSpace(sets.reference.rows(network))
    return space, *(space(one.rows(network, of)) for one, of in sets.sides.values())


def kernel_figures(sets: Sets, network: str) -> list[Figure]:
    """The kernel distance of the samples, with the permutation test, and of the yardsticks."""
    name = f"Kernel distance (MMD²), {CALLED[network]}"
    figure = Figure(
        f"mmd_{network}",
        DISTANCE,
        name,
        "Unbiased, so that it is about 0 for volumes of the same kind, however many there are.",
        counts=sets.counts,
    )
    if missing := sets.too_few(2):
        figure.missing = missing
        return [figure]
    space, made, held, first = spaces(sets, network)
    distance, floor = KernelDistance(made, held), KernelDistance(first, held)
    of_distance, of_floor = distance.bootstrap(), floor.bootstrap()
    figure.value, figure.interval = distance.value, interval(of_distance)
    figure.floor, figure.floor_interval = floor.value, interval(of_floor)
    figure.difference = difference_interval(of_distance - of_floor, figure.value - figure.floor, sets.least)
    figure.counts = f"{sets.least} on each side{permutation_test(sets, network, figure)}"
    rows = [figure]
    for change, features in sets.yardsticks.features.items():
        changed = KernelDistance(space(stacked(features[network])), held)
        rows.append(
            Figure(
                f"mmd_{network}: {change}",
                DISTANCE,
                f"... of {change}",
                "To compare with: real scans that this was done to.",
                changed.value,
                interval(changed.bootstrap()),
                better="",
                counts=f"{len(features[network])} real, {len(held)} held-out",
            )
        )
    return rows


def permutation_test(sets: Sets, network: str, figure: Figure) -> str:
    """Fill in whether samples and held-out volumes can be told apart; returns the numbers of volumes in
    words.

    Each subject has one volume in it, and features are scaled by both sets together: so the test is exact,
    since a volume could as well stand on the other side if the sets do not differ.
    """
    of = [one.of_each_subject for one in (sets.generated, sets.held_out)]
    of = [[one[i] for i in drawn(len(one), MOST, side)] for side, one in enumerate(of)]
    made, held = (one.rows(network, i) for one, i in zip((sets.generated, sets.held_out), of, strict=True))
    sizes = [len(i) for i in of]
    told = f"; in the test {sizes[0]} generated and {sizes[1]} held-out"
    if min(sizes) < 2:
        return f"{told}, too few"
    both = [torch.cat(groups) for groups in zip(made, held, strict=True)]
    rows = FeatureSpace(both)(both)
    figure.p_value = KernelDistance(rows[: sizes[0]], rows[sizes[0] :]).p_value()
    if figure.p_value > LEVEL:
        real = held
        if sets.training:
            scans = sets.training.rows(network, sets.training.of_each_subject)
            real = [torch.cat(groups) for groups in zip(held, scans, strict=True)]
        figure.sees = smallest_shift_seen(FeatureSpace(real)(real), *sizes)
    return told


def own_frechet_figure(sets: Sets) -> Figure:
    """The Fréchet distance along the axes in which real volumes vary most."""
    axes = min(AXES, sets.least // ROWS_AN_AXIS)
    figure = Figure(
        "frechet_own",
        DISTANCE,
        "Fréchet distance, own features",
        f"Along the {axes} directions in which volumes vary most, which so many volumes allow; 1 is the "
        "variance of real volumes.",
    )
    if missing := sets.too_few(2 * ROWS_AN_AXIS):
        figure.missing, figure.about = missing, "Along the directions in which volumes vary most."
        return figure
    _, made, held, first = spaces(sets, OWN)
    # Axes of all three sets together: those of the floor's two sets alone would favour the floor.
    project = PrincipalAxes(torch.cat([made, held, first]), axes)
    made, held, first = map(project, (made, held, first))
    real = torch.cat([first, held])
    size = (real - real.mean(0)).square().sum(1).mean().sqrt()  # of the spread of real volumes
    return with_floor(figure, _frechet, *((rows / size).numpy() for rows in (made, held, first)))


def _frechet(first: np.ndarray, second: np.ndarray) -> float:
    return frechet_distance(torch.from_numpy(first), torch.from_numpy(second))


def medicalnet_figure(sets: Sets) -> Figure:
    """The published 3D Fréchet distance."""
    figure = Figure(
        "fid_3d",
        DISTANCE,
        "3D FID (MedicalNet)",
        "As published: all features. It falls with the number of volumes, so that only its floor, of as "
        "many, says what it means.",
    )
    if missing := sets.too_few(2):
        figure.missing = missing
        return figure
    sides = (one.rows(MEDICALNET, of)[0].numpy() for one, of in sets.sides.values())
    return with_floor(figure, _frechet, *sides)


def radimagenet_figure(sets: Sets) -> Figure:
    """The published 2.5D Fréchet distance: the mean over three planes."""
    figure = Figure(
        "fid_2.5d",
        DISTANCE,
        "2.5D FID (RadImageNet)",
        "As published: the mean over sagittal, coronal and axial slices.",
        counts=f"{sets.least} on each side",
    )
    if missing := sets.too_few(2):
        figure.missing = missing
        return figure
    per_plane, floors = (
        [frechet_of_moments(*pair) for pair in zip(sets.slices[side], sets.slices["held"], strict=True)]
        for side in ("made", "first")
    )
    told = ", ".join(f"{name} {value:.4g}" for name, value in zip(PLANES, per_plane, strict=True))
    figure.about += f" Of the samples: {told}. No interval, since the slices are not kept."
    figure.value, figure.floor = float(np.mean(per_plane)), float(np.mean(floors))
    return figure


def precision_figures(sets: Sets) -> list[Figure]:
    """Precision and recall in own features."""
    kinds = (
        (
            "precision",
            "Share of samples that look like some real scan (within its nearest neighbours' distance).",
        ),
        ("recall", "Share of held-out scans that look like some sample."),
    )
    missing = sets.too_few(NEIGHBOURS + 1)
    if missing:
        return [
            Figure(
                key, DISTANCE, f"{key.capitalize()}, own features", about, better="higher", missing=missing
            )
            for key, about in kinds
        ]
    _, made, held, first = spaces(sets, OWN)
    found, floors = (precision_recall(held, rows, NEIGHBOURS) for rows in (made, first))
    figures = []
    for (key, about), values, floor in zip(kinds, found, floors, strict=True):
        figure = Figure(key, DISTANCE, f"{key.capitalize()}, own features", about, better="higher")
        figure.value, figure.interval = float(values.mean()), share_interval(values)
        figure.floor, figure.floor_interval = float(floor.mean()), share_interval(floor)
        figure.difference = share_difference(values, floor)
        figure.counts = f"{sets.least} on each side"
        figures.append(figure)
    return figures


def with_floor(
    figure: Figure, statistic: Callable, made: np.ndarray, held: np.ndarray, first: np.ndarray
) -> Figure:
    """Fill in a distance of samples and of the floor's first set to held-out volumes, rows (N, K) each, and
    their difference."""
    values, floors = bootstrap(statistic, made, first, second=held)
    figure.value, figure.floor = statistic(made, held), statistic(first, held)
    figure.interval, figure.floor_interval = (interval(np.maximum(0, one)) for one in (values, floors))
    figure.difference = difference_interval(values - floors, figure.value - figure.floor, len(made))
    figure.counts = f"{len(made)} on each side"
    return figure


# ---------------------------------------------------------------- diversity, appearance, anatomy


def similarity_figures(sets: Sets) -> list[Figure]:
    """MS-SSIM between samples, beside that between real scans."""
    figure = Figure(
        "ms_ssim",
        "Diversity",
        "MS-SSIM between samples",
        "How alike two samples are, from 0 to 1; more than between scans means less variety.",
        better="near floor",
        tolerance=ALIKE,
    )
    # The held-out volumes alone are few; training volumes are as real.
    real = sets.held_out.similarities + (sets.training.similarities if sets.training else [])
    made = sets.generated.similarities
    count = min(len(real), len(made))
    if count < 1:
        figure.missing = f"needs 2 volumes of each, large enough for its window; there are {sets.counts}"
        return [figure]
    made, real = (np.array(pairs)[drawn(len(pairs), count, i)] for i, pairs in enumerate((made, real)))
    draws, of_floor = bootstrap_mean(made), bootstrap_mean(real, seed=1)
    figure.value, figure.interval = float(made.mean()), interval(draws)
    figure.floor, figure.floor_interval = float(real.mean()), interval(of_floor)
    figure.difference = difference_interval(draws - of_floor, figure.value - figure.floor, count)
    figure.counts = f"{counted(count, 'pair{s}')} of each"
    return [figure]


def appearance_figures(sets: Sets) -> list[Figure]:
    """Sharpness and intensities."""
    group = "Sharpness and intensity"
    figures = [
        Figure("spectrum", group, "Power spectrum", "Mean difference over all frequencies.", unit="dB"),
        Figure(
            "fine_power",
            group,
            "Fine detail",
            f"Spectral power above {FINE} cycles a voxel, as a share of the held-out scans'.",
            better="near floor",
            tolerance=SHARP,
        ),
        Figure(
            "histogram",
            group,
            "Intensity histogram",
            "How far a voxel's intensity is from where it should be, on average (Wasserstein distance), as a "
            "share of the range.",
            unit="%",
        ),
    ]
    if missing := sets.too_few(1):
        for figure in figures:
            figure.missing = missing
        return figures
    fine = sets.held_out.spectrum.frequencies >= FINE

    def share(a: np.ndarray, b: np.ndarray) -> float:
        return float(a[:, fine].mean() / b[:, fine].mean()) if fine.any() and b[:, fine].any() else math.nan

    spectra, histograms = ([np.array(one) for one in sets.chosen(key)] for key in ("spectra", "histograms"))
    with_floor(figures[0], spectrum_distance, *spectra)
    with_floor(figures[1], share, *spectra)
    with_floor(figures[2], lambda a, b: 100 * histogram_distance(a, b), *histograms)
    return figures


def tissue_figures(sets: Sets) -> list[Figure]:
    """Volumes of the foreground and of its three classes of intensity."""
    names = {
        "foreground": "Foreground volume",
        "dark": "Dark tissue (fluid in T1w)",
        "middle": "Middle tissue (grey matter in T1w)",
        "bright": "Bright tissue (white matter in T1w)",
    }
    figures = []
    for field in fields(Tissues):
        made, held, first = (
            finite([getattr(one, field.name) for one in tissues]) for tissues in sets.chosen("tissues")
        )
        figure = Figure(f"tissue_{field.name}", "Anatomy", names[field.name], "", unit="ml")
        figures.append(figure)
        if not all(map(len, (made, held, first))):
            figure.missing = sets.too_few(1) or "the volumes have too few grey values to tell tissues apart"
            continue
        samples, scans = (
            _spread(finite([getattr(one, field.name) for one in some.tissues]))
            for some in (sets.generated, sets.held_out)
        )
        figure.about = (
            f"How far the distributions are apart (Wasserstein distance). Samples {samples} ml, held-out "
            f"scans {scans} ml."
        )
        figure.tolerance = [0.0, HALF * float(np.concatenate([held, first]).std())]
        least = min(map(len, (made, held, first)))
        with_floor(figure, wasserstein_distance, made[:least], held[:least], first[:least])
    return figures


def finite(values: Sequence[float]) -> np.ndarray:
    """The values that are."""
    values = np.array(values, dtype=float)
    return values[np.isfinite(values)]


def _spread(values: np.ndarray) -> str:
    mean = values.mean()
    digits = max(0, 2 - math.floor(math.log10(mean))) if mean > 0 else 0
    return f"{mean:.{digits}f}" + (f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else "")


def reconstruction_figures(sets: Sets) -> list[Figure]:
    """What the autoencoder keeps of held-out scans."""
    kinds = (
        ("psnr", "PSNR", "dB", "higher"),
        ("ssim", "SSIM", "", "higher"),
        ("l1", "Mean absolute error", "", "lower"),
    )
    values = np.array(sets.held_out.reconstructions).reshape(-1, len(kinds))
    figures = []
    for column, (key, name, unit, better) in enumerate(kinds):
        about = "Of held-out scans that went through the autoencoder and back; in the unit range, all voxels."
        figure = Figure(f"reconstruction_{key}", "Reconstruction", name, about, unit=unit, better=better)
        if len(values):
            figure.value = float(values[:, column].mean())
            figure.interval = difference_interval(
                bootstrap_mean(values[:, column]), figure.value, len(values)
            )
            figure.counts = f"{len(values)} held-out"
        else:
            figure.missing = "no autoencoder is named: give --autoencoder FILE, or -c and -e"
        figures.append(figure)
    return figures


def classifier_figures(sets: Sets) -> list[Figure]:
    """The inception score, where a classifier is given."""
    if not sets.generated.classifier:
        return []
    about = (
        "From 1, where all samples seem of one class, to the number of classes, all drawn, each clearly one."
    )
    figure = Figure(
        "inception_score", "Classifier", "Inception Score", about, better="near floor", counts=sets.counts
    )
    if missing := sets.too_few(1):
        figure.missing = missing
        return [figure]

    def score(rows: np.ndarray, _: np.ndarray) -> float:
        return inception_score(torch.from_numpy(rows))

    made, held, _ = (torch.stack(rows).numpy() for rows in sets.chosen("probabilities"))
    return [with_floor(figure, score, made, held, held)]


# ---------------------------------------------------------------- copies


def nearest_training_volumes(sets: Sets, device: torch.device, progress: Callable = iter) -> dict | None:
    """The nearest training volume of each sample and of each held-out volume, and what that says; None where
    there is no training set.

    Returns:
        "generated" and "held-out": a list of `memorisation.Neighbour`; "verdict": `memorisation.Verdict`.
    """
    if sets.training is None:
        return None
    training = copies.TrainingVolumes(sets.training.thumbnails, device)
    found = {
        one.name: [training.nearest(thumbnail) for thumbnail in progress(one.thumbnails)]
        for one in (sets.generated, sets.held_out)
    }
    distances = [
        np.array([neighbour.distance for neighbour in found[name]]) for name in ("generated", "held-out")
    ]
    return {**found, "verdict": copies.judge(*distances)}


def copy_figures(sets: Sets, nearest: dict | None) -> list[Figure]:
    """Copies of training volumes, and how close samples come to them."""
    group = "Copies of training scans"
    figures = [
        Figure("copies", group, "Samples that are copies", "", unit="%"),
        Figure(
            "nearest",
            group,
            "Distance to the nearest training scan",
            "Median over samples; floor: over held-out scans. sqrt(2 - 2 r), r the correlation after "
            "smoothing, at the best shift, mirrored or not.",
            better="near floor",
        ),
        Figure(
            "closer",
            group,
            "Samples closer than held-out scans",
            "Share of pairs of a sample and a held-out scan in which the sample is closer to the training "
            "set; 50 % where samples are as new as held-out scans. Blur alone brings it up.",
            unit="%",
            better="near floor",
        ),
    ]
    if nearest is None:
        for figure in figures:
            figure.missing = "no training set is named: give --train DIR, or -c and -e"
        return figures
    verdict = nearest["verdict"]
    made, held = (np.array([n.distance for n in nearest[name]]) for name in ("generated", "held-out"))
    copies, median, closer = figures
    copies.about = (
        f"Closer to a training scan than {verdict.limit:.3g}: half of the held-out scans' median distance, "
        f"or {copies.IDENTICAL:g} where that is less."
    )
    rng = np.random.default_rng(0)
    least = min(len(made), len(held))
    of_made, of_held = (rng.integers(len(one), size=(DRAWS, len(one))) for one in (made, held))
    shares = [
        100 * np.array(f(flags))
        for f in (np.mean, share_interval)
        for flags in (verdict.copies, verdict.leaks)
    ]
    copies.value, copies.floor, copies.interval, copies.floor_interval = (one.tolist() for one in shares)
    copies.difference = [100 * limit for limit in share_difference(verdict.copies, verdict.leaks)]
    draws, floors = np.median(made[of_made], axis=1), np.median(held[of_held], axis=1)
    median.value, median.floor = float(np.median(made)), float(np.median(held))
    median.interval, median.floor_interval = interval(draws), interval(floors)
    median.difference = difference_interval(draws - floors, median.value - median.floor, least)
    closer.value, closer.floor = 100 * verdict.closer, 50.0
    order = np.sign(held - made[:, None])  # 1 where the sample is closer
    draws = np.array([order[np.ix_(i, j)].mean() for i, j in zip(of_made, of_held, strict=True)])
    closer.interval = interval(50 + 50 * draws)
    closer.difference = difference_interval(50 * draws, closer.value - closer.floor, least)
    for figure in figures:
        figure.counts = sets.counts
    return figures
