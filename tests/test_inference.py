"""Sampling with trained networks: the arithmetic, the seeds, the files, and weights from elsewhere."""

import contextlib
import io
import json

import chain
import nibabel as nib
import numpy as np
import pytest
import torch
from chain import Project, copy_of, fingerprint
from matplotlib.image import imread

import inference
import train_autoencoder
import train_diffusion

NETWORKS = ("autoencoder.pt", "diffusion_unet.pt", "split.json")
BETAS = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0195}


@pytest.fixture
def model(done, tmp_path) -> Project:
    """The chain's trained networks, and nothing drawn from them."""
    return copy_of(done, tmp_path / "model", *NETWORKS)


@pytest.fixture(scope="session")
def discrete(done, tmp_path_factory) -> Project:
    """The chain's autoencoder under a model that learns the noise of a beta schedule."""
    project = copy_of(done, tmp_path_factory.mktemp("discrete"), "autoencoder.pt", "split.json")
    project.change(NoiseScheduler=BETAS)
    project.run(train_diffusion, "--no-amp", "--set", "diffusion_train.max_epochs=3")
    return project


def volume(project: Project, seed: int) -> np.ndarray:
    """What was written for a seed, (C, D, H, W)."""
    voxels = nib.load(project.output_dir / f"sample_{seed:06d}.nii.gz").get_fdata()
    return voxels[None] if voxels.ndim == 3 else np.moveaxis(voxels, -1, 0)


def assert_alike(a: np.ndarray, b: np.ndarray, share: float = 1e-4) -> None:
    """Two volumes agree to this share of their range."""
    np.testing.assert_allclose(a, b, rtol=0, atol=share * (b.max() - b.min()))


# ---------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("seed", [0, 2])
def test_a_sample_is_noise_integrated_unscaled_decoded_and_in_typical_units(done, seed):
    assert_alike(volume(done, seed), chain.sample_by_hand(done, seed, steps=4))


def test_the_scale_factor_on_the_command_line_wins(model):
    model.run(inference, "--steps", "4", "--scale-factor", "2.5")
    assert_alike(volume(model, 0), chain.sample_by_hand(model, 0, steps=4, scale=2.5))


@torch.no_grad()
def ancestral(project: Project, seed: int, times: list[int], noisy: bool) -> torch.Tensor:
    """DDPM (`noisy`) or DDIM between the times visited, by the textbook's formulas in alpha and beta."""
    alphas = (1 - torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    checkpoint = project.checkpoint("diffusion_unet.pt")
    unet = project.network("diffusion_def", checkpoint["model"])
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(checkpoint["latent_shape"], generator=generator)[None]
    for t, following in zip(times, [*times[1:], -1], strict=True):
        now, then = float(alphas[t]), float(alphas[following]) if following >= 0 else 1.0
        noise = unet(z, timesteps=torch.tensor([float(t)]))
        z0 = (z - (1 - now) ** 0.5 * noise) / now**0.5
        if not noisy:
            z = then**0.5 * z0 + (1 - then) ** 0.5 * noise
            continue
        alpha = now / then
        z = (then**0.5 * (1 - alpha) * z0 + alpha**0.5 * (1 - then) * z) / (1 - now)
        if following >= 0:
            fresh = torch.randn(z.shape[1:], generator=generator)
            z = z + ((1 - then) / (1 - now) * (1 - alpha)) ** 0.5 * fresh
    return z


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_samplers_of_a_beta_schedule(discrete, sampler):
    discrete.set_environment(output_dir=str(discrete.folder / sampler))
    discrete.output_dir = discrete.folder / sampler
    discrete.run(inference, "--steps", "4", "--sampler", sampler, "--num", "3", "--batch-size", "2")
    for seed in (0, 1, 2):  # 1 shares its batch, 2 has one of its own
        z = ancestral(discrete, seed, [999, 666, 333, 0], noisy=sampler == "ddpm")
        assert_alike(volume(discrete, seed), chain.decode_by_hand(discrete, z))


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_sampler_that_does_not_fit_a_beta_schedule(discrete, sampler):
    message = discrete.refused(inference, "--sampler", sampler, "--seed", "50")
    assert f"--sampler {sampler}" in message and "ddim or pndm or ddpm" in message


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_sampler_that_does_not_fit_rectified_flow(model, sampler):
    message = model.refused(inference, "--sampler", sampler)
    assert f"--sampler {sampler}" in message and "euler" in message
    assert not model.output_dir.exists()


def test_default_steps(model, discrete):
    assert "sample (25 steps)" in stderr_of(model)
    discrete.set_environment(output_dir=str(discrete.folder / "default"))
    assert "sample (30 steps)" in stderr_of(discrete)


def stderr_of(project: Project) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as err:
        project.run(inference)
    return err.getvalue()


def test_more_steps_than_the_schedule_has(discrete):
    message = discrete.refused(inference, "--steps", "1001", "--seed", "60")
    assert "1001" in message and "1000" in message


def test_mixed_precision_stays_close(done, model, monkeypatch):
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    model.run(inference, "--steps", "4", "--amp")
    assert not np.array_equal(volume(model, 0), volume(done, 0))
    assert_alike(volume(model, 0), volume(done, 0), share=0.1)


# ---------------------------------------------------------------- seeds


def test_the_same_seed_gives_the_same_bytes(done, model):
    model.run(inference, "--steps", "4", "--seed", "1")
    (again,) = model.output_dir.glob("*.nii.gz")
    assert again.read_bytes() == (done.output_dir / again.name).read_bytes()


def test_another_seed_gives_another_volume(done):
    volumes = [volume(done, seed) for seed in (0, 1, 2)]
    for i in (1, 2):
        apart = np.abs(volumes[i] - volumes[i - 1]).mean()
        assert apart > 0.01 * (volumes[0].max() - volumes[0].min())


def test_the_batch_size_changes_nothing(done, model):
    model.run(inference, "--steps", "4", "--num", "3", "--batch-size", "3")
    for seed in (0, 1, 2):
        assert_alike(volume(model, seed), volume(done, seed))


# ---------------------------------------------------------------- files


def test_names_are_the_seeds(model):
    model.run(inference, "--steps", "1", "--seed", "41", "--num", "2")
    names = sorted(path.name for path in model.output_dir.iterdir())
    volumes = [f"sample_0000{seed}.{kind}" for seed in (41, 42) for kind in ("json", "nii.gz")]
    assert names == [*volumes, "samples.png"]


def test_nothing_is_overwritten(model):
    model.run(inference, "--steps", "1", "--seed", "1")
    before = fingerprint(model.folder)
    message = model.refused(inference, "--steps", "2", "--num", "3")
    assert "sample_000001.nii.gz" in message and "--seed" in message
    assert fingerprint(model.folder) == before


def test_a_volume_opens_anywhere(done):
    image = nib.load(done.output_dir / "sample_000001.nii.gz")
    assert image.shape == chain.SHAPE and image.get_data_dtype() == np.float32
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    np.testing.assert_allclose(image.header.get_zooms(), chain.SPACING)
    np.testing.assert_allclose(image.affine[:3, :3], np.diag(chain.SPACING))
    assert image.header.get_xyzt_units()[0] == "mm"
    centre = image.affine @ [*(np.array(chain.SHAPE) - 1) / 2, 1]
    np.testing.assert_allclose(centre, [0, 0, 0, 1], atol=1e-5)
    for form in (image.get_sform, image.get_qform):
        affine, code = form(coded=True)
        assert code > 0
        np.testing.assert_allclose(affine, image.affine, atol=1e-5)
    assert np.isfinite(image.get_fdata()).all()


def test_intensities_are_those_of_the_training_set(done):
    """The median of the training cases' ranges; the held-out ones, and the mean, would give another."""
    split, ranges = done.split(), {name: done.limits(name)[0, 1] for name in done.split()["training"]}
    typical = np.median(list(ranges.values()))
    assert typical != pytest.approx(np.mean(list(ranges.values())), rel=0.01)
    everything = [done.limits(name)[0, 1] for name in split["training"] + split["validation"]]
    assert typical != pytest.approx(np.median(everything), rel=0.01)
    (limits,) = done.checkpoint("diffusion_unet.pt")["geometry"]["limits"]
    assert limits[1] == pytest.approx(typical, rel=1e-5)
    assert 0.2 * typical < np.percentile(volume(done, 0), 99.5) < 2 * typical


def test_the_picture_shows_each_sample(model):
    model.run(inference, "--steps", "1", "--num", "2")
    picture = imread(model.output_dir / "samples.png")[..., :3].mean(-1)
    left, right = np.array_split(picture[:, : picture.shape[1] // 2 * 2], 2, axis=1)
    assert left.std() > 0.02 and right.std() > 0.02 and not np.array_equal(left, right)


def test_networks_are_only_read(done, model):
    before = fingerprint(model.model_dir)
    model.run(inference, "--steps", "1")
    assert fingerprint(model.model_dir) == before


# ---------------------------------------------------------------- wrong usage


@pytest.mark.parametrize(
    "option, value",
    [
        ("--num", 0),
        ("--steps", 0),
        ("--batch-size", 0),
        ("--seed", -1),
        ("--seed", 2**63),
        ("--scale-factor", "nan"),
        ("--scale-factor", 1e30),
        ("--steps", 10**7),
    ],
)
def test_numbers_that_make_no_sense(model, option, value):
    assert f"{option} {value}" in model.refused(inference, option, value)
    assert not model.output_dir.exists()


@pytest.mark.parametrize("name", ["autoencoder.pt", "diffusion_unet.pt"])
@pytest.mark.parametrize("damage", ["truncated", "overwritten", "missing", "foreign"])
def test_a_damaged_checkpoint_is_named_and_not_used(model, name, damage):
    path = model.model_dir / name
    if damage == "missing":
        path.unlink()
    elif damage == "foreign":
        path.write_text("no checkpoint")
    else:
        chain.damage(path, damage)
        if damage == "overwritten":
            torch.load(path, weights_only=True)  # which takes it without complaint
    assert str(path) in model.refused(inference)
    assert not model.output_dir.exists()


@pytest.mark.parametrize(
    "key, change, name",
    [
        ("autoencoder_def", "autoencoder_def.num_res_blocks=2", "autoencoder.pt"),
        ("diffusion_def", "diffusion_def.channels=[8,24]", "diffusion_unet.pt"),
        ("NoiseScheduler", "NoiseScheduler.schedule=cosine", "diffusion_unet.pt"),
    ],
)
def test_a_config_of_another_model_is_refused(model, key, change, name):
    message = model.refused(inference, "--set", change)
    assert key in message and str(model.model_dir / name) in message
    assert not model.output_dir.exists()


@pytest.mark.parametrize(
    "change, told",
    [
        ("spacing=[4,4,4]", "was trained with spacing [2.0, 1.5, 3.0]"),
        ("channel=1", "was trained with channel 0"),
        ("intensity.upper_percentile=95", "was trained with intensity.upper_percentile 99.5"),
        ("diffusion_train.patch_size=[12,16,8]", "makes volumes of [16, 20, 12] voxels"),
        ("seed=5", "has no effect here: give --seed"),
    ],
)
def test_what_the_model_decides_is_not_changed(model, change, told):
    """By --set, or by a config file, whose seed is that of the training."""
    assert told in model.refused(inference, "--set", change)
    key, value = change.split("=")
    section, _, last = key.rpartition(".")
    value = json.loads(value)
    model.change(**({section: {**model.config.get(section, {}), last: value}} if section else {key: value}))
    if key == "seed":
        model.run(inference, "--steps", "1")
    else:
        assert told in model.refused(inference) and str(model.config_file) in model.refused(inference)
        assert not model.output_dir.exists()


def test_what_is_set_without_effect_is_said(model):
    """Unless the model was trained with it, as where a demo hands its options to each script."""
    keys = (
        "diffusion_train.lr=1",
        "diffusion_train.sample_steps=9",
        "data.val_fraction=0.34",
        "spacing=null",
    )
    said = model.run(inference, "--steps", "1", *(word for key in keys for word in ("--set", key)))
    assert "note: --set diffusion_train.lr has no effect here\n" in said
    assert "diffusion_train.sample_steps has no effect here: give --steps" in said
    assert said.count("note:") == 2


# ---------------------------------------------------------------- weights from elsewhere


@pytest.fixture
def bare(done, tmp_path) -> Project:
    """Two bare state dicts, as the BraTS bundle releases them, and a config that says what to make."""
    project = copy_of(done, tmp_path / "bare")
    project.change(diffusion_train={**project.config["diffusion_train"], "patch_size": [12, 16, 8]})
    for name, source in (("model_autoencoder.pt", "autoencoder.pt"), ("model.pt", "diffusion_unet.pt")):
        torch.save(done.checkpoint(source)["model"], project.folder / name)
    return project


def bare_argv(project: Project) -> list[str]:
    files = ("--autoencoder", project.folder / "model_autoencoder.pt", "--unet", project.folder / "model.pt")
    return [*map(str, files), "--steps", "3", "--sampler", "euler"]


def test_bare_state_dicts_with_a_scale_factor(bare):
    bare.run(inference, *bare_argv(bare), "--scale-factor", "0.9")
    image = nib.load(bare.output_dir / "sample_000000.nii.gz")
    assert image.shape == (12, 16, 8)
    np.testing.assert_allclose(image.header.get_zooms(), chain.SPACING)
    with torch.no_grad():
        unet = bare.network("diffusion_def", torch.load(bare.folder / "model.pt"))
        autoencoder = bare.network("autoencoder_def", torch.load(bare.folder / "model_autoencoder.pt"))
        z = torch.randn([3, 6, 8, 4], generator=torch.Generator().manual_seed(0))[None]
        for t in (1000, 2000 / 3, 1000 / 3):
            z = z + unet(z, timesteps=torch.tensor([t])) / 3
        expected = autoencoder.decode(z / 0.9)[0].numpy()
    assert_alike(volume(bare, 0), expected)  # as decoded: the range of the data is not known


def test_bare_state_dicts_without_a_scale_factor(bare):
    message = bare.refused(inference, *bare_argv(bare))
    assert "--scale-factor" in message and str(bare.folder / "model.pt") in message
    assert not bare.output_dir.exists()


@pytest.mark.parametrize("missing", ["spacing", "diffusion_train.patch_size"])
def test_bare_state_dicts_without_a_size(bare, missing):
    message = bare.refused(inference, *bare_argv(bare), "--scale-factor", "0.9", "--set", f"{missing}=null")
    assert missing in message
    assert not bare.output_dir.exists()


def test_bare_state_dicts_of_a_size_that_does_not_fit(bare):
    """Multiples of 4: two levels in each network."""
    odd = ("--set", "diffusion_train.patch_size=[12,18,8]")
    message = bare.refused(inference, *bare_argv(bare), "--scale-factor", "0.9", *odd)
    assert "diffusion_train.patch_size" in message and "12 x 16 or 20 x 8" in message
    assert not bare.output_dir.exists()


def test_a_volume_that_is_not_finite_is_not_written(bare):
    """Each weight is finite, and what comes of them is not."""
    path = bare.folder / "model_autoencoder.pt"
    torch.save({name: weight * 1e30 for name, weight in torch.load(path).items()}, path)
    message = bare.refused(inference, *bare_argv(bare), "--scale-factor", "0.9", code=1)
    assert "seed 0 is not finite" in message and "docs/NaN_FIX_GUIDE.md" in message
    assert not list(bare.output_dir.glob("*.nii.gz")) and not list(bare.output_dir.glob("*.json"))


def test_bare_state_dicts_of_another_network(bare):
    message = bare.refused(
        inference, *bare_argv(bare), "--scale-factor", "1", "--set", "autoencoder_def.num_res_blocks=2"
    )
    assert str(bare.folder / "model_autoencoder.pt") in message


def test_networks_of_monai_generative_through_all_scripts(done, tmp_path):
    """Trained by its class names; an autoencoder that its own class wrote; and the same weights drawn from
    again by MONAI's classes, with the same result."""
    nets = pytest.importorskip("generative.networks.nets")
    project = copy_of(done, tmp_path / "generative", "split.json")
    for key, name in (("autoencoder_def", "AutoencoderKL"), ("diffusion_def", "DiffusionModelUNet")):
        definition = {**project.config[key], "_target_": f"generative.networks.nets.{name}"}
        definition["num_channels"] = definition.pop("channels")
        project.change(**{key: definition})
    betas = {"_target_": "generative.networks.schedulers.DDPMScheduler", "num_train_timesteps": 1000, **BETAS}
    project.change(NoiseScheduler=betas)
    once = ["--no-amp", "--set", "autoencoder_train.max_epochs=1", "--set", "diffusion_train.max_epochs=1"]

    project.run(train_autoencoder, *once)
    definition = project.checkpoint("autoencoder.pt")["config"]["autoencoder_def"]
    autoencoder = nets.AutoencoderKL(**{k: v for k, v in definition.items() if k != "_target_"})
    autoencoder.load_state_dict(project.checkpoint("autoencoder.pt")["model"])
    state = {name: value * 1.25 for name, value in autoencoder.state_dict().items()}  # to be told apart
    torch.save(state, project.folder / "model_autoencoder.pt")
    given = ["--autoencoder", str(project.folder / "model_autoencoder.pt")]

    project.run(train_diffusion, *given, *once)
    checkpoint = project.checkpoint("diffusion_unet.pt")
    torch.save({"model": state}, project.model_dir / "autoencoder.pt")
    assert checkpoint["scale_factor"] == pytest.approx(chain.scale_by_hand(project), rel=1e-4)
    project.run(inference, *given, "--steps", "3", *once[1:])
    z = ancestral(project, 0, [999, 500, 0], noisy=False)
    assert_alike(volume(project, 0), chain.decode_by_hand(project, z))

    torch.save(checkpoint["model"], project.folder / "model.pt")
    drawn, limits = volume(project, 0), checkpoint["geometry"]["limits"][0]
    project.change(
        **{key: done.config[key] for key in ("autoencoder_def", "diffusion_def")},
        NoiseScheduler=BETAS,
        diffusion_train={**project.config["diffusion_train"], "patch_size": list(chain.SHAPE)},
    )
    project.output_dir = project.folder / "monai"
    project.set_environment(output_dir=str(project.output_dir))
    given += ["--unet", str(project.folder / "model.pt"), "--scale-factor", str(checkpoint["scale_factor"])]
    project.run(inference, *given, "--steps", "3")
    assert_alike(volume(project, 0) * (limits[1] - limits[0]) + limits[0], drawn)
