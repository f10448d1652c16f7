"""The conclusions from given metrics; and their error rates and power on simulated groups."""

import numpy as np
import pytest
from scipy.stats import binom, kstest

from benchmarks import verdicts as benchmark
from benchmarks.verdicts import answers, simulated
from ldm.evaluation import table, verdicts
from ldm.evaluation.copies import Neighbour, find_copies
from ldm.evaluation.distances import LEVEL
from ldm.evaluation.features import OWN
from ldm.evaluation.groups import BLURS, Comparison, blur_name
from ldm.evaluation.table import MS_SSIM_TOLERANCE, SHARPNESS_TOLERANCE, Metric

DISTANCES = dict(zip(BLURS, (0.5, 8.0, 128.0, 2048.0), strict=True))  # fourth powers, as for small blurs


def metrics(**values) -> dict[str, Metric]:
    """A whole table: the distance of the samples (`mmd`), its test (`p`, `sees`), and the differences from
    real scans in high-frequency power, MS-SSIM and a tissue volume; by default as for real scans."""

    def metric(key: str, value: float, interval: list | None = None, about: str = "", **more) -> Metric:
        return Metric(key, "", "Dark tissue", about, value, interval, **more)

    tissue = {"floor": 6.0, "difference": values.get("apart", [-2.0, 10.0]), "tolerance": [0.0, 20.0]}
    listed = [
        metric("mmd_own", values.get("mmd", 0.1), p_value=values.get("p", 0.001), sees=values.get("sees")),
        *(metric(f"mmd_own: {blur_name(sigma)}", value) for sigma, value in DISTANCES.items()),
        metric("mmd_own: reconstructions", 0.4),
        metric("fine_power", 1.0, floor=1.0, difference=values.get("fine", [-0.1, 0.1])),
        metric("ms_ssim", 0.8, floor=0.8, difference=values.get("ms_ssim", [-0.01, 0.01])),
        metric(
            "tissue_dark",
            10.0,
            values.get("tissue", [5.0, 15.0]),
            "How far. Samples 3 ml, scans 4 ml.",
            **tissue,
        ),
        metric("anatomy", 0.0, difference=[-0.1, 0.1], p_value=0.5),
        metric("anatomy: halves of two scans joined", 0.3),
        metric("reconstruction_psnr", values.get("psnr", 31.0), values.get("of_psnr", [30.5, 32])),
        metric("reconstruction_ssim", 0.95),
    ]
    found = {one.key: one for one in listed}
    found["fine_power"].tolerance, found["ms_ssim"].tolerance = SHARPNESS_TOLERANCE, MS_SSIM_TOLERANCE
    return found


@pytest.mark.parametrize(
    "mmd, tone, size",
    [
        (-0.1, "warn", "smaller than that of scans blurred by 0.25 voxels"),
        (2.0, "warn", "that of scans blurred by 0.4 voxels"),  # 0.25 * 2^(1/2): half way in both
        (128.0, "bad", "that of scans blurred by 1.0 voxels"),
        (2100.0, "bad", "larger than that of scans blurred by 2 voxels"),
        (2048.0 * 12, "bad", "12 times that of scans blurred by 2 voxels"),
        (1e7, "bad", "over 100 times that of scans blurred by 2 voxels"),
    ],
)
def test_a_distance_in_words(mmd, tone, size):
    found = verdicts.realism(metrics(mmd=mmd))
    test = "(permutation test, p = 0.001, own features)"
    assert found[0] == tone
    assert f"differ significantly from held-out scans {test}: their distance is {size}." in found[1]


@pytest.mark.parametrize(
    "p, sees, tone, part",
    [
        (0.4, 0.5, "good", "detects shifts of 0.5 standard deviations with 80% power"),
        (0.051, 0.75, "none", "only shifts of at least 0.75 standard deviations with 80% power"),
        (1.0, None, "none", "only shifts of more than 3 standard deviations"),
        (None, None, "none", "Too few subjects"),
    ],
)
def test_without_significance_there_is_no_difference_and_without_power_no_likeness(p, sees, tone, part):
    found = verdicts.realism(metrics(mmd=1e3, p=p, sees=sees))
    assert found[0] == tone and part in found[1]


def test_noise_is_told_where_volumes_are_too_few_for_a_test():
    tone, text = verdicts.realism(metrics(mmd=2048.0 * 600, p=0.32))
    assert tone == "bad" and "over 100 times that of scans blurred by 2 voxels, too few volumes" in text


def test_the_autoencoders_share_of_a_distance():
    assert "reconstructions account for 20% of it" in verdicts.realism(metrics(mmd=2.0))[1]
    assert "autoencoder" not in verdicts.realism(metrics(mmd=100.0))[1]  # less than 5%


def nearest(generated: list[float], held_out: list[float]) -> dict:
    groups = {"generated": generated, "held-out": held_out}
    neighbours = {name: [Neighbour(0, one, False) for one in group] for name, group in groups.items()}
    return {**neighbours, "found": find_copies(np.array(generated), np.array(held_out))}


HELD_OUT = [1.0 + 0.01 * i for i in range(20)]


@pytest.mark.parametrize(
    "generated, held_out, tone, parts",
    [
        ([0.9, 1.1] * 10, HELD_OUT, "good", ["No sample copies a training scan"]),
        ([0.9, 1.1] * 4, HELD_OUT, "none", ["With 8 samples, up to 31% of"]),  # 1 - 0.05^(1/8)
        ([0.1, 1.1, 0.2], HELD_OUT, "bad", ["2 of 3 samples copy", "None of the 20 held-out scans does"]),
        ([0.1, 1.1, 1.0], HELD_OUT, "bad", ["1 of 3 samples copies a training scan"]),
        ([0.8] * 20, HELD_OUT, "warn", ["100% of pairs"]),
        ([1.1] * 20, [0.1, *HELD_OUT], "warn", ["1 of 21 held-out scans copy training scans: the split"]),
        ([1.0] * 20, HELD_OUT[:4], "none", ["With 4 held-out scans the threshold is imprecise"]),
    ],
)
def test_copies_in_words(generated, held_out, tone, parts):
    found = verdicts.copies(nearest(generated, held_out), {"generated": len(generated)})
    assert found[0] == tone and all(part in found[1] for part in parts), found


@pytest.mark.parametrize(
    "difference, sharpness, diversity",
    [
        ([-0.015, 0.012], ("good", "as sharp as"), ("good", "as diverse as")),
        ([0.05, 0.1], ("good", "as sharp as"), ("warn", "less diverse")),  # significant, but irrelevant
        ([-0.4, -0.3], ("warn", "smoother"), ("warn", "less similar")),
        ([0.1, 0.3], ("warn", "noisier"), ("warn", "less diverse")),
        ([-0.3, 0.3], ("none", "Too few volumes to tell"), ("none", "Too few volumes to tell")),
        (None, ("none", "Too few volumes to tell"), ("none", "Too few volumes to tell")),
    ],
)
def test_sharpness_and_diversity_in_words(difference, sharpness, diversity):
    found = metrics(fine=difference, ms_ssim=difference)
    lines = verdicts.sharpness(found["fine_power"]), verdicts.diversity(found["ms_ssim"])
    for (tone, text), (expected, part) in zip(lines, (sharpness, diversity), strict=True):
        assert tone == expected and part in text


@pytest.mark.parametrize(
    "value, difference, tone",
    [(0.0, [-0.9, -0.4], "bad"), (0.6, [-0.5, -0.1], "warn"), (0.6, [-0.5, 0.1], None)],
)
def test_precision_is_mentioned_where_it_is_significantly_low(value, difference, tone):
    line = verdicts.likeness(Metric("precision", "", "", "", value, floor=0.9, difference=difference))
    assert (line and line[0]) == tone and (line is None or f"{value:.0%} of the samples" in line[1])


@pytest.mark.parametrize(
    "tissue, apart, tone, part",
    [
        ([5.0, 15.0], [1.0, 10.0], "good", "within 0.5 standard deviations"),
        ([5.0, 25.0], [-2.0, 20.0], "none", "Too few volumes to tell"),
        ([12.0, 25.0], [1.0, 20.0], "warn", "1 of 1 tissue volumes differ"),
    ],
)
def test_anatomy_in_words(tissue, apart, tone, part):
    found = verdicts.anatomy([metrics(tissue=tissue, apart=apart)["tissue_dark"]])
    assert found[0] == tone and part in found[1]
    assert found[1].endswith("dark tissue. Samples 3 ml, scans 4 ml.")


@pytest.mark.parametrize(
    "of_psnr, tone",
    [([30.5, 32], "good"), ([28, 32], "none"), ([26, 29], "warn"), ([20, 24], "bad"), (None, "none")],
)
def test_the_autoencoder_in_words(of_psnr, tone):
    assert verdicts.autoencoder(metrics(of_psnr=of_psnr))[0] == tone


def test_all_lines_in_their_order():
    found = metrics(psnr=20.0, of_psnr=[19, 21]).values()
    lines = verdicts.verdicts(list(found), nearest([1.0], [1.0, 1.1]), {"held-out": 2, "generated": 1})
    assert [line["tone"] for line in lines] == ["none", "warn", *["good"] * 4, "bad", "warn"]
    assert "20.0 dB" in lines[6]["text"] and "With 2 held-out and 1 generated" in lines[7]["text"]
    assert verdicts.copies(None, {})[0] == "none"


# ---------------------------------------------------------------- error rates and power


def at_most(rate: float, repeats: int) -> int:
    """Quantile 0.999 of the number of events at this rate."""
    return int(binom.ppf(0.999, repeats, rate))


@pytest.mark.parametrize("sizes", [(8, 10, 30), (20, 20, 60)])
def test_the_permutation_test_errs_as_often_as_it_says(sizes, monkeypatch):
    """p-values of equal groups are uniform, and the power for half a standard deviation is as documented."""
    monkeypatch.setattr(table.distances, "detectable_shift", lambda *args: None)
    rng, repeats = np.random.default_rng(0), 120
    equal, shifted = (
        np.array([table.permutation_test(simulated(sizes, shift, rng), OWN)[0] for _ in range(repeats)])
        for shift in (0.0, 0.5)
    )
    assert (equal <= LEVEL).sum() <= at_most(LEVEL, repeats)
    assert kstest(equal, "uniform").pvalue > 0.001
    power = (shifted <= LEVEL).mean()
    assert (0.15 < power < 0.45) if sizes[0] == 8 else (0.55 < power < 0.9)


@pytest.mark.parametrize("sizes", [(8, 10, 30), (50, 50, 100)])
def test_verdicts_of_simulated_sets(sizes):
    """Equal groups are seldom called different; shifted ones are seldom called alike, and are called
    different where volumes are many."""
    repeats = 8
    draws = {shift: [np.random.default_rng([1, i]) for i in range(repeats)] for shift in (0.0, 0.5)}
    found = {shift: [answers(simulated(sizes, shift, rng)) for rng in rngs] for shift, rngs in draws.items()}
    for line in ("realism", "sharpness", "diversity", "anatomy"):
        equal, shifted = ([one[line] for one in found[shift]] for shift in (0.0, 0.5))
        assert equal.count("differ") <= at_most(LEVEL, repeats)
        assert shifted.count("alike") <= at_most(LEVEL, repeats)
        if sizes[0] == 50:
            assert shifted.count("differ") >= 6, line
    equal = [one["realism"] for one in found[0.0]]
    assert "alike" not in equal if sizes[0] == 8 else equal.count("alike") >= 6


def test_the_benchmark_of_verdicts(capsys):
    benchmark.main(["--repeats", "1", "--sizes", "4,4,4"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 + 2 * 4 and all(sum(map(float, row[3:])) == 1 for row in rows[2:])


def test_all_sides_have_one_size():
    """And are not simply the first volumes of each group."""
    groups = simulated((30, 12, 40), 0.0, np.random.default_rng(0))
    assert {len(indices) for _, indices in groups.sides.values()} == {12}
    assert groups.sides["reference"][1] != list(range(12))
    for metric in (*table.kernel_metrics(groups, OWN)[:1], *table.tissue_metrics(groups)):
        assert metric.counts.startswith("12 on each side") and metric.difference
    halves = Comparison(groups.held_out, groups.generated, None, groups.degraded)
    assert "the baseline compares their two halves" in halves.too_few(7)
    held_out, reference = (set(halves.sides[side][1]) for side in ("held_out", "reference"))
    assert len(held_out) == len(reference) == 6 and not held_out & reference


def test_a_subject_counts_once_in_the_test():
    """Ten scans each of two held-out subjects are not twenty independent volumes."""
    groups = simulated((20, 20, 20), 0.0, np.random.default_rng(0))
    for i in range(20):
        groups.held_out.features[OWN][i] = groups.held_out.features[OWN][i % 2]
    p_value, _, counts = table.permutation_test(groups, OWN)
    assert counts == "20 generated and 20 held-out" and p_value < 0.01
    groups.held_out.subjects = [f"sub-{i % 2}" for i in range(20)]
    p_value, _, counts = table.permutation_test(groups, OWN)
    assert counts == "20 generated and 2 held-out" and p_value > LEVEL
    groups.held_out.subjects = ["sub-0"] * 20
    metric = table.kernel_metrics(groups, OWN)[0]
    assert metric.p_value is None and metric.counts.endswith("1 held-out, too few")
