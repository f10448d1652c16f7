"""Can a verdict of evaluate.py fail? Simulated sets whose truth is known, through the code of an evaluation.

    python -m benchmarks.verdicts
    python -m benchmarks.verdicts --repeats 1000 --sizes 20,20,60

Rows of features, tissue volumes, spectra and similarities are drawn from normal distributions, with no images
and no networks, and put into the sets that evaluate.py fills. Either all sets are equal, or samples are off:
features and tissue volumes by half a standard deviation, fine detail at three quarters, MS-SSIM up by 0.03.
Prints the table of docs/evaluation.md: how often each line of the page says that samples differ, that they do
not (the green tone), or that it cannot tell. 200 repeats of all sizes take some 20 minutes on one CPU core.
"""

import argparse
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from ldm.evaluation import rows, verdicts
from ldm.evaluation.volumes import BLURS, OWN, Sets, VolumeSet, Yardsticks
from ldm.metrics import RadialSpectrum, Tissues

SIZES = ((8, 10, 86), (20, 20, 60), (40, 40, 120), (60, 60, 240), (100, 100, 400), (100, 20, 80))
FEATURES, FACTORS = 64, 6
SOFT, ALIKER = 0.75, 0.03  # share of fine detail, and MS-SSIM more, of samples that are off
SAYS = {"warn": "differ", "bad": "differ", "good": "alike", "none": "cannot tell"}
ANSWERS = ("differ", "alike", "cannot tell")
LINES = ("realism", "sharpness", "diversity", "anatomy")


def filled(name: str, count: int, shift: float, rng: np.random.Generator) -> VolumeSet:
    """A simulated set of `count` volumes, its features and tissues `shift` standard deviations up.

    Features are of factors that all of them share, each with half the variance of the one before, and of a
    noise of their own. The shift is up or down as the first factor moves them.
    """
    one = VolumeSet(name, {OWN: None}, RadialSpectrum((8, 8, 8)), (1.0, 1.0, 1.0), count)
    loadings = np.random.default_rng(7).normal(size=(FACTORS, FEATURES))
    loadings *= 0.5 ** (np.arange(FACTORS)[:, None] / 2)
    rows = rng.normal(size=(count, FACTORS)) @ loadings + 0.3 * rng.normal(size=(count, FEATURES))
    rows += shift * np.sign(loadings[0]) * np.sqrt(0.09 + np.square(loadings).sum(0))
    one.features[OWN] = [[row] for row in torch.from_numpy(rows)]
    one.names = one.subjects = [f"{name}_{i}" for i in range(count)]
    brain, share = 1200 + 100 * (rng.normal(size=count) + shift), rng.normal(size=(count, 3)) + shift
    one.tissues = [Tissues(size, *(size * (1 + 0.1 * s) / 3)) for size, s in zip(brain, share, strict=True)]
    fine = np.exp(0.25 * rng.normal(size=(count, 1))) * (SOFT if shift else 1.0)
    one.spectra = list(fine * np.ones((1, 4)))
    one.histograms = list(rng.dirichlet(np.full(256, 50.0), count))
    one.similarities = list(similar(0.014 * rng.normal(size=count)) + (ALIKER if shift else 0.0))
    return one


def similar(own: np.ndarray) -> np.ndarray:
    """MS-SSIM of pairs, as `VolumeSet.add` takes them."""
    return 0.8 + own[: len(own) // 2 * 2].reshape(-1, 2).sum(1)


def simulated(sizes: Sequence[int], shift: float, rng: np.random.Generator) -> Sets:
    """Samples `shift` standard deviations off, held-out and training scans, so many of each; yardsticks far
    away."""
    made, held, training = (
        filled(name, count, shift if name == "generated" else 0.0, rng)
        for name, count in zip(("generated", "held-out", "training"), sizes, strict=True)
    )
    yardsticks = Yardsticks({OWN: None}, None)
    scans = training.features[OWN][:32]
    for sigma, change in zip(BLURS, yardsticks.changes, strict=True):
        yardsticks.features[change][OWN] = [[row + 1.6 * sigma] for (row,) in scans]
    return Sets(held, made, training, yardsticks)


def said(sets: Sets) -> dict[str, str]:
    """The tone of each line."""
    found = {
        one.key: one
        for figures in (
            rows.kernel_figures(sets, OWN),
            rows.appearance_figures(sets),
            rows.similarity_figures(sets),
            rows.tissue_figures(sets),
        )
        for one in figures
    }
    tissues = [figure for key, figure in found.items() if key.startswith("tissue_")]
    lines = (
        verdicts.realism(found),
        verdicts.sharpness(found["fine_power"]),
        verdicts.diversity(found["ms_ssim"]),
        verdicts.anatomy(tissues),
    )
    return {name: SAYS[tone] for name, (tone, _) in zip(LINES, lines, strict=True)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument(
        "--sizes", nargs="+", default=[",".join(map(str, one)) for one in SIZES], metavar="N,N,N"
    )
    args = parser.parse_args(argv)
    print(f"| generated, held-out, training | truth | line | {' | '.join(ANSWERS)} |")
    print("|---" * 6 + "|")
    for sizes in (tuple(map(int, one.split(","))) for one in args.sizes):
        for shift, truth in ((0.0, "equal"), (0.5, "off")):
            rng = np.random.default_rng([*sizes, int(10 * shift)])
            tallies = {line: Counter() for line in LINES}
            for _ in range(args.repeats):
                for line, tone in said(simulated(sizes, shift, rng)).items():
                    tallies[line][tone] += 1
            for line, tally in tallies.items():
                cells = [", ".join(map(str, sizes)), truth, line]
                cells += [f"{tally[one] / args.repeats:.3f}" for one in ANSWERS]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
