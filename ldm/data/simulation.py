"""Simulated brains: an average anatomy, made into many different subjects without any patient's data.

The MNI152 template (ICBM 2009a symmetric: T1, grey and white matter, shipped by nilearn) averages 152 brains,
so its cortex is blurred and its shape is nobody's. A subject is made from it in four steps:

1. shape     a stationary velocity field (random splines at three scales, a pull on the ventricles' walls, the
             push of a tumour) is integrated to a diffeomorphism; an affine gives size and head pose
2. cortex    tissue fractions are sharpened, then a net of sulci, in part the same in all, is cut in
3. tumour    in some subjects: a core, an enhancing rim, oedema that spreads along the white matter
4. scanner   tissue intensities of four contrasts, partial volume, bias field, Rician noise, arbitrary units

Every draw is a function of (seed, subject) alone. Random fields are defined on lattices fixed in millimetres,
not on the output grid, so a subject has the same anatomy at every spacing, with and without its tumour.

At 4 mm subjects are as alike and as sharp in T1w as real scans: MS-SSIM between two is 0.867 (scans of two
sites: 0.866 and 0.870), spectral power in the upper half of the frequencies 6.3e-3 (5.3e-3 and 7.1e-3).
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template
from scipy import ndimage
from scipy.spatial.transform import Rotation

from ldm import UserError

FIELD_OF_VIEW = (160.0, 192.0, 160.0)  # mm
LABELS = ("background", "edema", "non-enhancing tumor", "enhancing tumour")
TISSUES = ("ventricles", "sulcal CSF", "grey matter", "white matter", "oedema", "core", "rim")

# Mean intensity of each tissue; the brightest healthy tissue of a contrast is about 1.
INTENSITIES = {
    "FLAIR": (0.25, 0.25, 0.88, 0.67, 1.35, 0.95, 1.25),
    "T1w": (0.17, 0.17, 0.62, 1.00, 0.62, 0.40, 0.60),
    "t1gd": (0.22, 0.22, 0.72, 0.95, 0.64, 0.42, 1.50),
    "T2w": (1.00, 1.00, 0.47, 0.34, 0.78, 0.92, 0.60),
}

CONTRASTS = tuple(INTENSITIES)
INTERNAL_STEP = 2.0  # mm; coarser grids are averages of a grid at most this coarse
LATTICE_STEP = 4.0  # mm, of displacements and other smooth fields in atlas space
SULCUS_STEP = 3.0  # mm, of the field whose zero set is the sulci
COMMON_SULCI = np.float32(0.6)
SIZE_OF_SEX = {"f": -0.02, "m": 0.02}  # logarithm of a factor of all sides: men's brains are 13 % larger


@dataclass(frozen=True)
class Subject:
    """A simulated subject: volumes on one RAS grid."""

    image: np.ndarray  # (X, Y, Z, 4) int16: CONTRASTS in arbitrary units, at least 1 inside the brain, else 0
    label: np.ndarray  # (X, Y, Z) uint8, indices of LABELS
    tissues: np.ndarray  # (7, X, Y, Z) float32, volume fractions of TISSUES
    affine: np.ndarray  # (4, 4), voxel to mm
    ageing: float  # 0 to 1
    sex: str  # "f" or "m"

    @property
    def age(self):
        """In years, 20 to 80."""
        return 20 + 60 * self.ageing


def simulate_subject(seed, subject, spacing=(4.0, 4.0, 4.0), tumour=False):
    """Simulate one subject of a population; returns a Subject.

    `seed`, `subject`: whole numbers >= 0; `spacing`: three numbers in mm; `tumour`: whether to grow one.
    Raises UserError for a spacing outside 1 to 10 mm.
    """
    shape, affine = output_grid(spacing)
    atlas = load_atlas()
    streams = np.random.SeedSequence([seed, subject]).spawn(5)
    anatomy, growth, scanner, noise, person = (np.random.default_rng(stream) for stream in streams)
    sex = "fm"[person.integers(2)]

    ageing = anatomy.beta(1.5, 2.0)  # 0 to 1: widens ventricles and sulci, thins the cortex
    lesion = draw_tumour(growth, atlas) if tumour else None
    velocity = draw_velocity(anatomy, atlas, ageing)
    displacement = exponential(velocity)
    linear, shift = draw_pose(anatomy, atlas, displacement, SIZE_OF_SEX[sex])
    if lesion is not None:
        displacement = exponential(velocity + mass_effect(lesion, atlas))

    # Every voxel of a fine grid looks up the atlas; along each axis `parts` of them make one of the output.
    parts = np.ceil(np.array(spacing) / INTERNAL_STEP - 1e-6).astype(int)
    step = np.array(spacing) / parts
    fine = tuple((parts * shape).tolist())
    points = np.indices(fine, dtype=np.float32).reshape(3, -1)
    shift = shift - linear @ (step * (np.array(fine) - 1) / 2)
    points = np.einsum("ij,jn->in", np.float32(linear * step), points) + np.float32(shift)[:, None]
    points += LATTICE_STEP * sample(displacement, atlas.origin, LATTICE_STEP, points, mode="nearest")
    inside = np.flatnonzero(sample(atlas.maps[0], atlas.origin, 1.0, points) > 0)
    points = points[:, inside]

    fractions = draw_tissues(anatomy, atlas, points, step.mean(), ageing)
    if lesion is not None:
        fractions = grow_tumour(lesion, atlas, points, fractions)

    tissues = np.zeros((len(TISSUES), *shape), np.float32)
    for index, values in enumerate(fractions):
        volume = np.zeros(fine, np.float32)
        volume.flat[inside] = values
        volume = ndimage.gaussian_filter(volume, 0.5)  # point spread
        tissues[index] = volume.reshape(np.stack([shape, parts], axis=1).ravel()).mean(axis=(1, 3, 5))
    brain = tissues.sum(axis=0) > 0.3
    tissues *= brain

    image = scan(scanner, noise, tissues, spacing) * brain[..., None]
    shares = np.concatenate([tissues[:4].sum(axis=0, keepdims=True), tissues[4:]])
    return Subject(
        image.astype(np.int16), shares.argmax(axis=0).astype(np.uint8), tissues, affine, ageing, sex
    )


def has_tumour(subject, fraction):
    """Whether `subject` is among the `fraction` (0 to 1) of a population that has a tumour.

    A golden-ratio sequence: no population size enters, and the first n subjects hold the share to within two.
    """
    return bool((0.5 + subject * (np.sqrt(5) - 1) / 2) % 1 < fraction)


def output_grid(spacing):
    """Shape and affine (4, 4) of the field of view at `spacing` (three numbers, mm); RAS, 0 mm in its centre.

    Raises UserError for a spacing outside 1 to 10 mm.
    """
    spacing = np.asarray(spacing, float)
    if spacing.shape != (3,) or not np.all((spacing >= 1) & (spacing <= 10)):
        raise UserError(f"spacing {spacing.tolist()}: give one number, or three, from 1 to 10 mm")
    shape = np.round(np.array(FIELD_OF_VIEW) / spacing).astype(int)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -(shape - 1) / 2 * spacing
    return tuple(shape.tolist()), affine


# ---- the atlas


@dataclass(frozen=True)
class Atlas:
    """The template and what is derived from it once. Coordinates are MNI millimetres (RAS)."""

    origin: np.ndarray  # (3,), first voxel of every array below
    maps: np.ndarray  # (4, X, Y, Z) at 1 mm: brain mask, grey matter, white matter, ventricles
    guide: np.ndarray  # (5, X/2, Y/2, Z/2) at 2 mm: nearest hull point (mm), depth (mm), share of cortex
    pull: np.ndarray  # (3, X/4, Y/4, Z/4) at 4 mm: points into the ventricles, longest vector 1
    surface: np.ndarray  # (3, N) points of the brain's surface
    seeds: np.ndarray  # (3, M) deep white matter of the cerebrum: where a tumour may start

    @property
    def lattice(self):
        """Shape of the arrays at LATTICE_STEP."""
        return self.pull.shape[1:]


@lru_cache(maxsize=1)
def load_atlas():
    """Read the MNI152 maps that nilearn ships and derive the rest: about two seconds, once a process."""
    images = [load(1) for load in (load_mni152_template, load_mni152_gm_template, load_mni152_wm_template)]
    box, below = (slice(14, 182), slice(14, 222), slice(0, 168)), 16
    t1, grey, white = (
        np.pad(i.get_fdata(dtype=np.float32)[box], ((0, 0), (0, 0), (below, 0))) for i in images
    )
    origin = np.float32(images[0].affine[:3, 3] + (14, 14, -below))
    x, y, z = np.ogrid[tuple(slice(o, o + n) for o, n in zip(origin, t1.shape, strict=True))]

    brain = ndimage.binary_erosion(ndimage.binary_fill_holes(t1 > 0.05))  # without the layer of fluid
    cerebellum = (z < -4 - 0.45 * np.abs(x)) & (y < -30)
    stem = (np.abs(x) < 18) & (y > -48) & (y < -6) & (z < -8)
    tracts = 0.6 * grey * ndimage.gaussian_filter(stem.astype(np.float32), 3)  # the maps call them grey
    grey, white = grey - tracts, white + tracts

    fluid = np.clip(brain - grey - white, 0, 1)
    centre = (np.abs(x) < 36) & (y > -52) & (y < 36) & (z > -12) & (z < 34) & ((np.abs(x) > 5) | (y > -28))
    lakes, _ = ndimage.label((fluid > 0.5) & centre)
    largest = 1 + np.argsort(np.bincount(lakes.ravel())[1:])[-2:]
    ventricles = fluid * ndimage.binary_dilation(np.isin(lakes, largest), iterations=4)
    potential = ndimage.gaussian_filter(ventricles[::2, ::2, ::2], 2.5)
    pull = np.stack(np.gradient(potential[::2, ::2, ::2]))
    pull /= np.linalg.norm(pull, axis=0).max()

    # The hull is smooth and closed over the sulci: going down from it means going along them.
    closed = ndimage.binary_closing(brain[::2, ::2, ::2], iterations=5)
    closed = ndimage.gaussian_filter(closed.astype(np.float32), 1.5) > 0.5
    depth, nearest = ndimage.distance_transform_edt(closed, sampling=2.0, return_indices=True)
    nearest = 2.0 * nearest + origin[:, None, None, None]
    cortex = ndimage.gaussian_filter(1 - (cerebellum | stem)[::2, ::2, ::2].astype(np.float32), 2)

    surface = np.argwhere(brain & ~ndimage.binary_erosion(brain))[::50].T
    seeds = (white[::2, ::2, ::2] > 0.5) & (depth > 12) & (depth < 40) & (cortex > 0.95)
    seeds &= (potential < 0.03) & (np.abs(x[::2]) > 12)
    return Atlas(
        origin=origin,
        maps=np.stack([brain, grey, white, ventricles]).astype(np.float32),
        guide=np.concatenate([nearest, depth[None], cortex[None]]).astype(np.float32),
        pull=pull.astype(np.float32),
        surface=np.float32(surface + origin[:, None]),
        seeds=np.float32(2.0 * np.argwhere(seeds).T + origin[:, None]),
    )


def sample(array, origin, step, points, mode="constant"):
    """Linear interpolation of a lattice array (..., X, Y, Z) at `points` (3, N) in mm: (..., N) float32.

    `origin` (3,): of the first voxel, in mm; `step`: of the lattice, in mm; 0 outside, or `mode` "nearest".
    """
    index = (points - origin[:, None]) / step
    values = [
        ndimage.map_coordinates(volume, index, order=1, mode=mode, output=np.float32)
        for volume in array.reshape(-1, *array.shape[-3:])
    ]
    return np.stack(values).reshape(*array.shape[:-3], -1)


def random_field(rng, knots, step, shape):
    """Smooth random field (X, Y, Z), mean 0, standard deviation 1: cubic B-splines with normal coefficients.

    `knots`: distance of the control points in mm, the grain of the field; `step`: of the lattice in mm, one
    number or three; `shape`: of the lattice. The same box in mm gets the same field at any step.
    """
    axes = [(np.arange(n) + 0.5) * s / knots for n, s in zip(shape, np.broadcast_to(step, 3), strict=True)]
    field = rng.standard_normal([int(np.ceil(at[-1] + 1e-6)) + 3 for at in axes], np.float32)
    for at in axes:
        away = np.abs(at[:, None] + 1 - np.arange(len(field)))
        weights = np.where(away < 1, 2 / 3 - away**2 + away**3 / 2, np.clip(2 - away, 0, None) ** 3 / 6)
        weights *= np.sqrt(315 / 151)  # the squares of a cubic B-spline's weights sum to 151/315 on average
        field = np.einsum("ia,abc->bci", weights.astype(np.float32), field)
    return field


# ---- shape


def draw_velocity(rng, atlas, ageing):
    """Velocity (3, x, y, z), in lattice steps, of the flow from a subject's shape to the atlas.

    Random splines from the size of lobes to that of gyri, and wider (`ageing` 1) or narrower (0) ventricles.
    The subject looks up the atlas: a flow towards the ventricles makes them larger.
    """
    velocity = np.zeros(atlas.pull.shape, np.float32)
    for knots, deviation in ((60, 1.2), (30, 0.8), (15, 0.6)):  # mm
        velocity += deviation * np.stack(
            [random_field(rng, knots, LATTICE_STEP, atlas.lattice) for _ in range(3)]
        )
    widening = 8.5 * ageing - 3 + 0.5 * rng.normal(0, 1)
    velocity += (widening + 0.75 * random_field(rng, 50, LATTICE_STEP, atlas.lattice)) * atlas.pull
    return velocity / LATTICE_STEP


def exponential(velocity, squarings=5):
    """Displacement (3, X, Y, Z) of the flow of a stationary velocity field after unit time, in lattice steps.

    Scaling and squaring (Arsigny et al., MICCAI 2006): the flow of a smooth field is a diffeomorphism.
    """
    displacement = velocity / 2**squarings
    identity = np.indices(velocity.shape[1:], dtype=np.float32).reshape(3, -1)
    for _ in range(squarings):
        at = identity + displacement.reshape(3, -1)
        displacement = displacement + sample(
            displacement, np.zeros(3, np.float32), 1, at, mode="nearest"
        ).reshape(velocity.shape)
    return displacement


def draw_pose(rng, atlas, displacement, larger=0.0):
    """Matrix (3, 3) and shift (3,) from subject to atlas mm: size, proportions and pose in the field of view.

    `larger`: logarithm of a factor of all sides. The template is larger than most brains; the mean volume
    here is an adult's, 1.4 to 1.5 litres.
    """
    size = larger + np.clip(rng.normal(0, 0.025), -0.06, 0.06) + np.clip(rng.normal(0, 0.02, 3), -0.05, 0.05)
    angles = np.clip(rng.normal(0, (5, 1.5, 1.5)), (-14, -5, -5), (14, 5, 5))  # pitch, roll, yaw
    jitter = rng.uniform(-1, 1, 3)
    turn = Rotation.from_euler("XYZ", angles, degrees=True).as_matrix()
    forward = turn @ np.diag(np.exp(size) * (0.94, 0.92, 0.90))

    surface = atlas.surface  # where it comes to lie: fixed-point inverse of the deformation, then the affine
    for _ in range(3):
        offset = sample(displacement, atlas.origin, LATTICE_STEP, surface, mode="nearest")
        surface = atlas.surface - LATTICE_STEP * offset
    surface = forward @ surface
    low, high = surface.min(axis=1), surface.max(axis=1)
    room = np.array(FIELD_OF_VIEW) - 8
    shrink = min(1.0, (room / (high - low)).min())
    shift = -shrink * (low + high) / 2 + jitter * np.minimum(3, (room - shrink * (high - low)) / 2)
    linear = np.linalg.inv(shrink * forward)
    return linear, -linear @ shift


# ---- cortex


def draw_tissues(rng, atlas, points, step, ageing):
    """Volume fractions (4, N) of the healthy TISSUES at atlas `points` (3, N) in mm, for voxels of `step` mm.

    They sum to the share of the voxel that is brain.
    """
    brain, grey, white, ventricles = sample(atlas.maps, atlas.origin, 1.0, points)
    guide = sample(atlas.guide, atlas.origin, 2.0, points, mode="nearest")
    fluid = np.clip(brain - grey - white, 0, 1)

    # The maps are averages over people: squares sharpen them, factors move borders with subject and place.
    tone = np.stack([random_field(rng, 40, LATTICE_STEP, atlas.lattice) for _ in range(2)])
    tone = sample(tone, atlas.origin, LATTICE_STEP, points, mode="nearest")
    more_fluid = np.exp(0.6 + 1.2 * ageing + 0.4 * tone[0] + rng.normal(0, 0.2))
    more_grey = np.exp(-0.5 + 0.3 * tone[1] + rng.normal(0, 0.15))
    sharp = np.stack([more_fluid * fluid**2, more_grey * grey**2, white**2]) + 1e-6
    deep = np.clip((guide[3] - 24) / 8, 0, 1)  # thalamus and lentiform nucleus are true mixtures: leave them
    fluid, grey, white = (1 - deep) * sharp / sharp.sum(axis=0) + deep * np.stack([fluid, grey, white])

    distance = draw_sulci(rng, atlas, points, guide)
    half_width = 0.3 + 0.6 * ageing + rng.uniform(0, 0.2)  # mm
    thickness = 2.75 - 0.4 * ageing + rng.uniform(-0.35, 0.35)  # mm
    fluid = np.maximum(fluid, slab(distance, half_width, step))
    white = np.minimum(white, 1 - slab(distance, half_width + thickness, step))
    inner = np.minimum(ventricles, fluid)
    tissues = np.stack([inner, fluid - inner, np.clip(1 - fluid - white, 0, 1), white])
    return brain * tissues / tissues.sum(axis=0)


def draw_sulci(rng, atlas, points, guide):
    """Distance (N,) in mm of atlas `points` (3, N) to the nearest of a subject's sulci.

    The zero set of a random field is a net of lines on the hull; carried down along the shortest way from the
    hull (`guide` (5, N), the atlas's guide at the points), these lines become sheets, as sulci are. Large
    sulci are found in everybody: of the field's variance COMMON_SULCI is the same in all subjects.
    """
    shape = np.ceil(np.array(atlas.maps.shape[1:]) / SULCUS_STEP).astype(int)
    common = random_field(np.random.default_rng(0), 9.5, SULCUS_STEP, shape)
    own = random_field(rng, rng.uniform(8.5, 10.5), SULCUS_STEP, shape)
    field = np.sqrt(COMMON_SULCI) * common + np.sqrt(1 - COMMON_SULCI) * own
    slope = np.sqrt(sum(g**2 for g in np.gradient(field, SULCUS_STEP)))
    top, depth, cortex = guide[:3], guide[3], guide[4]
    at = top + 0.25 * (points - top)  # a little of the way down, so that the sheets bend
    height, slope = sample(np.stack([field, slope]), atlas.origin, SULCUS_STEP, at, mode="nearest")
    across = np.abs(height) / (slope + 0.02)
    bottom = 11 + 4 * random_field(rng, 14, LATTICE_STEP, atlas.lattice)
    bottom = sample(bottom, atlas.origin, LATTICE_STEP, points, mode="nearest")
    return np.hypot(across, np.maximum(depth - bottom, 0)) + 20 * (1 - cortex)


def slab(distance, half_width, step):
    """Share of a voxel of size `step` within `half_width` of a sheet `distance` >= 0 away; all in mm."""
    overlap = np.minimum(distance + step / 2, half_width) - np.maximum(distance - step / 2, -half_width)
    return np.clip(overlap / step, 0, 1)


# ---- tumour


@dataclass(frozen=True)
class Tumour:
    """Where a tumour is and how far it has grown, in MNI millimetres."""

    centre: np.ndarray  # (3,)
    shape: np.ndarray  # (3, 3) metric of the ellipsoid, determinant 1
    radius: float  # of the enhancing rim's outer border
    rim: float  # its thickness; 0: the tumour does not enhance
    oedema: float  # how far it reaches into white matter
    push: float  # mass effect: divergence of the velocity at the centre, over 3
    texture: np.ndarray  # (2, lattice) coarse and fine irregularity of the borders


def draw_tumour(rng, atlas):
    """A random Tumour in the white matter of the cerebrum; 15 % do not enhance."""
    radius = rng.uniform(9, 20)
    stretch = np.exp(np.clip(rng.normal(0, 0.2, 3), -0.4, 0.4))
    turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    return Tumour(
        centre=atlas.seeds[:, rng.integers(atlas.seeds.shape[1])] + rng.uniform(-1, 1, 3),
        shape=turn @ np.diag(stretch / np.cbrt(stretch.prod())) @ turn.T,
        radius=radius,
        rim=rng.uniform(0.2, 0.45) * radius if rng.random() < 0.85 else 0.0,
        oedema=rng.uniform(6, 26),
        push=rng.uniform(0.1, 0.45),
        texture=np.stack([random_field(rng, knots, LATTICE_STEP, atlas.lattice) for knots in (18, 9)]),
    )


def mass_effect(tumour, atlas):
    """Velocity (3, x, y, z), in lattice steps, that makes room for a tumour: look-ups flow to its centre."""
    away = LATTICE_STEP * np.indices(atlas.lattice, dtype=np.float32)
    away += (atlas.origin - tumour.centre)[:, None, None, None]
    reach = 8 + 1.6 * tumour.radius
    velocity = -tumour.push * away * np.exp(-np.sum(away**2, axis=0) / reach**2)
    return (velocity / LATTICE_STEP).astype(np.float32)


def grow_tumour(tumour, atlas, points, tissues):
    """Fractions (7, N) of all TISSUES from the healthy brain's (4, N), at atlas `points` (3, N) in mm."""
    coarse, fine = sample(tumour.texture, atlas.origin, LATTICE_STEP, points, mode="nearest")
    offset = np.einsum("ij,jn->in", tumour.shape, points - tumour.centre[:, None])
    ventricles, sulci, _, white = tissues
    distance = np.linalg.norm(offset, axis=0) + 40 * ventricles
    border = distance - tumour.radius * (1 + 0.2 * coarse + 0.1 * fine)
    core = border + tumour.rim * np.clip(1 + 0.4 * fine, 0.4, 1.4)
    front = distance - tumour.radius - tumour.oedema * (0.25 + 0.75 * white) * (1 + 0.25 * coarse)
    front += 20 * sulci + 8 * (points[0] * tumour.centre[0] < 0)  # the falx keeps oedema on its side
    inside = [1 / (1 + np.exp(np.clip(2 * d, -30, 30))) for d in (front, border, core)]  # borders 2 mm soft
    swelling, mass, core = np.maximum(inside[0], inside[1]), inside[1], np.minimum(inside[1], inside[2])
    grown = np.stack([swelling - mass, core, mass - core]) * tissues.sum(axis=0)
    return np.concatenate([tissues * (1 - swelling), grown])


# ---- scanner


def scan(rng, noise_rng, tissues, spacing):
    """Image (X, Y, Z, 4) of whole numbers from 1 to 32767, from tissue fractions (7, X, Y, Z).

    Each contrast has its own tissue intensities, bias field (brighter in the centre), unit and noise level.
    """
    shape = tissues.shape[1:]
    radius = np.indices(shape, dtype=np.float32) - (np.reshape(shape, (3, 1, 1, 1)) - 1) / 2
    radius = sum((r * s / 80) ** 2 for r, s in zip(radius, spacing, strict=True))
    image = np.empty((*shape, len(CONTRASTS)), np.float32)
    for channel, means in enumerate(INTENSITIES.values()):
        means = means * np.exp(np.clip(rng.normal(0, 0.05, len(TISSUES)), -0.08, 0.08))
        bias = np.exp(-rng.uniform(0.2, 0.5) * radius + 0.04 * random_field(rng, 70, spacing, shape))
        unit = np.exp(np.clip(rng.normal(6.3, 0.35), 5.4, 7.2))
        level = rng.uniform(0.01, 0.025)
        signal = bias * np.einsum("c,cxyz->xyz", means, tissues)
        # the magnitude of a complex signal has Rician noise (Gudbjartsson and Patz, 1995)
        real, imaginary = level * noise_rng.standard_normal((2, *shape), np.float32)
        image[..., channel] = unit * np.hypot(signal + real, imaginary)
    return np.clip(np.round(image), 1, 32767)
