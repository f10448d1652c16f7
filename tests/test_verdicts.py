"""What is said of figures that are given; and how often it is true, of sets that are simulated."""

import numpy as np
import pytest
from scipy.stats import binom, kstest

from benchmarks import verdicts as verdicts_of_sets
from benchmarks.verdicts import said, simulated
from ldm.evaluation import rows, verdicts
from ldm.evaluation.copies import Neighbour, judge
from ldm.evaluation.distances import LEVEL
from ldm.evaluation.rows import ALIKE, SHARP, Figure
from ldm.evaluation.volumes import BLURS, OWN, Sets, blurred_scans

LADDER = dict(zip(BLURS, (0.5, 8.0, 128.0, 2048.0), strict=True))  # a fourth power, as for little blur


def figures(**values) -> dict[str, Figure]:
    """A whole table: the distance of the samples (`mmd`), its test (`p`, `sees`), and the differences of fine
    detail, MS-SSIM and a tissue volume from the floor, with the others as they are for real scans."""
    similar, fine = values.get("ms_ssim", [-0.01, 0.01]), values.get("fine", [-0.1, 0.1])
    listed = [
        Figure("mmd_own", "", "", "", values.get("mmd", 0.1), p_value=values.get("p", 0.001)),
        *(
            Figure(f"mmd_own: {blurred_scans(sigma)}", "", "", "", value, [value, value])
            for sigma, value in LADDER.items()
        ),
        Figure("mmd_own: reconstructions", "", "", "", values.get("reconstructions", 0.4), [0.3, 0.5]),
        Figure("fine_power", "", "", "", 1.0, floor=1.0, difference=fine, tolerance=SHARP),
        Figure("ms_ssim", "", "", "", 0.8, floor=0.8, difference=similar, tolerance=ALIKE),
        Figure(
            "tissue_dark",
            "",
            "Dark tissue",
            "How far. Samples 3 ml, scans 4 ml.",
            10.0,
            values.get("tissue", [5.0, 15.0]),
            6.0,
            difference=values.get("apart", [-2.0, 10.0]),
            tolerance=[0.0, 20.0],
        ),
        Figure(
            "reconstruction_psnr", "", "", "", values.get("psnr", 31.0), values.get("of_psnr", [30.5, 32])
        ),
        Figure("reconstruction_ssim", "", "", "", 0.95, [0.9, 1]),
    ]
    listed[0].sees = values.get("sees")
    return {figure.key: figure for figure in listed}


@pytest.mark.parametrize(
    "mmd, tone, said",
    [
        (0.4, "warn", "closer than scans blurred by 0.25 voxels"),
        (-0.1, "warn", "closer than scans blurred by 0.25 voxels"),
        (8.0, "warn", "as far as scans blurred by 0.5 voxels"),
        (2.0, "warn", "as far as scans blurred by 0.4 voxels"),  # 0.25 * 2^(1/2): half way in both
        (128.0, "bad", "as far as scans blurred by 1.0 voxels"),
        (2100.0, "bad", "farther than scans blurred by 2 voxels"),
        (2048.0 * 12, "bad", "12 times as far as scans blurred by 2 voxels"),
        (1e7, "bad", "far beyond scans blurred by 2 voxels"),
    ],
)
def test_a_distance_in_words(mmd, tone, said):
    found = verdicts.realism(figures(mmd=mmd))
    assert found[0] == tone and f"apart (p = 0.001, own features): they are {said}" in found[1]


@pytest.mark.parametrize(
    "p, sees, tone, said",
    [
        (0.4, 0.5, "good", "finds a difference of half a standard deviation in four of five cases"),
        (0.051, 0.75, "none", "must be 0.75 standard deviations to be found"),
        (1.0, None, "none", "must be more than 3 standard deviations"),
        (None, None, "none", "Too few subjects"),
    ],
)
def test_sets_that_the_test_cannot_tell_apart(p, sees, tone, said):
    """However far they seem: without the test's word there is no difference, and without its power no
    likeness."""
    found = verdicts.realism(figures(mmd=1e4, p=p, sees=sees))
    assert found[0] == tone and said in found[1]


def test_what_the_autoencoder_makes_of_a_distance():
    assert "20 % of this distance is the autoencoder's" in verdicts.realism(figures(mmd=2.0))[1]
    assert "autoencoder" not in verdicts.realism(figures(mmd=100.0))[1]  # less than 5 %


def neighbours(*distances: float) -> list[Neighbour]:
    return [Neighbour(0, distance, False) for distance in distances]


def judged(made: list[float], held: list[float]) -> tuple[str, str]:
    nearest = {"generated": neighbours(*made), "held-out": neighbours(*held)}
    nearest["verdict"] = judge(np.array(made), np.array(held))
    return verdicts.copies(nearest, {"generated": len(made), "held-out": len(held)})


def test_copies_in_words():
    held = [1.0 + 0.01 * i for i in range(20)]
    assert judged([0.9, 1.1] * 10, held)[0] == "good"
    tone, text = judged(
        [0.9, 1.1] * 4, held
    )  # none of 8: of all that the model makes 1 - 0.05^(1/8) could be
    assert tone == "none" and "No sample is a copy" in text and "up to 31 %" in text
    tone, text = judged([0.1, 1.1, 0.2], held)
    assert tone == "bad" and "2 of 3 samples are copies" in text and "20 held-out scans none is" in text
    assert "1 of 3 samples is a copy" in judged([0.1, 1.1, 1.0], held)[1]
    tone, text = judged([0.8] * 20, held)
    assert tone == "warn" and "100 % of pairs" in text
    tone, text = judged([1.1] * 20, [0.1, *held])
    assert tone == "warn" and "1 of the held-out scans are copies of training scans" in text
    tone, text = judged([1.0] * 20, held[:4])
    assert tone == "none" and "4 held-out scan(s) that limit is rough" in text
    assert verdicts.copies(None, {})[0] == "none"


@pytest.mark.parametrize(
    "difference, fine, similar",
    [
        ([-0.015, 0.012], ("good", "about as sharp"), ("good", "as varied")),
        ([-0.4, -0.3], ("warn", "softer"), ("warn", "less alike")),
        ([0.1, 0.3], ("warn", "noisier"), ("warn", "less varied")),
        ([-0.3, 0.3], ("none", "Too few volumes to tell"), ("none", "Too few volumes to tell")),
        (None, ("none", "Too few volumes to tell"), ("none", "Too few volumes to tell")),
    ],
)
def test_sharpness_and_diversity_in_words(difference, fine, similar):
    found = figures(fine=difference, ms_ssim=difference)
    for (tone, text), (due, part) in (
        (verdicts.sharpness(found["fine_power"]), fine),
        (verdicts.diversity(found["ms_ssim"]), similar),
    ):
        assert tone == due and part in text


@pytest.mark.parametrize(
    "value, difference, tone",
    [
        (0.0, [-0.9, -0.4], "bad"),
        (0.6, [-0.5, -0.1], "warn"),
        (0.6, [-0.5, 0.1], None),
        (1.0, [0.1, 0.3], None),
    ],
)
def test_precision_is_told_where_it_is_low_beyond_chance(value, difference, tone):
    figure = Figure("precision", "", "", "", value, floor=0.9, difference=difference)
    line = verdicts.likeness(figure)
    assert (line and line[0]) == tone and (line is None or f"{100 * value:.0f} % of the samples" in line[1])


def test_a_difference_that_is_there_but_does_not_matter():
    assert verdicts.sharpness(figures(fine=[0.05, 0.1])["fine_power"])[0] == "good"


@pytest.mark.parametrize(
    "tissue, apart, tone, said",
    [
        ([5.0, 15.0], [1.0, 10.0], "good", "within half a standard deviation"),
        ([5.0, 25.0], [-2.0, 20.0], "none", "Too few volumes to tell"),
        ([12.0, 25.0], [1.0, 20.0], "warn", "1 of 1 tissue volumes are off"),
    ],
)
def test_anatomy_in_words(tissue, apart, tone, said):
    found = verdicts.anatomy([figures(tissue=tissue, apart=apart)["tissue_dark"]])
    assert (
        found[0] == tone and said in found[1] and found[1].endswith("dark tissue. Samples 3 ml, scans 4 ml.")
    )


@pytest.mark.parametrize(
    "of_psnr, tone",
    [([30.5, 32], "good"), ([28, 32], "none"), ([26, 29], "warn"), ([20, 24], "bad"), (None, "none")],
)
def test_the_autoencoder_in_words(of_psnr, tone):
    assert verdicts.autoencoder(figures(of_psnr=of_psnr))[0] == tone


def test_all_lines_in_their_order():
    nearest = {"generated": neighbours(1.0), "held-out": neighbours(1.0, 1.1)}
    nearest["verdict"] = judge(np.array([1.0]), np.array([1.0, 1.1]))
    lines = verdicts.verdicts(
        list(figures(psnr=20.0, of_psnr=[19, 21]).values()), nearest, {"held-out": 2, "generated": 1}
    )
    assert [line["tone"] for line in lines] == ["none", "warn", "good", "good", "good", "bad", "warn"]
    assert "20.0 dB" in lines[5]["text"] and "With 2 held-out and 1 generated" in lines[6]["text"]


# ---------------------------------------------------------------- how often they are true


def at_most(rate: float, repeats: int) -> int:
    """Events that happen at this rate or less are not more than this, but for one time in 1000."""
    return int(binom.ppf(0.999, repeats, rate))


@pytest.mark.parametrize("sizes", [(8, 10, 30), (20, 20, 60)])
def test_the_permutation_test_errs_as_often_as_it_says(sizes, monkeypatch):
    """Through the sets of an evaluation: p-values of equal sets are uniform, and half a standard deviation is
    found about as often as the figure promises of it."""
    monkeypatch.setattr(rows, "smallest_shift_seen", lambda *args: None)
    rng, repeats = np.random.default_rng(0), 120
    found = {}
    for shift in (0.0, 0.5):
        found[shift] = np.empty(repeats)
        for i in range(repeats):
            figure = Figure("", "", "", "")
            rows.permutation_test(simulated(sizes, shift, rng), OWN, figure)
            found[shift][i] = figure.p_value
    assert (found[0.0] <= LEVEL).sum() <= at_most(LEVEL, repeats)
    assert kstest(found[0.0], "uniform").pvalue > 0.001
    power = (found[0.5] <= LEVEL).mean()
    assert (0.15 < power < 0.45) if sizes[0] == 8 else (0.55 < power < 0.9)


@pytest.mark.parametrize("sizes", [(8, 10, 30), (50, 50, 100)])
def test_verdicts_of_simulated_sets(sizes):
    """Equal sets are seldom said to differ. Those that are off are seldom said to be alike, and are said to
    differ where volumes are many."""
    repeats = 8
    found = {
        shift: [said(simulated(sizes, shift, np.random.default_rng([1, i]))) for i in range(repeats)]
        for shift in (0.0, 0.5)
    }
    for line in ("realism", "sharpness", "diversity", "anatomy"):
        equal, off = ([one[line] for one in found[shift]] for shift in (0.0, 0.5))
        assert equal.count("differ") <= at_most(LEVEL, repeats)
        assert off.count("alike") <= at_most(LEVEL, repeats)
        if sizes[0] == 50:
            assert off.count("differ") >= 6, line
    equal = [one["realism"] for one in found[0.0]]
    assert "alike" not in equal if sizes[0] == 8 else equal.count("alike") >= 6


def test_the_benchmark_of_verdicts(capsys):
    verdicts_of_sets.main(["--repeats", "1", "--sizes", "4,4,4"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 + 2 * 4 and all(sum(map(float, row[3:])) == 1 for row in rows[2:])


def test_both_sides_of_a_floor_have_one_size():
    """And other volumes than the first ones."""
    sets = simulated((30, 12, 40), 0.0, np.random.default_rng(0))
    assert {len(of) for _, of in sets.sides.values()} == {12}
    assert sets.sides["first"][1] != list(range(12))
    for figure in (*rows.kernel_figures(sets, OWN)[:1], *rows.tissue_figures(sets)):
        assert figure.counts.startswith("12 on each side") and figure.difference
    halves = Sets(sets.held_out, sets.generated, None, sets.yardsticks)
    held, first = (set(halves.sides[side][1]) for side in ("held", "first"))
    assert len(held) == len(first) == 6 and not held & first


def test_a_subject_counts_once_in_the_test():
    """Ten scans each of two held-out subjects are no twenty volumes."""
    sets = simulated((20, 20, 20), 0.0, np.random.default_rng(0))
    for i in range(20):
        sets.held_out.features[OWN][i] = sets.held_out.features[OWN][i % 2]
    figure = Figure("", "", "", "")
    assert rows.permutation_test(sets, OWN, figure) == "; in the test 20 generated and 20 held-out"
    assert figure.p_value < 0.01
    sets.held_out.subjects = [f"sub-{i % 2}" for i in range(20)]
    assert rows.permutation_test(sets, OWN, figure).endswith("20 generated and 2 held-out")
    assert figure.p_value > LEVEL
    sets.held_out.subjects = ["sub-0"] * 20
    (figure, *_) = rows.kernel_figures(sets, OWN)
    assert figure.p_value is None and figure.counts.endswith("1 held-out, too few")
