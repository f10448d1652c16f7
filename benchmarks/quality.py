"""Quality over time: two trainings of the same wall time, judged by the own-feature distance of their volumes
to held-out ones.

Both start from the same autoencoder and the same initial UNet, and take turns. The reference learns to
predict noise by Adam at the config's learning rate (the tutorial's 1e-5 would learn nothing in this time) and
batch size, with neither warm-up nor average; this project does what the config says, and the time in which it
encodes the data counts. Drawing and judging do not.
"""

import copy
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import DataLoader

import utils
from benchmarks import measure, project, reference
from ldm import generation
from ldm.evaluation.distances import KernelDistance, interval
from ldm.evaluation.features import AutoencoderFeatures, FeatureSpace, rows_of
from ldm.models.autoencoder import Autoencoder
from ldm.system.ranks import Run

SLICES = 24
MARKS = (2, 4, 8, 12, 16, 24)  # slices after which volumes are drawn
SAMPLER_STEPS = (5, 10, 15, 20, 30)
TIMED = 5  # volumes, of which the median time is taken


def endless(loader: DataLoader) -> Iterator[dict]:
    """The batches of epoch after epoch."""
    for epoch in itertools.count():
        loader.batch_sampler.epoch = epoch
        yield from loader


@dataclass
class Arm:
    """One of the trainings.

    Args:
        step: takes a batch.
        batches: without end.
        networks: what `generation.draw` takes, of the weights that this training would keep.
        flags: of torch, see `measure.read_flags`.
        begin: called with the seconds that were trained, before each slice.
        seconds: trained so far, preparation included.
    """

    step: Callable[[dict], None]
    batches: Iterator[dict]
    networks: generation.Networks
    flags: tuple
    begin: Callable[[float], None] = lambda seconds: None
    seconds: float = 0.0
    steps: int = 0
    marks: list[dict] = field(default_factory=list)

    def train_until(self, seconds: float, device: torch.device) -> None:
        """Go on until `seconds` of training in all."""
        self.begin(self.seconds)
        self.networks.unet.train()
        measure.write_flags(self.flags)
        before, start = self.seconds, time.monotonic()
        while self.seconds < seconds:
            self.step(next(self.batches))
            self.steps += 1
            self.seconds = before + time.monotonic() - start
        measure.synchronise(device)
        self.seconds = before + time.monotonic() - start


def draw(networks: generation.Networks, count: int, sampler: str, steps: int, run: Run, batch: int = 8):
    """Volumes of the seeds 0 .. count - 1, (count, C, D, H, W), as inference.py draws them."""
    networks.unet.eval()
    with torch.inference_mode():
        parts = [
            generation.draw(networks, range(first, min(first + batch, count)), sampler, steps, run)
            for first in range(0, count, batch)
        ]
    return torch.cat(parts).clone()


@torch.no_grad()
def draw_reference(networks: generation.Networks, count: int, device, batch: int = 8) -> torch.Tensor:
    """The same by the reference's 1000 steps."""
    volumes = []
    for first in range(0, count, batch):
        seeds = range(first, min(first + batch, count))
        latents = reference.draw_latents(networks.unet, networks.latent_shape, seeds, reference.STEPS, device)
        for latent in latents.split(1):
            volumes.append(
                reference.decode(networks.autoencoder.network, latent, networks.scale_factor).cpu()
            )
    return torch.cat(volumes)


def build_arms(config: dict, encoder: Autoencoder, train, source, minutes: float, flags, run: Run) -> dict:
    """Both trainings, before their first step.

    Args:
        train: volumes in memory, for the reference.
        source: the same for this project, `train` or, where the config augments them, as they come.
        flags: of torch, by side.
    """
    section, shape = {**config["diffusion_train"], "max_minutes": minutes}, train.images.shape[2:]
    config = {**config, "diffusion_train": section}
    torch.manual_seed(config["seed"])
    unet = reference.define_network(config, "diffusion_def", run)
    weights = copy.deepcopy(unet.state_dict())

    loader = utils.make_loader(train, section, config, run, workers=0)
    theirs = reference.Diffusion(
        encoder.network, unet, next(iter(loader))["image"], section["lr"], run.device
    )
    their_process = reference.noise_process()
    latent_shape = list(theirs.latent_shape)
    arms = {
        "reference": Arm(
            theirs.step,
            endless(loader),
            project.sampling_networks(encoder, theirs.scale_factor, unet, their_process, latent_shape, shape),
            flags["reference"],
        )
    }

    start = time.monotonic()
    ours = project.Diffusion(config, encoder, source, run, weights)
    prepared = time.monotonic() - start
    arms["ours"] = Arm(
        ours.step,
        endless(utils.make_loader(ours.dataset, section, config, run, 0 if source.versions else None)),
        project.sampling_networks(
            encoder, ours.scale_factor, ours.learner.network, ours.process, latent_shape, shape
        ),
        flags["ours"],
        ours.resume_clock,
        prepared,
    )
    return arms


def told(distance: KernelDistance) -> dict:
    """A distance with its 90 % interval."""
    low, high = interval(distance.bootstrap(), 0.9)
    return {"distance": distance.value, "low": low, "high": high}


def compare(
    config: dict,
    encoder: Autoencoder,
    train,
    held_out,
    source,
    minutes: float,
    samples: int,
    reference_steps: int,
    flags: dict,
    run: Run,
) -> dict:
    """Train both for `minutes` each, and judge `samples` volumes of each on the way.

    Args:
        train, held_out: volumes in memory.
        source: see `build_arms`.
        reference_steps: of the 1000, by which the time of a volume of the reference is told.

    Returns:
        "floor" and "reconstructions" (of training volumes), "marks" of both, "end" of the reference by its
        own 1000 steps, "by_steps" of ours, each as `told`; "difference" of ours by its default sampler and
        "end", 90 % interval; "reached": the share of the time after which ours
        is no worse than the reference at its end, or None; "speedup" of a volume no worse than its, or None.
    """
    device, plain = run.device, Run(0, 1, run.device)  # volumes are drawn as inference.py draws by default
    network = AutoencoderFeatures(encoder)
    space = FeatureSpace(rows_of(network, train.images))
    real = space(rows_of(network, held_out.images))

    def judged(volumes: torch.Tensor) -> KernelDistance:
        return KernelDistance(space(rows_of(network, volumes)), real)

    with torch.no_grad():
        again = torch.cat([encoder.reconstruct(x.to(device)).cpu() for x in train.images.split(1)])
    result = {
        "minutes": minutes,
        "samples": samples,
        "batch_size": config["diffusion_train"]["batch_size"],
        "lr": config["diffusion_train"]["lr"],
        "training": len(train),
        "held_out": len(held_out),
        "floor": told(judged(train.images)),
        "reconstructions": told(judged(again)),
    }
    arms = build_arms(config, encoder, train, source, minutes, flags, run)
    for number in range(1, SLICES + 1):
        for name, arm in arms.items():
            arm.train_until(60 * minutes * number / SLICES, device)
            if number in MARKS:
                measure.write_flags(flags["inference"])
                sampler, steps = project.default_sampler(arm.networks.process)
                score = told(judged(draw(arm.networks, samples, sampler, steps, plain)))
                about = {"seconds": arm.seconds, "steps": arm.steps, "sampler": f"{sampler} {steps}"}
                arm.marks.append({"share": number / SLICES, **about, **score})
                run.say(f"{name}: {about['seconds']:.0f} s, {arm.steps} steps, {score['distance']:.4g}")

    measure.write_flags(flags["reference"])
    theirs, ours = arms["reference"].networks, arms["ours"].networks
    result["marks"] = {name: arm.marks for name, arm in arms.items()}
    end = judged(draw_reference(theirs, samples, device))
    result["end"] = {"seconds": time_of_reference(theirs, reference_steps, flags, device), **told(end)}
    result["by_steps"] = []
    sampler, default = project.default_sampler(ours.process)
    measure.write_flags(flags["inference"])
    for steps in sorted({*SAMPLER_STEPS, default}):
        distance = judged(draw(ours, samples, sampler, steps, plain))
        if steps == default:
            apart = distance.bootstrap() - end.bootstrap()
            result["difference"] = np.nanquantile(apart, [0.05, 0.95]).tolist()
        call = functools.partial(draw, ours, 1, sampler, steps, plain)
        work = measure.Work(((call, 1),), flags["inference"])
        seconds = statistics.median(work.seconds(device) for _ in range(TIMED))
        result["by_steps"].append({"sampler": sampler, "steps": steps, "seconds": seconds, **told(distance)})
    return {**result, **conclusions(result)}


def time_of_reference(networks: generation.Networks, steps: int, flags: dict, device: torch.device) -> float:
    """Seconds of a volume by the reference, of whose 1000 steps the first few are timed."""
    shape = networks.latent_shape
    latents = torch.randn(1, *shape).to(device)

    def start() -> None:
        reference.draw_latents(networks.unet, shape, [0], steps, device)

    def end() -> None:
        reference.decode(networks.autoencoder.network, latents, networks.scale_factor)

    work = measure.Work(((start, reference.STEPS / steps), (end, 1)), flags["reference"])
    return statistics.median(work.seconds(device) for _ in range(TIMED))


def conclusions(result: dict) -> dict:
    """What `compare` says of time and of sampling: the reference's end is the better of its two samplers."""
    end = min(result["end"]["distance"], result["marks"]["reference"][-1]["distance"])
    shares = [mark["share"] for mark in result["marks"]["ours"] if mark["distance"] <= end]
    enough = [one for one in result["by_steps"] if one["distance"] <= result["end"]["distance"]]
    return {
        "reached": shares[0] if shares else None,
        "speedup": result["end"]["seconds"] / enough[0]["seconds"] if enough else None,
        "speedup_steps": enough[0]["steps"] if enough else None,
    }
