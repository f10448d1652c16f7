"""Sets of volumes, reduced to rows of numbers: the volumes come one after the other, and none is kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.fft import irfftn, rfftn
from scipy.ndimage import fourier_gaussian

from ldm.evaluation import copies
from ldm.evaluation.distances import Moments
from ldm.evaluation.features import PLANES, stacked
from ldm.metrics import RadialSpectrum, histogram, ms_ssim, reconstruction_metrics, scales_of, tissue_volumes

OWN, MEDICALNET, RADIMAGENET = "own", "medicalnet", "radimagenet"  # networks of features
BLURS = (0.25, 0.5, 1.0, 2.0)  # voxels, of the scans that distances are told by
PAIRS = 100  # of which MS-SSIM is taken at most
MOST = 2000  # volumes on a side of a distance


class VolumeSet:
    """What is kept of the volumes of a set.

    Args:
        name: "held-out", "generated" or "training".
        networks: of features, by name.
        spectrum: for volumes of this size.
        spacing: in mm.
        count: volumes that will come, at most.
        classifier: a network (1, C, D, H, W) -> (1, classes), or None.
    """

    def __init__(
        self,
        name: str,
        networks: dict[str, Callable],
        spectrum: RadialSpectrum,
        spacing: Sequence[float],
        count: int,
        classifier: Callable | None = None,
    ):
        self.name, self.networks, self.spectrum, self.spacing = name, networks, spectrum, spacing
        self.count, self.classifier = count, classifier
        self.names, self.subjects, self.spectra, self.histograms, self.tissues = [], [], [], [], []
        self.features = {network: [] for network in networks if network != RADIMAGENET}
        self.similarities, self.reconstructions, self.probabilities = [], [], []
        self._before = self._thumbnails = None

    def __len__(self) -> int:
        return len(self.names)

    @torch.no_grad()
    def add(self, name: str, volume: torch.Tensor, subject: str | None = None) -> None:
        """A volume (1, C, D, H, W) in the unit range, float32; each is of a subject of its own where none is
        named."""
        for network, features in self.features.items():
            features.append(self.networks[network](volume))
        thumbnail = copies.thumbnail(volume)
        if self._thumbnails is None:
            # In one piece: between them the memory of volumes that have gone would be left in holes.
            self._thumbnails = thumbnail.new_empty(self.count, *thumbnail.shape)
        self._thumbnails[len(self)] = thumbnail
        self.names.append(name)
        self.subjects.append(subject or name)
        self.spectra.append(self.spectrum(volume))
        self.histograms.append(histogram(volume))
        self.tissues.append(tissue_volumes(volume[0, 0].cpu().numpy(), self.spacing))
        # Pairs that share no volume: only then are they independent.
        if self._before is None:
            self._before = volume
        elif len(self.similarities) < PAIRS and scales_of(volume.shape[2:]):
            self.similarities.append(ms_ssim(self._before, volume))
            self._before = None
        if self.classifier:
            self.probabilities.append(self.classifier(volume)[0].softmax(0).double().cpu())

    def add_reconstruction(self, reconstruction: torch.Tensor, volume: torch.Tensor) -> None:
        """How a volume comes back from the autoencoder."""
        numbers = reconstruction_metrics(reconstruction.clamp(0, 1), volume)
        self.reconstructions.append([float(numbers[key]) for key in ("psnr", "ssim", "l1")])

    @property
    def thumbnails(self) -> torch.Tensor:
        """What is compared in the search for copies, (N, C, d, h, w) float16."""
        return self._thumbnails[: len(self)]

    def rows(self, network: str, of: Sequence[int] | None = None) -> list[torch.Tensor]:
        """Features of some volumes, or of all: (N, F) a group."""
        features = self.features[network]
        return stacked(features if of is None else [features[i] for i in of])

    @property
    def of_each_subject(self) -> list[int]:
        """One volume of each subject, since those of one subject are more alike than others."""
        first = {subject: i for i, subject in reversed(list(enumerate(self.subjects)))}
        return sorted(first.values())


class Yardsticks:
    """Features of real volumes that something was done to, by which a distance is told in plain words.

    Args:
        networks: as those of `VolumeSet`.
        reconstruct: the autoencoder's way there and back, or None.
    """

    def __init__(self, networks: dict[str, Callable], reconstruct: Callable | None):
        self.networks = {name: network for name, network in networks.items() if name != RADIMAGENET}
        self.changes = {blurred_scans(sigma): _blurred(sigma) for sigma in BLURS}
        if reconstruct:
            self.changes["reconstructions"] = reconstruct
        self.features = {change: {name: [] for name in self.networks} for change in self.changes}
        self.count = 0

    @torch.no_grad()
    def add(self, volume: torch.Tensor) -> None:
        """A real volume (1, C, D, H, W)."""
        self.count += 1
        for change, apply in self.changes.items():
            changed = apply(volume).clamp(0, 1)
            for name, network in self.networks.items():
                self.features[change][name].append(network(changed))


def blurred_scans(sigma: float) -> str:
    """What a yardstick is called."""
    return f"scans blurred by {sigma:g} voxel{'s' * (sigma != 1)}"


def _blurred(sigma: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A Gaussian blur, by the spectrum: on the grid, one of half a voxel or less is hardly a Gaussian."""

    def blur(volume: torch.Tensor) -> torch.Tensor:
        voxels = volume[0].cpu().numpy()
        last = voxels.shape[-1]
        smooth = [
            irfftn(fourier_gaussian(rfftn(channel), sigma, last), s=channel.shape) for channel in voxels
        ]
        return torch.from_numpy(np.stack(smooth)[None].astype(np.float32)).to(volume.device)

    return blur


def drawn(count: int, wanted: int, side: int) -> list[int]:
    """Which of `count` volumes stand on a side of a figure, in their order, by a draw that depends on nothing
    else."""
    return sorted(np.random.default_rng([0, side]).permutation(count)[:wanted].tolist())


@dataclass
class Sets:
    """What is compared. Where there is no training set, the floor is between two halves of the held-out
    volumes.

    Many distances depend on the sizes of the sets. Samples and the floor's first set are therefore compared
    with the same held-out volumes, with `least` volumes on each side.

    `yardsticks` are of the volumes that the floor's first set begins with.
    """

    held_out: VolumeSet
    generated: VolumeSet
    training: VolumeSet | None
    yardsticks: Yardsticks
    slices: dict[str, list[Moments]] = field(default_factory=dict)  # of each side, for each plane

    @property
    def present(self) -> list[VolumeSet]:
        """Those that there are, the held-out one first."""
        return [one for one in (self.held_out, self.generated, self.training) if one]

    @property
    def reference(self) -> VolumeSet:
        """The set that the floor's first volumes are from."""
        return self.training or self.held_out

    @property
    def _pools(self) -> dict[str, list[int]]:
        """The volumes that may stand on each side."""
        held, reference = range(len(self.held_out)), range(len(self.reference))
        return {
            "made": list(range(len(self.generated))),
            "held": list(held if self.training else held[1::2]),
            "first": list(reference if self.training else reference[::2]),
        }

    @property
    def least(self) -> int:
        """Volumes on each side of a figure and of its floor."""
        return min(MOST, *map(len, self._pools.values()))

    @property
    def sides(self) -> dict[str, tuple[VolumeSet, list[int]]]:
        """For the samples ("made"), the held-out volumes ("held") and the floor's first set ("first"): the
        set, and which `least` of it."""
        of = {"made": self.generated, "held": self.held_out, "first": self.reference}
        return {
            name: (of[name], [pool[i] for i in drawn(len(pool), self.least, side)])
            for side, (name, pool) in enumerate(self._pools.items())
        }

    def chosen(self, key: str) -> tuple[list, list, list]:
        """What a list of each set holds for the volumes of each side: made, held, first."""
        return tuple([getattr(one, key)[i] for i in of] for one, of in self.sides.values())

    def add_slices(self, side: str, volume: torch.Tensor) -> None:
        """Add a volume of this side for the 2.5D distance, which takes the moments of all slices: the slices
        are too many to be kept."""
        moments = self.slices.setdefault(side, [Moments() for _ in PLANES])
        for one, rows in zip(moments, self.generated.networks[RADIMAGENET](volume), strict=True):
            one.add(rows)

    @property
    def counts(self) -> str:
        """How many volumes each has."""
        training = f", {len(self.training)} training" if self.training else ""
        return f"{len(self.generated)} generated, {len(self.held_out)} held-out{training}"

    def too_few(self, least: int) -> str | None:
        """Why a figure is missing that needs `least` volumes on each side, or None."""
        if self.least >= least:
            return None
        halves = "" if self.training else " (whose halves are the floor, as there is no training set)"
        return f"needs {least} volumes on each side; there are {self.counts}{halves}"
