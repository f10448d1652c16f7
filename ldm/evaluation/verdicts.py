"""What the figures of an evaluation say, in plain words: the lines that a user reads first.

Each is a tone and a sentence. "good" is said only where a difference that matters would have been seen,
"warn" and "bad" of samples only where there is a difference beyond chance. Where the volumes are too few for
either, the tone is "none" and the line says so.
"""

from collections.abc import Sequence

import numpy as np

from ldm.evaluation.distances import LEVEL, POWER
from ldm.evaluation.rows import HALF, Figure
from ldm.evaluation.volumes import BLURS, MEDICALNET, OWN, blurred_scans

PLAIN_BLUR = 0.75  # voxels, which any eye sees
RARE = 0.5  # of the share of real scans that lie among others, below which samples are plainly not like them
RATE = 0.1  # of copies among samples, which so many samples as are needed show
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
        likeness(found.get("precision")),
        sharpness(found["fine_power"]),
        diversity(found["ms_ssim"]),
        anatomy([figure for key, figure in found.items() if key.startswith("tissue_")]),
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
    held = f" {leaks} of the held-out scans are copies of training scans: the split leaks." if leaks else ""
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
    # With a share of `RATE` copies among all that the model makes, so many samples would show one or more.
    if few := 1 - (1 - RATE) ** total < POWER:
        most = 100 * (1 - LEVEL ** (1 / total))
        text += (
            f" But {total} sample(s) are few: up to {most:.0f} % of all that the model makes could be copies."
        )
    if verdict.z <= SUSPICIOUS:
        text += (
            " But samples as a whole lie closer to training scans than held-out scans do "
            f"({100 * verdict.closer:.0f} % of pairs, 50 % would be chance): by blur, or because parts are "
            "learnt by heart. Look at the closest pairs."
        )
    if leaks or verdict.z <= SUSPICIOUS:
        return "warn", text + held
    return ("none" if rough or few else "good"), text


def realism(found: dict[str, Figure]) -> tuple[str, str]:
    """How far samples are from held-out scans, told by what blur does to scans."""
    measured = [key for key in (f"mmd_{OWN}", f"mmd_{MEDICALNET}") if key in found and not found[key].missing]
    if not measured:
        return "none", f"How real samples look was not measured: {found[f'mmd_{OWN}'].missing}."
    key = measured[0]
    figure, features = found[key], "own features" if key.endswith(OWN) else "MedicalNet's features"
    if figure.p_value is None:
        return "none", "Too few subjects to tell whether samples differ from held-out scans."
    p = f"p = {figure.p_value:.2g}, {features}"
    if figure.p_value > LEVEL:
        text = f"A permutation test cannot tell samples from held-out scans apart ({p})"
        if figure.sees is not None and figure.sees <= HALF:
            return "good", (
                f"{text}. With so many volumes it finds a difference of half a standard deviation in four of "
                "five cases."
            )
        least = "more than 3 standard deviations"
        if figure.sees is not None:
            least = f"{figure.sees:g} standard deviation{'s' * (figure.sees != 1)}"
        return "none", (
            f"{text}. This does not show that they are alike: with so few volumes a difference must be "
            f"{least} to be found in four of five cases."
        )
    ladder = [max(found[f"{key}: {blurred_scans(sigma)}"].value, 1e-9) for sigma in BLURS]
    ladder = np.maximum.accumulate(ladder)
    if figure.value < ladder[0]:
        tone, place = "warn", f"closer than {blurred_scans(BLURS[0])}"
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
    text = f"A permutation test tells samples from held-out scans apart ({p}): they are {place}."
    reconstructions = found.get(f"{key}: reconstructions")
    if reconstructions and reconstructions.value > WORTH_TELLING * figure.value:
        text += f" {_share(reconstructions.value, figure.value)} of this distance is the autoencoder's."
    return tone, text


def likeness(figure: Figure | None) -> tuple[str, str] | None:
    """Whether samples lie where real scans do; nothing is said where no difference is seen."""
    if figure is None or figure.missing or judged(figure.difference, (0, 0)) != "less":
        return None
    tone = "bad" if figure.value < RARE * figure.floor else "warn"
    return tone, (
        f"{100 * figure.value:.0f} % of the samples lie among held-out scans in own features (precision); of "
        f"other real scans {100 * figure.floor:.0f} % do."
    )


def _share(part: float, whole: float) -> str:
    return f"{100 * min(1.0, max(0.0, part / whole)):.0f} %"


def judged(interval: Sequence[float] | None, tolerance: Sequence[float]) -> str:
    """What the interval of a difference says: "alike" where it lies within what does not matter, "less" or
    "more" where it does not reach zero, else "unknown"."""
    if interval is None or not np.isfinite(interval).all():
        return "unknown"
    low, high = interval
    if tolerance[0] <= low and high <= tolerance[1]:
        return "alike"
    return "more" if low > 0 else "less" if high < 0 else "unknown"


def sharpness(figure: Figure) -> tuple[str, str] | None:
    """Fine detail beside that of scans."""
    if figure.missing or figure.value is None:
        return None
    hold = f"they hold {100 * figure.value:.0f} % of the fine detail of held-out scans"
    return {
        "alike": ("good", f"Samples are about as sharp as scans: {hold}."),
        "less": ("warn", f"Samples are softer than scans: {hold}."),
        "more": ("warn", f"Samples are noisier than scans: {hold}."),
        "unknown": ("none", f"Too few volumes to tell whether samples are as sharp as scans: {hold}."),
    }[judged(figure.difference, figure.tolerance)]


def diversity(figure: Figure) -> tuple[str, str] | None:
    """How varied samples are."""
    if figure.missing:
        return "none", f"How varied samples are was not measured: {figure.missing}."
    text = f"two samples are {figure.value:.2f} alike (MS-SSIM), two scans {figure.floor:.2f}."
    return {
        "alike": ("good", f"Samples are about as varied as scans: {text}"),
        "more": ("warn", f"Samples are less varied than scans: {text}"),
        "less": ("warn", f"Samples are less alike than scans are, which noise and faults do too: {text}"),
        "unknown": ("none", f"Too few volumes to tell whether samples are as varied as scans: {text}"),
    }[judged(figure.difference, figure.tolerance)]


def anatomy(figures: Sequence[Figure]) -> tuple[str, str] | None:
    """Whether tissue volumes are distributed as those of scans."""
    measured = [figure for figure in figures if not figure.missing]
    if not measured:
        return None
    # The distance itself, not less its floor: it is never below the difference of the means.
    close = [figure for figure in measured if judged(figure.interval, figure.tolerance) == "alike"]
    off = [one for one in measured if one not in close and one.difference and one.difference[0] > 0]
    worst = max(off or measured, key=lambda figure: figure.value / max(figure.floor, 1e-9))
    told = f"{worst.name[:1].lower()}{worst.name[1:]}. {worst.about.partition('. ')[2]}"
    if off:
        return "warn", f"{len(off)} of {len(measured)} tissue volumes are off, the most: {told}"
    if len(close) < len(measured):
        return "none", f"Too few volumes to tell whether tissues are as large as in scans. Most apart: {told}"
    return "good", (
        f"Tissue volumes are distributed as in scans, to within half a standard deviation. Most apart: {told}"
    )


def autoencoder(found: dict[str, Figure]) -> tuple[str, str] | None:
    """What the autoencoder keeps."""
    psnr, ssim = found["reconstruction_psnr"], found["reconstruction_ssim"]
    if psnr.missing:
        return None
    low, high = psnr.interval or (-np.inf, np.inf)
    tone = (
        "good" if low >= GOOD_PSNR else "bad" if high < FAIR_PSNR else "warn" if high < GOOD_PSNR else "none"
    )
    few = " Too few held-out scans to tell whether that is enough." if tone == "none" else ""
    return tone, (
        f"The autoencoder gives held-out scans back at {psnr.value:.1f} dB PSNR and {ssim.value:.3f} SSIM; "
        f"what it loses, samples do not have.{few}"
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
