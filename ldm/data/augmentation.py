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


def augmentation(section: dict, size: Sequence[int], random_crop: bool) -> Callable | None:
    """Random crop, flips, small affine and intensity changes, in this order. None where nothing is random.

    Args:
        section: the config's `augment`, with its defaults.
        size: voxels of the crop.
        random_crop: crop at a random place, else about the centre.

    Returns:
        `f(volume, label, rng)` -> (C, *size) float32 tensor; all random numbers are of `rng`.
    """
    steps = [RandFlip(section["flip_prob"], axis) for axis in section.get("flip_axes", [])]
    if section.get("rotate_degrees") or section.get("scale") or section.get("translate_voxels"):
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
    return RandomCropAndAugment(tuple(size), random_crop, section.get("foreground_prob", 0.0), Compose(steps))


@dataclass
class RandomCropAndAugment:
    """See `augmentation`. A class, so that loader processes on Windows can pickle it."""

    size: tuple[int, ...]
    random_crop: bool
    foreground_prob: float
    steps: Compose

    def __call__(
        self, volume: np.ndarray, label: np.ndarray | None, rng: np.random.RandomState
    ) -> torch.Tensor:
        volume = self._crop(volume, label, rng) if self.random_crop else volume
        image = torch.from_numpy(np.array(crop_or_pad(volume, self.size), np.float32))
        # Every step has its own seed, so that the numbers one draws do not shift those of the next.
        for step in self.steps.transforms:
            image = step.set_random_state(seed=int(rng.randint(2**31)))(image)
        return image.as_tensor() if isinstance(image, MetaTensor) else image

    def _crop(self, volume: np.ndarray, label: np.ndarray | None, rng: np.random.RandomState) -> np.ndarray:
        room = np.maximum(np.array(volume.shape[1:]) - self.size, 0)
        start = np.array([rng.randint(r + 1) for r in room])
        if rng.rand() < self.foreground_prob:
            mask = label[0] > 0 if label is not None and label.any() else volume[0] > 0
            inside = np.flatnonzero(mask)
            centre = np.array(np.unravel_index(inside[rng.randint(len(inside))], mask.shape))
            start = np.clip(centre - np.array(self.size) // 2, 0, room)
        end = start + self.size
        return volume[:, start[0] : end[0], start[1] : end[1], start[2] : end[2]]
