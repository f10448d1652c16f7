"""The folder of a run: its lock, its checkpoints, where a training starts, and what an earlier one left."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from ldm import UserError, configs
from ldm.data.prepare import find_data
from ldm.system.checkpoints import COUNTS, load_checkpoint, save_checkpoint, weights_hash
from ldm.system.messages import EXIT_STACK
from ldm.system.ranks import Run
from ldm.system.versions import versions
from ldm.training.logs import TextLog, read_log, write_log

COMMON = ("stepper", *COUNTS, "seconds", "sums", "ema")  # "stepper" is the state of the optimiser
ENTRIES = {  # that the newest checkpoint of each stage has, and the best need not have
    "autoencoder": (*COMMON, "discriminator", "discriminator_stepper"),
    "diffusion_unet": (*COMMON, "scale_factor"),
    "controlnet": (*COMMON, "unet", "label_values"),
}


class StageFiles:
    """The checkpoints of one stage in a model folder: the best, the newest, and the one before that.

    Args:
        model_dir: their folder.
        name: `autoencoder`, `diffusion_unet` or `controlnet`.
    """

    def __init__(self, model_dir: Path, name: str):
        self.name = name
        self.best, self.last, self.prev = (model_dir / f"{name}{role}.pt" for role in ("", "_last", "_prev"))
        self.last_is_good = True

    def present(self) -> list[Path]:
        """The files that exist."""
        return [path for path in (self.best, self.last, self.prev) if path.exists()]

    def newest(self, log: Callable[[str], None]) -> tuple[Path, dict]:
        """The newest good checkpoint to resume from and its content, where one is `present`.

        Raises:
            UserError: none is good.
        """
        faults = []
        for path in (self.last, self.prev):
            if not path.exists():  # such as between the two renames of a save
                continue
            try:
                content = load_training_checkpoint(path, self.name)
            except UserError as error:
                faults.append(str(error))
                self.last_is_good = False
                continue
            if path == self.prev:
                log(f"warning: {faults[0] if faults else f'{self.last} is missing'}; {path} is used")
            return path, content
        if faults:
            raise UserError(
                f"{' '.join(faults)}\nNo good checkpoint is left to resume from. --fresh starts over, and "
                "moves these files to old-N."
            )
        raise UserError(
            f"{self.best} exists, but neither {self.last.name} nor {self.prev.name} to resume from. "
            "--fresh starts over, and moves it to old-N; or choose another model_dir."
        )

    def save_last(self, content: dict) -> None:
        """Write the newest; the one before it is kept, if it is good."""
        save_checkpoint(self.last, content, self.prev if self.last_is_good else None)
        self.last_is_good = True

    def best_score(self) -> tuple[float, int] | None:
        """The score of the best file and its epoch, or None where there is none.

        Raises:
            UserError: it cannot be read. It is not replaced, since its score may be better.
        """
        if not self.best.exists():
            return None
        remedy = "Move it away to resume without it; the next validation is then the best."
        try:
            content = load_checkpoint(self.best)
        except UserError as error:
            raise UserError(f"{error}\n{remedy}") from None
        if "best" not in content:
            raise UserError(f"{self.best}: has no score, so it is not a result of this training. {remedy}")
        return content["best"], content["epoch"]


def load_training_checkpoint(path: Path, name: str) -> dict:
    """Read a checkpoint to resume from; `path` is added to its entries.

    Args:
        name: of the network that is trained, as `StageFiles` has it.

    Raises:
        UserError: as `load_checkpoint`, and where an entry is missing.
    """
    if not path.is_file():
        raise UserError(
            f"--resume {path}: no such checkpoint. Name a *_last.pt, or leave out --resume: the same command "
            "resumes from the newest in model_dir."
        )
    content = load_checkpoint(path)
    for key in ENTRIES[name]:
        if key not in content:
            raise UserError(f"{path}: {key} is missing, so {name} cannot resume from it. Name a *_last.pt.")
    return {**content, "path": path}


def lock_run_folder(folder: Path, run: Run) -> None:
    """Keep every other run from writing to a folder until this script ends, however it ends.

    Raises:
        UserError: another run is writing there.
        OSError: the folder cannot be made or written to.
    """

    def lock():
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{folder}: another run is writing there. Wait for its end, or choose another model_dir."
            ) from None
        EXIT_STACK.callback(lock.release)
        for part in folder.glob(".*.part"):  # of a save that was killed
            part.unlink()

    run.from_main(lock)


def resume_or_start(
    files: StageFiles,
    stage: str,
    config: dict,
    environment: dict,
    run: Run,
    resume: Path | None = None,
    fresh: bool = False,
) -> dict | None:
    """The checkpoint to resume from, on every rank; None where the training starts.

    It is `resume` where that is named; None where `fresh` is set or `resume_ckpt` is false; else the newest
    good one. Where the training starts over, earlier files are moved to `model_dir/old-N`. Config keys that
    differ from the checkpoint's are printed. Messages are collected from here on for `model_dir/log.txt`,
    which `Progress` creates.

    Args:
        stage: `autoencoder`, `diffusion` or `controlnet`.
        resume, fresh: `--resume` and `--fresh`.

    Raises:
        UserError: the checkpoint that was named is missing or damaged; or checkpoints are there and none is
            good; or it was trained with other networks or volumes than the config asks for; or there are no
            data to start over on.
    """
    found, model_dir = {}, environment["model_dir"]
    log = TextLog(model_dir / "log.txt") if run.is_main else None

    def check(content: dict) -> None:
        """Before anything is moved. A spacing that the data decide is checked when they are found."""
        found["content"] = content
        keys = [key for key in configs.FIXED[stage] if key != "spacing" or config["spacing"]]
        keys.append(f"{stage}_train.optimizer")  # whose state cannot be that of another
        configs.check_fixed(content["config"], config, keys, content["path"], configs.RESUMING)

    def choose() -> Path | None:
        if resume:
            check(load_training_checkpoint(resume, files.name))
            if files.present() and resume.resolve() != files.last.resolve():
                run.print(
                    f"the files in {model_dir} are copied to {set_aside(environment, stage, copy=True)}"
                )
            return resume
        if not files.present():
            if environment["resume_ckpt"]:
                run.print(f"{model_dir}: no checkpoint of this stage to resume from; the training starts.")
            return None
        if fresh or environment["resume_ckpt"] is False:
            from_cache = stage == "diffusion" and config["diffusion_train"]["latent_cache"]
            if not from_cache and not environment["download_brats"]:
                find_data(config, environment)  # fails before anything is moved
            why = "" if fresh else " (resume_ckpt is false; remove it to resume instead)"
            run.print(f"starting over{why}: earlier files are now in {set_aside(environment, stage)}")
            return None
        path, content = files.newest(run.print)
        check(content)
        return path

    path = run.from_main(choose)
    if log:
        facts = {
            f"==== {stage}": f"resumes from {path}" if path else "starts",
            "command": run.command,
            "config": model_dir / f"config_{stage}.json",
            "device": f"{run.device.type} x {run.world_size}, {run.amp_dtype or torch.float32}",
            "versions": ", ".join(f"{name} {version}" for name, version in versions().items() if version),
        }
        log.begin(facts)
    if path is None:
        return None
    content = found["content"] if run.is_main else load_training_checkpoint(path, files.name)
    if changes := configs.changes(content["config"], config):
        run.print(f"differs from the checkpoint's config: {changes}")
    return content


FOLLOWS = {  # of each stage the file of the next, and its entry with the hash of these weights
    "autoencoder": ("diffusion_unet.pt", "autoencoder"),
    "diffusion": ("controlnet.pt", "unet"),
}


def keep_pair(environment: dict, best: Path, run: Run, stage: str = "autoencoder") -> None:
    """Before a stage's best weights are replaced, copy them to `old-N` with the model of the next stage that
    was trained on them, if there is one: it is of no use without them."""
    name, entry = FOLLOWS[stage]
    following = environment["model_dir"] / name

    def copy():
        if not (following.is_file() and best.is_file()):
            return
        if load_checkpoint(following).get(entry) == weights_hash(load_checkpoint(best)["model"]):
            old = set_aside(environment, stage, copy=True)
            run.print(f"{following} was trained on {best}, which is now replaced: a copy of both is in {old}")

    run.from_main(copy)


STAGE_FILES = {
    # A diffusion model goes with its autoencoder, a ControlNet with its diffusion model.
    "autoencoder": ("*.pt", "*.json", "samples", "*.gif", "losses.png", "log.txt"),
    "diffusion": (
        "diffusion_unet*.pt",
        "controlnet*.pt",
        "config_controlnet.json",
        "config_diffusion.json",
        "samples",
        "samples.gif",
        "losses.png",
    ),
    "controlnet": ("controlnet*.pt", "config_controlnet.json", "losses.png"),
}


def set_aside(environment: dict, stage: str, copy: bool = False) -> Path:
    """Move what a stage left in `model_dir`, its pictures and its TensorBoard files to a new `old-N`.

    Args:
        copy: copy them, since a training will resume from them.
    """
    model_dir, output_dir = environment["model_dir"], environment["output_dir"]
    old = next(p for n in itertools.count(1) if not (p := model_dir / f"old-{n}").exists())
    old.mkdir()
    log, text = model_dir / "train_log.jsonl", model_dir / "log.txt"
    stages = [*STAGE_FILES][[*STAGE_FILES].index(stage) :]
    pictures = [output_dir / "reconstructions.png"] if stage == "autoencoder" else []
    for path in [p for pattern in STAGE_FILES[stage] for p in model_dir.glob(pattern)] + pictures:
        if path.is_dir() and copy:
            shutil.copytree(path, old / path.name)
        elif path.exists():
            (shutil.copy2 if copy else shutil.move)(path, old / path.name)
    if text.is_file():  # of both stages: the run continues to write it
        shutil.copy2(text, old / text.name)
    if log.is_file():
        shutil.copy2(log, old / log.name)
        if not copy:
            write_log(log, [entry for entry in read_log(log) if entry["stage"] not in stages])
    for one in [] if copy else stages:
        events = environment["tfevent_path"] / one
        if events.is_dir():
            shutil.move(events, old / f"tensorboard_{one}")
    return old
