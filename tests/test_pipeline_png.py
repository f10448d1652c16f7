"""The drawing of the pipeline keeps its texts apart, and every picture has its command in docs/figures.md."""

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("make_pipeline_png", ROOT / "docs/make_pipeline_png.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_texts_lie_inside_and_do_not_overlap(script):
    class Blank(dict):
        def __missing__(self, name):
            return np.zeros((4, 4))

    figure = script.draw(Blank())
    renderer = FigureCanvasAgg(figure).get_renderer()
    axis = figure.axes[0]
    boxes = {text: text.get_window_extent(renderer) for text in axis.texts}
    assert len(boxes) > 30
    inside = figure.bbox
    for text, box in boxes.items():
        assert inside.x0 < box.x0 and box.x1 < inside.x1, text
        assert inside.y0 < box.y0 and box.y1 < inside.y1, text
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        assert not a.overlaps(b), (one, other)
    for image in axis.images:
        box = image.get_window_extent(renderer)
        assert not [text for text, other in boxes.items() if box.overlaps(other)]


def test_every_picture_has_its_command():
    page = (ROOT / "docs/figures.md").read_text(encoding="utf-8")
    assert not [path.name for path in ROOT.glob("figs/*") if f"`figs/{path.name}`" not in page]
    assert (ROOT / "figs/pipeline.png").stat().st_size < 400e3
