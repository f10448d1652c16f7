"""Masks among scans, known by what they hold, whatever their names: few whole numbers, in patches."""

import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ldm import UserError
from ldm.data.cases import Case
from ldm.data.reading import read_image

MOST_VALUES = 128  # distinct values of a mask at most: the fullest label maps of a body have about 120
PATCHES = 0.5  # of neighbours in the foreground that have one value: 0.75 and more in masks, 0.1 in scans
LEAST_BYTES = 2**16  # of a file's voxels; the compression of smaller files says nothing
GZIP_RATIO = 1032  # the highest compression that gzip can reach
SCANS = 8  # after so many well-compressed files that are scans, the search ends


def mask_values(voxels: np.ndarray) -> int:
    """How many values a mask holds: 2 to `MOST_VALUES` whole numbers in patches, so that most neighbours in
    the foreground are equal; 0 if the voxels, (D, H, W) or with channels last, are no mask."""
    flat = voxels.ravel()
    for some in (flat[:: max(1, flat.size // 10**4)], flat):  # a few voxels show most scans
        values = np.unique(some)
        if len(values) > MOST_VALUES or not np.array_equal(values, np.rint(values)):
            return 0
    if len(values) < 2:
        return 0
    same = pairs = 0
    for axis in range(3):
        along = np.moveaxis(voxels, axis, 0)
        foreground = along[:-1] != values[0]
        same += np.count_nonzero(foreground & (along[:-1] == along[1:]))
        pairs += np.count_nonzero(foreground)
    return len(values) if pairs and same / pairs > PATCHES else 0


def masks_among(cases: Sequence[Case]) -> list[tuple[Case, Path, int]]:
    """Images that are masks where others are scans, each with its case and its number of values.

    A mask compresses far better than a scan. Only such files are read, the best first, until `SCANS` prove to
    be scans: a good data set costs a look at the end or the middle of each file.
    """
    files = [(case, file) for case in cases for file in case.images]
    with ThreadPoolExecutor(8) as pool:
        shares = list(pool.map(_compressed_share, [file for _, file in files]))
    known = sorted((share, i) for i, share in enumerate(shares) if share is not None)

    def values_of(i: int) -> int:
        try:
            return mask_values(np.asanyarray(read_image(files[i][1]).dataobj))
        except UserError:  # reported when every voxel is read
            return 0

    if not known or values_of(known[-1][1]):
        return []
    masks, scans = [], 0
    for share, i in known:
        if share > known[-1][0] / 4 or scans == SCANS:
            break
        if values := values_of(i):
            masks.append((*files[i], values))
        else:
            scans += 1
    return masks


def _compressed_share(file: Path) -> float | None:
    """The compressed size of a file as a share of its voxels' bytes; None where it is unknown."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            if opened.read(2) == b"\x1f\x8b":
                opened.seek(-4, os.SEEK_END)  # where gzip keeps the uncompressed length
                whole = int.from_bytes(opened.read(4), "little")
                # An impossible length: the file was cut short.
                return size / whole if LEAST_BYTES <= whole <= GZIP_RATIO * size else None
            opened.seek(size // 2)
            piece = opened.read(2**18)
            return len(zlib.compress(piece, 1)) / len(piece) if size >= LEAST_BYTES else None
    except OSError:
        return None
