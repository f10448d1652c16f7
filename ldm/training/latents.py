"""The latents that stage 2 trains on: encoded now, or read from a cache; and their scale factor."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ldm import UserError, configs
from ldm.data import latent_cache
from ldm.data.augmentation import augmentation
from ldm.data.cases import Case, typical_limits
from ldm.data.datasets import VolumeDataset, WithDraws, among, augmentation_rng, version_of
from ldm.data.extent import trained_geometry
from ldm.data.posteriors import Posteriors, encode_all
from ldm.data.prepare import data_folders, find_data
from ldm.data.splits import SPLIT, check_unchanged, left_out
from ldm.data.structures import structures_of
from ldm.diffusion import modality
from ldm.diffusion.conditioning import UNCONDITIONED, Conditions
from ldm.diffusion.coverage import INDICES
from ldm.models.autoencoder import Autoencoder, LatentMoments
from ldm.models.definitions import check_size, latent_size, network_divisor
from ldm.models.layers import on_device
from ldm.models.weights import load_weights
from ldm.system.checkpoints import load_checkpoint, weights_hash
from ldm.system.ranks import Run
from ldm.training.memory import GB

RIDGE = 0.01  # of the regression, as a share of the squares of each number


class WithNoise(WithDraws):
    """A data set whose items also hold `posterior_noise` and `noise`, (c, d, h, w) each, the `uniform`
    draw that a time is made of, and `cond`, which is dropped at random.

    Args:
        dataset: has `cases`, `versions`, and keys `(epoch, i)`.
        augment: the `augment` section of the config, whose parameters the network is told; None: none.
    """

    purpose = "diffusion"

    def __init__(
        self,
        dataset: Posteriors | VolumeDataset,
        shape: Sequence[int],
        seed: int,
        conditions: Conditions = UNCONDITIONED,
        augment: dict | None = None,
        shapes: Sequence[Sequence[int]] | None = None,
    ):
        super().__init__(dataset, shape, seed, shapes)
        self.conditions = conditions
        self.augmentation = self.versions = None
        if conditions.told and augment is not None:
            self.augmentation, self.versions = augmentation(augment, shape, False), dataset.versions

    def __getitem__(self, key: tuple[int, int]) -> dict:
        item = super().__getitem__(key)
        if self.augmentation:
            name = self.cases[key[1]].name
            version = version_of(self.seed, key[0], name, self.versions)
            parameters = self.augmentation.parameters(augmentation_rng(self.seed, version, name))
            item["cond"]["channels"] = self.conditions.tell(item["cond"]["channels"], parameters)
        if "start" in item and "channels" in item["cond"]:  # of `SliceWindows`
            end = item["start"] + self.shape[-1]
            item["cond"]["channels"] = item["cond"]["channels"][..., item["start"] : end]
        return item

    def draw(self, generator: torch.Generator, case: Case, shape: Sequence[int]) -> dict:
        posterior_noise, noise = (torch.randn(tuple(shape), generator=generator) for _ in range(2))
        uniform = torch.rand((), generator=generator)
        conditions = self.conditions if self.shapes is None else self.conditions.at(shape)
        # Last, so that a model with conditions has the noise and times of one without.
        cond = conditions.draw(case, generator)
        return {"posterior_noise": posterior_noise, "noise": noise, "uniform": uniform, "cond": cond}


@dataclass
class Latents:
    """What the diffusion model learns from.

    Attributes:
        train, val: posteriors; `train` serves images where each epoch has its own augmented versions.
        autoencoder: None where the posteriors come from a cache.
        autoencoder_hash: of its weights.
        shape: of the latents, (c, d, h, w).
        geometry: spacing, size and intensity limits of the volumes.
        shapes: of the latents of each training case, where they differ; `shape` is then the usual one.
    """

    train: Posteriors | VolumeDataset
    val: Posteriors
    autoencoder: Autoencoder | None
    autoencoder_hash: str
    shape: list[int]
    geometry: dict
    shapes: list[list[int]] | None = None

    @property
    def in_memory(self) -> bool:
        """Whether a loader has nothing to read or to make."""
        return self.autoencoder is not None and isinstance(self.train, Posteriors)

    @torch.no_grad()
    def posterior(self, batch: dict, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior mean and std of a batch, (B, c, d, h, w) each: as kept; or encoded now, for this step
        alone, in the precision of the training."""
        if "mean" in batch:
            return tuple(batch[key].to(run.device, non_blocking=True) for key in ("mean", "std"))
        with run.autocast():
            return self.autoencoder.encode(batch["image"].to(run.device, non_blocking=True))

    @torch.no_grad()
    def moments(self, run: Run) -> tuple[float, torch.Tensor | None, dict]:
        """What the latents of the whole training set are like, the same on every rank. Where volumes change
        from epoch to epoch, those of epoch 0 are measured.

        Returns:
            The scale factor, 1 / std (Rombach et al., 2022, appendix D.1), of the slices that are trained on;
            the mean, (c, d, h, w) float32 on the CPU, None of latents of several shapes; and, where only
            slices that are not empty are trained on, the `slices` that half of the volumes have something in:
            the first, and the one after the last.
        """
        moments, total = LatentMoments(), torch.zeros(self.shape, dtype=torch.float64)
        counts, known = torch.zeros(self.shape[-1]), torch.zeros(())
        for i in range(run.rank, len(self.train), run.world_size):
            item = self.train[(0, i)]
            mean, std = self.posterior(one_of(item), run)
            moments.add(mean[..., among(item)], std[..., among(item)])
            if self.shapes is None:
                total += mean[0].double().cpu()
            counts[among(item)] += 1
            known += "slices" in item
        filled = (2 * run.sum(counts) >= len(self.train)).nonzero().flatten().tolist()
        slices = {"slices": [filled[0], filled[-1] + 1]} if run.sum(known) else {}
        mean = (run.sum(total) / len(self.train)).float() if self.shapes is None else None
        return moments.scale_factor(run.sum), mean, slices

    @torch.no_grad()
    def regression(self, mean: torch.Tensor, deviations: torch.Tensor, run: Run) -> torch.Tensor:
        """What latents are expected under covariates: by ridge regression over the training set.

        Args:
            mean: of the latents, (c, d, h, w).
            deviations: of each volume's covariates from their mean, (volumes, n).

        Returns:
            (1 + n, c, d, h, w) float32: the mean, and its slope over each of the n numbers.
        """
        count = deviations.shape[1]
        products = torch.zeros(count, *self.shape, dtype=torch.float64)
        for i in range(run.rank, len(self.train), run.world_size):
            z = self.posterior(one_of(self.train[(0, i)]), run)[0][0].double().cpu() - mean.double()
            products += torch.tensordot(deviations[i].double(), z, 0)
        squares = deviations.double().T @ deviations.double()
        squares += torch.diag(RIDGE * squares.diagonal() + 1e-9)  # flags of the unknown have no squares
        slopes = torch.linalg.solve(squares, run.sum(products).flatten(1)).reshape(count, *self.shape)
        return torch.cat([mean[None], slopes.float()])


def one_of(item: dict) -> dict:
    """An item as a batch of one."""
    return {key: item[key][None] for key in ("image", "mean", "std") if key in item}


def load_autoencoder(
    path: Path, config: dict, run: Run, max_memory: float | None = None, checkpoint: dict | None = None
) -> Autoencoder:
    """The frozen autoencoder of stage 1, checked against the config in what both stages share.

    Args:
        max_memory: GB to encode and decode in; None: no limit.
        checkpoint: the content of the file, if it was read already.
    """
    checkpoint = checkpoint or load_checkpoint(path, "autoencoder")
    configs.check_fixed(checkpoint.get("config", config), config, configs.FIXED["autoencoder"], path)
    network = configs.define_network(config, "autoencoder_def")
    load_weights(network, checkpoint["model"], str(path))
    budget = None
    if max_memory:
        from ldm.lowmem.slabwise import Budget

        budget = Budget(max_memory * GB)
    return Autoencoder(on_device(network, run, True).eval().requires_grad_(False), budget)


def encode_data(
    config: dict, train: VolumeDataset, val: VolumeDataset, path: Path, resumed: dict | None, run: Run
) -> Latents:
    """Encode the training and held-out volumes with the autoencoder at `path`."""
    autoencoder, workers = load_autoencoder(path, config, run), config["data"]["num_workers"]
    weights = weights_hash(autoencoder.network.state_dict())
    check_same(resumed, weights, path)
    limits = run.from_main(lambda: typical_limits(train.preprocessing, train.cases))
    geometry = trained_geometry(train.cases, train.size, config["spacing"], limits)
    geometry |= run.from_main(lambda: structures_of(train.preprocessing, train.cases))
    val = encode_all(autoencoder, val, run, workers, "encode held-out")
    if train.versions is not None:
        train = encode_all(autoencoder, train, run, workers, "encode training")
    shape = [val.entries[0].shape[2], *latent_size(config, geometry["size"])]
    return Latents(train, val, autoencoder, weights, shape, geometry, shapes_of(config, train.cases, shape))


def shapes_of(config: dict, cases: Sequence[Case], shape: Sequence[int]) -> list[list[int]] | None:
    """The shape of the latents of each case, (c, d, h, w); None where all have the same."""
    if not any(case.size for case in cases):
        return None
    return [[shape[0], *latent_size(config, case.size)] for case in cases]


def read_cache(config: dict, environment: dict, path: Path, resumed: dict | None, run: Run) -> Latents:
    """The latents that cache_latents.py has written; no image is opened and no autoencoder built.

    Args:
        path: of the autoencoder's file, which may be missing.

    Raises:
        UserError: they are not those of this config, autoencoder and data.
    """
    folder, seed = environment["cache_dir"] / latent_cache.FOLDER, config["seed"]
    about = latent_cache.dependencies(config)
    manifest = latent_cache.open_cache(folder, about, path, run)
    weights = manifest["autoencoder"]["weights"]
    check_same(resumed, weights, path)

    def check() -> None:
        folders = data_folders(environment)
        where = ", ".join(map(str, folders))
        if all(one.exists() for one in folders):
            train, val = find_data(config, environment, run.print)
            section = config["conditions"]
            columns = [section["class_labels"], *section["covariates"]][section["class_labels"] is None :]
            columns = [name for name in columns if name not in section["structure_sizes"]]  # by the labels
            columns += [*INDICES] * section["region"] + [modality.NAME] * section["modality"]
            if others := latent_cache.check_data(folder, manifest, [*train, *val], columns):
                run.print(f"data: {left_out(others, where, folder / latent_cache.MANIFEST)}")
        else:
            run.print(f"data: {where} does not exist; training uses the latents in {folder} alone")
        latent_cache.check_split(folder, manifest, environment["model_dir"] / SPLIT)

    run.from_main(check)
    parts = latent_cache.posteriors(folder, manifest, seed)
    if resumed:
        check_unchanged(environment["model_dir"] / SPLIT, *(part.cases for part in parts), resumed)
    shape = manifest["latent_shape"]
    for size in {case.size for part in parts for case in part.cases if case.size}:
        check_size(size, network_divisor(config), f"{folder}: volumes of")
    shapes = shapes_of(config, parts[0].cases, shape)
    return Latents(*parts, None, weights, shape, manifest["geometry"], shapes)


def check_same(resumed: dict | None, weights: str, path: Path) -> None:
    """Raise UserError unless a training resumes with latents of the autoencoder that it began with."""
    if resumed and resumed.get("autoencoder") != weights:
        raise UserError(
            f"{resumed['path']}: was trained on the latents of another autoencoder than {path}. "
            "Name that one by --autoencoder, or start over with --fresh."
        )
