"""What is said of figures, for figures that are given."""

import numpy as np
import pytest

from ldm import verdicts
from ldm.evaluation import Figure
from ldm.memorisation import Neighbour, judge
from ldm.sets import BLURS, blurred_scans

LADDER = dict(zip(BLURS, (0.5, 8.0, 128.0, 2048.0), strict=True))  # a fourth power, as for little blur


def figures(**values) -> dict[str, Figure]:
    """A whole table: `mmd=(value, low, high)`, `ms_ssim=(value, floor)` and the others as they are for real
    scans."""
    mmd, low, high = values.get("mmd", (0.1, -0.1, 0.3))
    similar, floor = values.get("ms_ssim", (0.8, 0.8))
    tissue, tissue_low = values.get("tissue", (10.0, 5.0))
    listed = [
        Figure("mmd_own", "", "", "", mmd, [low, high], 0.0, [-0.2, 0.2]),
        *(
            Figure(f"mmd_own: {blurred_scans(sigma)}", "", "", "", value, [value, value])
            for sigma, value in LADDER.items()
        ),
        Figure("mmd_own: reconstructions", "", "", "", values.get("reconstructions", 0.4), [0.3, 0.5]),
        Figure("fine_power", "", "", "", values.get("fine", 1.0), [0.9, 1.1], 1.0, [0.9, 1.1]),
        Figure("ms_ssim", "", "", "", similar, [similar - 0.005] * 2, floor, [floor + 0.005] * 2),
        Figure(
            "tissue_dark",
            "",
            "Dark tissue",
            "How far. Samples 3 ml, scans 4 ml.",
            tissue,
            [tissue_low, 15.0],
            6.0,
            [0.0, 9.0],
        ),  # fmt: skip
        Figure("reconstruction_psnr", "", "", "", values.get("psnr", 31.0), [30, 32]),
        Figure("reconstruction_ssim", "", "", "", 0.95, [0.9, 1]),
    ]
    return {figure.key: figure for figure in listed}


@pytest.mark.parametrize(
    "mmd, tone, said",
    [
        ((0.1, -0.1, 0.3), "good", "no difference can be seen"),
        ((0.4, 0.3, 0.5), "good", "closer than scans blurred by 0.25 voxels"),
        ((8.0, 7.0, 9.0), "warn", "as far as scans blurred by 0.5 voxels"),
        (
            (2.0, 1.8, 2.2),
            "warn",
            "as far as scans blurred by 0.4 voxels",
        ),  # 0.25 * 2^(1/2): half way in both
        ((128.0, 120.0, 130.0), "bad", "as far as scans blurred by 1.0 voxels"),
        ((2100.0, 2000.0, 2200.0), "bad", "farther than scans blurred by 2 voxels"),
        ((2048.0 * 12, 2e4, 3e4), "bad", "12 times as far as scans blurred by 2 voxels"),
        ((1e7, 9e6, 2e7), "bad", "far beyond scans blurred by 2 voxels"),
    ],
)
def test_a_distance_in_words(mmd, tone, said):
    found = verdicts.realism(figures(mmd=mmd))
    assert found[0] == tone and said in found[1]


def test_what_the_autoencoder_makes_of_a_distance():
    assert "20 % of this distance is the autoencoder's" in verdicts.realism(figures(mmd=(2.0, 1.8, 2.2)))[1]
    assert "autoencoder" not in verdicts.realism(figures(mmd=(100.0, 90.0, 110.0)))[1]  # less than 5 %


def neighbours(*distances: float) -> list[Neighbour]:
    return [Neighbour(0, distance, False) for distance in distances]


def judged(made: list[float], held: list[float]) -> tuple[str, str]:
    nearest = {"generated": neighbours(*made), "held-out": neighbours(*held)}
    nearest["verdict"] = judge(np.array(made), np.array(held))
    return verdicts.copies(nearest, {"generated": len(made), "held-out": len(held)})


def test_copies_in_words():
    held = [1.0 + 0.01 * i for i in range(20)]
    assert judged([0.9, 1.1, 1.0], held)[0] == "good"
    tone, text = judged([0.1, 1.1, 0.2], held)
    assert tone == "bad" and "2 of 3 samples are copies" in text and "20 held-out scans none is" in text
    assert "1 of 3 samples is a copy" in judged([0.1, 1.1, 1.0], held)[1]
    tone, text = judged([0.8] * 20, held)
    assert tone == "warn" and "100 % of pairs" in text
    tone, text = judged([1.1] * 20, [0.1, *held])
    assert tone == "warn" and "1 of the held-out scans are copies too" in text
    tone, text = judged([1.0] * 20, held[:4])
    assert tone == "warn" and "4 held-out scan(s) that limit is rough" in text
    assert verdicts.copies(None, {})[0] == "none"


@pytest.mark.parametrize(
    "fine, tone, said", [(1.0, "good", "100 %"), (0.5, "warn", "softer"), (2.0, "warn", "noisier")]
)
def test_sharpness_in_words(fine, tone, said):
    found = verdicts.sharpness(figures(fine=fine)["fine_power"])
    assert found[0] == tone and said in found[1]


@pytest.mark.parametrize(
    "values, tone, said",
    [
        ((0.8, 0.8), "good", "as varied"),
        ((0.9, 0.8), "warn", "less varied"),
        ((0.6, 0.8), "warn", "less alike"),
    ],
)
def test_diversity_in_words(values, tone, said):
    found = verdicts.diversity(figures(ms_ssim=values)["ms_ssim"])
    assert found[0] == tone and said in found[1]


def test_anatomy_in_words():
    many, few = ({"generated": 30, "held-out": n} for n in (30, 10))
    for counts, due in ((many, "good"), (few, "none")):
        tone, text = verdicts.anatomy([figures()["tissue_dark"]], counts)
        assert tone == due and text.endswith("dark tissue. Samples 3 ml, scans 4 ml.")
    tone, text = verdicts.anatomy([figures(tissue=(20.0, 10.0))["tissue_dark"]], few)
    assert tone == "warn" and text.endswith("Samples 3 ml, scans 4 ml.") and "1 of 1" in text


def test_all_lines_in_their_order():
    nearest = {"generated": neighbours(1.0), "held-out": neighbours(1.0, 1.1)}
    nearest["verdict"] = judge(np.array([1.0]), np.array([1.0, 1.1]))
    lines = verdicts.verdicts(list(figures(psnr=20.0).values()), nearest, {"held-out": 2, "generated": 1})
    assert [line["tone"] for line in lines] == ["warn", "good", "good", "good", "none", "bad", "warn"]
    assert "20.0 dB" in lines[5]["text"] and "With 2 held-out and 1 generated" in lines[6]["text"]
