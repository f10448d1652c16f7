"""Does a generated image fit its label? Structures that look wrong, and samples that are drawn again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ldm.data.datasets import stream
from ldm.data.structures import LEAST_VOXELS, medians
from ldm.metrics import dice

WIDTH = 4.0  # standard deviations of training's medians within which a median is usual
LEAST_STD = 0.02  # of the unit range, that training's medians are taken to have
LEAST_DICE = 0.5  # of the label with what a segmenter finds, mean of the structures


@dataclass(frozen=True)
class Check:
    """What a generated image is checked against.

    Args:
        usual: as of `ldm.data.structures.usual_medians`.
        segment: an image (1, C, D, H, W) in the unit range -> a label (D, H, W); None: no segmenter.
        known: the values that it finds.
    """

    usual: dict[str, list[list[float]]]
    segment: Callable[[torch.Tensor], np.ndarray] | None = None
    known: Sequence[int] = ()

    def faults(self, image: torch.Tensor, label: np.ndarray) -> list[str]:
        """What is wrong with an image (C, D, H, W) in the unit range of this label (D, H, W); [] where
        nothing is."""
        found, values = [], [int(value) for value in self.usual]
        measured = medians(image.numpy(), label, values)
        for value, row in zip(values, measured, strict=True):
            for channel, median in enumerate(row):
                mean, std = self.usual[str(value)][channel]
                width = WIDTH * max(std, LEAST_STD)
                if abs(median - mean) > width:  # never of NaN, a structure that is not there
                    where = f" in channel {channel}" if len(row) > 1 else ""
                    found.append(
                        f"label {value}: median {median:.2f}{where}, in scans {mean - width:.2f} to "
                        f"{mean + width:.2f}"
                    )
        if self.segment is not None:
            present = [value for value in self.known if (label == value).sum() >= LEAST_VOXELS]
            scores = dice(self.segment(image.clamp(0, 1)[None]), label, present)
            if present and np.mean(scores) < LEAST_DICE:
                found.append(f"the segmenter finds its label with Dice {np.mean(scores):.2f}")
        return found


def seed_again(seed: int, draw: int) -> int:
    """The seed of the noise of a sample's further draw, from 1 on; the first has the sample's own."""
    return stream(seed, "draw", draw).initial_seed()


def draw_until_fit(
    seed: int,
    sample: torch.Tensor,
    draw: Callable[[int], torch.Tensor],
    judge: Callable[[torch.Tensor], list[str]],
    tries: int,
) -> tuple[torch.Tensor, int, list[str]]:
    """Draw a sample again while something is wrong with it, until it was drawn `tries` times.

    Args:
        sample: its first draw.
        draw: the seed of the noise -> a sample.
        judge: what is wrong with a sample.

    Returns:
        The last draw, which it is, from 0, and what is wrong with it.
    """
    number = 0
    while (faults := judge(sample)) and number + 1 < tries:
        number += 1
        sample = draw(seed_again(seed, number))
    return sample, number, faults
