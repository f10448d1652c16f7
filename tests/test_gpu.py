"""What only a GPU can show: the chain on CUDA. Skipped, saying so, where there is none."""

import nibabel as nib
import numpy as np
import pytest
import torch
from chain import Project, make_data, trained

import inference
import train_autoencoder
import train_diffusion

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
]


@pytest.mark.parametrize("flags", [("--amp",), ("--no-amp", "--compile")])
def test_the_chain_trains_and_samples_on_a_gpu(tmp_path, flags):
    project = Project(tmp_path / "chain", make_data(tmp_path / "data"))
    for script in (train_autoencoder, train_diffusion):
        project.run(script, "--device", "cuda", *flags)
    project.run(inference, "--device", "cuda", "--num", "2", "--steps", "4")
    losses = [entry["val_psnr"] for entry in project.log("autoencoder") if "val_psnr" in entry]
    assert losses[-1] > losses[0]
    for path in project.output_dir.glob("*.nii.gz"):
        assert np.isfinite(nib.load(path).get_fdata()).all()


def test_a_gpu_draws_the_sample_that_a_cpu_draws(tmp_path_factory, tmp_path):
    project = trained(tmp_path_factory.getbasetemp())
    images = {}
    for device in ("cpu", "cuda"):
        project.set_environment(output_dir=str(tmp_path / device))
        project.run(inference, "--num", "1", "--seed", "7", "--steps", "4", "--device", device, "--no-amp")
        images[device] = nib.load(tmp_path / device / "sample_000007.nii.gz").get_fdata()
    assert np.abs(images["cpu"] - images["cuda"]).max() < 1e-2 * np.ptp(images["cpu"])
