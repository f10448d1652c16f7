"""Draw figs/report.png: head, verdict and viewer of an evaluation's page, as a browser shows them.

    python docs/make_report_png.py outputs/demo/evaluation/report.html

Needs Chromium and its driver (Debian: chromium, chromium-driver), and selenium, of requirements-test.txt.
"""

import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

OUT = Path(__file__).resolve().parents[1] / "figs" / "report.png"
PARTS = ("header", "#verdict", "#viewer")
FLAGS = ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-sync")
WIDTH = 1100


def main() -> None:
    (page,) = sys.argv[1:]
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        browser = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
        try:
            browser.set_window_size(WIDTH, 2400)
            browser.get(Path(page).resolve().as_uri())
            shots = [browser.find_element("css selector", part).screenshot_as_png for part in PARTS]
        finally:
            browser.quit()
    pictures = [Image.open(io.BytesIO(shot)).convert("RGB") for shot in shots]
    width = max(picture.width for picture in pictures)
    ground = pictures[0].getpixel((0, 0))
    whole = Image.new("RGB", (width, sum(picture.height + 12 for picture in pictures)), ground)
    top = 0
    for picture in pictures:
        whole.paste(picture, ((width - picture.width) // 2, top))
        top += picture.height + 12
    whole.save(OUT, optimize=True)
    print(OUT)


if __name__ == "__main__":
    main()
