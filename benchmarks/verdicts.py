"""Error rates and power of evaluate.py's conclusions, on simulated groups whose truth is known.

    python -m benchmarks.verdicts
    python -m benchmarks.verdicts --repeats 1000 --sizes 20,20,60

Features, tissue volumes, spectra and similarities are drawn from normal distributions, without images and
networks, and put into the groups that evaluate.py fills. Either all groups are equal, or samples are shifted:
features and tissue volumes by half a standard deviation, high-frequency power to 0.75, MS-SSIM by 0.03.
Prints the table of docs/evaluation.md: how often each conclusion says that samples differ, that they are
alike (the green tone), or that it cannot tell. 200 repeats of all sizes take 20 minutes on one CPU core.
"""

import argparse
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from ldm.evaluation import table, verdicts
from ldm.evaluation.features import OWN
from ldm.evaluation.groups import BLURS, Comparison, DegradedScans, VolumeGroup, blur_name
from ldm.metrics import RadialSpectrum, Tissues

SIZES = ((8, 10, 86), (20, 20, 60), (40, 40, 120), (60, 60, 240), (100, 100, 400), (100, 20, 80))
FEATURES, FACTORS = 64, 6
POWER_RATIO, MS_SSIM_SHIFT = 0.75, 0.03  # of shifted samples
ANSWER_OF = {"warn": "differ", "bad": "differ", "good": "alike", "none": "cannot tell"}
ANSWERS = ("differ", "alike", "cannot tell")
LINES = ("realism", "sharpness", "diversity", "anatomy")


def simulated_group(name: str, count: int, shift: float, rng: np.random.Generator) -> VolumeGroup:
    """`count` simulated volumes, their features and tissues shifted by `shift` standard deviations.

    Features are sums of common factors, each with half the variance of the one before, and of noise; they are
    shifted with the signs of the first factor.
    """
    one = VolumeGroup(name, {OWN: None}, RadialSpectrum((8, 8, 8)), (1.0, 1.0, 1.0), count)
    loadings = np.random.default_rng(7).normal(size=(FACTORS, FEATURES))
    loadings *= 0.5 ** (np.arange(FACTORS)[:, None] / 2)
    features = rng.normal(size=(count, FACTORS)) @ loadings + 0.3 * rng.normal(size=(count, FEATURES))
    features += shift * np.sign(loadings[0]) * np.sqrt(0.09 + np.square(loadings).sum(0))
    one.features[OWN] = [[row] for row in torch.from_numpy(features)]
    one.names = one.subjects = [f"{name}_{i}" for i in range(count)]
    brain, share = 1200 + 100 * (rng.normal(size=count) + shift), rng.normal(size=(count, 3)) + shift
    one.tissues = [Tissues(size, *(size * (1 + 0.1 * s) / 3)) for size, s in zip(brain, share, strict=True)]
    fine = np.exp(0.25 * rng.normal(size=(count, 1))) * (POWER_RATIO if shift else 1.0)
    one.spectra = list(fine * np.ones((1, 4)))
    one.histograms = list(rng.dirichlet(np.full(256, 50.0), count))
    pairs = 0.014 * rng.normal(size=count)[: count // 2 * 2].reshape(-1, 2).sum(1)  # as `VolumeGroup.add`
    one.similarities = list(0.8 + pairs + (MS_SSIM_SHIFT if shift else 0.0))
    return one


def simulated(sizes: Sequence[int], shift: float, rng: np.random.Generator) -> Comparison:
    """Shifted samples, held-out and training scans, so many of each, and degraded scans far away."""
    generated, held_out, training = (
        simulated_group(name, count, shift if name == "generated" else 0.0, rng)
        for name, count in zip(("generated", "held-out", "training"), sizes, strict=True)
    )
    degraded = DegradedScans({OWN: None}, None)
    scans = training.features[OWN][:32]
    for sigma in BLURS:
        degraded.features[blur_name(sigma)][OWN] = [[row + 1.6 * sigma] for (row,) in scans]
    return Comparison(held_out, generated, training, degraded)


def answers(groups: Comparison) -> dict[str, str]:
    """What each conclusion says."""
    found = {metric.key: metric for metric in table.kernel_metrics(groups, OWN)}
    for metrics in (table.appearance_metrics, table.similarity_metrics, table.tissue_metrics):
        found |= {metric.key: metric for metric in metrics(groups)}
    lines = (
        verdicts.realism(found),
        verdicts.sharpness(found["fine_power"]),
        verdicts.diversity(found["ms_ssim"]),
        verdicts.anatomy([metric for key, metric in found.items() if key.startswith("tissue_")]),
    )
    return {name: ANSWER_OF[tone] for name, (tone, _) in zip(LINES, lines, strict=True)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument(
        "--sizes", nargs="+", default=[",".join(map(str, one)) for one in SIZES], metavar="N,N,N"
    )
    args = parser.parse_args(argv)
    print(f"| generated, held-out, training | truth | conclusion | {' | '.join(ANSWERS)} |")
    print("|---" * 6 + "|")
    for sizes in (tuple(map(int, one.split(","))) for one in args.sizes):
        for shift, truth in ((0.0, "equal"), (0.5, "shifted")):
            rng = np.random.default_rng([*sizes, int(10 * shift)])
            tallies = {line: Counter() for line in LINES}
            for _ in range(args.repeats):
                for line, answer in answers(simulated(sizes, shift, rng)).items():
                    tallies[line][answer] += 1
            for line, tally in tallies.items():
                cells = [", ".join(map(str, sizes)), truth, line]
                cells += [f"{tally[one] / args.repeats:.3f}" for one in ANSWERS]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
