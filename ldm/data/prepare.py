"""From a config and an environment file to the cases, sizes and data sets of a training.

`prepare_data` finds the cases, checks them and splits them as `model_dir/split.json` says. Where the config
leaves the spacing open, the data decide it; the caller puts it into the config:

    train, val, spacing = prepare_data(config, environment, run)
    config = configs.with_spacing(config, spacing)
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ldm import UserError, configs, few
from ldm.data import splits
from ldm.data.cases import Case, choose_spacing, volume_size, warn_of_padding
from ldm.data.datasets import SliceWindows, VolumeDataset
from ldm.data.download import fetch_task01
from ldm.data.embeddings import check_embeddings, with_embeddings
from ldm.data.extent import largest_size, usual_spacing, with_own_extent
from ldm.data.intensity import Intensity
from ldm.data.label_names import label_names
from ldm.data.labels import check_labelled, with_sizes
from ldm.data.layouts import find_cases
from ldm.data.names import words_of
from ldm.data.posteriors import Posteriors
from ldm.data.preprocessing import Preprocessing
from ldm.data.reading import EMBEDDING, by_times
from ldm.environment import FOLDERS
from ldm.models.definitions import check_size, downsampling_factor, latent_size, network_divisor
from ldm.system.checkpoints import load_checkpoint
from ldm.system.ranks import Run

STAGES = ("autoencoder_train", "diffusion_train")


def own_folders(environment: dict) -> list[Path]:
    """The folders that the scripts write to. Images in them are not data."""
    return [environment[key] for key in FOLDERS]


def data_folders(environment: dict) -> list[Path]:
    """The data folder, or several."""
    base = environment["data_base_dir"]
    return base if isinstance(base, list) else [base]


def find_data(
    config: dict, environment: dict, log: Callable[[str], None] | None = None
) -> tuple[list[Case], list[Case]]:
    """The cases that `data_base_dir` and the config's section `data` name, as `find_cases` gives them,
    without volumes that this run or inference.py wrote; with the embeddings beside the images, where
    `data.embeddings` says so."""
    data = config["data"]
    found = find_cases(
        environment["data_base_dir"],
        data["pattern"],
        contrasts=data["contrasts"],
        subject=data["subject"],
        outputs=own_folders(environment),
        generated=False,
        lists=environment.get("json_data_list"),
        label_maps=config["with_labels"] == configs.ONLY,
        log=log,
    )
    if data["embeddings"] and config["with_labels"] != configs.ONLY:
        found = tuple(map(with_embeddings, found))
        if not any(case.embedding for cases in found for case in cases):
            where = ", ".join(map(str, data_folders(environment)))
            raise UserError(f"data.embeddings: {where}: no NAME{EMBEDDING} lies beside an image NAME.nii.gz.")
    return found


def prepare_data(
    config: dict,
    environment: dict,
    run: Run,
    skip_bad: bool = False,
    for_training: bool = True,
    resumed: dict | None = None,
    autoencoder: Path | None = None,
    known: dict | None = None,
    test: bool = False,
    labels: bool = False,
) -> tuple[list[Case], list[Case], list[float]]:
    """Find the cases and split them as `model_dir/split.json` says; where it is missing, make and write it.

    With a `split.json`, its cases are those of the run: others are left out and named. A training ends where
    one of its cases is missing or bad; else that case is left out and named, too.

    Args:
        skip_bad: read every voxel first. Where the split is made, leave out bad cases and list them in
            `model_dir/skipped.json`. Without it only headers are read, and a bad one ends the training.
        for_training: if False, nothing is written or downloaded.
        resumed: the checkpoint that is resumed.
        autoencoder: the file of stage 1's weights. Where the split is made, cases that the autoencoder was
            not trained on are held out.
        known: the `subjects` in that file, if it was read already.
        test: as of `ldm.data.splits.Splitter`.
        labels: check labels too, as is done where the config uses them.

    Returns:
        Training cases, validation cases, and the spacing in mm: the config's, or where it leaves it open,
        that of `choose_spacing`. With `data.own_spacing` and `data.sizes` the cases have spacing and size of
        their own; the spacing is then the usual one.

    Raises:
        UserError: no data, bad data, or a held-out case that was trained on.
    """
    base = environment["data_base_dir"]
    if environment["download_brats"] and for_training:
        if isinstance(base, list):
            raise UserError("download_brats: data_base_dir should be one folder, not a list.")

        def download() -> None:
            fetch_task01(base)

        run.from_main(download)
    found = find_data(config, environment, run.print)
    sizes = config["conditions"]["structure_sizes"]

    def divide() -> splits.Sides:
        subjects = known
        if subjects is None and autoencoder and autoencoder.is_file():
            subjects = load_checkpoint(autoencoder).get("subjects")
        stages = [config[stage] for stage in STAGES]
        # Else they are not read.
        used = labels or sizes or config["with_labels"]
        used = bool(used) or any(one["augment"]["foreground_prob"] for one in stages)
        where = ", ".join(map(str, data_folders(environment)))
        path, data = environment["model_dir"] / splits.SPLIT, config["data"]
        splitter = splits.Splitter(path, where, for_training, run.print, data, test)
        sides = splitter.without_bad(
            *splitter.select(*found),
            configs.channels_of(config),
            Intensity.from_config(config),
            used,
            skip_bad,
        )
        sides = splitter.divide(*sides, config["seed"], resumed, autoencoder, subjects)
        if not sizes:
            return sides
        measured = with_sizes([*sides[0], *sides[1]], sizes)
        return measured[: len(sides[0])], measured[len(sides[0]) :]

    train, val = run.from_main(divide)
    if config["with_labels"]:
        check_labelled([*train, *val], "with_labels")  # label maps are their own labels
        warn_of_sides([config[stage] for stage in STAGES], train, run)
    if splits.is_single_subject(train, val):
        run.print(
            f"warning: a single subject ({train[0].subject}): it is trained on and is its own validation."
        )
    choose = usual_spacing if config["data"]["own_spacing"] else choose_spacing
    spacing = config["spacing"] or choose(train, config["longest_side"])
    divisor = network_divisor(config)
    train, val = (with_own_extent(config, cases, spacing, divisor) for cases in (train, val))
    run.print(f"data: {len(train)} training and {len(val)} validation cases, {_extent(train, spacing)}")
    return train, val, spacing


def _extent(cases: Sequence[Case], spacing: Sequence[float]) -> str:
    """The spacing and the sizes of cases in words; sizes where they have their own."""
    text = f"spacing {list(spacing)} mm"
    if cases[0].spacing:
        spacings = np.array([case.spacing for case in cases])
        text = f"spacings from {by_times(spacings.min(0))} to {by_times(spacings.max(0))} mm"
    if cases[0].size:
        counts = Counter(case.size for case in cases).most_common()
        text += "; sizes " + few([f"{by_times(size)} ({count})" for size, count in counts], 8)
    return text


def warn_of_sides(sections: Sequence[dict], cases: Sequence[Case], run: Run) -> None:
    """Print one line where sections of the config mirror volumes left to right, and labels name a side."""
    flips = any(0 in section["augment"]["flip_axes"] for section in sections)
    sides = [name for name in label_names(cases).values() if {"left", "right"} & {*words_of(name)}]
    if flips and sides:
        run.print(
            f"warning: volumes are mirrored left to right, and so are labels such as {sides[0]}: a left one "
            "is drawn on the right. Set flip_axes of both stages' augment to []"
        )


def volumes_to_encode(
    config: dict,
    environment: dict,
    train: Sequence[Case],
    val: Sequence[Case],
    run: Run,
    augment: dict | None = None,
) -> tuple[VolumeDataset, VolumeDataset]:
    """The training and validation volumes that stage 2 encodes, as images. `augment` is another stage's.

    Raises:
        UserError: as `patch_sizes`; or embeddings that do not fit.
    """
    _, size, _ = patch_sizes(config, [*train, *val])
    preprocessing, augment = (
        Preprocessing.from_config(config),
        augment or config["diffusion_train"]["augment"],
    )
    cache_rate, seed = config["data"]["cache_rate"], config["seed"]
    common = {"cache_dir": environment["cache_dir"], "cache_rate": cache_rate, "seed": seed}
    common |= {"find_slices": config["slices"]["foreground"], "own_sizes": True}
    if not config["data"]["sizes"]:
        warn_of_padding(train, config["spacing"], size, run.print)
    volumes = (
        VolumeDataset(train, preprocessing, size, augment=augment, **common),
        VolumeDataset(val, preprocessing, size, **common),
    )
    cases = [*train, *val]
    if any(case.embedding for case in cases):
        check_embeddings(
            cases,
            config["diffusion_def"]["out_channels"],
            lambda case: latent_size(config, case.size or size),
            has_window=preprocessing.intensity.window is not None,
            forbidden={
                "augment": volumes[0].augmentation is not None,
                "with_labels": config["with_labels"],
                "spatial_dims": config["spatial_dims"] != 3,
            },
            log=run.print,
        )
    return volumes


def patch_sizes(config: dict, cases: Sequence[Case]) -> tuple[list[int], list[int], list[int]]:
    """Sizes in voxels of stage 1's patches in training, of the volumes that stage 2 encodes, and of those
    that stage 1 is validated on. The first two, where the config leaves them open, are the size that holds
    every volume; the third is then the second. Where volumes have sizes of their own, they are the largest.

    Raises:
        UserError: a size that the networks cannot take; the nearest that they can are named.
    """
    first, second, sizes = config["autoencoder_train"], config["diffusion_train"], config["data"]["sizes"]
    patch, volume, val_patch = first["patch_size"], second["patch_size"], first["val_patch_size"]
    if sizes:
        volume = largest_size(cases, (1, 1, 1)) if sizes == "own" else max(sizes, key=math.prod)
        # Stage 1 trains on patches of one size, which should hold every volume.
        patch = patch or np.max([case.size or volume for case in cases], axis=0).tolist()
    if not (patch and volume):
        whole = volume_size(cases, config["spacing"], network_divisor(config))
        check_size(whole, [1] * len(whole), f"spacing {config['spacing']}: volumes of")
        patch, volume = patch or whole, volume or whole
    val_patch, factor = val_patch or volume, downsampling_factor(config["autoencoder_def"])
    check_size(volume, network_divisor(config), "diffusion_train.patch_size")
    check_size(patch, factor, "autoencoder_train.patch_size")
    check_size(val_patch, factor, "autoencoder_train.val_patch_size")
    return patch, volume, val_patch


def step_size(config: dict, size: Sequence[int]) -> list[int]:
    """The part of volumes or latents (..., d, h, w) of this size that a training step sees: of 2D networks
    `slices.per_volume` slices, where the config says so.

    Raises:
        UserError: the volumes have fewer slices.
    """
    count = config["slices"]["per_volume"]
    if count is None:
        return list(size)
    if count > size[-1]:
        raise UserError(f"slices.per_volume: expected at most {size[-1]}, as volumes have; found {count}.")
    return [*size[:-1], count]


def in_steps(config: dict, dataset: VolumeDataset | Posteriors) -> VolumeDataset | Posteriors | SliceWindows:
    """The data set whose items are what a training step sees, see `step_size`."""
    count = config["slices"]["per_volume"]
    return dataset if count is None else SliceWindows(dataset, count, config["seed"])
