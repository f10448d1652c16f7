"""How good are a model's samples, and are they copies of the scans it was trained on? A table and a page.

    python evaluate.py -c config/config_train_16g.json -e config/environment.json
    python evaluate.py --real held_out --generated samples --train training --autoencoder autoencoder.pt \\
        --out report
    python evaluate.py --real held_out --generated samples --out report
    python evaluate.py -c CONFIG -e ENV --medicalnet resnet_50_23dataset.pth --radimagenet RadImageNet.pth

With -c and -e, held-out and training scans are those of the run's split, features those of its autoencoder,
and samples those in `output_dir` that inference.py generated with the checkpoints now in `model_dir`, by
their records; other volumes there are left out and listed. Any group can be named instead, as a folder in any
layout of docs/data.md or a list: --real for scans that were not trained on, --generated for samples of one
model, --train for scans that were trained on. Samples that are files of the scans are left out, which the
page says first. Without training scans, copies are not searched for, anatomy is not compared, and the
real-vs-real baseline compares two halves of the held-out scans. Without an autoencoder there are no distances
in own features.

All volumes are brought to the grid of the samples and to the unit range: scans as `intensity` says, samples
of inference.py by the limits in their records. Volumes that cannot be read or are constant are left out and
listed.

Weights of published networks are local files, optionally followed by their SHA-256 or its first digits:
MedicalNet's ResNet-10 or 50 for the 3D FID, RadImageNet's ResNet-50 for the 2.5D FID. A classifier for the
Inception Score is a JSON file such as
{"_target_": "monai.networks.nets.DenseNet121", "spatial_dims": 3, "in_channels": 1, "out_channels": 2}
and a file with its weights.

Samples that were asked for by --condition are compared with that: numbers with the size of each --structure,
such as ventricles=0:0.35:24 (values from 0 to 0.35 of the unit range, at least 24 mm inside the foreground)
or ventricles=label:3 (as --segmenter finds it, or else as volumes `with_labels` have it; structures of
`conditions.structure_sizes` need not be named), categories with the scans that have them, by
participants.tsv.

Label maps of a model without images are compared with real ones by sizes, parts and overlap.

--segmentation asks whether samples with labels are of use: a small network is trained to segment on them, on
as many training scans and on both, for the same number of steps, and Dice is measured on held-out scans. It
keeps the network that was trained on scans as segmenter.safetensors. --segmenter FILE then says how well the
labels of samples fit what it finds in their images.

Writes to --out: metrics.json, all metrics with confidence intervals and real-vs-real baselines, and each
sample's nearest training scan; report.html, one page with pictures for any browser. docs/evaluation.md
explains the metrics.

Exit codes: 0 done, whatever the result; 1 failed at run time; 2 wrong usage or input.
"""

import argparse
import contextlib
import datetime
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import utils
from ldm import UserError, configs
from ldm.data.cases import rounded, volume_size
from ldm.data.label_names import label_names
from ldm.data.labels import as_label_maps, values_in
from ldm.data.layouts import find_cases
from ldm.data.prepare import prepare_data
from ldm.data.preprocessing import Preprocessing
from ldm.data.reading import ras_geometry
from ldm.data.splits import SPLIT
from ldm.evaluation import content, label_maps, reading, segmentation, table
from ldm.evaluation.anatomy import SmoothedVolumes
from ldm.evaluation.asked import LabelStructure, Structure, condition_metrics, known_values
from ldm.evaluation.features import ANATOMY, feature_networks
from ldm.evaluation.groups import GENERATED, HELD_OUT, TRAINING
from ldm.evaluation.reading import Source
from ldm.evaluation.report import write_report
from ldm.evaluation.segmentation import Segmenter, load_segmenter, save_segmenter
from ldm.evaluation.verdicts import verdicts
from ldm.export import records
from ldm.models.definitions import NETWORKS, downsampling_factor, instantiate
from ldm.models.weights import load_weights
from ldm.system import versions
from ldm.system.checkpoints import load_checkpoint
from ldm.system.files import read_json, sha256_of, write_json
from ldm.system.messages import progress_bar
from ldm.system.ranks import Run
from ldm.training.latents import load_autoencoder
from ldm.training.logs import read_log

SEGMENTER = "segmenter.safetensors"
OF_IMAGES = ("channel", "medicalnet", "radimagenet", "classifier", "segmenter", "segmentation")  # options
TONES = {"good": "good", "warn": "caution", "bad": "bad", "none": "unclear"}  # as printed


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-c", "--config-file", help="the config of the training")
    add("-e", "--environment-file", help="its environment file")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config key")
    add("--real", type=Path, metavar="DIR", help="scans that were not trained on")
    add("--generated", type=Path, metavar="DIR", help="samples")
    add("--train", type=Path, metavar="DIR", help="scans that were trained on")
    add("--autoencoder", type=Path, metavar="FILE", help="default: model_dir/autoencoder.pt")
    add("--channel", type=int, nargs="+", help="channels of the scans, from 0; default: the config's")
    weights = {"nargs": "+", "metavar": ("FILE", "SHA256")}
    add("--medicalnet", help="weights for the 3D FID", **weights)
    add("--radimagenet", help="weights for the 2.5D FID", **weights)
    classifier = {"type": Path, "nargs": 2, "metavar": ("JSON", "WEIGHTS")}
    add("--classifier", help="for the Inception Score", **classifier)
    add(
        "--structure",
        action="append",
        default=[],
        metavar="NAME=LOW:HIGH:DEPTH",
        help="to measure by thresholds, or by NAME=label:VALUE,...",
    )
    add("--segmenter", type=Path, metavar="FILE", help="that --segmentation wrote")
    add(
        "--segmentation",
        type=int,
        nargs="?",
        const=segmentation.STEPS,
        metavar="STEPS",
        help=f"train segmenters on samples and on scans; default: {segmentation.STEPS} steps each",
    )
    add("--out", type=Path, metavar="DIR", help="default with -e: output_dir/evaluation")
    add("--device", help="cpu or cuda; default: cuda where available")
    args = parser.parse_args(argv)
    if bool(args.config_file) != bool(args.environment_file):
        raise UserError("-c and -e: give both.")
    if not args.environment_file and not (args.real and args.generated and args.out):
        raise UserError("give the run by -c and -e, or --real, --generated and --out.")
    if args.set and not args.config_file:
        raise UserError("--set: overrides a config; give one by -c.")
    for name in ("medicalnet", "radimagenet"):
        if len(getattr(args, name) or []) > 2:
            raise UserError(f"--{name}: expected a file and, optionally, its SHA-256.")
    utils.find_files(
        autoencoder=[args.autoencoder],
        medicalnet=(args.medicalnet or [])[:1],
        radimagenet=(args.radimagenet or [])[:1],
        classifier=args.classifier or [],
        segmenter=[args.segmenter],
    )
    if args.segmentation is not None and args.segmentation < 1:
        raise UserError(f"--segmentation {args.segmentation}: expected at least 1 step.")
    args.gpus, args.amp = None, False
    return args


@dataclass
class Inputs:
    """What is evaluated. `config` is None without a run and an autoencoder; `checkpoint` is the content of
    the file `autoencoder`; `records` are those of the samples that have one."""

    sources: dict[str, Source]
    config: dict | None
    autoencoder: Path | None
    checkpoint: dict | None
    log: list[dict]
    out: Path
    records: list[dict]
    notes: list[str]


def find_inputs(args: argparse.Namespace, run: Run) -> Inputs:
    """The volumes, the autoencoder and the log, of the run or as named.

    Raises:
        UserError: something is missing, or `--out` holds an evaluation already.
    """
    environment = utils.load_environment(args.environment_file) if args.environment_file else None
    config = utils.load_config(args.config_file, args.set) if args.config_file else None
    autoencoder = utils.autoencoder_path(args, environment) if environment else args.autoencoder
    log = read_log(environment["model_dir"] / "train_log.jsonl") if environment else []
    checkpoint = load_checkpoint(autoencoder, "autoencoder") if autoencoder else None
    needs_split = bool(environment) and not (args.real and args.train)
    if checkpoint and (config is None or not config["spacing"]):
        if "config" in checkpoint:
            trained = configs.completed(checkpoint["config"])
            config = {**config, "spacing": trained["spacing"], "longest_side": None} if config else trained
        elif not needs_split:
            raise UserError(
                f"{autoencoder}: holds weights alone. Give their config, with a spacing, by -c and -e."
            )
    alone = bool(config) and config["with_labels"] == configs.ONLY
    if alone and (given := [one for one in OF_IMAGES if getattr(args, one) is not None]):
        raise UserError(f"--{given[0]}: is for images; this is a model of label maps alone. Leave it out.")
    split = dict.fromkeys((TRAINING, HELD_OUT))
    if needs_split:
        known = {"autoencoder": autoencoder, "known": checkpoint.get("subjects")}
        known["labels"] = bool(args.segmentation or args.segmenter)
        *sides, spacing = prepare_data(config, environment, run, for_training=False, test=True, **known)
        split, config = dict(zip(split, sides, strict=True)), configs.with_spacing(config, spacing)
    out = args.out or environment["output_dir"] / "evaluation"
    for name in ("metrics.json", "report.html", SEGMENTER):
        if (out / name).exists():
            raise UserError(f"{out / name} exists. Give another folder by --out, or move it away.")
    sources, notes = {}, []
    unet = environment["model_dir"] / "diffusion_unet.pt" if environment else None
    for name, folder in ((HELD_OUT, args.real), (GENERATED, args.generated), (TRAINING, args.train)):
        if folder:
            training, held_out = find_cases(folder, label_maps=alone, log=run.print)
            sources[name] = Source(name, str(folder), [*training, *held_out])
        elif name == GENERATED:
            sources[name], found, others = reading.samples_of_model(
                environment["output_dir"], autoencoder, unet
            )
            if alone:
                sources[name].cases = as_label_maps(sources[name].cases)
        elif split[name]:
            sources[name] = Source(name, str(environment["data_base_dir"]), split[name])
            notes += reading.split_notes(environment["model_dir"] / SPLIT, sources[name])
    if args.generated:
        found, others = reading.check_named_samples(sources[GENERATED], unet)
    return Inputs(sources, config, autoencoder, checkpoint, log, out, found, [*others, *notes])


def values_of(inputs: Inputs) -> dict[str, dict[str, dict]]:
    """By group and volume: what a sample was asked for, by its record; the covariates of a scan."""
    values = {
        name: {case.name: known_values(case.covariates) for case in source.cases}
        for name, source in inputs.sources.items()
    }
    for case in inputs.sources[GENERATED].cases:
        record = None
        with contextlib.suppress(UserError):  # a damaged one is listed when its volume is read
            record = records.record_of(case.images[0])
        values[GENERATED][case.name] = known_values((record or {}).get("condition", {}))
    return values


def preprocessing_of(inputs: Inputs, channels: list[int] | None) -> Preprocessing:
    """The config's, or onto the grid of the first sample."""
    if inputs.config:
        preprocessing = Preprocessing.from_config(inputs.config)
    else:
        _, spacing = ras_geometry(inputs.sources[GENERATED].cases[0].images[0])
        preprocessing = Preprocessing((0,), tuple(map(rounded, spacing)))
    if channels is None:
        return preprocessing
    expected = len(preprocessing.channels)
    if len(channels) != expected and inputs.config:
        raise UserError(f"--channel: {len(channels)} given; the autoencoder has {expected} channel(s).")
    return replace(preprocessing, channels=tuple(channels))


def sized_structures(config: dict | None, named: Sequence, found: bool) -> list[LabelStructure]:
    """The structures of `conditions.structure_sizes` that `--structure` does not name, where volumes have
    labels or a segmenter finds them (`found`)."""
    if config is None or not (found or config["with_labels"]):
        return []
    names = {one.name for one in named}
    sizes = config["conditions"]["structure_sizes"].items()
    known = {value for _, values in sizes for value in values} if found else {*configs.labels_of(config)}
    return [
        LabelStructure(name, values) for name, values in sizes if name not in names and known >= {*values}
    ]


def segmentation_metrics(inputs: Inputs, read: reading.Reader, steps: int, run: Run) -> list[table.Metric]:
    """Dice of segmenters trained on samples, scans and both; writes segmenter.safetensors."""
    cases = inputs.sources[HELD_OUT].cases
    values = read.preprocessing.labels or values_in(cases)
    if not values:
        raise UserError("--segmentation: the labels of the held-out scans are 0 everywhere.")
    metrics, segmenter = segmentation.utility(inputs.sources, read, values, label_names(cases), steps, run)
    inputs.out.mkdir(parents=True, exist_ok=True)
    save_segmenter(inputs.out / SEGMENTER, segmenter, read.preprocessing.spacing)
    return metrics


def read_segmenter(path: Path | None, preprocessing: Preprocessing, run: Run) -> Segmenter | None:
    """The segmenter of `--segmenter`."""
    if path is None:
        return None
    return load_segmenter(path, len(preprocessing.channels), preprocessing.spacing, run)


def read_classifier(paths: Sequence[Path] | None, run: Run) -> torch.nn.Module | None:
    """The classifier, frozen, from its definition and weights."""
    if not paths:
        return None
    definition, weights = paths
    network = instantiate(read_json(definition, "classifier"), NETWORKS, str(definition))
    load_weights(network, load_checkpoint(weights)["model"], str(weights))
    return network.to(run.device).eval().requires_grad_(False)


@utils.command
def main(argv: Sequence[str] | None = None) -> None:
    # Step 0: inputs
    args = parse_arguments(argv)
    run = utils.start(args)
    if run.world_size > 1:
        raise UserError("evaluate.py runs in one process: start it without torchrun.")
    structures = [Structure.parse(text) for text in args.structure]
    inputs = find_inputs(args, run)
    structures += sized_structures(inputs.config, structures, bool(args.segmenter))
    sources, notes = inputs.sources, inputs.notes
    lines = reading.remove_scans(sources)
    if inputs.config and inputs.config["with_labels"] == configs.ONLY:
        return judge_label_maps(inputs, structures, lines, run)
    if args.segmentation:
        segmentation.check_labels(sources)

    # Step 1: one grid for all volumes, and the networks
    preprocessing = preprocessing_of(inputs, args.channel)
    encoder, divisor = None, 1
    if inputs.autoencoder:
        encoder = load_autoencoder(inputs.autoencoder, inputs.config, run, checkpoint=inputs.checkpoint)
        divisor = downsampling_factor(inputs.config["autoencoder_def"])
    size = volume_size(sources[GENERATED].cases, preprocessing.spacing, divisor)
    networks, about_networks = feature_networks(encoder, args.medicalnet, args.radimagenet, run.device)
    networks[ANATOMY] = SmoothedVolumes(preprocessing.spacing)
    classifier = read_classifier(args.classifier, run)
    for source in sources.values():
        notes += reading.resampling_notes(source, preprocessing, size)

    # Step 2: read every volume once
    read = reading.Reader(preprocessing, size, run.device)
    segmenter = read_segmenter(args.segmenter, preprocessing, run)
    structures = [
        one.found_by(segmenter, preprocessing.labels) if isinstance(one, LabelStructure) else one
        for one in structures
    ]
    measured = {one.name: one.millilitres for one in structures}
    groups, examples = reading.read_groups(sources, read, networks, encoder, classifier, run, measured)
    counts = {group.name: len(group) for group in groups.groups}
    for source in sources.values():
        notes += [f"{source.name}: left out: {reason}" for reason in source.left_out.values()]

    # Step 3: metrics and conclusions
    nearest = table.nearest_training_volumes(
        groups,
        run.device,
        lambda items: progress_bar(run, "nearest training scan", items=items, unit="volume"),
    )
    metrics = table.all_metrics(groups, nearest) + condition_metrics(groups, values_of(inputs))
    if segmenter:
        names = label_names(sources[HELD_OUT].cases)
        metrics += (rows := segmentation.agreement(sources, read, segmenter, names, run))
        if not rows:
            notes.append("samples or held-out scans have no labels to compare with what the segmenter finds.")
    if args.segmentation:
        metrics += segmentation_metrics(inputs, read, args.segmentation, run)
    lines += verdicts(metrics, nearest, counts)

    # Step 4: metrics.json and report.html
    scans = content.nearest_scans(groups, nearest)
    pictures = {
        "examples": examples,
        "pairs": content.closest_pairs(scans, nearest, sources, read),
        "curves": content.curves(groups),
        "distributions": content.distributions(groups, nearest),
    }
    write_results(inputs, read, about_networks, counts, metrics, lines, scans, pictures, run)


def judge_label_maps(inputs: Inputs, structures: list, lines: list[dict], run: Run) -> None:
    """Evaluate label maps without images: the same steps."""
    # Step 1: one grid
    config, sources = inputs.config, inputs.sources
    preprocessing, encoder, divisor = Preprocessing.from_config(config), None, 1
    if inputs.autoencoder:
        encoder = load_autoencoder(inputs.autoencoder, config, run, checkpoint=inputs.checkpoint)
        divisor = downsampling_factor(config["autoencoder_def"])
    size = volume_size(sources[GENERATED].cases, preprocessing.spacing, divisor)
    for source in sources.values():
        inputs.notes += reading.resampling_notes(source, preprocessing, size)

    # Step 2: read every map once
    read, labels = reading.Reader(preprocessing, size, run.device), preprocessing.labels
    known = label_names(sources[HELD_OUT].cases)
    names = {value: known.get(value, f"label {value}") for value in labels}
    if any(isinstance(one, Structure) for one in structures):
        raise UserError("--structure: label maps have no intensities. Name values, as in ventricles=label:3.")
    measured = [*(LabelStructure(name, (value,)) for value, name in names.items()), *structures]
    measured = {one.name: one.found_by(None, labels).values for one in measured}
    groups, examples = label_maps.read_maps(sources, read, measured, encoder, run)
    for source in sources.values():
        inputs.notes += [f"{source.name}: left out: {reason}" for reason in source.left_out.values()]

    # Step 3: metrics and conclusions
    nearest = label_maps.nearest_maps(groups, len(labels), run)
    metrics = label_maps.map_metrics(groups, nearest, names) + condition_metrics(groups, values_of(inputs))
    counts = {group.name: len(group) for group in groups.groups}
    lines += label_maps.map_verdicts(metrics, nearest, counts)

    # Step 4: metrics.json and report.html
    maps = content.nearest_scans(groups, nearest)
    pictures = {
        "examples": examples,
        "pairs": content.closest_pairs(maps, nearest, sources, label_maps.as_pictures(read)),
        "curves": [],
        "distributions": label_maps.size_charts(groups, nearest),
    }
    write_results(inputs, read, {}, counts, metrics, lines, maps, pictures, run)


def write_results(
    inputs: Inputs,
    read: reading.Reader,
    about_networks: dict,
    counts: dict[str, int],
    metrics: list[table.Metric],
    lines: list[dict],
    nearest: list[dict],
    pictures: dict,
    run: Run,
) -> None:
    """Write metrics.json and report.html, and print the conclusions.

    Args:
        counts: volumes of each group.
        nearest: each sample and its nearest training scan.
        pictures: arguments of `write_report`.
    """
    sources, notes, preprocessing, size = inputs.sources, inputs.notes, read.preprocessing, read.size
    digest = sha256_of(inputs.autoencoder) if inputs.autoencoder else None
    sampling = records.settings_of(inputs.records)
    samplers = "; ".join(
        f"{one['volumes']} by {one['sampler']}, {one['steps']} steps, {one['precision']}, scale factor "
        f"{one['scale_factor']:.4g}"
        + (f", {one['condition']}, guidance {one['guidance']:g}" if one["condition"] else "")
        for one in sampling
    )
    if len(sampling) > 1:
        notes.append(f"{GENERATED}: generated with different settings: {samplers}.")
    settings = {
        "grid": f"{' x '.join(map(str, size))} voxels of "
        f"{' x '.join(f'{side:g}' for side in preprocessing.spacing)} mm",
        "channels": ", ".join(map(str, preprocessing.channels)),
        "labels": ", ".join(map(str, preprocessing.labels)),
        "intensities": f"{preprocessing.intensity} become 0 and 1" if preprocessing.channels else "",
        "intervals": "95 %, by bootstrap over volumes",
        "precision": f"all networks compute in {run.precision}",
        **about_networks,
        "samples": samplers,
        "autoencoder": f"{inputs.autoencoder.name}, SHA-256 {digest}" if digest else "",
        "versions": ", ".join(f"{key} {value}" for key, value in versions.versions().items() if value),
        "machine": f"{platform.system()}, {run.device}",
    }
    results = {
        "format": 1,
        "title": f"{Path(sources[GENERATED].folder).name} vs {Path(sources[HELD_OUT].folder).name}",
        "made": datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        "sets": {name: {"folder": sources[name].folder, "volumes": count} for name, count in counts.items()},
        "verdicts": lines,
        "figures": [metric.as_json() for metric in metrics],
        "settings": {key: value for key, value in settings.items() if value},
        "notes": notes,
        "nearest": nearest,
        "autoencoder_sha256": digest,
        "unet_sha256": inputs.records[0]["unet"]["sha256"] if inputs.records else None,
        "sampling": sampling,
    }
    write_report(
        inputs.out / "report.html",
        results,
        spacing=preprocessing.spacing,
        **pictures,
        log=inputs.log,
    )
    write_json(inputs.out / "metrics.json", results)
    for line in lines:
        run.print(f"{TONES[line['tone']]:>7}  {line['text']}")
    for note in notes:
        run.print(f"   note  {note}")
    run.print(f"evaluation: {inputs.out / 'metrics.json'}\n  {inputs.out / 'report.html'}")


if __name__ == "__main__":
    main()
