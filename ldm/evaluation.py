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

from ldm import memorisation
from ldm.distances import (
    KernelDistance,
    PrincipalAxes,
    bootstrap,
    bootstrap_mean,
    frechet_distance,
    frechet_of_moments,
    inception_score,
    interval,
    precision_recall,
)
from ldm.features import PLANES, FeatureSpace, stacked
from ldm.metrics import Tissues, histogram_distance, spectrum_distance
from ldm.sets import MEDICALNET, OWN, RADIMAGENET, Sets

NEIGHBOURS = 3  # of precision and recall
AXES = 16  # at most, of the Fréchet distance in own features
ROWS_AN_AXIS = 3  # volumes at least for each of them
FINE = 0.25  # cycles a voxel, above which detail is fine


@dataclass
class Figure:
    """A line of the table: `value` of the generated volumes, `floor` the same of real volumes against real
    ones, each with a 95 % interval. `better` is "lower", "higher", "near floor" or "" where it is there to
    compare with; `missing` says why there is no value."""

    key: str
    group: str
    name: str
    about: str
    value: float | None = None
    interval: list[float] | None = None
    floor: float | None = None
    floor_interval: list[float] | None = None
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
    """The feature space, and the rows of the generated and the held-out volumes and of the floor's first
    set."""
    space = FeatureSpace(sets.reference.rows(network))
    made, held = (space(one.rows(network)) for one in (sets.generated, sets.held_out))
    return space, made, held, space(sets.reference.rows(network, sets.first))


def kernel_figures(sets: Sets, network: str) -> list[Figure]:
    """The kernel distance of the samples, and of the yardsticks."""
    name = f"Kernel distance (MMD²), {CALLED[network]}"
    about = "Unbiased, so that it is about 0 for volumes of the same kind, however many there are."
    figure = Figure(f"mmd_{network}", DISTANCE, name, about, counts=sets.counts)
    if missing := sets.too_few(2):
        figure.missing = missing
        return [figure]
    space, made, held, first = spaces(sets, network)
    distance, floor = KernelDistance(made, held), KernelDistance(first, held[sets.second])
    figure.value, figure.interval = distance.value, interval(distance.bootstrap())
    figure.floor, figure.floor_interval = floor.value, interval(floor.bootstrap())
    rows = [figure]
    for change, features in sets.yardsticks.features.items():
        changed = KernelDistance(space(stacked(features[network])), held[sets.second])
        rows.append(
            Figure(
                f"mmd_{network}: {change}",
                DISTANCE,
                f"... of {change}",
                "To compare with: real scans that this was done to.",
                changed.value,
                interval(changed.bootstrap()),
                better="",
                counts=f"{len(features[network])} real, {len(held[sets.second])} held-out",
            )
        )
    return rows


def own_frechet_figure(sets: Sets) -> Figure:
    """The Fréchet distance along the axes in which real volumes vary most."""
    axes = min(AXES, sets.least // ROWS_AN_AXIS)
    figure = Figure(
        "frechet_own",
        DISTANCE,
        "Fréchet distance, own features",
        f"Along the {axes} directions in which real volumes vary most, which so many volumes allow; 1 is the "
        "variance of real volumes.",
    )
    if missing := sets.too_few(2 * ROWS_AN_AXIS):
        figure.missing, figure.about = missing, "Along the directions in which real volumes vary most."
        return figure
    _, made, held, first = spaces(sets, OWN)
    project = PrincipalAxes(torch.cat([first, held[sets.second]]), axes)
    count = sets.least
    real = project(torch.cat([first, held[sets.second]]))
    size = (real - real.mean(0)).square().sum(1).mean().sqrt()  # of the spread of real volumes
    made, held, first = ((project(rows)[:count] / size).numpy() for rows in (made, held[sets.second], first))
    return with_floor(figure, _frechet, made, first, held, f"{count} on each side")


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
    count = sets.least
    made, held, first = (
        rows[0][:count].numpy()
        for rows in (
            sets.generated.rows(MEDICALNET),
            sets.held_out.rows(MEDICALNET, sets.second),
            sets.reference.rows(MEDICALNET, sets.first),
        )
    )
    return with_floor(figure, _frechet, made, first, held, f"{count} on each side")


def radimagenet_figure(sets: Sets) -> Figure:
    """The published 2.5D Fréchet distance: the mean over three planes."""
    figure = Figure(
        "fid_2.5d",
        DISTANCE,
        "2.5D FID (RadImageNet)",
        "As published: the mean over sagittal, coronal and axial slices.",
        counts=sets.counts,
    )
    if missing := sets.too_few(2):
        figure.missing = missing
        return figure
    halves, held = sets.reference.slices, sets.held_out.slices
    per_plane, floors = [], []
    for plane in range(len(PLANES)):
        whole = held[0][plane] + held[1][plane]
        made = sets.generated.slices[0][plane] + sets.generated.slices[1][plane]
        per_plane.append(frechet_of_moments(made, whole))
        first = halves[0][plane] + halves[1][plane] if sets.training else halves[0][plane]
        floors.append(frechet_of_moments(first, whole if sets.training else held[1][plane]))
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
    found, floors = (
        precision_recall(held, made, NEIGHBOURS),
        precision_recall(held[sets.second], first, NEIGHBOURS),
    )
    return [
        Figure(
            key,
            DISTANCE,
            f"{key.capitalize()}, own features",
            about,
            float(values.mean()),
            interval(bootstrap_mean(values)),
            float(floor.mean()),
            interval(bootstrap_mean(floor)),
            better="higher",
            counts=sets.counts,
        )
        for (key, about), values, floor in zip(kinds, found, floors, strict=True)
    ]


def with_floor(
    figure: Figure, statistic: Callable, made: np.ndarray, first: np.ndarray, held: np.ndarray, counts: str
) -> Figure:
    """Fill in a distance of samples and of the floor's first set to held-out volumes, rows (N, K) each."""
    figure.value, figure.interval = statistic(made, held), interval(bootstrap(statistic, made, held))
    figure.floor, figure.floor_interval = statistic(first, held), interval(bootstrap(statistic, first, held))
    figure.counts = counts
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
    )
    # The held-out volumes alone are few; training volumes are as real.
    real = sets.held_out.similarities + (sets.training.similarities if sets.training else [])
    made = sets.generated.similarities
    if min(len(real), len(made)) < 1:
        figure.missing = f"needs 2 volumes of each, large enough for its window; there are {sets.counts}"
        return [figure]
    figure.value, figure.interval = float(np.mean(made)), interval(bootstrap_mean(made))
    figure.floor, figure.floor_interval = float(np.mean(real)), interval(bootstrap_mean(real))
    figure.counts = f"{len(made)} pairs generated, {len(real)} real"
    return [figure]


def appearance_figures(sets: Sets) -> list[Figure]:
    """Sharpness and intensities."""
    group = "Sharpness and intensity"
    made, held = (np.array(one.spectra) for one in (sets.generated, sets.held_out))
    first = np.array(sets.reference.spectra)[sets.first]
    figures = [
        Figure("spectrum", group, "Power spectrum", "Mean difference over all frequencies.", unit="dB"),
        Figure(
            "fine_power",
            group,
            "Fine detail",
            f"Spectral power above {FINE} cycles a voxel, as a share of the held-out scans'.",
            better="near floor",
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
    with_floor(figures[0], spectrum_distance, made, first, held[sets.second], sets.counts)
    fine = sets.held_out.spectrum.frequencies >= FINE

    def share(a: np.ndarray, b: np.ndarray) -> float:
        return float(a[:, fine].mean() / b[:, fine].mean()) if fine.any() and b[:, fine].any() else math.nan

    with_floor(figures[1], share, made, first, held[sets.second], sets.counts)
    histograms = [
        np.array(sets.generated.histograms),
        np.array(sets.reference.histograms)[sets.first],
        np.array(sets.held_out.histograms)[sets.second],
    ]
    with_floor(figures[2], lambda a, b: 100 * histogram_distance(a, b), *histograms, sets.counts)
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
            finite([getattr(one, field.name) for one in tissues])
            for tissues in (
                sets.generated.tissues,
                sets.held_out.tissues[sets.second],
                sets.reference.tissues[sets.first],
            )
        )
        figure = Figure(f"tissue_{field.name}", "Anatomy", names[field.name], "", unit="ml")
        figures.append(figure)
        if not all(map(len, (made, held, first))):
            figure.missing = sets.too_few(1) or "the volumes have too few grey values to tell tissues apart"
            continue
        figure.about = (
            f"How far the distributions are apart (Wasserstein distance). Samples {_spread(made)} ml, "
            f"held-out scans {_spread(held)} ml."
        )
        with_floor(figure, wasserstein_distance, made, first, held, sets.counts)
    return figures


def finite(values: Sequence[float]) -> np.ndarray:
    """The values that are."""
    values = np.array(values, dtype=float)
    return values[np.isfinite(values)]


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():.0f}" + (f" ± {values.std():.0f}" if len(values) > 1 else "")


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
            figure.interval = interval(bootstrap_mean(values[:, column]))
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
    made, real = (torch.stack(one.probabilities).numpy() for one in (sets.generated, sets.held_out))

    def score(rows: np.ndarray, _: np.ndarray) -> float:
        return inception_score(torch.from_numpy(rows))

    figure.value, figure.interval = score(made, real), interval(bootstrap(score, made, real))
    figure.floor, figure.floor_interval = score(real, made), interval(bootstrap(score, real, made))
    return [figure]


# ---------------------------------------------------------------- copies


def nearest_training_volumes(sets: Sets, device: torch.device, progress: Callable = iter) -> dict | None:
    """The nearest training volume of each sample and of each held-out volume, and what that says; None where
    there is no training set.

    Returns:
        "generated" and "held-out": a list of `memorisation.Neighbour`; "verdict": `memorisation.Verdict`.
    """
    if sets.training is None:
        return None
    training = memorisation.TrainingVolumes(sets.training.thumbnails, device)
    found = {
        one.name: [training.nearest(thumbnail) for thumbnail in progress(one.thumbnails)]
        for one in (sets.generated, sets.held_out)
    }
    distances = [
        np.array([neighbour.distance for neighbour in found[name]]) for name in ("generated", "held-out")
    ]
    return {**found, "verdict": memorisation.judge(*distances)}


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
        f"or {memorisation.IDENTICAL:g} where that is less."
    )
    copies.value, copies.floor = 100 * float(verdict.copies.mean()), 100 * float(verdict.leaks.mean())
    median.value, median.floor = float(np.median(made)), float(np.median(held))
    for figure, values in ((median, made), (copies, 100.0 * verdict.copies)):
        statistic = np.median if figure is median else np.mean
        figure.interval = interval(bootstrap(lambda a, _, s=statistic: float(s(a)), values, held))
    median.floor_interval = interval(bootstrap(lambda a, _: float(np.median(a)), held, made))
    closer.value, closer.floor = 100 * verdict.closer, 50.0
    for figure in figures:
        figure.counts = sets.counts
    return figures
