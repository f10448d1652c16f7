"""Are generated pairs of image and label of use? The same small network is trained to segment on them, on as
many real pairs and on both, for the same number of steps, and segments the held-out scans."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from monai.networks.nets import SegResNet
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import nn

from ldm import UserError, counted
from ldm.data.augmentation import augmentation
from ldm.data.cases import Case
from ldm.data.datasets import stream
from ldm.data.labels import channels_of_label, shares
from ldm.data.preprocessing import crop_or_pad, largest_share
from ldm.data.reading import label_type
from ldm.evaluation.distances import DRAWS
from ldm.evaluation.groups import GENERATED, HELD_OUT, TRAINING, subset
from ldm.evaluation.reading import Reader, Source
from ldm.evaluation.table import Metric
from ldm.losses import dice_and_cross_entropy
from ldm.metrics import dice
from ldm.models.layers import on_device
from ldm.models.weights import load_weights
from ldm.system.files import written_whole
from ldm.system.messages import progress_bar
from ldm.system.ranks import Run, amp_dtype

GROUP = "Segmentation"
STEPS = 400
FILTERS, DIVISOR = 16, 4  # of the network; what its input's sides are multiples of
BATCH, PATCH, LEARNING_RATE = 2, 64, 2e-3  # PATCH: voxels of a side, at most
AUGMENT = {
    "affine_prob": 0.5,
    "rotate_degrees": 10.0,
    "scale": 0.1,
    "translate_voxels": 3.0,
    "intensity_scale": 0.1,
    "intensity_shift": 0.05,
    "intensity_prob": 0.5,
    "foreground_prob": 0.5,
}
FACTS = "segmenter"  # in the metadata of its file
SCANS, BOTH = "scans", "both"  # what a segmenter was trained on, beside GENERATED


# ---------------------------------------------------------------- data


@dataclass
class Pairs:
    """Images and labels on one grid, in memory: (C, D, H, W) float32, and indices (D, H, W)."""

    images: list[torch.Tensor]
    labels: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.images)

    def __add__(self, other: "Pairs") -> "Pairs":
        return Pairs(self.images + other.images, self.labels + other.labels)


def read_pairs(source: Source, count: int | None, read: Reader, values: Sequence[int], run: Run) -> Pairs:
    """The pairs of a group, or a random `count` of them.

    Args:
        read: without channels of labels.
    """
    cases = labelled(source)
    chosen = range(len(cases)) if count is None else subset(len(cases), count, 0)
    read = Reader(replace(read.preprocessing, labels=tuple(values)), read.size, torch.device("cpu"))
    pairs = Pairs([], [])
    for i in progress_bar(run, f"pairs of {source.name}", items=chosen, unit="volume"):
        volume = read(cases[i])[0]
        image, channels = volume[: -len(values)], volume[-len(values) :].numpy()
        pairs.images.append(image.clone())
        pairs.labels.append(largest_share(channels, range(1, len(values) + 1)))
    return pairs


def labelled(source: Source) -> list[Case]:
    """The cases of a group that can be read and have a label."""
    return [case for case in source.cases if case.label is not None and case.name not in source.left_out]


def check_labels(sources: dict[str, Source]) -> None:
    """Raise UserError where a group has no labels, before anything is read."""
    groups = (GENERATED, TRAINING, HELD_OUT)
    if missing := [name for name in groups if name not in sources or not labelled(sources[name])]:
        raise UserError(
            f"--segmentation: no {missing[0]} volume has a label. It needs labels of samples, training and "
            "held-out scans."
        )


# ---------------------------------------------------------------- a segmenter


class Segmenter:
    """A network that finds labels in images.

    Args:
        network: (B, C, D, H, W) -> logits of background and labels, (B, 1 + L, D, H, W).
        channels: of the image.
        values: of the labels.
    """

    def __init__(self, network: nn.Module, channels: int, values: Sequence[int], run: Run):
        self.network, self.device = on_device(network, run).eval(), run.device
        self.channels, self.values = channels, tuple(values)
        self._seen, self._found = None, None

    @torch.no_grad()
    def __call__(self, volume: torch.Tensor) -> np.ndarray:
        """(1, C, D, H, W) in the unit range, of which the first channels are the image -> the label,
        (D, H, W)."""
        if volume is not self._seen:  # else another structure of it was measured just before
            size = volume.shape[2:]
            image = crop_or_pad(volume[0, : self.channels].cpu(), padded(size))[None]
            index = self.network(image.to(self.device)).argmax(1).cpu()
            index = crop_or_pad(index.to(torch.int16), size)[0].numpy()
            self._seen, self._found = volume, np.array([0, *self.values], label_type(self.values))[index]
        return self._found


def padded(size: Sequence[int]) -> list[int]:
    """The next size in voxels that the network divides."""
    return [-(-side // DIVISOR) * DIVISOR for side in size]


def define_segmenter(channels: int, labels: int) -> nn.Module:
    """A small residual U-Net (Myronenko, 2018)."""
    return SegResNet(
        spatial_dims=3,
        init_filters=FILTERS,
        in_channels=channels,
        out_channels=1 + labels,
        blocks_down=(1, 1, 2),
        blocks_up=(1, 1),
    )


def train_segmenter(
    pairs: Pairs, values: Sequence[int], steps: int, what: str, run: Run, seed: int = 0
) -> Segmenter:
    """Train a segmenter by Dice and cross-entropy with small affine and intensity changes.

    Args:
        pairs: what it is trained on; their labels are indices from 0, background.
        what: the name of the progress bar.
    """
    channels = len(pairs.images[0])
    size = [min(PATCH, side) for side in padded(pairs.labels[0].shape)]
    change = augmentation(AUGMENT, size, True, channels)
    torch.manual_seed(seed)
    network = on_device(define_segmenter(channels, len(values)), run).train()
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    indices = range(1, len(values) + 1)
    half = amp_dtype(run.device)
    half = half if half is torch.bfloat16 else None  # float16 would need its loss scaled
    for step in progress_bar(run, what, items=range(steps), unit="step"):
        rng = np.random.RandomState(stream(seed, "segmenter", step).initial_seed() % 2**32)
        items = []
        for i in rng.randint(len(pairs), size=BATCH):
            label = pairs.labels[i]
            volume = np.concatenate([pairs.images[i].numpy(), channels_of_label(label, indices)])
            items.append(change(volume, label[None], rng))
        batch = torch.stack(items).to(run.device)
        images, target = batch[:, :channels], shares(batch[:, channels:])
        with torch.autocast(run.device.type, half, enabled=half is not None):
            output = network(images)
        loss = dice_and_cross_entropy(output.float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return Segmenter(network, channels, values, run)


def save_segmenter(path: Path, segmenter: Segmenter, spacing: Sequence[float]) -> None:
    """Write a segmenter for `--segmenter`, as safetensors."""
    facts = {
        "values": list(segmenter.values),
        "channels": segmenter.channels,
        "spacing": list(spacing),
    }
    state = {name: one.contiguous().cpu() for name, one in segmenter.network.state_dict().items()}
    with written_whole(path) as file:
        file.write(to_safetensors(state, {FACTS: json.dumps(facts)}))


def load_segmenter(path: Path, channels: int, spacing: Sequence[float], run: Run) -> Segmenter:
    """A segmenter that `save_segmenter` wrote.

    Raises:
        UserError: the file holds no such segmenter, or one for another spacing or number of image channels.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})[FACTS])
            trained = facts["spacing"], facts["channels"], facts["values"]
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError):
        raise UserError(f"{path}: holds no segmenter. Use the one that --segmentation writes.") from None
    own, count, values = trained
    if not np.allclose(own, spacing, rtol=1e-3):
        raise UserError(f"{path}: was trained at {own} mm; volumes are at {list(spacing)} mm.")
    if count != channels:
        raise UserError(f"{path}: was trained on {count} channel(s); volumes have {channels}.")
    network = define_segmenter(count, len(values))
    load_weights(network, state, str(path))
    return Segmenter(network, count, values, run)


# ---------------------------------------------------------------- Dice


def utility(
    sources: dict[str, Source],
    read: Reader,
    values: Sequence[int],
    names: dict[int, str],
    steps: int,
    run: Run,
) -> tuple[list[Metric], Segmenter]:
    """Train a segmenter on samples, on as many training scans and on both; Dice on the held-out scans.

    Args:
        read: onto the grid of the samples.
        values, names: of the labels.

    Returns:
        Rows of the table, and the segmenter that was trained on scans.

    Raises:
        UserError: a group has no labels that can be read.
    """
    check_labels(sources)
    count = min(len(labelled(sources[name])) for name in (GENERATED, TRAINING))
    samples, scans = (read_pairs(sources[name], count, read, values, run) for name in (GENERATED, TRAINING))
    held_out = read_pairs(sources[HELD_OUT], None, read, values, run)
    scores, of_scans = {}, None
    indices = range(1, len(values) + 1)
    for name, pairs in ((GENERATED, samples), (SCANS, scans), (BOTH, samples + scans)):
        segment = train_segmenter(pairs, indices, steps, f"segmenter on {name}", run)
        scores[name] = np.stack(
            [
                dice(segment(image[None]), true, indices)
                for image, true in zip(held_out.images, held_out.labels, strict=True)
            ]
        )
        if name == SCANS:
            of_scans = Segmenter(segment.network, segment.channels, values, run)
    about = f"{counted(count, 'pair{s}')} each, {steps} steps; held-out: {len(held_out)}"
    metrics = []
    for name, trained in ((GENERATED, "samples"), (BOTH, "samples and scans")):
        rows = rows_of(
            f"dice_{name}", f"trained on {trained}", scores[name], scores[SCANS], values, names, about
        )
        for row in rows:
            row.about = "Beside it, the same network trained on as many scans."
        metrics += rows
    return metrics, of_scans


def agreement(
    sources: dict[str, Source], read: Reader, segmenter: Segmenter, names: dict[int, str], run: Run
) -> list[Metric]:
    """Rows of the table: Dice of each sample's label with what a segmenter finds in its image, beside that of
    held-out scans; nothing where one of the groups has no labels.

    Args:
        read: onto the grid of the samples.
        names: of the labels.
    """
    scores, indices = [], range(1, len(segmenter.values) + 1)
    for source in (sources[GENERATED], sources[HELD_OUT]):
        pairs = read_pairs(source, None, read, segmenter.values, run)
        if not len(pairs):
            return []
        index = {value: i for i, value in enumerate((0, *segmenter.values))}
        found = [np.vectorize(index.get)(segmenter(image[None])) for image in pairs.images]
        scores.append(np.stack([dice(*both, indices) for both in zip(found, pairs.labels, strict=True)]))
    about = f"{len(scores[0])} samples, {len(scores[1])} scans"
    rows = rows_of("agreement", "label and segmenter", *scores, segmenter.values, names, about)
    for row in rows:
        row.about = "Of each sample's own label with what the segmenter finds; of held-out scans likewise."
    return rows


def rows_of(
    key: str,
    what: str,
    found: np.ndarray,
    real: np.ndarray,
    values: Sequence[int],
    names: dict[int, str],
    counts: str,
) -> list[Metric]:
    """Dice of all structures together and of each, beside a baseline.

    Args:
        key, what: of the rows.
        found, real: (volumes, structures), NaN where a volume has no such structure.
    """
    metrics = []
    parts: list[tuple[str, str, slice]] = [("mean", "mean of the structures", slice(None))]
    parts += [
        (str(value), names.get(value, f"label {value}"), slice(i, i + 1)) for i, value in enumerate(values)
    ]
    rng = np.random.default_rng(0)
    draws = [rng.integers(len(one), size=(DRAWS, len(one))) for one in (found, real)]
    if len(found) == len(real):  # the same scans
        draws[1] = draws[0]
    for part, name, columns in parts:
        metric = Metric(f"{key}_{part}", GROUP, f"Dice, {name}: {what}", better="higher", counts=counts)
        metrics.append(metric)
        both = found[:, columns], real[:, columns]
        if any(np.isnan(one).all() for one in both):
            metric.missing = "not in these volumes"
            continue
        drawn = [_means(*pair) for pair in zip(both, draws, strict=True)]
        metric.fill(*(float(np.nanmean(one)) for one in both), *drawn, min(map(len, both)))
    return metrics


def _means(scores: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The mean of (volumes, structures) over each draw of volumes, without NaN; where a draw has no volume
    with the structure, that of all."""
    filled, known = np.nan_to_num(scores), ~np.isnan(scores)
    counts = known[draws].sum((1, 2))
    return np.where(counts, filled[draws].sum((1, 2)) / np.maximum(counts, 1), np.nanmean(scores))
