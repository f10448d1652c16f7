"""Autoencoders with quantised latents: the arithmetic, and VQ-VAE and FSQ through all scripts."""

import copy
import json

import chain
import nibabel as nib
import numpy as np
import pytest
import torch
from chain import CONFIG
from monai.networks.layers.vector_quantizer import EMAQuantizer

import evaluate
import export_model
import inference
import train_autoencoder
from ldm import UserError, configs
from ldm.losses import AutoencoderLoss
from ldm.models.autoencoder import Autoencoder
from ldm.models.definitions import NETWORKS, downsampling_factor, instantiate
from ldm.models.quantised import FIRST_RESTART, FSQ, RestartingQuantizer

CODEBOOK = {
    "_target_": "monai.networks.nets.VQVAE",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 1,
    "channels": [8],
    "num_res_channels": [8],
    "num_res_layers": 1,
    "downsample_parameters": [[2, 4, 1, 1]],
    "upsample_parameters": [[2, 4, 1, 1, 0]],
    "num_embeddings": 16,
    "embedding_dim": 3,
    "decay": 0.9,
}
ROUNDED = {key: value for key, value in CONFIG["autoencoder_def"].items() if key != "latent_channels"}
ROUNDED |= {"_target_": "ldm.models.FSQ", "in_channels": 1, "out_channels": 1, "channel_levels": [5, 4, 3]}


def quantiser(cls: type, codes: int = 6) -> EMAQuantizer:
    torch.manual_seed(0)
    found = cls(3, codes, 2, decay=0.9)
    if cls is RestartingQuantizer:
        found.register_buffer("steps", torch.zeros((), dtype=torch.long))
    return found


# ---------------------------------------------------------------- the codebook


def test_a_training_step_is_monais():
    own, monais, inputs = quantiser(RestartingQuantizer), quantiser(EMAQuantizer), torch.randn(2, 2, 3, 4, 5)
    for step in range(3):
        a, b = (inputs.clone().requires_grad_() for _ in range(2))
        found, expected = own(a), monais(b)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
        (found[0].square().sum() + found[1]).backward()
        (expected[0].square().sum() + expected[1]).backward()
        torch.testing.assert_close(a.grad, b.grad)
        for key in ("embedding.weight", "ema_w", "ema_cluster_size"):
            torch.testing.assert_close(own.state_dict()[key], monais.state_dict()[key])
        assert own.steps == step + 1


def test_dead_codes_become_latents_of_the_batch():
    own, inputs = quantiser(RestartingQuantizer), 3 + torch.rand(1, 2, 4, 4, 4) / 10
    for _ in range(FIRST_RESTART + 2):
        own(inputs)
    numbers = own.eval()(inputs)[2]
    assert len(numbers.unique()) > 3  # one code at first
    rows = inputs.movedim(1, -1).reshape(-1, 2)
    assert torch.cdist(own.embedding.weight, rows).min(1).values.max() < 0.1


def test_a_step_that_is_not_finite_changes_no_code():
    own = quantiser(RestartingQuantizer)
    before = copy.deepcopy(own.state_dict())
    own(torch.full((1, 2, 2, 2, 2), float("nan")))
    assert all(torch.equal(before[key], value) for key, value in own.state_dict().items())


# ---------------------------------------------------------------- rounded channels


def test_rounding_by_hand():
    """5, 4 and 3 levels: tanh brings any number between the outermost."""
    network = instantiate(ROUNDED, NETWORKS, "here")
    far = torch.tensor([-50.0, 0.0, 50.0]).repeat(3, 1)[None, :, :, None, None]
    values, loss, numbers = network._quantise(far)
    expected = torch.tensor([[-1, 0, 1], [-1, 0, 0.5], [-1, 0, 1]])
    torch.testing.assert_close(values[0, :, :, 0, 0], expected)
    assert loss == 0 and network.codes == 60
    # digits (0, 2, 4), (0, 2, 3), (0, 1, 2), at places 1, 5, 20
    assert numbers.tolist() == [0, 2 + 5 * 2 + 20 * 1, 4 + 5 * 3 + 20 * 2]
    raw = torch.randn(1, 3, 8, 8, 8, requires_grad=True)
    values, _, numbers = network._quantise(3 * raw)
    assert [len(one.unique()) for one in values[0]] == [5, 4, 3] and 0 <= numbers.min() <= numbers.max() < 60
    values.sum().backward()
    assert (raw.grad > 0).float().mean() > 0.5
    with pytest.raises(UserError, match="expected 3 or more"):
        instantiate(ROUNDED | {"channel_levels": [5, 2]}, NETWORKS, "here")


# ---------------------------------------------------------------- what both share


@pytest.mark.parametrize("definition", [CODEBOOK, ROUNDED], ids=["VQ", "FSQ"])
def test_latents_are_standardised_and_quantised_when_decoded(definition):
    torch.manual_seed(0)
    network = instantiate(definition, NETWORKS, "here")
    autoencoder, images = Autoencoder(network), torch.rand(2, 1, 8, 12, 16)
    assert autoencoder.is_quantised and autoencoder.latent_channels == 3
    assert autoencoder.factor == downsampling_factor(definition) == (2, 2, 2)
    for _ in range(3):
        reconstruction, z, loss = autoencoder(images, torch.zeros(()))
    assert reconstruction.shape == images.shape and z.shape == (2, 3, 4, 6, 8) and loss.shape == (2,)
    found = network.use_of_codes()
    counts = np.bincount(network.code_numbers.numpy(), minlength=network.codes)
    shares = counts[counts > 0] / counts.sum()
    assert float(found["perplexity"]) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
    assert float(found["codes_used"]) == pytest.approx(len(shares) / network.codes)

    network.eval()
    with torch.no_grad():
        z, std = autoencoder.encode(images)
        assert not std.any() and autoencoder.activations(images)[-1].shape == z.shape
        raw = network._raw(images)
        spread = raw.std((0, 2, 3, 4), correction=0)
        if spread.min() > 0.1 * spread.max():
            torch.testing.assert_close(z.mean((0, 2, 3, 4)), torch.zeros(3), atol=1e-4, rtol=0)
            torch.testing.assert_close(z.std((0, 2, 3, 4), correction=0), torch.ones(3), atol=1e-3, rtol=0)
        once = network.decode(z)
        quantised = network._quantise(raw)[0]
        torch.testing.assert_close(network._decoded(quantised), once, atol=1e-5, rtol=1e-4)


def test_a_channel_that_is_empty_is_not_blown_up():
    network = instantiate(ROUNDED, NETWORKS, "here")
    network.channel_square.copy_(torch.tensor([4.0, 1e-8, 1.0]))
    assert network._affine(torch.zeros(1, 3, 1, 1, 1))[1].flatten().tolist() == pytest.approx([2, 0.2, 1])


def test_the_background_counts_less():
    section = configs.completed({"autoencoder_train": {"perceptual_weight": 0, "background_weight": 0.5}})
    images = torch.tensor([0.0, 0, 1, 1]).reshape(1, 1, 4, 1, 1)
    changed = images + torch.tensor([0.4, 0, 0.1, 0]).reshape(1, 1, 4, 1, 1)
    terms = AutoencoderLoss(section["autoencoder_train"], None).held_out(images, changed, None)
    assert float(terms["recon_loss"]) == pytest.approx((0.5 * 0.4 + 0.1) / 3)


# ---------------------------------------------------------------- all scripts


@pytest.fixture(scope="module", params=[CODEBOOK, ROUNDED], ids=["VQ", "FSQ"])
def project(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("codes")
    (folder / "data").mkdir()
    for i in range(4):
        voxels = np.random.default_rng(i).normal(100, 20, (16, 20, 12)).astype(np.float32)
        nib.save(nib.Nifti1Image(voxels, np.diag([2, 1.5, 3, 1])), folder / f"data/s{i}.nii.gz")
    config = json.loads(json.dumps(CONFIG)) | {"autoencoder_def": request.param}
    config["autoencoder_train"] |= {"max_epochs": 4, "adversarial_weight": 0, "lr_schedule": "constant"}
    config["diffusion_train"] |= {"max_epochs": 2}
    files = chain.train_in(folder, config)
    inference.main([*files, "--num", "2", "--steps", "2"])
    return folder, files


def test_all_scripts_take_quantised_latents(project, capsys):
    folder, files = project
    lines = [json.loads(line) for line in (folder / "models/train_log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "perplexity" in str(line)]
    assert steps and "codes_used" in str(steps[0])
    evaluate.main(files)
    with pytest.raises(SystemExit):
        export_model.main([*files[:4], "--out", str(folder / "all")])
    assert "Leave the bundle out" in capsys.readouterr().err


def test_resume_is_exact(project):
    folder, files = project
    paths = json.loads((folder / "env.json").read_text()) | {"model_dir": str(folder / "again")}
    (folder / "again.json").write_text(json.dumps(paths))
    again = [*files[:3], str(folder / "again.json"), *files[4:], "--no-amp"]
    for epochs in (2, 4):
        train_autoencoder.main([*again, "--set", f"autoencoder_train.max_epochs={epochs}"])
    whole, parts = (
        torch.load(folder / where / "autoencoder_last.pt", weights_only=True)["model"]
        for where in ("models", "again")
    )
    assert all(torch.equal(whole[key], value) for key, value in parts.items())


def test_noise_on_quantised_latents_is_refused(project, capsys):
    _, files = project
    with pytest.raises(SystemExit):
        train_autoencoder.main([*files, "--no-amp", "--fresh", "--set", "autoencoder_train.latent_noise=0.5"])
    assert "latent_noise: quantised latents take none" in capsys.readouterr().err


def test_a_class_of_its_own():
    assert isinstance(instantiate(ROUNDED, NETWORKS, "here"), FSQ)
