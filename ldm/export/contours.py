"""Outlines of labelled regions in a plane, as closed polygons."""

import numpy as np
from scipy.spatial.distance import cdist
from skimage.measure import find_contours, points_in_poly


def outlines(mask: np.ndarray) -> list[np.ndarray]:
    """The outlines of the regions of a plane. They hold the centres of the voxels of the mask, and no others.

    They run halfway between neighbours (marching squares); voxels that touch only at a corner are regions of
    their own. A hole is joined to the outline around it by a channel of no width, the keyhole of DICOM
    PS3.3, C.8.8.6.3, so that each region is one polygon.

    Args:
        mask: (X, Y), bool.

    Returns:
        The corners of each polygon in voxels, (N, 2); the last is not the first again.
    """
    loops = [loop[:-1] - 1 for loop in find_contours(np.pad(mask, 1).astype(float), 0.5)]
    areas = [_area(loop) for loop in loops]
    around = {i: [] for i, area in enumerate(areas) if area > 0}
    for loop, area in zip(loops, areas, strict=True):
        if area < 0:
            outer = [i for i in around if areas[i] > -area and points_in_poly(loop[:1], loops[i])[0]]
            around[min(outer, key=lambda i: areas[i])].append(loop)
    return [_corners(_joined(loops[i], holes)) for i, holes in around.items()]


def _area(loop: np.ndarray) -> float:
    """The area in a polygon: below 0 where find_contours goes round a hole."""
    x, y = loop.T
    return 0.5 * float(np.sum(np.roll(x, -1) * y - x * np.roll(y, -1)))


def _joined(outline: np.ndarray, holes: list[np.ndarray]) -> np.ndarray:
    """One polygon of an outline and its holes: there and back between the nearest corners, the nearest hole
    first."""
    holes = list(holes)
    while holes:
        distances = [cdist(outline, hole) for hole in holes]
        n = int(np.argmin([one.min() for one in distances]))
        i, j = np.unravel_index(distances[n].argmin(), distances[n].shape)
        hole = np.roll(holes.pop(n), -j, axis=0)
        outline = np.concatenate([outline[: i + 1], hole, hole[:1], outline[i:]])
    return outline


def _corners(polygon: np.ndarray) -> np.ndarray:
    """A polygon without the points between which it goes straight on."""
    before, after = polygon - np.roll(polygon, 1, axis=0), np.roll(polygon, -1, axis=0) - polygon
    turns = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
    return polygon[(turns != 0) | ((before * after).sum(1) < 0)]
