"""Conclusions from the table of metrics in plain sentences, which the user reads first.

Each is a tone and a sentence. "good" requires enough volumes that a relevant difference would have been
detected; "warn" and "bad" of samples require a significant difference. With too few volumes for either, the
tone is "none" and the sentence says so.
"""

from collections.abc import Sequence

import numpy as np

from ldm import counted
from ldm.evaluation.distances import LEVEL, POWER, SHIFTS
from ldm.evaluation.features import ANATOMY, MEDICALNET, OWN
from ldm.evaluation.groups import BLURS, GENERATED, HELD_OUT, JOINED, TRAINING, blur_name
from ldm.evaluation.table import SHIFT_TOLERANCE, Metric, distances_of

VISIBLE_BLUR = 0.75  # voxels; from here on the tone is "bad"
LOW_PRECISION = 0.5  # share of the baseline's; below it the tone is "bad"
COPY_RATE = 0.1  # enough samples: with this rate of copies, one is found with probability `POWER`
RECONSTRUCTION_SHARE = 0.05  # of the distance, from which on the autoencoder's part is mentioned
FEW_VOLUMES = 20  # below it, a sentence says so
MIN_HELD_OUT = 5  # for the threshold of copies
SUSPICIOUS_Z = -3.0  # Meehan et al. (2020)
GOOD_PSNR, FAIR_PSNR = 30.0, 25.0  # dB
GOOD_UTILITY, FAIR_UTILITY = 0.9, 0.7  # of the Dice of a segmenter that was trained on scans
WEAK_DICE = 0.6  # of that one, below which it has not learned its structures


def verdicts(metrics: Sequence[Metric], nearest: dict | None, counts: dict[str, int]) -> list[dict]:
    """The conclusions, most important first.

    Args:
        nearest: as `table.nearest_training_volumes` returns it.
        counts: number of volumes of each group.
    """
    found = {metric.key: metric for metric in metrics}
    lines = [
        copies(nearest, counts),
        realism(found),
        likeness(found.get("precision")),
        structure(found),
        sharpness(found["fine_power"]),
        diversity(found["ms_ssim"]),
        anatomy([metric for key, metric in found.items() if key.startswith("tissue_")]),
        utility(found),
        autoencoder(found),
        numbers(counts),
    ]
    return [{"tone": tone, "text": text} for tone, text in filter(None, lines)]


def copies(nearest: dict | None, counts: dict[str, int]) -> tuple[str, str]:
    """Whether samples are copies of training scans."""
    if nearest is None:
        return "none", "Copies of training scans were not searched for: no training scans were given."
    found, total, held_out = nearest["found"], counts[GENERATED], len(nearest["found"].leaks)
    leaks = int(found.leaks.sum())
    leak = f" {leaks} of {held_out} held-out scans copy training scans: the split leaks." if leaks else ""
    if number := int(found.copies.sum()):
        verb = "copies a training scan" if number == 1 else "copy training scans"
        none = "" if leaks else f" None of the {held_out} held-out scans does."
        return "bad", f"{number} of {total} samples {verb}: see the closest pairs.{leak}{none}"
    closest = {group: distances_of(nearest[group]).min() for group in (GENERATED, HELD_OUT)}
    text = (
        f"No sample copies a training scan: the smallest distance is {closest[GENERATED]:.2g} (held-out "
        f"scans {closest[HELD_OUT]:.2g}, threshold for a copy {found.threshold:.2g})."
    )
    if imprecise := held_out < MIN_HELD_OUT:
        text += f" With {counted(held_out, 'held-out scan{s}')} the threshold is imprecise."
    if too_few := 1 - (1 - COPY_RATE) ** total < POWER:
        most = f"{1 - LEVEL ** (1 / total):.0%} of what the model generates"
        text += f" With {counted(total, 'sample{s}')}, up to {most} may be copies."
    if suspicious := found.z <= SUSPICIOUS_Z:
        text += (
            f" But samples are closer to training scans than held-out scans are ({found.closer:.0%} of "
            "pairs, 50% expected by chance), by blur or partial memorisation: check the closest pairs."
        )
    if leaks or suspicious:
        return "warn", text + leak
    return ("none" if imprecise or too_few else "good"), text


def realism(found: dict[str, Metric]) -> tuple[str, str]:
    """Whether samples differ from held-out scans, and by how much: compared with blurred scans."""
    measured = [key for key in (f"mmd_{OWN}", f"mmd_{MEDICALNET}") if key in found and not found[key].missing]
    if not measured:
        return "none", f"The distance to held-out scans was not measured: {found[f'mmd_{OWN}'].missing}."
    key = measured[0]
    metric, features = found[key], "own features" if key.endswith(OWN) else "MedicalNet's features"
    if metric.p_value is None:
        return "none", "Too few subjects to test whether samples differ from held-out scans."
    p = f"(permutation test, p = {metric.p_value:.2g}, {features})"
    scale = np.maximum.accumulate([max(found[f"{key}: {blur_name(sigma)}"].value, 1e-9) for sigma in BLURS])
    times = metric.value / scale[-1]
    ratio = "larger than" if times < 1.5 else f"{times:.2g} times" if times < 100 else "over 100 times"
    largest = f"{ratio} that of {blur_name(BLURS[-1])}"
    if metric.p_value > LEVEL and times > 1.5:
        return (
            "bad",
            f"The distance of samples to held-out scans is {largest}, too few volumes for a test {p}.",
        )
    if metric.p_value > LEVEL:
        text, sees = f"Samples do not differ significantly from held-out scans {p}", metric.sees
        if sees is not None and sees <= SHIFT_TOLERANCE:
            shift = f"shifts of {SHIFT_TOLERANCE:g} standard deviations"
            return "good", f"{text}. With so many volumes the test detects {shift} with {POWER:.0%} power."
        least = f"more than {SHIFTS[-1]:g}" if sees is None else f"at least {sees:g}"
        return "none", (
            f"{text}. This does not show that they are alike: with so few volumes the test detects only "
            f"shifts of {least} standard deviation{'s' * (sees != 1)} with {POWER:.0%} power."
        )
    if metric.value < scale[0]:
        tone, size = "warn", f"smaller than that of {blur_name(BLURS[0])}"
    elif metric.value > scale[-1]:
        tone, size = "bad", largest
    else:
        blur = float(np.exp(np.interp(np.log(metric.value), np.log(scale), np.log(BLURS))))
        tone, size = ("warn" if blur < VISIBLE_BLUR else "bad"), f"that of scans blurred by {blur:.1f} voxels"
    text = f"Samples differ significantly from held-out scans {p}: their distance is {size}."
    reconstructions = found.get(f"{key}: reconstructions")
    if reconstructions and reconstructions.value > RECONSTRUCTION_SHARE * metric.value:
        share = min(1.0, reconstructions.value / metric.value)
        text += f" The autoencoder's reconstructions account for {share:.0%} of it."
    return tone, text


def likeness(metric: Metric | None) -> tuple[str, str] | None:
    """Whether precision is below that of real scans; no sentence otherwise."""
    if metric is None or metric.missing or direction(metric.difference, (0, 0)) != "less":
        return None
    return "bad" if metric.value < LOW_PRECISION * metric.floor else "warn", (
        f"{metric.value:.0%} of the samples lie in the range of held-out scans in own features (precision); "
        f"of other real scans {metric.floor:.0%} do."
    )


def structure(found: dict[str, Metric]) -> tuple[str, str]:
    """Whether the gross anatomy of samples differs from that of held-out scans, and by how much: compared
    with scans whose halves are of two subjects."""
    metric, halves = found[ANATOMY], found.get(f"{ANATOMY}: {JOINED}")
    if metric.missing:
        return "none", f"Gross anatomy was not compared: {metric.missing}."
    p = f"(permutation test, p = {metric.p_value:.2g})"
    if metric.p_value <= LEVEL:
        text = f"The gross anatomy of samples differs significantly from that of held-out scans {p}"
        if halves is None or halves.value <= 0:
            return "warn", f"{text}."
        times = metric.value / halves.value
        size = f"{times:.2g}" if times < 100 else "over 100"
        return "bad" if times > 1 else "warn", f"{text}: their distance is {size} times that of {JOINED}."
    text = f"The gross anatomy of samples does not differ significantly from that of held-out scans {p}"
    if halves and direction(metric.difference, (-np.inf, halves.value)) == "alike":
        return "good", f"{text}, and their distance is smaller than that of {JOINED}."
    return "none", f"{text}. This does not show that they are alike: volumes are too few to see {JOINED}."


def direction(interval: Sequence[float] | None, tolerance: Sequence[float]) -> str:
    """What the interval of a difference shows: "alike" if within the tolerance, "less" or "more" if it
    excludes zero, else "unknown"."""
    if interval is None or not np.isfinite(interval).all():
        return "unknown"
    low, high = interval
    if tolerance[0] <= low and high <= tolerance[1]:
        return "alike"
    return "more" if low > 0 else "less" if high < 0 else "unknown"


def compared(metric: Metric, detail: str, **texts: str) -> tuple[str, str]:
    """The tone and the text of a metric's `direction`, with a detail."""
    found = direction(metric.difference, metric.tolerance)
    return {"alike": "good", "unknown": "none"}.get(found, "warn"), f"{texts[found]}: {detail}."


def sharpness(metric: Metric) -> tuple[str, str] | None:
    """High-frequency power compared with real scans."""
    if metric.missing or metric.value is None:
        return None
    return compared(
        metric,
        f"{metric.value:.0%} of the high-frequency power (0.25-0.5 cycles/voxel) of held-out scans",
        alike="Samples are as sharp as real scans",
        less="Samples are smoother than real scans",
        more="Samples are noisier than real scans",
        unknown="Too few volumes to tell whether samples are as sharp as real scans",
    )


def diversity(metric: Metric) -> tuple[str, str] | None:
    """Similarity of samples compared with that of real scans."""
    if metric.missing:
        return "none", f"The diversity of samples was not measured: {metric.missing}."
    return compared(
        metric,
        f"MS-SSIM {metric.value:.2f} between two samples, {metric.floor:.2f} between two real scans",
        alike="Samples are as diverse as real scans",
        more="Samples are less diverse than real scans",
        less="Samples are less similar to each other than real scans are, possibly by noise or artefacts",
        unknown="Too few volumes to tell whether samples are as diverse as real scans",
    )


def anatomy(metrics: Sequence[Metric], what: str = "tissue volumes") -> tuple[str, str] | None:
    """Tissue volumes, or the like, compared with real scans."""
    measured = [metric for metric in metrics if not metric.missing]
    if not measured:
        return None
    # The distance itself, not less its baseline: it is never below the difference of the means.
    close = [metric for metric in measured if direction(metric.interval, metric.tolerance) == "alike"]
    off = [one for one in measured if one not in close and one.difference and one.difference[0] > 0]
    worst = max(off or measured, key=lambda metric: metric.value / max(metric.floor, 1e-9))
    most = f"Largest difference: {worst.name[:1].lower()}{worst.name[1:]}. {worst.about.partition('. ')[2]}"
    if off:
        return "warn", f"{len(off)} of {len(measured)} {what} differ from those of real scans. {most}"
    if len(close) < len(measured):
        return "none", f"Too few volumes to tell whether {what} are those of real scans. {most}"
    within = f"within {SHIFT_TOLERANCE:g} standard deviations"
    return "good", f"{what.capitalize()} are distributed as in real scans, {within}. {most}"


def utility(found: dict[str, Metric]) -> tuple[str, str] | None:
    """Whether samples with labels train a segmenter."""
    alone, both = (found.get(f"dice_{kind}_mean") for kind in (GENERATED, "both"))
    if alone is None or alone.missing:
        return None
    if alone.floor < WEAK_DICE:
        return "none", (
            f"The segmenter trained on scans is too weak to compare with (Dice {alone.floor:.3f} on held-out "
            "scans). Train for more steps: --segmentation STEPS."
        )
    share = alone.value / alone.floor
    text = (
        f"A segmenter trained on samples reaches {share:.0%} of the Dice of one trained on as many scans "
        f"({alone.value:.3f}, {alone.floor:.3f}); on both {both.value:.3f}."
    )
    return ("good" if share >= GOOD_UTILITY else "warn" if share >= FAIR_UTILITY else "bad"), text


def autoencoder(found: dict[str, Metric]) -> tuple[str, str] | None:
    """Quality of the reconstructions."""
    psnr, ssim = found["reconstruction_psnr"], found["reconstruction_ssim"]
    if psnr.missing:
        return None
    low, high = psnr.interval or (-np.inf, np.inf)
    tone = (
        "good" if low >= GOOD_PSNR else "bad" if high < FAIR_PSNR else "warn" if high < GOOD_PSNR else "none"
    )
    unclear = " Too few held-out scans to tell whether that is enough." if tone == "none" else ""
    return tone, (
        f"The autoencoder reconstructs held-out scans with {psnr.value:.1f} dB PSNR and {ssim.value:.3f} "
        f"SSIM; samples cannot be better.{unclear}"
    )


def numbers(counts: dict[str, int]) -> tuple[str, str] | None:
    """A caution where volumes are few."""
    few = [f"{count} {name}" for name, count in counts.items() if count < FEW_VOLUMES and name != TRAINING]
    if not few:
        return None
    volumes = f"With {' and '.join(few)} volume(s)"
    return "warn", f"{volumes} only large differences can be detected; intervals are wide."
