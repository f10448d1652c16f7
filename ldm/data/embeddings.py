"""Latents that MAISI's scripts have encoded: `NAME_emb.nii.gz` beside the image `NAME.nii.gz`, or in its
place in a list.

A file holds one draw from the posterior, (X, Y, Z, C) float32 along right, anterior and superior, not scaled.
It is taken as it is: as a posterior with this mean and a standard deviation of 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ldm import UserError, counted
from ldm.data.cases import Case
from ldm.data.names import stem_of
from ldm.data.reading import EMBEDDING, open_image, read_image


def embedding_beside(image: Path) -> Path:
    """Where MAISI's scripts put the embedding of an image."""
    return image.with_name(stem_of(image.name) + EMBEDDING)


def with_embeddings(cases: Sequence[Case]) -> list[Case]:
    """The cases with the embeddings that lie beside their images."""
    found = []
    for case in cases:
        beside = embedding_beside(case.images[0]) if len(case.images) == 1 else None
        take = case.embedding is None and beside is not None and beside.is_file()
        found.append(replace(case, embedding=beside) if take else case)
    return found


def check_embeddings(
    cases: Sequence[Case],
    channels: int,
    size_of: Callable[[Case], Sequence[int]],
    has_window: bool,
    forbidden: dict[str, bool],
    log: Callable[[str], None],
) -> None:
    """Check the headers of all embeddings before anything is encoded, and print how many there are.

    Args:
        channels: of the latents.
        size_of: a case -> (d, h, w) of its latents.
        has_window: whether intensities have a fixed window; else there must be images to measure.
        forbidden: keys of the config that embeddings cannot be used with, and whether they are set.

    Raises:
        UserError: one has another shape, a window is missing, or a forbidden key is set.
    """
    embedded = [case for case in cases if case.embedding]
    if key := next((key for key, is_set in forbidden.items() if is_set), None):
        raise UserError(
            f"{key}: {len(embedded)} of {counted(len(cases), 'case{s}')} have embeddings, which are 3D, of "
            "whole images as they are. Leave that key out, or the embeddings."
        )
    imageless = next((case for case in embedded if case.is_embedding), None)
    if imageless and not has_window:
        raise UserError(
            f"intensity.window: {imageless.embedding} is an embedding without an image to measure. Set the "
            "window that it was encoded with, such as [-1000, 1000]."
        )
    for case in embedded:
        found, size = tuple(map(int, open_image(case.embedding).shape)), tuple(size_of(case))
        if found != (*size, channels):
            raise UserError(
                f"{case.embedding}: shape {found}; the autoencoder of the config makes latents of {size} and "
                f"{channels} channels from volumes of this size. Check latent_channels, spacing and "
                "diffusion_train.patch_size."
            )
    log(f"data: {len(embedded)} of {len(cases)} volumes have embeddings, which are taken as they are")


def read_embedding(case: Case) -> torch.Tensor:
    """The embedding of a case as a posterior: (1, 2, c, d, h, w) float32, mean before std, which is 0.

    Raises:
        UserError: it cannot be read, or is not finite.
    """
    voxels = np.asanyarray(read_image(case.embedding).dataobj).astype(np.float32)
    if bad := voxels.size - np.count_nonzero(np.isfinite(voxels)):
        raise UserError(f"{case.embedding}: has {bad} voxels that are not finite. Encode it again.")
    mean = torch.from_numpy(np.ascontiguousarray(np.moveaxis(voxels, -1, 0)))
    return torch.stack([mean, torch.zeros_like(mean)])[None]
