"""The cache of latents: what it holds, that a training on it is the same to the bit, and what is refused."""

import json
import re
import shutil
from multiprocessing.reduction import ForkingPickler

import chain
import nibabel as nib
import numpy as np
import pytest
import torch
from chain import Project, copy_of, differences, fingerprint
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

import cache_latents
import train_diffusion
from ldm import UserError
from ldm.data import latent_cache, posteriors
from ldm.data.cases import Case
from ldm.data.posteriors import Posteriors
from ldm.system.checkpoints import save_checkpoint
from ldm.system.ranks import Run

CACHED = ("--no-amp", "--set", "diffusion_train.latent_cache=true")
FLIPS = ("--set", 'diffusion_train.augment={"flip_axes": [0, 1], "versions": 3}')


@pytest.fixture(scope="module")
def cached(done, tmp_path_factory) -> Project:
    """The chain's autoencoder and a cache of its latents. Look, but do not touch."""
    project = copy_of(done, tmp_path_factory.mktemp("cached"), "autoencoder.pt", "split.json")
    project.printed["cache"] = project.run(cache_latents, "--no-amp")
    return project


@pytest.fixture
def own(cached, tmp_path) -> Project:
    """A copy of it to use."""
    project = copy_of(cached, tmp_path / "own", "autoencoder.pt", "split.json")
    shutil.copytree(folder_of(cached), folder_of(project))
    return project


def folder_of(project: Project):
    return project.model_dir / "cache" / "latents"


def manifest_of(project: Project) -> dict:
    return json.loads((folder_of(project) / "manifest.json").read_text())


def test_entries_hold_mean_and_std_of_the_posterior(cached):
    autoencoder = cached.network("autoencoder_def", cached.checkpoint("autoencoder.pt")["model"])
    manifest = manifest_of(cached)
    assert [one["case"] for one in manifest["training"]] == cached.split()["training"]
    assert [one["case"] for one in manifest["validation"]] == cached.split()["validation"]
    for record in [*manifest["training"], *manifest["validation"]]:
        entry = np.load(folder_of(cached) / record["entry"])
        assert entry.shape == (1, 2, 3, 8, 10, 6) and entry.dtype == np.float32
        with torch.no_grad():
            posterior = autoencoder.encode(cached.normalised(record["case"]))
        for kept, expected in zip(entry[0], posterior, strict=True):
            np.testing.assert_allclose(kept, expected[0].numpy(), atol=1e-5)
    assert manifest["latent_shape"] == [3, 8, 10, 6]
    assert (
        "4 training volumes, 1 version(s) each, and of 2 held-out ones: 6 encoded, 0 found"
        in (cached.printed["cache"])
    )


def test_a_training_on_the_cache_is_the_same_to_the_bit(done, own):
    own.run(train_diffusion, *CACHED)
    for name in ("diffusion_unet.pt", "diffusion_unet_last.pt"):
        apart = differences(own.checkpoint(name), done.checkpoint(name))
        assert apart == [".config.diffusion_train.latent_cache"]


def test_a_training_on_the_cache_needs_neither_images_nor_autoencoder(done, own):
    (own.model_dir / "autoencoder.pt").unlink()
    own.set_environment(data_base_dir=str(own.folder / "nowhere"))
    own.config["diffusion_train"]["sample_interval"] = 5
    own.change()
    said = own.run(train_diffusion, *CACHED)
    assert "nowhere does not exist; training uses the latents in" in said
    assert "no samples are drawn during training" in said
    a, b = (one.checkpoint("diffusion_unet_last.pt") for one in (own, done))
    assert not differences(a["model"], b["model"]) and a["geometry"] == b["geometry"]


def test_versions_are_the_augmented_volumes_and_a_training_on_them_is_the_same(done, tmp_path):
    runs = {}
    for name, flags in (("live", ("--no-amp",)), ("cached", CACHED)):
        project = copy_of(done, tmp_path / name, "autoencoder.pt", "split.json")
        if flags is CACHED:
            assert "3 version(s) each" in project.run(cache_latents, "--no-amp", *FLIPS)
        project.run(train_diffusion, *flags, *FLIPS, "--set", "diffusion_train.max_epochs=4")
        runs[name] = project
    a, b = (one.checkpoint("diffusion_unet_last.pt") for one in runs.values())
    assert differences(a, b) == [".config.diffusion_train.latent_cache"]

    autoencoder = done.network("autoencoder_def", done.checkpoint("autoencoder.pt")["model"])
    folder, manifest, flipped = folder_of(runs["cached"]), manifest_of(runs["cached"]), 0
    for record in manifest["training"]:
        image = done.normalised(record["case"])
        ways = [image, image.flip(2), image.flip(3), image.flip(2, 3)]
        with torch.no_grad():
            expected = [autoencoder.encode(way)[0][0].numpy() for way in ways]
        for mean, _ in np.load(folder / record["entry"]):
            close = [np.abs(mean - one).max() < 1e-5 for one in expected]
            assert sum(close) == 1
            flipped += not close[0]
    assert 0 < flipped < 12
    assert all(len(np.load(folder / record["entry"])) == 1 for record in manifest["validation"])


def test_each_version_has_its_turn(tmp_path):
    """Entries that tell their version, in memory and on disk, with and without loader processes."""
    entry = torch.arange(3.0).reshape(3, 1, 1, 1, 1, 1).expand(3, 2, 1, 2, 2, 2).contiguous()
    np.save(tmp_path / "entry.npy", entry.numpy())
    cases = [Case("a", ()), Case("b", ())]
    for entries in ([entry, entry], [tmp_path / "entry.npy"] * 2):
        dataset = Posteriors(cases, entries, seed=0)
        for i in range(2):
            seen = [dataset[(epoch, i)]["mean"].unique().item() for epoch in range(6)]
            assert seen[:3] == seen[3:] and sorted(seen[:3]) == [0, 1, 2]
        keys = [[(epoch, 0), (epoch, 1)] for epoch in range(3)]
        loaded = [list(DataLoader(dataset, batch_sampler=keys, num_workers=n)) for n in (0, 1)]
        for a, b in zip(*loaded, strict=True):
            assert torch.equal(a["mean"], b["mean"]) and torch.equal(a["std"], b["std"])


class Volumes:
    """Three volumes in two versions."""

    cases, versions, seed, find_slices = [Case(name, ()) for name in "abc"], 2, 0, False

    def __len__(self) -> int:
        return 3

    def size_of(self, i: int) -> tuple[int, ...]:
        return 64, 64, 32

    def image(self, i: int, version: int) -> torch.Tensor:
        return torch.rand(1, 64, 64, 32, generator=torch.Generator().manual_seed(10 * i + version))


class Encoder:
    """An encoder of one convolution, which notes whether TF32 is allowed."""

    def __init__(self):
        torch.manual_seed(0)
        self.layer, self.tf32 = torch.nn.Conv3d(1, 2, 3, padding=1), []

    def encode(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.tf32 += [backend.allow_tf32 for backend in (torch.backends.cuda.matmul, torch.backends.cudnn)]
        return self.layer(image).float().chunk(2, 1)


@pytest.fixture
def tf32():
    """Allowed, as in a training on a GPU."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = True
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


@pytest.mark.usefixtures("tf32")
def test_what_is_kept_is_encoded_in_float32_whatever_the_training_has():
    half, full = (Run(0, 1, torch.device("cpu"), amp) for amp in (torch.bfloat16, None))
    encoder = Encoder()
    a, b = (posteriors.encode_all(encoder, Volumes(), run, 0, "encode") for run in (half, full))
    assert torch.equal(a.entries, b.entries) and a.entries.shape == (3, 2, 2, 1, 64, 64, 32)
    assert not any(encoder.tf32) and torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32
    with torch.no_grad():
        mean, std = encoder.encode(Volumes().image(2, 1)[None])
    assert torch.equal(a.entries[2, 1], torch.stack([mean[0], std[0]]))


def test_latents_in_memory_are_pickled_to_no_rank_and_no_loader_process(monkeypatch):
    """A loader process that is spawned, as on Windows, is told where they lie."""
    gathered = []
    monkeypatch.setattr(Run, "gather", lambda self, value: gathered.append(value) or [value])
    encoded = posteriors.encode_all(Encoder(), Volumes(), Run(0, 1, torch.device("cpu")), 0, "encode")
    assert not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(gathered))
    assert encoded.entries.nbytes > 1e6 and len(ForkingPickler.dumps(encoded)) < 10_000


# ---------------------------------------------------------------- resuming


def test_an_interrupted_cache_goes_on(cached, own, monkeypatch):
    shutil.rmtree(folder_of(own))
    real = posteriors.encode

    def until_the_third(*args):
        for k, one in enumerate(real(*args)):
            if k == 2:
                raise KeyboardInterrupt
            yield one

    monkeypatch.setattr(latent_cache, "encode", until_the_third)
    with pytest.raises(SystemExit) as stop:
        own.run(cache_latents, "--no-amp")
    assert stop.value.code == 130
    monkeypatch.undo()
    assert "the cache is unfinished" in own.refused(train_diffusion, *CACHED)
    assert "4 encoded, 2 found" in own.run(cache_latents, "--no-amp")
    assert fingerprint(folder_of(own)) == fingerprint(folder_of(cached))


def test_a_damaged_entry_of_an_unfinished_cache_is_made_anew(cached, own):
    """Whose manifest does not hold its hash yet."""
    manifest = manifest_of(own)
    path = folder_of(own) / manifest["training"][0]["entry"]
    chain.damage(path, "truncated")
    begun = {key: manifest[key] for key in ("about", "autoencoder")}
    (folder_of(own) / "manifest.json").write_text(json.dumps(begun))
    assert "1 encoded, 5 found" in own.run(cache_latents, "--no-amp")
    assert fingerprint(folder_of(own)) == fingerprint(folder_of(cached))


def test_a_finished_cache_is_left_as_it_is(own):
    before = fingerprint(folder_of(own))
    assert "0 encoded, 6 found" in own.run(cache_latents, "--no-amp")
    assert fingerprint(folder_of(own)) == before


@pytest.mark.parametrize("how", ["gone", "empty", "bits"])
def test_a_damaged_entry_is_found_and_made_anew(cached, own, how):
    path = folder_of(own) / manifest_of(own)["training"][1]["entry"]
    if how in ("gone", "empty"):
        path.unlink() if how == "gone" else path.write_bytes(b"")
    else:
        chain.damage(path, how)
    message = own.refused(train_diffusion, *CACHED)
    assert "1 of 6 entries are missing or damaged" in message and path.name in message
    assert "1 encoded, 5 found" in own.run(cache_latents, "--no-amp")
    assert fingerprint(folder_of(own)) == fingerprint(folder_of(cached))


# ---------------------------------------------------------------- a cache of something else


def test_a_cache_of_another_autoencoder_is_refused(own):
    content = own.checkpoint("autoencoder.pt")
    save_checkpoint(own.model_dir / "autoencoder.pt", content)  # the same weights in other bytes
    own.run(train_diffusion, *CACHED, "--set", "diffusion_train.max_epochs=1")
    next(iter(content["model"].values())).mul_(1.01)
    save_checkpoint(own.model_dir / "autoencoder.pt", content)
    before = fingerprint(folder_of(own))
    for script, flags in ((train_diffusion, (*CACHED, "--fresh")), (cache_latents, ("--no-amp",))):
        message = own.refused(script, *flags)
        assert "another autoencoder" in message and "cache_latents.py --fresh" in message
    assert fingerprint(folder_of(own)) == before
    assert "6 encoded, 0 found" in own.run(cache_latents, "--no-amp", "--fresh")
    assert len(list(folder_of(own).glob("*.npy"))) == 6  # the old ones are gone
    short = ("--set", "diffusion_train.max_epochs=1", "--set", "diffusion_train.sample_interval=5")
    own.run(train_diffusion, *CACHED, "--fresh", *short)
    assert (own.model_dir / "samples" / "epoch_00001.png").stat().st_size  # drawn with a cache too


def test_a_cache_of_other_transforms_is_refused(cached):
    """By any key that the latents follow from; a training names it."""
    flags = ("--set", "diffusion_train.patch_size=[16, 20, 16]")
    message = cached.refused(train_diffusion, *CACHED, *flags)
    assert "diffusion_train.patch_size null; here it is" in message and "cache_latents.py --fresh" in message
    about = manifest_of(cached)["about"]
    assert {"seed", "intensity", "spacing", "channel", "autoencoder_def"} < set(about)
    assert {"diffusion_train.augment", "data.val_fraction", "data.pattern"} < set(about)
    for key, value in about.items():
        with pytest.raises(UserError, match=rf"were made with {re.escape(key)} .*; here it is"):
            now = {**about, key: [value]}
            latent_cache.open_cache(
                folder_of(cached), now, cached.folder / "gone.pt", Run(0, 1, torch.device("cpu"))
            )


def test_a_cache_that_does_not_say_its_precision_is_refused(own):
    """Those of before were made in bfloat16 where the machine had it."""
    manifest = manifest_of(own)
    assert manifest["about"].pop("precision") == "float32"
    (folder_of(own) / "manifest.json").write_text(json.dumps(manifest))
    for script, flags in ((train_diffusion, CACHED), (cache_latents, ())):
        assert own.refused(script, *flags) == (
            f"error: {folder_of(own)}: the latents there were made with precision unknown; here it is "
            '"float32". Run cache_latents.py --fresh, or choose another cache_dir in the '
            "environment file."
        )
    assert own.refused(cache_latents, "--amp") == (
        "error: --amp: latents that are kept are encoded in float32; leave it out."
    )


def test_a_cache_of_other_data_is_refused_and_what_changed_is_made(own):
    data = own.folder / "data"
    shutil.copytree(own.data, data)
    own.data = data
    own.set_environment()
    path = data / "imagesTr" / "scan_2.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(image.get_fdata().astype(np.float32) ** 2, image.affine), path)
    assert "1 case changed: scan_2" in own.refused(train_diffusion, *CACHED)
    assert "1 encoded, 5 found" in own.run(cache_latents, "--no-amp")
    listed = json.loads((data / "dataset.json").read_text())
    last = listed["training"].pop()
    (data / "dataset.json").write_text(json.dumps(listed))
    assert "1 case not found among the data: scan_5. Put them back" in own.refused(train_diffusion, *CACHED)
    listed["training"] += [last, {"name": "new", "image": "imagesTr/new.nii.gz"}]
    (data / "dataset.json").write_text(json.dumps(listed))
    said = own.run(train_diffusion, *CACHED, "--set", "diffusion_train.max_epochs=1")
    assert "1 scan in" in said and "left out: new" in said


def test_a_cache_of_another_split_is_refused(own):
    split = own.split()
    split["training"][0], split["validation"][0] = split["validation"][0], split["training"][0]
    (own.model_dir / "split.json").write_text(json.dumps(split))
    assert "were made for another split" in own.refused(train_diffusion, *CACHED)
    shutil.rmtree(folder_of(own))
    assert "no cache of latents. Run cache_latents.py" in own.refused(train_diffusion, *CACHED)


def test_augmentation_without_end_cannot_be_cached(own):
    augment = json.dumps({"flip_axes": [0]})
    message = own.refused(cache_latents, "--set", f"diffusion_train.augment={augment}")
    assert "augment.versions" in message


@pytest.mark.parametrize(
    "key, value",
    [
        (("training",), []),
        (("training",), "scan_0"),
        (("training", 0, "entry"), 3),
        (("versions",), 0),
        (("latent_shape",), [3, 8]),
        (("geometry", "limits"), None),
        (("geometry", "spacing"), [1, 1, -1]),
        (("autoencoder",), {}),
        (("about",), None),
    ],
)
def test_a_manifest_that_is_none_is_refused(cached, tmp_path, key, value):
    section = manifest = manifest_of(cached)
    for part in key[:-1]:
        section = section[part]
    section[key[-1]] = value
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json: .* Make the cache again"):
        latent_cache.open_cache(tmp_path, {}, tmp_path / "gone.pt", Run(0, 1, torch.device("cpu")))
