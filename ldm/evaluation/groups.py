"""Groups of volumes (held-out, generated, training) reduced to rows of numbers: no volume is kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.fft import irfftn, rfftn
from scipy.ndimage import fourier_gaussian

from ldm.evaluation import copies
from ldm.evaluation.distances import Moments
from ldm.evaluation.features import OWN, PLANES, RADIMAGENET, stacked
from ldm.metrics import RadialSpectrum, histogram, ms_ssim, reconstruction_metrics, scales_of, tissue_volumes

HELD_OUT, GENERATED, TRAINING = "held-out", "generated", "training"  # the groups
BLURS = (0.25, 0.5, 1.0, 2.0)  # standard deviations in voxels, of the blurred scans
JOINED = "halves of two scans joined"  # part of a key in metrics.json
MAX_PAIRS = 100  # pairs of volumes for MS-SSIM
MAX_VOLUMES = 2000  # volumes on each side of a distance


class VolumeGroup:
    """What is kept of the volumes of a group.

    Args:
        name: "held-out", "generated" or "training".
        networks: feature networks by name.
        spectrum: for volumes of this size.
        spacing: in mm.
        count: upper limit of the number of volumes.
        classifier: a network (1, C, D, H, W) -> (1, classes), or None.
        structures: by name, what measures the ml of a structure, from a volume and the spacing.
        labels: how many channels of the volumes, the last, are those of labels. Own features see them, all
            else is of the image.
    """

    def __init__(
        self,
        name: str,
        networks: dict[str, Callable],
        spectrum: RadialSpectrum,
        spacing: Sequence[float],
        count: int,
        classifier: Callable | None = None,
        structures: dict[str, Callable] | None = None,
        labels: int = 0,
    ):
        self.labels = labels
        self.structures, self.sizes = structures or {}, {one: [] for one in structures or {}}
        self.name, self.networks, self.spectrum, self.spacing = name, networks, spectrum, spacing
        self.count, self.classifier = count, classifier
        self.names, self.subjects, self.spectra, self.histograms, self.tissues = [], [], [], [], []
        self.features = {network: [] for network in networks if network != RADIMAGENET}
        self.similarities, self.reconstructions, self.probabilities = [], [], []
        self._previous = self._thumbnails = None

    def __len__(self) -> int:
        return len(self.names)

    @torch.no_grad()
    def add(self, name: str, volume: torch.Tensor, subject: str | None = None) -> None:
        """Add a volume (1, C, D, H, W) in the unit range, float32. Without `subject` it counts as a subject
        of its own."""
        for network, features in self.features.items():
            features.append(features_of(self.networks, network, volume, self.labels))
        for structure, millilitres in self.structures.items():
            self.sizes[structure].append(millilitres(volume, self.spacing))
        volume = image_of(volume, self.labels)
        thumbnail = copies.thumbnail(volume)
        if self._thumbnails is None:
            # One block: many small ones, allocated between volumes, would fragment the memory.
            self._thumbnails = thumbnail.new_empty(self.count, *thumbnail.shape)
        self._thumbnails[len(self)] = thumbnail
        self.names.append(name)
        self.subjects.append(subject or name)
        self.spectra.append(self.spectrum(volume))
        self.histograms.append(histogram(volume))
        self.tissues.append(tissue_volumes(volume[0, 0].cpu().numpy(), self.spacing))
        # Pairs share no volume: only then are they independent.
        if self._previous is None:
            self._previous = volume
        elif len(self.similarities) < MAX_PAIRS and scales_of(volume.shape[2:]):
            self.similarities.append(ms_ssim(self._previous, volume))
            self._previous = None
        if self.classifier:
            self.probabilities.append(self.classifier(volume)[0].softmax(0).double().cpu())

    def add_reconstruction(self, reconstruction: torch.Tensor, volume: torch.Tensor) -> None:
        """Score the autoencoder's reconstruction of a volume."""
        both = (image_of(one, self.labels) for one in (reconstruction.clamp(0, 1), volume))
        scores = reconstruction_metrics(*both)
        self.reconstructions.append([float(scores[key]) for key in ("psnr", "ssim", "l1")])

    @property
    def thumbnails(self) -> torch.Tensor:
        """For the search for copies: (N, C, d, h, w) float16."""
        return self._thumbnails[: len(self)]

    def rows(self, network: str, indices: Sequence[int] | None = None) -> list[torch.Tensor]:
        """Features (N, F), one tensor per layer, of all volumes or of those at `indices`."""
        features = self.features[network]
        return stacked(features if indices is None else [features[i] for i in indices])

    @property
    def one_per_subject(self) -> list[int]:
        """Indices of one volume per subject: volumes of one subject are not independent."""
        first = {subject: i for i, subject in reversed(list(enumerate(self.subjects)))}
        return sorted(first.values())


def image_of(volume: torch.Tensor, labels: int) -> torch.Tensor:
    """The channels of a volume (1, C + labels, D, H, W) that are the image's."""
    return volume[:, : volume.shape[1] - labels]


def features_of(networks: dict[str, Callable], name: str, volume: torch.Tensor, labels: int) -> list:
    """Features of a volume by one of the networks: own ones also of the label's channels."""
    return networks[name](volume if name == OWN else image_of(volume, labels))


class DegradedScans:
    """Features of real scans after known degradations (blur, the autoencoder, halves of two scans joined), as
    a scale for distances.

    Args:
        networks: as for `VolumeGroup`.
        reconstruct: the autoencoder, encode and decode, or None.
        labels: as for `VolumeGroup`.
    """

    def __init__(self, networks: dict[str, Callable], reconstruct: Callable | None, labels: int = 0):
        self.labels = labels
        self.networks = {name: network for name, network in networks.items() if name != RADIMAGENET}
        self.degradations = {blur_name(sigma): _blur(sigma) for sigma in BLURS}
        if reconstruct:
            self.degradations["reconstructions"] = reconstruct
        self.features = {
            name: {network: [] for network in self.networks} for name in (*self.degradations, JOINED)
        }
        self.count, self._previous = 0, None

    @torch.no_grad()
    def add(self, volume: torch.Tensor) -> None:
        """Add a real scan (1, C, D, H, W). Joined halves are those of each scan and the one before it."""
        self.count += 1
        for name, degrade in self.degradations.items():
            self._add(name, degrade(volume).clamp(0, 1))
        if self._previous is not None:
            self._add(JOINED, joined_halves(self._previous, volume))
        self._previous = volume

    def _add(self, name: str, degraded: torch.Tensor) -> None:
        for network in self.networks:
            row = features_of(self.networks, network, degraded, self.labels)
            self.features[name][network].append(row)


def joined_halves(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The left half of a volume and the right half of another, (1, C, D, H, W) in RAS."""
    middle = left.shape[2] // 2
    return torch.cat([left[:, :, :middle], right[:, :, middle:]], 2)


def blur_name(sigma: float) -> str:
    """Name of a blur: part of a key in metrics.json."""
    return f"scans blurred by {sigma:g} voxel{'s' * (sigma != 1)}"


def _blur(sigma: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A Gaussian blur in Fourier space: a sampled kernel of half a voxel or less is hardly a Gaussian."""

    def blur(volume: torch.Tensor) -> torch.Tensor:
        voxels = volume[0].cpu().numpy()
        last = voxels.shape[-1]
        smooth = [
            irfftn(fourier_gaussian(rfftn(channel), sigma, last), s=channel.shape) for channel in voxels
        ]
        return torch.from_numpy(np.stack(smooth)[None].astype(np.float32)).to(volume.device)

    return blur


def subset(count: int, wanted: int, seed: int) -> list[int]:
    """Sorted indices of a random subset of `count` volumes, which depends on these numbers only."""
    return sorted(np.random.default_rng([0, seed]).permutation(count)[:wanted].tolist())


@dataclass
class Comparison:
    """The groups that are compared, and which of their volumes each metric uses.

    A metric compares samples with held-out scans. Its real-vs-real baseline compares other real scans (the
    reference: training scans, or without a training group every other held-out scan) with the same held-out
    scans. Many distances depend on group sizes, so all three sides have `size` volumes.

    `degraded` holds the first scans of the reference.
    """

    held_out: VolumeGroup
    generated: VolumeGroup
    training: VolumeGroup | None
    degraded: DegradedScans
    slices: dict[str, list[Moments]] = field(default_factory=dict)  # by side, one for each plane

    @property
    def groups(self) -> list[VolumeGroup]:
        """All groups, the held-out one first."""
        return [group for group in (self.held_out, self.generated, self.training) if group]

    @property
    def reference(self) -> VolumeGroup:
        """The group that the reference scans come from."""
        return self.training or self.held_out

    @property
    def _candidates(self) -> dict[str, list[int]]:
        """Indices of the volumes that each side may use."""
        held_out, reference = range(len(self.held_out)), range(len(self.reference))
        return {
            "samples": list(range(len(self.generated))),
            "held_out": list(held_out if self.training else held_out[1::2]),
            "reference": list(reference if self.training else reference[::2]),
        }

    @property
    def size(self) -> int:
        """Number of volumes on each side."""
        return min(MAX_VOLUMES, *map(len, self._candidates.values()))

    @property
    def sides(self) -> dict[str, tuple[VolumeGroup, list[int]]]:
        """For "samples", "held_out" and "reference": the group and the indices of its `size` volumes."""
        groups = {"samples": self.generated, "held_out": self.held_out, "reference": self.reference}
        return {
            side: (groups[side], [indices[i] for i in subset(len(indices), self.size, number)])
            for number, (side, indices) in enumerate(self._candidates.items())
        }

    def rows(self, network: str) -> list[list[torch.Tensor]]:
        """Features of samples, held-out and reference scans, each as `VolumeGroup.rows` gives them."""
        return [group.rows(network, indices) for group, indices in self.sides.values()]

    def values(self, key: str) -> list[list]:
        """The list `key` of each group, at the volumes of samples, held-out and reference scans."""
        return [[getattr(group, key)[i] for i in indices] for group, indices in self.sides.values()]

    @property
    def independent(self) -> tuple[dict[str, tuple[VolumeGroup, list[int]]], list[int]]:
        """As `sides`, with one volume per subject and at most half of the training scans; and the indices of
        the training scans of all other subjects.

        Reference scans are the first that were read, as those of `degraded` are.
        """
        samples, held_out, training = (
            group.one_per_subject for group in (self.generated, self.held_out, self.training)
        )
        size = min(MAX_VOLUMES, len(samples), len(held_out), len(training) // 2)
        sides = {
            "samples": (self.generated, [samples[i] for i in subset(len(samples), size, 0)]),
            "held_out": (self.held_out, [held_out[i] for i in subset(len(held_out), size, 1)]),
            "reference": (self.training, training[:size]),
        }
        return sides, training[size:]

    def add_slices(self, side: str, volume: torch.Tensor) -> None:
        """Add a volume's slices to the moments of the 2.5D distance; the slices are too many to keep."""
        moments = self.slices.setdefault(side, [Moments() for _ in PLANES])
        for one, rows in zip(moments, self.generated.networks[RADIMAGENET](volume), strict=True):
            one.add(rows)

    @property
    def counts(self) -> str:
        """Number of volumes of each group."""
        training = f", {len(self.training)} training" if self.training else ""
        return f"{len(self.generated)} generated, {len(self.held_out)} held-out{training}"

    def too_few(self, needed: int) -> str | None:
        """Why a metric is missing that needs so many volumes on each side; None where there are enough."""
        if self.size >= needed:
            return None
        halves = "" if self.training else " (no training scans: the baseline compares their two halves)"
        return f"needs {needed} volumes on each side; there are {self.counts}{halves}"
