"""The notebook 3d_ldm_tutorial.ipynb: its cells run, on simulated brains and on data like BraTS."""

import base64
import importlib.util
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import nibabel as nib
import numpy as np
import pytest

from ldm import UserError
from ldm.system.checkpoints import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "3d_ldm_tutorial.ipynb"
MINUTES = re.compile(r"whole notebook took ([\d.]+) minutes")

spec = importlib.util.spec_from_file_location("make_tutorial", ROOT / "docs" / "make_tutorial.py")
make_tutorial = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_tutorial)


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def pictures(cell: nbformat.NotebookNode) -> list[str]:
    """The kinds of picture among a cell's outputs."""
    return [kind for output in cell.outputs for kind in output.get("data", {}) if kind.startswith("image/")]


def number(pattern: str, text: str) -> float:
    return float(re.search(pattern, text)[1])


def changed(changes: dict[str, str]) -> nbformat.NotebookNode:
    """The notebook, with other text in its first code cell."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first = code(notebook)[0]
    for before, after in changes.items():
        assert first.source.count(before) == 1
        first.source = first.source.replace(before, after)
    return notebook


def executed(out: Path) -> nbformat.NotebookNode:
    """The notebook as it is, run quickly in a process of its own; its results go below `out`."""
    notebook = changed({})
    with pytest.MonkeyPatch.context() as patch:
        for key, value in (("QUICK", "1"), ("OUT", str(out))):
            patch.setenv(f"TUTORIAL_{key}", value)
        patch.setenv("OMP_NUM_THREADS", "1")
        make_tutorial.execute(notebook)
    return notebook


# ---------------------------------------------------------------- run now


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> tuple[nbformat.NotebookNode, Path]:
    """The notebook as it is, run quickly, and the folder of its results."""
    out = tmp_path_factory.mktemp("tutorial")
    return executed(out), out / "simulated-quick"


def test_all_cells_run_on_simulated_brains(simulated):
    notebook, out = simulated
    text = printed(notebook)
    psnr = number(r"PSNR of the reconstruction ([\d.]+) dB", text)
    assert psnr > 23 and psnr > number(r"of the mean brain ([\d.]+) dB", text) + 1
    assert number(r"variance [\d.]+ becomes ([\d.]+)", text) == pytest.approx(1, abs=0.02)
    unet = load_checkpoint(out / "models" / "diffusion_unet.pt")
    assert number(r"scale factor ([\d.]+):", text) == pytest.approx(unet["scale_factor"], rel=0.01)
    assert number(r"that was not turned: ([\d.]+)", text) == 0
    assert "byte-identical to the recorded volume" in text and MINUTES.search(text)
    sample = nib.load(out / "samples" / "sample_000001.nii.gz")
    assert sample.shape == (24, 24, 24) and np.isfinite(sample.get_fdata()).all()
    verdicts = json.loads((out / "samples" / "evaluation" / "metrics.json").read_text())["verdicts"]
    assert verdicts and all(verdict["text"] in text for verdict in verdicts)
    assert {"denoising.gif", "turned.nii.gz", "data", "fine"} <= {path.name for path in out.iterdir()}


def test_the_same_cells_run_on_data_like_brats(simulated, tmp_path, monkeypatch, capsys):
    """Other data by one variable; networks and grid of the config for BraTS made small for the test. In this
    process, since a kernel takes longer to start than these cells."""
    data, config_file = simulated[1] / "data", tmp_path / "config.json"
    config = json.loads((ROOT / "config" / "config_train_16g.json").read_text())
    config |= {"spacing": [8.0, 8.0, 8.0], "data": {"num_workers": 0}}
    config["autoencoder_def"] |= {"channels": [8, 8, 16], "num_res_blocks": 1, "norm_num_groups": 4}
    config["autoencoder_train"]["patch_size"] = [16, 16, 16]
    config["autoencoder_train"]["discriminator"] = {"channels": 4, "num_layers_d": 1}
    config["diffusion_def"] |= {"channels": [8, 8, 16], "num_head_channels": [0, 8, 8], "num_res_blocks": 1}
    config["diffusion_def"]["norm_num_groups"] = 4
    config["diffusion_train"]["patch_size"] = [16, 32, 16]
    for stage in ("autoencoder_train", "diffusion_train"):
        config[stage]["amp"] = False  # bf16 on a CPU fails on grids so small: docs/NaN_FIX_GUIDE.md
    config_file.write_text(json.dumps(config))
    changes = {
        'DATA = "simulated"': f"DATA = {str(data)!r}",
        '"config/config_train_16g.json"': repr(str(config_file)),
        'autoencoder_train.max_epochs=6"': 'autoencoder_train.max_epochs=1"',
        'diffusion_train.max_epochs=10"': 'diffusion_train.max_epochs=1"',
    }
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TUTORIAL_QUICK", "1")
    monkeypatch.setenv("TUTORIAL_OUT", str(tmp_path))
    names = {}
    with plt.rc_context():
        for cell in code(changed(changes)):
            exec(cell.source, names)
            plt.close("all")
    assert "predicts epsilon" in capsys.readouterr().out
    out = tmp_path / "brats-quick"
    assert nib.load(out / "samples" / "sample_000001.nii.gz").shape == (16, 32, 16)
    assert not (out / "data").exists() and not (out / "fine").exists()


def test_brats_that_is_not_there_is_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TUTORIAL_OUT", str(tmp_path))
    first = code(changed({'DATA = "simulated"': f"DATA = {str(tmp_path / 'no')!r}"}))[0]
    with pytest.raises(UserError, match=r"python download_brats_data.py -e config/environment.json"):
        exec(first.source, {})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- as it is kept


@pytest.fixture(scope="module")
def kept() -> nbformat.NotebookNode:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_the_outputs_are_those_of_one_whole_run(kept):
    assert [cell.execution_count for cell in code(kept)] == [*range(1, len(code(kept)) + 1)]
    errors = [o for cell in code(kept) for o in cell.outputs if o.output_type == "error"]
    assert not errors and "warning" not in printed(kept).lower()
    assert float(MINUTES.search(printed(kept))[1]) < 15


def test_every_section_shows_a_picture(kept):
    section, shown = None, {}
    for cell in kept.cells:
        if cell.cell_type == "markdown" and (heading := re.match(r"## (\d+)\. ", cell.source)):
            section = int(heading[1])
            shown[section] = 0
        elif cell.cell_type == "code" and section:
            shown[section] += len(pictures(cell))
    last = max(shown)
    assert [*shown] == [*range(1, last + 1)]
    assert [number for number, count in shown.items() if not count] == [1, last]  # settings, and the end
    assert "image/gif" in [kind for cell in code(kept) for kind in pictures(cell)]


def test_the_file_is_clean(kept):
    assert kept.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(cell.metadata == {} for cell in kept.cells)
    assert NOTEBOOK.stat().st_size < 3e6
    words = printed(kept) + "".join(cell.source for cell in kept.cells)
    words += "".join(o.data.get("text/plain", "") for c in code(kept) for o in c.outputs if "data" in o)
    assert not re.search(r"(?<![\w.])/(work|tmp|root|home|usr|opt)\b|[A-Z]:\\", words)
    assert "TODO" not in words


def test_outputs_are_text_and_whole_pictures(kept):
    magic = {"image/png": b"\x89PNG", "image/gif": b"GIF8"}
    for output in [output for cell in code(kept) for output in cell.outputs]:
        kinds = set(output.get("data", {})) - {"text/plain"}
        assert output.output_type == "stream" or (len(kinds) == 1 and kinds <= set(magic)), output
        for kind in kinds:
            assert base64.b64decode(output.data[kind]).startswith(magic[kind])


def test_links_lead_somewhere(kept):
    text = "".join(cell.source for cell in kept.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert "docs/config.md" in links
    assert not [link for link in links if not (ROOT / link).is_file()]
