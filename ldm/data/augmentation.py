"""Random crops, flips and the like."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    RandAffine,
    RandFlip,
    RandScaleIntensity,
    RandShiftIntensity,
)

from ldm.data.preprocessing import crop_or_pad

AFFINE = ("rotate_degrees", "scale", "translate_voxels")  # maxima of what an affine change is made of


def augmentation(
    section: dict, size: Sequence[int], random_crop: bool, image_channels: int | None = None
) -> Callable | None:
    """Random crop, flips, small affine and intensity changes, in this order. None where nothing is random.

    Args:
        section: the config's `augment`, with its defaults.
        size: voxels of the crop.
        random_crop: crop at a random place, else about the centre.
        image_channels: how many of the channels are an image's; intensities of the others stay. None: all.

    Returns:
        `f(volume, label, rng)` -> (C, *size) float32 tensor; all random numbers are of `rng`.
    """
    steps = [RandFlip(section["flip_prob"], axis) for axis in section.get("flip_axes", [])]
    if any(section.get(key) for key in AFFINE):
        steps.append(
            RandAffine(
                prob=section["affine_prob"],
                rotate_range=[np.deg2rad(section["rotate_degrees"])] * 3,
                scale_range=[section["scale"]] * 3,
                translate_range=[section["translate_voxels"]] * 3,
                padding_mode="zeros",
            )
        )
    if section.get("intensity_scale"):
        steps.append(RandScaleIntensity(section["intensity_scale"], section["intensity_prob"]))
    if section.get("intensity_shift"):
        steps.append(RandShiftIntensity(section["intensity_shift"], prob=section["intensity_prob"]))
    if not steps and not random_crop:
        return None
    foreground_prob = section.get("foreground_prob", 0.0)
    return RandomCropAndAugment(tuple(size), random_crop, foreground_prob, Compose(steps), image_channels)


def count_parameters(section: dict) -> int:
    """How many numbers say what flips and affine change did to a volume."""
    return len(section.get("flip_axes", [])) + 3 * sum(bool(section.get(key)) for key in AFFINE)


@dataclass
class RandomCropAndAugment:
    """See `augmentation`. A class, so that loader processes on Windows can pickle it."""

    size: tuple[int, ...]
    random_crop: bool
    foreground_prob: float
    steps: Compose
    image_channels: int | None = None

    def __call__(
        self, volume: np.ndarray, label: np.ndarray | None, rng: np.random.RandomState
    ) -> torch.Tensor:
        self._seed_steps(rng)
        volume = self._crop(volume, label, rng) if self.random_crop else volume
        image = torch.from_numpy(np.array(crop_or_pad(volume, self.size), np.float32))
        for step in self.steps.transforms:
            if not isinstance(step, RandScaleIntensity | RandShiftIntensity):
                image = step(image)
            elif self.image_channels != 0:
                image[: self.image_channels] = step(image[: self.image_channels])
        return image.as_tensor() if isinstance(image, MetaTensor) else image

    def parameters(self, rng: np.random.RandomState) -> torch.Tensor:
        """What flips and affine change do to a volume that is augmented with the same `rng`, (n,) float32, as
        many as `count_parameters`: 1 for a flip, rotation, scale and shift as shares of their maxima; 0 is
        the volume as it was."""
        self._seed_steps(rng)
        values = []
        for step in self.steps.transforms:
            if isinstance(step, RandFlip):
                step.randomize(None)
                values.append(float(step._do_transform))
            elif isinstance(step, RandAffine):
                step.randomize()
                grid, changed = step.rand_affine_grid, step._do_transform
                grid.randomize()  # RandAffine draws its grid twice, and uses the second
                for name, ranges, neutral in (
                    ("rotate_params", grid.rotate_range, 0),
                    ("scale_params", grid.scale_range, 1),
                    ("translate_params", grid.translate_range, 0),
                ):
                    if ranges[0]:
                        drawn = getattr(grid, name) if changed else [neutral] * 3
                        values += [(value - neutral) / ranges[0] for value in drawn]
        return torch.tensor(values, dtype=torch.float32)

    def _seed_steps(self, rng: np.random.RandomState) -> None:
        """Give every step its own seed, so that the numbers one draws do not shift those of the next."""
        for step in self.steps.transforms:
            step.set_random_state(seed=int(rng.randint(2**31)))

    def _crop(self, volume: np.ndarray, label: np.ndarray | None, rng: np.random.RandomState) -> np.ndarray:
        room = np.maximum(np.array(volume.shape[1:]) - self.size, 0)
        start = np.array([rng.randint(r + 1) for r in room])
        if rng.rand() < self.foreground_prob:
            mask = label[0] > 0 if label is not None and label.any() else volume[0] > 0
            if len(inside := np.flatnonzero(mask)):  # not of an empty label map
                centre = np.array(np.unravel_index(inside[rng.randint(len(inside))], mask.shape))
                start = np.clip(centre - np.array(self.size) // 2, 0, room)
        end = start + self.size
        return volume[:, start[0] : end[0], start[1] : end[1], start[2] : end[2]]
