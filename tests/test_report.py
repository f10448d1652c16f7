"""The page of an evaluation: its text, the embedded volumes, and its behaviour in a real browser (Debian's
Chromium with its driver; without them those tests are skipped)."""

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import zlib
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from ldm.evaluation import report

SHAPE, SPACING, BLOCK = (24, 32, 20), (1.0, 1.5, 2.0), 4
PLANES = ("sagittal", "coronal", "axial")  # the planes across each axis
MIDDLE = (10, 16, 10)  # where the viewer starts: the middle, a twelfth of the width beside the midline
HOSTILE = '"><script>window.harm = 1</script><img src=x onerror="window.harm = 1">\'&{{title}} $\\frac{'


def blocks(seed: int) -> np.ndarray:
    """A volume of blocks of 4 voxels a side: cubic interpolation leaves the middle of each as it is."""
    coarse = np.random.default_rng(seed).integers(20, 236, [n // BLOCK for n in SHAPE])
    return np.kron(coarse, np.ones((BLOCK,) * 3)) / 255


def evaluation(name: str = "sub-01") -> dict:
    """The arguments of a full page; `name` is in every word that may come from a file."""
    metric = {
        **{"key": "mmd", "group": f"Distance {name}", "name": f"Kernel distance {name}"},
        **{"about": f"How far. {name}", "unit": f"ml {name}", "counts": f"60 generated {name}"},
        **{"value": 0.3125, "interval": [0.25, 0.38], "floor": 0.0021, "floor_interval": [-0.004, 0.009]},
        **{"difference": [0.2, 0.4], "p_value": 0.001, "better": "lower", "missing": None},
    }
    absent = dict.fromkeys(("value", "interval", "floor", "floor_interval"))
    series = {"name": f"series {name}", "x": [0, 1, 2], "y": [1.0, 0.1, 0.01], "low": None, "high": None}
    band = {"name": "held-out", "low": [0.5, 0.05, 0.005], "high": [2, 0.2, 0.02]}
    curve = {"title": f"Power {name}", "x": f"cycles {name}", "y": f"power {name}", "log": True}
    numbers = {"held-out": [1.0, 2.0, 3.0], "generated": [2.0], "training": []}
    pair = {"training": f"case {name}", "limit": 0.05}
    return {
        "metrics": {
            **{"format": 1, "title": f"Evaluation {name}", "made": "2026-11-21 20:00"},
            "figures": [
                metric,
                {**metric, "name": "Coverage", "better": "higher", "interval": None, "floor_interval": None},
                {**metric, **absent, "group": "Copies", "missing": f"no training scans {name}"},
            ],
            "sets": {group: {"folder": f"{group}/{name}", "volumes": 30} for group in numbers},
            "verdicts": [
                {"tone": tone, "text": f"A {tone} verdict. {name}"}
                for tone in ("bad", "warn", "good", "none")
            ],
            "settings": {f"feature network {name}": f"ResNet {name}"},
            "notes": [f"held-out: 3 volumes were resampled {name}"],
        },
        "spacing": SPACING,
        "examples": {
            "held-out": [(f"{name} a", blocks(0)), (f"{name} b", blocks(1))],
            "generated": [(f"sample_0 {name}", blocks(2))],
        },
        "pairs": [
            {**pair, "generated": f"sample_{i} {name}", "distance": distance, "flagged": i == 0}
            | {"volumes": (blocks(i), blocks(3))}
            for i, distance in enumerate((0.04, 0.14))
        ],
        "curves": [{**curve, "series": [series, {**series, **band}]}],
        "distributions": [{"title": f"Volume {name}", "x": f"ml {name}", "groups": numbers}],
        "log": [
            {"stage": "autoencoder", "step": 1, "recon_loss": 0.1},
            {"stage": "diffusion", "step": 1, "loss": 0.5, "val_loss": 0.6},
        ],
    }


def minimum() -> dict:
    """The least that `evaluate.py` has: one volume of each group, and no metric that could be computed."""
    full = evaluation()
    content = {
        **full["metrics"],
        **{"figures": full["metrics"]["figures"][2:], "notes": [], "settings": {}},
        "verdicts": [{"tone": "none", "text": "Too few volumes to say."}],
    }
    examples = {group: named[:1] for group, named in full["examples"].items()}
    empty = dict.fromkeys(("pairs", "curves", "distributions", "log"), [])
    return {**empty, "metrics": content, "spacing": SPACING, "examples": examples}


class Page(HTMLParser):
    """A page's elements, its text, its pictures by their alternative texts, and its scripts."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements, self.words, self.scripts, self.inside = [], [], {}, None
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())
        self.images = {one.get("alt"): one["src"] for tag, one in self.elements if tag == "img"}

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = (tag, dict(attributes).get("id"))

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside and self.inside[0] == "script":
            self.scripts[self.inside[1]] = data
        elif not self.inside or self.inside[0] != "style":
            self.words.append(data)

    def picture(self, alt: str) -> Image.Image:
        kind, _, data = self.images[alt].partition(",")
        assert kind == "data:image/png;base64"
        return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.fixture
def page(tmp_path):
    """`page(content)` writes a page and reads it."""

    def write(content: dict) -> Page:
        report.write_report(tmp_path / "report.html", **content)
        return Page(tmp_path / "report.html")

    return write


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> list[Path]:
    """The page of `evaluation`, and the same where every word from a file is hostile."""
    paths = [tmp_path_factory.mktemp("page") / "report.html" for _ in range(2)]
    for path, name in zip(paths, ("sub-01", HOSTILE), strict=True):
        report.write_report(path, **evaluation(name))
    return paths


# ---------------------------------------------------------------- text


def test_the_page_has_all_text(written):
    text, metrics = Page(written[0]).text, evaluation()["metrics"]
    said = [metrics["title"], metrics["made"], *metrics["notes"], *metrics["settings"]]
    said += metrics["settings"].values()
    said += [one["text"] for one in metrics["verdicts"]]
    said += [one[key] for one in metrics["figures"] for key in ("group", "name", "about", "counts")]
    said += [metrics["figures"][2]["missing"], "24 × 32 × 20 voxels of 1 × 1.5 × 2 mm", "held-out/sub-01"]
    assert [one for one in said if one not in text] == []
    assert text.index("A bad verdict") < text.index("A warn verdict") < text.index("Kernel distance")
    row = "0.312 ml sub-01 [0.25, 0.38] p = 0.001 0.0021 ml sub-01 [−0.004, 0.009] 149 × baseline"
    assert f"{row} difference [0.2, 0.4] ↓ lower" in text
    assert "Flagged distance 0.04, threshold 0.05" in text
    assert "Not flagged distance 0.14, threshold 0.05" in text


def test_the_minimum(page):
    made = page(minimum())
    assert "Too few volumes to say." in made.text and "no training scans" in made.text
    sections = [one["id"] for tag, one in made.elements if tag == "section"]
    assert sections == ["verdict", "metrics", "slices", "viewer"]


def test_numbers():
    """Three digits of each, as a reader writes them."""
    found = {"–": None, "0": 0.0, "3": 3, "0.312": 0.31249, "−23.4": -23.44, "1": 0.99999, "12300": 12345.6}
    found |= {"0.0021": 0.0021, "3.12 × 10⁻⁵": 3.12e-5, "−1 × 10⁻⁹": -9.999e-10, "4.5 × 10¹²": 4.5e12}
    assert [report._number(value) for value in found.values()] == list(found)


def test_a_word_from_a_file_is_only_a_word(written):
    plain, hostile = map(Page, written)
    assert Counter(tag for tag, _ in hostile.elements) == Counter(tag for tag, _ in plain.elements)
    assert [list(names) for _, names in hostile.elements] == [list(names) for _, names in plain.elements]
    assert hostile.text.count(HOSTILE) == plain.text.count("sub-01")
    volumes = json.loads(hostile.scripts["volumes"])["volumes"]
    assert [one["name"] for one in volumes] == [f"{HOSTILE} a", f"{HOSTILE} b", f"sample_0 {HOSTILE}"]


def test_it_takes_nothing_from_elsewhere_and_is_the_same_twice(page, written):
    made = Page(written[0])
    assert page(evaluation()).source == made.source
    links = [one[key] for _, one in made.elements for key in ("src", "href") if key in one]
    assert links and all(link.startswith(("data:image/", "#")) for link in links)
    assert not re.search(r"@import|url\(|https?://|<link|<iframe", made.source)
    policy = next(one["content"] for _, one in made.elements if one.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(made.scripts[None].encode()).digest()).decode()
    assert policy.split("; ")[0] == "default-src 'none'"
    assert policy.split("; ")[-1] == f"script-src 'sha256-{digest}'"


# ---------------------------------------------------------------- embedded volumes


def embedded(made: Page) -> tuple[dict, list[np.ndarray]]:
    data = json.loads(made.scripts["volumes"])
    unpacked = [zlib.decompress(base64.b64decode(one["data"])) for one in data["volumes"]]
    return data, [np.frombuffer(one, np.uint8).reshape(data["shape"]) for one in unpacked]


def test_volumes_are_embedded_to_the_byte(page):
    content = {**minimum(), "examples": evaluation()["examples"]}
    content["examples"]["generated"][0][1][0, 0, :2] = -3, 7  # beyond black and white
    content["spacing"] = np.float32(SPACING)  # as nibabel has it
    data, volumes = embedded(page(content))
    assert [one["set"] for one in data["volumes"]] == ["held-out", "held-out", "generated"]
    assert data["shape"] == list(SHAPE) and data["spacing"] == list(SPACING)
    whole = [volume for named in content["examples"].values() for _, volume in named]
    for bytes_, volume in zip(volumes, whole, strict=True):
        assert np.array_equal(bytes_, np.round(np.clip(volume, 0, 1) * 255))
    assert volumes[2][0, 0, :2].tolist() == [0, 255]


def test_large_and_many_volumes_are_averaged_and_the_page_says_so(page, monkeypatch):
    content = minimum()
    volume = np.zeros((300, 10, 7))  # blocks of 3 x 1 x 1, as 300 / 128 is between 2 and 3
    volume[3:6, 4, 5] = 0.2, 0.4, 0.9
    content["examples"] = {"held-out": [("a", volume)], "generated": [("b", volume)]}
    made = page(content)
    data, volumes = embedded(made)
    assert data["shape"] == [100, 10, 7] and data["spacing"] == [3 * SPACING[0], *SPACING[1:]]
    assert volumes[0][1, 4, 5] == round(0.5 * 255) and volumes[0].sum() == volumes[0][1, 4, 5]
    said = "Shown are means of 3 × 1 × 1 voxels , 100 × 10 × 7 of 3 × 1.5 × 2 mm"
    assert said in made.text and "means of" not in page(minimum()).text
    monkeypatch.setattr(report, "VOXELS", 3 * 24 * 32 * 20 - 1)
    data, volumes = embedded(page({**minimum(), "examples": evaluation()["examples"]}))
    assert data["shape"] == [24, 16, 20]  # three of these do
    assert volumes[0][5, 3, 9] == round(blocks(0)[5, 6:8, 9].mean() * 255)


def test_slices_have_the_subjects_right_on_the_left_and_true_proportions(page):
    content, (d, h, w) = minimum(), SHAPE
    volume = np.zeros(SHAPE)
    volume[d // 2 :, h // 2 :, w // 2 :] = 0.5  # right, anterior and superior
    volume[d // 2 - d // 12, h // 2 :, w // 2 :] = 1.0  # in the sagittal slice
    content["examples"] = {"held-out": [("a", volume)], "generated": [("b", volume)]}
    made = page(content)
    sizes = {"axial": (24, 48), "coronal": (24, 40), "sagittal": (48, 40)}  # mm
    for plane, (across, down) in sizes.items():
        picture = made.picture(f"held-out: a, {plane} slice")
        assert picture.width / picture.height == pytest.approx(across / down, rel=0.01)
        grey = np.asarray(picture)
        rows, columns = (slice(n // 8, n // 8 * 3) for n in grey.shape)
        corner = 255 if plane == "sagittal" else 128
        assert grey[rows, columns] == pytest.approx(corner, abs=1)  # upper left
        assert grey[rows, ::-1][:, columns].max() == 0 and grey[::-1][rows].max() == 0


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def driver(tmp_path_factory, written):
    """Chromium without a window, for the hostile page."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    chromedriver = shutil.which("chromedriver")
    if not browser or not chromedriver:
        pytest.skip("no Chromium with its chromedriver here (Debian: chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-sync window-size=1300,1400"
    flags += " disable-background-networking disable-component-update"
    for flag in (*flags.split(), f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    one = webdriver.Chrome(options, Service(chromedriver, log_output=subprocess.DEVNULL))
    one.page = written[1].as_uri()
    yield one
    one.quit()


@pytest.fixture
def viewer(driver):
    """The page freshly opened, its viewer ready; nothing may have been said on the console at the end."""
    driver.get(driver.page)
    WebDriverWait(driver, 20).until(
        lambda _: driver.find_elements(By.CSS_SELECTOR, "#viewer[data-ready], .failure")
    )
    driver.execute_script("document.getElementById('viewer').scrollIntoView({behavior: 'instant'})")
    frame(driver)
    yield driver
    assert driver.get_log("browser") == []
    assert driver.execute_script("return window.harm") is None


def frame(driver) -> None:
    """Wait until what was asked for has been drawn."""
    driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def plane(driver, name: str, side: int = 0):
    return driver.find_elements(By.CSS_SELECTOR, f"figure[data-plane={name}] .plane")[side]


def at(driver, side: int = 0) -> tuple[int, ...]:
    """The voxel of the left or right viewer's crosshair, as its sliders have it."""
    frame(driver)
    read = "return document.querySelectorAll(`figure[data-plane=${arguments[0]}] input`)[arguments[1]].value"
    return tuple(int(driver.execute_script(read, name, side)) for name in PLANES)


def shown(driver, name: str, side: int = 0) -> np.ndarray:
    """The greys that a plane shows in the middle of each block of 4 x 4 voxels."""
    frame(driver)
    canvas = driver.find_elements(By.CSS_SELECTOR, f"figure[data-plane={name}] canvas")[side]
    png = driver.execute_script("return arguments[0].toDataURL()", canvas).partition(",")[2]
    colours = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA"))
    assert (colours[..., :3] == colours[..., :1]).all() and (colours[..., 3] == 255).all()  # grey, opaque
    sides = [n // BLOCK for axis, n in enumerate(SHAPE) if axis != PLANES.index(name)]
    rows, columns = (
        np.int64((np.arange(count) + 0.5) / count * pixels)
        for count, pixels in zip(sides[::-1], colours.shape, strict=False)
    )
    return colours[np.ix_(rows, columns)][..., 0]


def expected(volume: np.ndarray, name: str, index: int, window: float = 1, level: float = 0.5) -> np.ndarray:
    """The same, computed here."""
    slice_ = np.take(volume, index, PLANES.index(name))[2::BLOCK, 2::BLOCK]
    grey = np.clip((slice_ - (level - window / 2)) / window, 0, 1) * 255
    return np.floor(grey[::-1, ::-1].T + 0.5)


def test_the_viewer_shows_the_voxels_that_it_should(viewer):
    for side, seed in ((0, 0), (1, 2)):  # the first held-out volume beside the first generated one
        assert at(viewer, side) == MIDDLE
        for name, index in zip(PLANES, MIDDLE, strict=True):
            assert np.array_equal(shown(viewer, name, side), expected(blocks(seed), name, index))
    intensity = viewer.find_elements(By.CSS_SELECTOR, ".intensity")[1].text
    assert intensity == f"{blocks(2)[MIDDLE]:.3f}"
    position = viewer.find_element(By.CSS_SELECTOR, ".position").text.replace("\xa0", " ")
    assert position == "L 1.5 · A 0.8 · S 1.0 mm"  # (10 - 11.5) 1, (16 - 15.5) 1.5, (10 - 9.5) 2


def test_letters_and_proportions(viewer):
    sizes = {"axial": ("RLAP", 24 / 48), "coronal": ("RLSI", 24 / 40), "sagittal": ("APSI", 48 / 40)}
    for name, (letters, ratio) in sizes.items():
        one = plane(viewer, name)
        assert "".join(letter.text for letter in one.find_elements(By.TAG_NAME, "b")) == letters
        assert one.size["width"] / one.size["height"] == pytest.approx(ratio, rel=0.02)
        left, right, top, bottom = (letter.location for letter in one.find_elements(By.TAG_NAME, "b"))
        assert left["x"] < top["x"] < right["x"] and top["y"] < left["y"] < bottom["y"]


def test_wheel_keys_and_sliders_scroll_both_viewers(viewer):
    axial = plane(viewer, "axial", 1)
    for delta, index in ((100, 9), (100, 8), (-100, 9)):  # down is towards the feet
        ActionChains(viewer).scroll_from_origin(ScrollOrigin.from_element(axial), 0, delta).perform()
        assert at(viewer, 0) == at(viewer, 1) == (*MIDDLE[:2], index)
    assert np.array_equal(shown(viewer, "axial", 0), expected(blocks(0), "axial", 9))
    coronal = plane(viewer, "coronal")
    for key, index in ((Keys.ARROW_UP, 17), (Keys.PAGE_DOWN, 7), (Keys.END, 31), (Keys.ARROW_UP, 31)):
        coronal.send_keys(key)
        assert at(viewer, 0) == at(viewer, 1) == (10, index, 9)
    assert np.array_equal(shown(viewer, "coronal", 1), expected(blocks(2), "coronal", 31))
    viewer.find_element(By.CSS_SELECTOR, "figure[data-plane=sagittal] input").send_keys(Keys.ARROW_LEFT)
    assert at(viewer, 1) == (9, 31, 9)
    viewer.find_element(By.ID, "reset").click()
    assert at(viewer, 0) == at(viewer, 1) == MIDDLE
    viewer.find_element(By.ID, "linked").click()  # each alone
    plane(viewer, "axial", 1).send_keys(Keys.HOME)
    assert at(viewer, 0) == MIDDLE and at(viewer, 1) == (*MIDDLE[:2], 0)
    viewer.find_element(By.ID, "linked").click()
    assert at(viewer, 1) == MIDDLE


def test_a_click_moves_the_other_planes(viewer):
    axial = plane(viewer, "axial")
    width, height = axial.size["width"], axial.size["height"]
    # a quarter of the width is voxel 18 of 24 from the left's, an eighth of the height voxel 28 of 32
    place = (round(-0.25 * width) - 2, round(-0.375 * height) - 2)
    ActionChains(viewer).move_to_element_with_offset(axial, *place).click().perform()
    assert at(viewer, 0) == at(viewer, 1) == (18, 28, 10)
    assert np.array_equal(shown(viewer, "sagittal"), expected(blocks(0), "sagittal", 18))
    assert np.array_equal(shown(viewer, "coronal"), expected(blocks(0), "coronal", 28))
    style = viewer.execute_script("return arguments[0].style.cssText", axial)
    assert f"--x: {100 * (1 - 18.5 / 24):.3f}"[:10] in style  # the crosshair is on the voxel


def test_window_and_level(viewer):
    def greys(window: float, level: float) -> None:
        for side, seed in ((0, 0), (1, 2)):
            for name, index in zip(PLANES, MIDDLE, strict=True):
                wanted = expected(blocks(seed), name, index, window, level)
                assert np.abs(shown(viewer, name, side) - wanted).max() <= 1  # rounded in single precision
        values = [one.text for one in viewer.find_elements(By.CSS_SELECTOR, ".controls output")]
        assert values == [f"{window:.2f}", f"{level:.2f}"]

    coronal = plane(viewer, "coronal")
    viewer.find_element(By.ID, "window").send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * 38)
    greys(0.4, 0.5)
    coronal.send_keys(*[Keys.ARROW_LEFT] * 5)
    greys(0.4, 0.4)
    coronal.send_keys(Keys.SHIFT, *[Keys.ARROW_RIGHT] * 5)
    greys(0.5, 0.4)
    drag = ActionChains(viewer).key_down(Keys.SHIFT).click_and_hold(coronal).move_by_offset(30, -15)
    drag.release().key_up(Keys.SHIFT).perform()
    greys(0.6, 0.45)
    drag = ActionBuilder(viewer)
    drag.pointer_action.move_to(coronal).pointer_down(button=2).move_by(-60, 30).pointer_up(button=2)
    drag.perform()
    greys(0.4, 0.35)
    assert at(viewer) == MIDDLE  # none of these moved the crosshair
    viewer.find_element(By.ID, "reset").click()
    greys(1, 0.5)


def test_another_volume(viewer):
    select = Select(viewer.find_elements(By.CSS_SELECTOR, ".viewer select")[1])
    names = [one.text for one in select.options]
    assert names == [f"held-out: {HOSTILE} a", f"held-out: {HOSTILE} b", f"generated: sample_0 {HOSTILE}"]
    select.select_by_index(1)
    WebDriverWait(viewer, 5).until(
        lambda _: viewer.find_elements(By.CSS_SELECTOR, ".intensity")[1].text == f"{blocks(1)[MIDDLE]:.3f}"
    )
    assert np.array_equal(shown(viewer, "axial", 1), expected(blocks(1), "axial", 10))
    assert np.array_equal(shown(viewer, "axial", 0), expected(blocks(0), "axial", 10))


def test_it_fits_a_telephone_and_paper_and_loads_nothing(viewer):
    loaded = viewer.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert [one for one in loaded if not one.startswith("data:")] == []
    assert viewer.execute_script(
        "return [...document.images].every((one) => one.complete && one.naturalWidth)"
    )
    metrics = {"width": 380, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    viewer.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        assert np.array_equal(shown(viewer, "axial"), expected(blocks(0), "axial", 10))
        assert viewer.execute_script("return document.documentElement.scrollWidth") <= 380
    finally:
        viewer.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    made = viewer.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})
    pdf = base64.b64decode(made["data"])
    assert pdf.startswith(b"%PDF") and 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 10
    assert re.findall(rb"/MediaBox\s*\[0 0 59\d\S* 84\d", pdf)  # A4
