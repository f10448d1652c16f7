"""What the figures of an evaluation say, in plain words: the lines that a user reads first.

Each is a tone ("good", "warn", "bad", or "none" where nothing can be said) and a sentence. They say no more
than the figures do: where an interval reaches the floor's, that no difference can be seen, and with how many
volumes.
"""

from collections.abc import Sequence

import numpy as np

from ldm.evaluation import Figure
from ldm.sets import BLURS, MEDICALNET, OWN, blurred_scans

ALIKE = 0.02  # by which MS-SSIM may exceed that of scans
PLAIN_BLUR = 0.75  # voxels, which any eye sees
SHARP = 0.8, 1.25  # share of the held-out scans' fine detail that is as it should be
WORTH_TELLING = 0.05  # of a distance, that the autoencoder makes
FEW = 20  # volumes, below which a line says so
FEWEST = 5  # held-out scans, below which their median is no measure
SUSPICIOUS = -3.0  # standard deviations (Meehan et al., 2020)
GOOD_PSNR, FAIR_PSNR = 30.0, 25.0  # dB


def verdicts(figures: Sequence[Figure], nearest: dict | None, counts: dict[str, int]) -> list[dict]:
    """The lines, the most important first.

    Args:
        nearest: of `evaluation.nearest_training_volumes`.
        counts: volumes of each set.
    """
    found = {figure.key: figure for figure in figures}
    lines = [
        copies(nearest, counts),
        realism(found),
        sharpness(found["fine_power"]),
        diversity(found["ms_ssim"]),
        anatomy([figure for key, figure in found.items() if key.startswith("tissue_")], counts),
        autoencoder(found),
        numbers(counts),
    ]
    return [{"tone": tone, "text": text} for tone, text in filter(None, lines)]


def copies(nearest: dict | None, counts: dict[str, int]) -> tuple[str, str]:
    """Whether samples are copies of training scans."""
    if nearest is None:
        return (
            "none",
            "Whether samples are copies of training scans was not looked at: no training set was named.",
        )
    verdict, total = nearest["verdict"], counts["generated"]
    leaks = int(verdict.leaks.sum())
    held = f" {leaks} of the held-out scans are copies too: the split leaks." if leaks else ""
    none = "" if leaks else f" Of the {len(verdict.leaks)} held-out scans none is."
    if number := int(verdict.copies.sum()):
        are = "is a copy of a training scan" if number == 1 else "are copies of training scans"
        return "bad", f"{number} of {total} samples {are}: the pairs are shown below.{held}{none}"
    closest = min(neighbour.distance for neighbour in nearest["generated"])
    others = min(neighbour.distance for neighbour in nearest["held-out"])
    text = (
        f"No sample is a copy of a training scan: the closest lies {closest:.2g} from one, held-out scans "
        f"come as close as {others:.2g}, and below {verdict.limit:.2g} it would be a copy."
    )
    if rough := len(verdict.leaks) < FEWEST:
        text += f" With {len(verdict.leaks)} held-out scan(s) that limit is rough."
    if verdict.z <= SUSPICIOUS:
        text += (
            " But samples as a whole lie closer to training scans than held-out scans do "
            f"({100 * verdict.closer:.0f} % of pairs, 50 % would be chance): by blur, or because parts are "
            "learnt by heart. Look at the closest pairs."
        )
    return ("warn" if leaks or rough or verdict.z <= SUSPICIOUS else "good"), text + held


def realism(found: dict[str, Figure]) -> tuple[str, str]:
    """How far samples are from held-out scans, told by what blur does to scans."""
    measured = [key for key in (f"mmd_{OWN}", f"mmd_{MEDICALNET}") if key in found and not found[key].missing]
    if not measured:
        return "none", f"How real samples look was not measured: {found[f'mmd_{OWN}'].missing}."
    key = measured[0]
    figure, features = found[key], "own features" if key.endswith(OWN) else "MedicalNet's features"
    if figure.interval[0] <= max(figure.floor, figure.floor_interval[1]):
        return "good", (
            f"Samples are as far from held-out scans as other real scans are ({features}): with this many "
            "volumes no difference can be seen."
        )
    ladder = [max(found[f"{key}: {blurred_scans(sigma)}"].value, 1e-9) for sigma in BLURS]
    ladder = np.maximum.accumulate(ladder)
    if figure.value < ladder[0]:
        tone, place = "good", f"closer than {blurred_scans(BLURS[0])}"
    elif figure.value > ladder[-1]:
        times = figure.value / ladder[-1]
        far = (
            "farther than" if times < 1.5 else f"{times:.2g} times as far as" if times < 100 else "far beyond"
        )
        tone, place = "bad", f"{far} {blurred_scans(BLURS[-1])}"
    else:
        blur = float(np.exp(np.interp(np.log(figure.value), np.log(ladder), np.log(BLURS))))
        tone, place = (
            ("warn" if blur < PLAIN_BLUR else "bad"),
            f"as far as scans blurred by {blur:.1f} voxels",
        )
    text = f"Samples differ from held-out scans: they are {place} ({features})."
    reconstructions = found.get(f"{key}: reconstructions")
    if reconstructions and reconstructions.value > WORTH_TELLING * figure.value:
        text += f" {_share(reconstructions.value, figure.value)} of this distance is the autoencoder's."
    return tone, text


def _share(part: float, whole: float) -> str:
    return f"{100 * min(1.0, max(0.0, part / whole)):.0f} %"


def sharpness(figure: Figure) -> tuple[str, str] | None:
    """Fine detail beside that of scans."""
    if figure.missing or figure.value is None:
        return None
    share, low, high = 100 * figure.value, *SHARP
    if figure.value < low:
        return "warn", f"Samples are softer than scans: they hold {share:.0f} % of the fine detail."
    if figure.value > high:
        return "warn", f"Samples are noisier than scans: they hold {share:.0f} % of the fine detail's power."
    return "good", f"Samples are as sharp as scans: they hold {share:.0f} % of the fine detail."


def diversity(figure: Figure) -> tuple[str, str] | None:
    """How varied samples are."""
    if figure.missing:
        return "none", f"How varied samples are was not measured: {figure.missing}."
    text = f"two samples are {figure.value:.2f} alike (MS-SSIM), two scans {figure.floor:.2f}."
    if figure.value > figure.floor + ALIKE and figure.interval[0] > figure.floor_interval[1]:
        return "warn", f"Samples are less varied than scans: {text}"
    if figure.value < figure.floor - ALIKE and figure.interval[1] < figure.floor_interval[0]:
        return "warn", f"Samples are less alike than scans are, which noise and faults do too: {text}"
    return "good", f"Samples are about as varied as scans: {text}"


def anatomy(figures: Sequence[Figure], counts: dict[str, int]) -> tuple[str, str] | None:
    """Whether tissue volumes are distributed as those of scans."""
    measured = [figure for figure in figures if not figure.missing and figure.floor_interval]
    if not measured:
        return None
    off = [figure for figure in measured if figure.interval[0] > max(figure.floor, figure.floor_interval[1])]
    worst = max(off or measured, key=lambda figure: figure.value / max(figure.floor, 1e-9))
    told = f"{worst.name[:1].lower()}{worst.name[1:]}. {worst.about.partition('. ')[2]}"
    if off:
        return "warn", f"{len(off)} of {len(measured)} tissue volumes are off, the most: {told}"
    if min(counts["generated"], counts["held-out"]) < FEW:
        return (
            "none",
            f"So few volumes do not tell whether tissues are as large as in scans. Most apart: {told}",
        )
    return "good", f"Tissue volumes are distributed as in scans, as far as so many tell. Most apart: {told}"


def autoencoder(found: dict[str, Figure]) -> tuple[str, str] | None:
    """What the autoencoder keeps."""
    psnr, ssim = found["reconstruction_psnr"], found["reconstruction_ssim"]
    if psnr.missing:
        return None
    tone = "good" if psnr.value >= GOOD_PSNR else "warn" if psnr.value >= FAIR_PSNR else "bad"
    return tone, (
        f"The autoencoder gives held-out scans back at {psnr.value:.1f} dB PSNR and {ssim.value:.3f} SSIM; "
        "what it loses, samples do not have."
    )


def numbers(counts: dict[str, int]) -> tuple[str, str] | None:
    """A word of caution where volumes are few."""
    few = [f"{count} {name}" for name, count in counts.items() if count < FEW and name != "training"]
    if not few:
        return None
    return (
        "warn",
        f"With {' and '.join(few)} volume(s) only large differences can be seen; intervals are wide.",
    )
