"""What only a GPU can show: the chain on CUDA. Skipped, saying so, where there is none."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from chain import CONFIG, Project, make_data, trained

import cache_latents
import evaluate
import inference
import train_autoencoder
import train_diffusion
from ldm.lowmem.slabwise import Budget, decode_within
from ldm.models.definitions import NETWORKS, instantiate
from ldm.training.progress import Progress

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


@pytest.mark.parametrize("schedule", ["rectified_flow", "cosine"])
def test_a_step_waits_for_nothing_on_the_gpu(tmp_path, monkeypatch, schedule):
    """Ten steps of each stage, from the fourth on, when libraries have set themselves up; with averages, the
    adversarial term, clipping and a weight by time. CUDA calls that wait raise."""
    project = Project(tmp_path / "chain", make_data(tmp_path / "data"))
    common = {"max_epochs": 7, "val_interval": 100, "clip_grad_norm": 1.0, "save_minutes": None}
    first = project.config["autoencoder_train"] | common | {"adversarial_warmup_epochs": 0}
    second = project.config["diffusion_train"] | common | {"min_snr_gamma": 5.0}
    project.change(autoencoder_train=first, diffusion_train=second, NoiseScheduler={"schedule": schedule})
    real, steps = Progress.batches, []

    def strictly(self):
        for item in real(self):
            steps.append(self.stage)
            torch.cuda.set_sync_debug_mode("error" if steps.count(self.stage) > 3 else "default")
            try:
                yield item
            finally:
                torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Progress, "batches", strictly)
    for script in (train_autoencoder, train_diffusion):
        project.run(script, "--device", "cuda")
    assert steps.count("autoencoder") == steps.count("diffusion") == 14


def test_a_gpu_draws_the_sample_that_a_cpu_draws(tmp_path_factory, tmp_path):
    project = trained(tmp_path_factory.getbasetemp())
    images = {}
    for device in ("cpu", "cuda"):
        project.set_environment(output_dir=str(tmp_path / device))
        project.run(inference, "--num", "1", "--seed", "7", "--steps", "4", "--device", device)
        images[device] = nib.load(tmp_path / device / "sample_000007.nii.gz").get_fdata()
        assert json.loads((tmp_path / device / "sample_000007.json").read_text())["precision"] == "float32"
    assert np.abs(images["cpu"] - images["cuda"]).max() < 1e-3 * np.ptp(images["cpu"])  # 1e-2 in TF32


def test_a_gpu_measures_what_a_cpu_measures(tmp_path_factory, tmp_path):
    project, found = trained(tmp_path_factory.getbasetemp()), {}
    for device in ("cpu", "cuda"):
        project.run(evaluate, "--device", device, "--out", tmp_path / device)
        content = json.loads((tmp_path / device / "metrics.json").read_text())
        found[device] = {figure["key"]: figure["value"] for figure in content["figures"]}
    for key in ("spectrum", "fine_power", "histogram", "nearest", "reconstruction_psnr", "tissue_foreground"):
        assert found["cuda"][key] == pytest.approx(found["cpu"][key], rel=1e-2), key


def test_a_training_on_cached_latents_and_compiled_samples(tmp_path):
    project = Project(tmp_path / "chain", make_data(tmp_path / "data"))
    for script in (train_autoencoder, cache_latents):
        project.run(script, "--device", "cuda")
    project.run(train_diffusion, "--device", "cuda", "--set", "diffusion_train.latent_cache=true")
    images = {}
    for flag in ("--no-compile", "--compile"):
        project.set_environment(output_dir=str(tmp_path / flag))
        project.run(inference, "--num", "1", "--steps", "4", "--device", "cuda", flag)
        images[flag] = nib.load(tmp_path / flag / "sample_000000.nii.gz").get_fdata()
    assert np.abs(images["--compile"] - images["--no-compile"]).max() < 1e-2 * np.ptp(images["--compile"])


@pytest.mark.parametrize("amp", [False, True])
def test_decoding_in_slabs_keeps_within_the_memory_of_a_gpu(amp):
    """A quarter of what the whole volume takes; what is kept on the host comes back as it went."""
    torch.manual_seed(0)
    definition = {**CONFIG["autoencoder_def"], "in_channels": 1, "out_channels": 1, "latent_channels": 3}
    definition |= {"channels": [32, 64, 64], "attention_levels": [False] * 3, "norm_num_groups": 8}
    network = instantiate(definition, NETWORKS, "here").cuda().eval()
    latents = torch.randn(1, 3, 32, 32, 32, device="cuda")
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=amp):
        torch.cuda.reset_peak_memory_stats()
        whole = network.decode(latents).float().cpu()
        budget = 0.25 * torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        slabs = decode_within(network, latents, Budget(budget)).float()
        assert torch.cuda.max_memory_allocated() <= budget
    torch.testing.assert_close(slabs, whole, rtol=0, atol=(3e-2 if amp else 2e-3) * float(whole.std()))
