"""Is a model any good, and does it only repeat the scans that it was trained on? One table and one page.

    python evaluate.py -c config/config_train_16g.json -e config/environment.json
    python evaluate.py --real held_out --generated samples --train training --autoencoder autoencoder.pt \\
        --out report
    python evaluate.py --real held_out --generated samples --out report
    python evaluate.py -c CONFIG -e ENV --medicalnet resnet_50_23dataset.pth --radimagenet RadImageNet.pth

With `-c` and `-e` the held-out and the training scans are those of the run's split, the features those of its
autoencoder, and the samples those that inference.py drew into `output_dir` with the checkpoints of
`model_dir` as they are now, by their records; all other volumes there are left out and named. `--out` is
`output_dir`/evaluation. Any of them can be named instead: `--real` held-out scans, `--generated` samples, of
one model, `--train` the scans that were trained on, each a folder in any layout of docs/data.md or a list.
Files of the scans among the samples are left out, and the page says so first. Without `--train` copies are
not looked for, and the floor is between the two halves of the held-out scans. Without an autoencoder there
are no distances in features.

All volumes come to one grid, that of the samples, and to the unit range: scans as `intensity` says, samples
of inference.py by the limits in their records. Volumes that cannot be read or are constant are left
out and listed. They are read one after the other and not kept.

Published networks' weights are files that you have: MedicalNet's ResNet-10 or 50 for the 3D FID,
RadImageNet's ResNet-50 for the 2.5D FID, each with its SHA-256 behind it, or the first digits of it, if it is
to be checked. A classifier, for the Inception Score, is a JSON file such as
{"_target_": "monai.networks.nets.DenseNet121", "spatial_dims": 3, "in_channels": 1, "out_channels": 2}
and a file of its weights.

Written to `--out`: `metrics.json`, all figures with intervals and floors, and each sample's nearest training
scan; and `report.html`, one page with pictures that opens in any browser. docs/evaluation.md says what each
figure means.

Exit codes: 0 done, whatever the verdict; 1 a failure at run time; 2 wrong usage or input.
"""

import argparse
import contextlib
import datetime
import functools
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

import utils
from ldm import UserError, configs, few, metrics
from ldm.data import splits
from ldm.data.cases import Case, rounded, size_at, volume_size
from ldm.data.datasets import stream
from ldm.data.intensity import Intensity, to_unit_range
from ldm.data.layouts import find_cases
from ldm.data.prepare import prepare_data
from ldm.data.preprocessing import Preprocessing, fit
from ldm.data.reading import ras_geometry
from ldm.evaluation import features, rows
from ldm.evaluation.report import write_report
from ldm.evaluation.verdicts import verdicts
from ldm.evaluation.volumes import MEDICALNET, OWN, RADIMAGENET, Sets, VolumeSet, Yardsticks
from ldm.export import records
from ldm.models import perceptual
from ldm.models.autoencoder import Autoencoder
from ldm.models.definitions import NETWORKS, downsampling_factor, instantiate
from ldm.models.weights import load_weights
from ldm.system import versions
from ldm.system.checkpoints import load_checkpoint
from ldm.system.files import read_json, sha256_of, write_json
from ldm.system.messages import progress_bar
from ldm.system.ranks import Run
from ldm.training.latents import load_autoencoder
from ldm.training.logs import read_log

HELD_OUT, GENERATED, TRAINING = "held-out", "generated", "training"
SHOWN = 4  # volumes of a set on the page
TOLD = {"good": "good", "warn": "caution", "bad": "bad", "none": "unclear"}  # of the lines that are printed
PAIRS_SHOWN = 8
YARDSTICKS = 32  # real volumes that are blurred, at most


# ---------------------------------------------------------------- command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-c", "--config-file", default=None, help="the config that was trained with")
    add("-e", "--environment-file", default=None, help="the environment file of that run")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config key")
    add("--real", type=Path, default=None, metavar="DIR", help="scans that were not trained on")
    add("--generated", type=Path, default=None, metavar="DIR", help="samples")
    add("--train", type=Path, default=None, metavar="DIR", help="scans that were trained on")
    add(
        "--autoencoder",
        type=Path,
        default=None,
        metavar="FILE",
        help="features; default: model_dir/autoencoder.pt",
    )
    add(
        "--channel",
        type=int,
        nargs="+",
        default=None,
        help="channels of the scans, from 0; default: the config's",
    )
    weights = {"nargs": "+", "default": None, "metavar": ("FILE", "SHA256")}
    add("--medicalnet", help="weights for the 3D FID", **weights)
    add("--radimagenet", help="weights for the 2.5D FID", **weights)
    add(
        "--classifier",
        type=Path,
        nargs=2,
        default=None,
        metavar=("JSON", "WEIGHTS"),
        help="for the Inception Score",
    )
    add("--out", type=Path, default=None, metavar="DIR", help="default with -e: output_dir/evaluation")
    add("--device", default=None, help="cpu or cuda; default: cuda where there is one")
    args = parser.parse_args(argv)
    if bool(args.config_file) != bool(args.environment_file):
        raise UserError("-c and -e: a run is named by both.")
    if not args.environment_file and not (args.real and args.generated and args.out):
        raise UserError("name a run by -c and -e, or --real, --generated and --out.")
    if args.set and not args.config_file:
        raise UserError("--set: changes the config, and none is named by -c.")
    for name in ("medicalnet", "radimagenet"):
        if len(getattr(args, name) or []) > 2:
            raise UserError(f"--{name}: a file, and its SHA-256 if that is to be checked.")
    utils.find_files(
        autoencoder=[args.autoencoder],
        medicalnet=(args.medicalnet or [])[:1],
        radimagenet=(args.radimagenet or [])[:1],
        classifier=args.classifier or [],
    )
    args.gpus, args.amp = None, False
    return args


# ---------------------------------------------------------------- what is compared


@dataclass
class Source:
    """The volumes of a set as files."""

    name: str
    folder: str
    cases: list[Case]
    left_out: dict[str, str] = field(default_factory=dict)  # by case, why


@dataclass
class Inputs:
    """All that an evaluation reads. `config` is None where neither a run nor an autoencoder is named;
    `records` are those of the samples that have one."""

    sources: dict[str, Source]
    config: dict | None
    autoencoder: Path | None
    log: list[dict]
    out: Path
    records: list[dict]
    notes: list[str]


def find_inputs(args: argparse.Namespace, run: Run) -> Inputs:
    """The volumes, the autoencoder and the log, from the run or as they are named.

    Raises:
        UserError: something is not there, or the results of another evaluation are.
    """
    environment = utils.load_environment(args.environment_file) if args.environment_file else None
    config = utils.load_config(args.config_file, args.set) if args.config_file else None
    autoencoder, log, cases = args.autoencoder, [], {}
    if environment:
        model_dir = environment["model_dir"]
        autoencoder = utils.autoencoder_path(args, environment)
        log = read_log(model_dir / "train_log.jsonl")
    of_the_split = bool(environment) and not (args.real and args.train)
    if autoencoder and (config is None or not config["spacing"]):
        trained = load_checkpoint(autoencoder).get("config")
        if trained is None and not of_the_split:
            raise UserError(
                f"{autoencoder}: holds weights alone. Name their config, with a spacing, by -c and -e."
            )
        if trained is not None:
            trained = configs.completed(trained)
            config = {**config, "spacing": trained["spacing"], "longest_side": None} if config else trained
    if of_the_split:
        cases[TRAINING], cases[HELD_OUT], spacing = prepare_data(
            config, environment, run, write=False, autoencoder=autoencoder
        )
        config = configs.with_spacing(config, spacing)
    out = args.out or environment["output_dir"] / "evaluation"
    for name in ("metrics.json", "report.html"):
        if (out / name).exists():
            raise UserError(f"{out / name} is there already. Name another folder by --out, or move it away.")
    named = {HELD_OUT: args.real, GENERATED: args.generated, TRAINING: args.train}
    sources, notes = {}, []
    for name, folder in named.items():
        if folder:
            found, validation = find_cases(folder, say=run.say)
            sources[name] = Source(name, str(folder), [*found, *validation])
        elif name == GENERATED:
            cases[name], records, on_samples = samples_of_run(environment, autoencoder)
            sources[name] = Source(name, str(environment["output_dir"]), cases[name])
        elif cases.get(name):
            sources[name] = Source(name, str(environment["data_base_dir"]), cases[name])
            notes += notes_on_the_split(environment["model_dir"], sources[name])
    if args.generated:
        unet = environment["model_dir"] / "diffusion_unet.pt" if environment else None
        records, on_samples = check_named_samples(sources[GENERATED], unet)
    return Inputs(sources, config, autoencoder, log, out, records, [*on_samples, *notes])


def samples_of_run(environment: dict, autoencoder: Path) -> tuple[list[Case], list[dict], list[str]]:
    """The samples of the run's model in `output_dir`, their records, and a note on what else lies there.

    Raises:
        UserError: there are none, or no model.
    """
    folder, unet = environment["output_dir"], environment["model_dir"] / "diffusion_unet.pt"
    if not unet.is_file():
        raise UserError(
            f"{unet}: no such checkpoint. Run train_diffusion.py, or name the samples by --generated."
        )
    checkpoints = {"autoencoder": autoencoder, "unet": unet}
    samples, others = records.samples_of(folder, checkpoints)
    left_out = f"left out: {records.told(others)}" if others else ""
    if not samples:
        raise UserError(
            f"{folder}: no samples of {unet} there{f' ({left_out})' * bool(others)}.\n"
            "Run inference.py, or name the samples by --generated."
        )
    cases = [Case(path.name.removesuffix(".nii.gz"), (path,)) for path in samples]
    return cases, [*samples.values()], [f"{GENERATED}: {left_out}."] if others else []


def check_named_samples(source: Source, unet: Path | None) -> tuple[list[dict], list[str]]:
    """The records of the samples of a folder that the user named, as far as there are any, and notes on what
    is not as expected. What --reproduce made is taken out, and so is a sample that is there twice.

    Args:
        unet: of the run beside which they are judged, or None.

    Raises:
        UserError: there are none, or by their records they are of several models.
    """
    named = [case for case in source.cases if not case.name.endswith(records.REPRODUCED)]
    if not named:
        raise UserError(f"{source.folder}: no {source.name} volumes there but what --reproduce made.")
    records, source.cases, without, twice, changed = {}, [], [], [], []
    for case in named:
        record = None
        with contextlib.suppress(UserError):  # a damaged one is listed when its volume is read
            record = records.record_of(case.images[0])
        key = record and (record["seed"], record["volume"]["sha256"])
        if key in records:
            twice.append(case.name)
            continue
        source.cases.append(case)
        if record is None:
            without.append(case.name)
            continue
        records[key] = record
        if sha256_of(case.images[0]) != record["volume"]["sha256"]:
            changed.append(case.name)
    found = [*records.values()]
    records.check_one_model(source.folder, found)
    notes = [
        f"{source.name}: {len(names)} of {len(named)} volumes {what} ({few(names, 3)})."
        for what, names in (
            ("have no record of inference.py", without if found else []),
            ("were changed after inference.py wrote them", changed),
            ("are there twice and count once", twice),
        )
        if names
    ]
    if found and unet and unet.is_file() and (digest := found[0]["unet"]["sha256"]) != sha256_of(unet):
        drawn = f"{found[0]['unet']['path']} (SHA-256 {digest[:12]})"
        notes.append(f"{source.name}: drawn by {drawn}, which is not {unet} as it is now.")
    return found, notes


def take_out_scans(sources: dict[str, Source]) -> list[dict]:
    """Take out the generated volumes that are files of the scans, by path or by their bytes, and say so in
    lines such as `verdicts` gives.

    Raises:
        UserError: no other is left.
    """
    made, lines = sources[GENERATED], []
    total, hashed = len(made.cases), functools.cache(sha256_of)
    for name in (TRAINING, HELD_OUT):
        by_size = {}  # only files of one size need to be read
        for case in sources[name].cases if name in sources else ():
            for path in filter(Path.is_file, case.images):
                by_size.setdefault(path.stat().st_size, []).append(path)

        def is_scan(path: Path, by_size: dict = by_size) -> bool:
            rivals = by_size.get(path.stat().st_size, ()) if path.is_file() else ()
            return any(hashed(path) == hashed(one) for one in rivals)

        scans = [case.name for case in made.cases if any(map(is_scan, case.images))]
        if not scans:
            continue
        if len(scans) == len(made.cases):
            raise UserError(f"{made.folder}: all generated volumes there are files of the {name} set.")
        made.cases = [case for case in made.cases if case.name not in scans]
        text = f"{len(scans)} of {total} generated volumes are files of the {name} set, and are left out"
        lines.append({"tone": "bad", "text": f"{text}: {few(scans, 3)}."})
    return lines


def notes_on_the_split(model_dir: Path, source: Source) -> list[str]:
    """What is said of the cases of split.json that are no longer there, or have become bad."""
    path, there = model_dir / splits.SPLIT, {case.name for case in source.cases}
    if not path.is_file():
        return []
    names = splits.read_split(path)[source.name == HELD_OUT]
    gone = [name for name in names if name not in there]
    told = f"{source.name}: {len(gone)} of {len(names)} cases of {path} are not there or bad, and left out"
    return [f"{told}: {few(gone)}"] if gone else []


def preprocessing_for(inputs: Inputs, channels: list[int] | None) -> Preprocessing:
    """The way from file to volume: the config's, or the grid of the first sample."""
    if inputs.config:
        way = Preprocessing.from_config(inputs.config)
    else:
        _, sizes = ras_geometry(inputs.sources[GENERATED].cases[0].images[0])
        way = Preprocessing((0,), tuple(rounded(size) for size in sizes))
    if channels is None:
        return way
    if len(channels) != len(way.channels) and inputs.config:
        raise UserError(
            f"--channel: {len(channels)} given; the autoencoder has {len(way.channels)} channel(s)."
        )
    return replace(way, channels=tuple(channels))


class Reader:
    """Volumes of the cases, all on one grid in the unit range.

    Args:
        way: of the scans.
        size: voxels of the grid.
    """

    def __init__(self, way: Preprocessing, size: Sequence[int], device: torch.device):
        self.way, self.size, self.device = way, tuple(size), device

    def __call__(self, case: Case) -> torch.Tensor:
        """(1, C, D, H, W) float32. Raises UserError: it cannot be read, or is constant."""
        volume = self._unit_range(case)
        if np.ptp(volume) == 0:
            raise UserError(f"{case.images[0]}: constant, an empty image.")
        return torch.from_numpy(np.ascontiguousarray(fit(volume, self.size)))[None].to(self.device)

    def _unit_range(self, case: Case) -> np.ndarray:
        limits = records.limits_of(case.images[0]) if len(case.images) == 1 else None
        if limits is None:
            return np.clip(self.way(case.images), 0, 1)
        channels = tuple(range(len(limits)))  # a sample has the channels that were trained on, and no others
        return to_unit_range(
            replace(self.way, channels=channels, intensity=Intensity()).read(case.images),
            np.array(limits),
            clip=True,
        )


def geometry_notes(source: Source, way: Preprocessing, size: Sequence[int]) -> list[str]:
    """What is done to volumes that are not on the grid already."""
    found = [ras_geometry(case.images[0]) for case in source.cases]
    notes, total = [], len(found)
    other = [sizes for _, sizes in found if not np.allclose(sizes, way.spacing, rtol=1e-3, atol=0)]
    if other:
        kinds = sorted({" x ".join(f"{side:.3g}" for side in sizes) for sizes in other})
        notes.append(
            f"{source.name}: {len(other)} of {total} volumes have another spacing "
            f"({few(kinds, 3)} mm) and were resampled."
        )
    if moved := sum(any(size_at(*one, way.spacing) != size) for one in found):
        notes.append(
            f"{source.name}: {moved} of {total} volumes have another size and were cropped or padded."
        )
    return notes


# ---------------------------------------------------------------- networks


def feature_networks(
    args: argparse.Namespace, encoder: Autoencoder | None, run: Run
) -> tuple[dict[str, Callable], dict[str, str]]:
    """The networks of features by name, and for each what the page says of it."""
    networks, told = {}, {}
    if encoder:
        networks[OWN] = features.AutoencoderFeatures(encoder)
        told["own features"] = (
            "the encoder of the autoencoder; such figures are never to be set beside published ones"
        )
    if args.medicalnet:
        path = Path(args.medicalnet[0])
        state, digest = perceptual.read_weights(path, *args.medicalnet[1:] or [None])
        depth = perceptual.medicalnet_depth(state, str(path))
        networks[MEDICALNET] = features.MedicalNetFeatures(depth, state, str(path), run.device)
        told["MedicalNet"] = f"ResNet-{depth}, {path.name}, SHA-256 {digest}"
    if args.radimagenet:
        path = Path(args.radimagenet[0])
        state, digest = perceptual.read_weights(path, *args.radimagenet[1:] or [None])
        networks[RADIMAGENET] = features.RadImageNetFeatures(state, str(path), run.device)
        told["RadImageNet"] = f"ResNet-50, {path.name}, SHA-256 {digest}"
    return networks, told


def read_classifier(paths: Sequence[Path] | None, run: Run) -> torch.nn.Module | None:
    """The classifier of a definition and its weights."""
    if not paths:
        return None
    definition, weights = paths
    network = instantiate(read_json(definition, "classifier"), NETWORKS, str(definition))
    load_weights(network, load_checkpoint(weights)["model"], str(weights))
    return network.to(run.device).eval().requires_grad_(False)


# ---------------------------------------------------------------- reading


def volumes_of(source: Source, read: Reader, run: Run) -> Iterator[tuple[Case, torch.Tensor]]:
    """The volumes of a set in an order drawn by its size alone, since neighbours in a folder may be scans of
    one subject, and MS-SSIM is taken of neighbours. What cannot be read is left out, and listed."""
    order = torch.randperm(len(source.cases), generator=stream(0, "evaluation", source.name)).tolist()
    for i in progress_bar(run, source.name, items=order, unit="volume"):
        case = source.cases[i]
        try:
            volume = read(case)
        except UserError as error:
            source.left_out[case.name] = str(error)
            continue
        yield case, volume
    if len(source.left_out) == len(source.cases):
        raise UserError(
            f"{source.folder}: no {source.name} volume can be used. {next(iter(source.left_out.values()))}"
        )


@torch.inference_mode()
def gather(
    inputs: Inputs, read: Reader, networks: dict, encoder: Autoencoder | None, classifier, run: Run
) -> tuple[Sets, dict[str, list[tuple[str, np.ndarray]]]]:
    """Read all volumes once (those of the 2.5D distance twice); and keep a few of each set to be looked at,
    (name, (D, H, W))."""
    spectrum = metrics.RadialSpectrum(read.size)
    yardsticks = Yardsticks(networks, encoder.reconstruct if encoder else None)
    gathered, shown = {}, {}
    measured = TRAINING if TRAINING in inputs.sources else HELD_OUT
    for name, source in inputs.sources.items():
        chosen = set(sorted(case.name for case in source.cases)[:SHOWN])
        one = gathered[name] = VolumeSet(
            name, networks, spectrum, read.way.spacing, len(source.cases), classifier
        )
        shown[name] = []
        for number, (case, volume) in enumerate(volumes_of(source, read, run)):
            first = name == TRAINING or number % 2 == 0  # of the floor
            if name == measured and first and yardsticks.count < YARDSTICKS:
                yardsticks.add(volume)
            if name == HELD_OUT and encoder:
                one.add_reconstruction(encoder.reconstruct(volume), volume)
            one.add(case.name, volume, case.subject)
            if case.name in chosen:
                shown[name].append((case.name, volume[0, 0].cpu().numpy()))
        shown[name].sort(key=lambda item: item[0])
    sets = Sets(gathered[HELD_OUT], gathered[GENERATED], gathered.get(TRAINING), yardsticks)
    if RADIMAGENET in networks:  # how many volumes stand on each side is known only now
        for side, (one, of) in sets.sides.items():
            cases = {case.name: case for case in inputs.sources[one.name].cases}
            for i in progress_bar(run, f"slices of {one.name}", items=of, unit="volume"):
                sets.add_slices(side, read(cases[one.names[i]]))
    return sets, shown


# ---------------------------------------------------------------- the page


def closest_pairs(sets: Sets, nearest: dict | None, inputs: Inputs, read: Reader) -> list[dict]:
    """The samples that lie closest to a training scan, with both volumes, the closest first."""
    if nearest is None:
        return []
    cases = {name: {case.name: case for case in source.cases} for name, source in inputs.sources.items()}
    verdict = nearest["verdict"]
    order = sorted(range(len(sets.generated)), key=lambda i: nearest[GENERATED][i].distance)
    pairs = []
    for i in order[:PAIRS_SHOWN]:
        neighbour = nearest[GENERATED][i]
        sample, scan = sets.generated.names[i], sets.training.names[neighbour.index]
        a, b = (
            read(cases[name][case])[0, 0].cpu().numpy()
            for name, case in ((GENERATED, sample), (TRAINING, scan))
        )
        pairs.append(
            {
                "generated": sample,
                "training": scan + " (mirrored)" * neighbour.mirrored,
                "distance": neighbour.distance,
                "limit": verdict.limit,
                "flagged": bool(verdict.copies[i]),
                "volumes": (a, b[::-1] if neighbour.mirrored else b),
            }
        )
    return pairs


def nearest_of_each(sets: Sets, nearest: dict | None) -> list[dict]:
    """For metrics.json: each sample and its nearest training scan, the closest first."""
    if nearest is None:
        return []
    rows = [
        {
            "generated": name,
            "training": sets.training.names[neighbour.index],
            "distance": neighbour.distance,
            "mirrored": neighbour.mirrored,
            "copy": bool(copy),
        }
        for name, neighbour, copy in zip(
            sets.generated.names, nearest[GENERATED], nearest["verdict"].copies, strict=True
        )
    ]
    return sorted(rows, key=lambda row: row["distance"])


def curves_of(sets: Sets) -> list[dict]:
    """Mean spectra and histograms of each set, between the 5th and 95th percentile over volumes."""
    kinds = (
        (
            "Power spectrum",
            "frequency (cycles a voxel)",
            "power",
            True,
            sets.held_out.spectrum.frequencies,
            "spectra",
        ),
        (
            "Intensities of the foreground",
            "intensity (unit range)",
            "share of the voxels",
            False,
            (np.arange(metrics.BINS) + 0.5) / metrics.BINS,
            "histograms",
        ),
    )
    curves = []
    for title, x, y, logarithmic, at, key in kinds:
        series = []
        for one in sets.present:
            rows = np.array(getattr(one, key))
            low, high = np.quantile(rows, [0.05, 0.95], axis=0)
            series.append(
                {
                    "name": one.name,
                    "x": at.tolist(),
                    "y": rows.mean(0).tolist(),
                    "low": low.tolist(),
                    "high": high.tolist(),
                }
            )
        curves.append({"title": title, "x": x, "y": y, "log": logarithmic, "series": series})
    return curves


def spreads_of(sets: Sets, nearest: dict | None) -> list[dict]:
    """Tissue volumes, and distances to the nearest training scan, of each volume."""
    spreads = [
        {
            "title": f"{name.capitalize()} volume" if name == "foreground" else f"{name.capitalize()} tissue",
            "x": "ml",
            "groups": {
                one.name: rows.finite([getattr(tissues, name) for tissues in one.tissues]).tolist()
                for one in sets.present
            },
        }
        for name in ("foreground", *metrics.TISSUES)
    ]
    if nearest:
        groups = {name: [neighbour.distance for neighbour in nearest[name]] for name in (HELD_OUT, GENERATED)}
        spreads.append({"title": "Distance to the nearest training scan", "x": "distance", "groups": groups})
    return spreads


# ---------------------------------------------------------------- the script


@utils.command
def main(argv: Sequence[str] | None = None) -> None:
    # Step 0: what there is
    args = parse_arguments(argv)
    run = utils.start(args)
    if run.world_size > 1:
        raise UserError("evaluate.py is one process: start it without torchrun.")
    inputs = find_inputs(args, run)
    sources, made = inputs.sources, inputs.sources[GENERATED]
    findings = take_out_scans(sources)

    # Step 1: one grid for all, and networks that look at it
    way = preprocessing_for(inputs, args.channel)
    encoder = load_autoencoder(inputs.autoencoder, inputs.config, run) if inputs.autoencoder else None
    divisor = downsampling_factor(inputs.config["autoencoder_def"]) if encoder else 1
    size = volume_size(made.cases, way.spacing, divisor)
    networks, settings = feature_networks(args, encoder, run)
    classifier = read_classifier(args.classifier, run)
    notes = [
        *inputs.notes,
        *(note for source in sources.values() for note in geometry_notes(source, way, size)),
    ]
    read = Reader(way, size, run.device)

    # Step 2: read every volume once
    sets, shown = gather(inputs, read, networks, encoder, classifier, run)
    for source in sources.values():
        notes += [f"{source.name}: left out: {reason}" for reason in source.left_out.values()]

    # Step 3: figures, and what they say
    nearest = rows.nearest_training_volumes(
        sets, run.device, lambda items: progress_bar(run, "nearest training scan", items=items, unit="volume")
    )
    figures = rows.all_figures(sets, nearest)
    counts = {one.name: len(one) for one in sets.present}
    lines = [*findings, *verdicts(figures, nearest, counts)]

    # Step 4: metrics.json and report.html
    sampling = records.settings_of(inputs.records)
    told = [
        f"{one['volumes']} by {one['sampler']}, {one['steps']} steps, {one['precision']}, scale factor "
        f"{one['scale_factor']:.4g}"
        for one in sampling
    ]
    if told:
        settings["samples"] = "; ".join(told)
    if len(sampling) > 1:
        notes.append(f"{GENERATED}: drawn with different settings: {'; '.join(told)}.")
    digest = sha256_of(inputs.autoencoder) if inputs.autoencoder else None
    if digest:
        settings["autoencoder"] = f"{inputs.autoencoder.name}, SHA-256 {digest}"
    content = {
        "format": 1,
        "title": f"{Path(made.folder).name} beside {Path(sources[HELD_OUT].folder).name}",
        "made": datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        "sets": {name: {"folder": sources[name].folder, "volumes": count} for name, count in counts.items()},
        "verdicts": lines,
        "figures": [figure.plain() for figure in figures],
        "settings": {
            "grid": f"{' x '.join(map(str, size))} voxels of {' x '.join(f'{s:g}' for s in way.spacing)} mm",
            "channels": ", ".join(map(str, way.channels)),
            "intensities": f"{way.intensity} become 0 and 1",
            "intervals": "95 %, by drawing volumes anew",
            "precision": f"all networks compute in {run.precision}",
            **settings,
            "versions": ", ".join(f"{key} {value}" for key, value in versions.versions().items() if value),
            "machine": f"{platform.system()}, {run.device}",
        },
        "notes": notes,
        "nearest": nearest_of_each(sets, nearest),
        "autoencoder_sha256": digest,
        "unet_sha256": inputs.records[0]["unet"]["sha256"] if inputs.records else None,
        "sampling": sampling,
    }
    write_report(
        inputs.out / "report.html",
        content,
        spacing=way.spacing,
        shown=shown,
        pairs=closest_pairs(sets, nearest, inputs, read),
        curves=curves_of(sets),
        spreads=spreads_of(sets, nearest),
        log=inputs.log,
    )
    write_json(inputs.out / "metrics.json", content)
    for line in lines:
        run.say(f"{TOLD[line['tone']]:>7}  {line['text']}")
    for note in notes:
        run.say(f"   note  {note}")
    run.say(f"evaluation: {inputs.out / 'metrics.json'}\n  {inputs.out / 'report.html'}")


if __name__ == "__main__":
    main()
