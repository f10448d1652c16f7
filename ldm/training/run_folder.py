"""The folder of a run: its checkpoints, where a training starts, and what it leaves behind."""

from collections.abc import Callable
from pathlib import Path

from ldm import UserError
from ldm.system.checkpoints import COUNTS, load_checkpoint, save_checkpoint

TO_GO_ON = (*COUNTS, "seconds", "sums", "stepper", "ema")
TO_GO_ON_FROM = {  # what the newest checkpoint of each stage holds, and the best need not
    "autoencoder": (*TO_GO_ON, "discriminator", "discriminator_stepper"),
    "diffusion_unet": (*TO_GO_ON, "scale_factor"),
}


class StageFiles:
    """The checkpoints of one stage in a model folder: the best, the newest, and the one before that.

    Args:
        model_dir: their folder.
        name: `autoencoder` or `diffusion_unet`.
    """

    def __init__(self, model_dir: Path, name: str):
        self.name = name
        self.best, self.last, self.prev = (model_dir / f"{name}{role}.pt" for role in ("", "_last", "_prev"))
        self.last_is_good = True

    def present(self) -> list[Path]:
        """Those that are there."""
        return [path for path in (self.best, self.last, self.prev) if path.exists()]

    def newest(self, say: Callable[[str], None]) -> tuple[Path, dict]:
        """The newest good checkpoint to resume from and its content, where one is `present`.

        Raises:
            UserError: there is none to resume from.
        """
        faults = []
        for path in (self.last, self.prev):
            if not path.exists():  # also between the two renames of a save
                continue
            try:
                content = load_training_checkpoint(path, self.name)
            except UserError as error:
                faults.append(str(error))
                self.last_is_good = False
                continue
            if path == self.prev:
                say(f"warning: {faults[0] if faults else f'{self.last} is not there'}; {path} is used")
            return path, content
        if faults:
            raise UserError(
                f"{' '.join(faults)}\nNo good checkpoint is left to resume from; --fresh starts over, and "
                "keeps what is there in old-N."
            )
        raise UserError(
            f"{self.best} is there, but neither {self.last.name} nor {self.prev.name} to resume from. "
            "--fresh starts over, and keeps it in old-N; or choose another model_dir."
        )

    def save_last(self, content: dict) -> None:
        """Write the newest; the good one before it is kept."""
        save_checkpoint(self.last, content, self.prev if self.last_is_good else None)
        self.last_is_good = True

    def best_score(self) -> float | None:
        """The score of the best file, or None where there is none.

        Raises:
            UserError: it is there and cannot be read: what is not known to be worse is not replaced.
        """
        if not self.best.exists():
            return None
        remedy = "Move it away to resume without it: the next validation is the best then."
        try:
            content = load_checkpoint(self.best)
        except UserError as error:
            raise UserError(f"{error}\n{remedy}") from None
        if "best" not in content:
            raise UserError(f"{self.best}: holds no score, so it is not one of this training. {remedy}")
        return content["best"]


def load_training_checkpoint(path: Path, name: str) -> dict:
    """Read a checkpoint that a training can resume from, and put its `path` among the entries.

    Args:
        name: of the network that is trained, as `StageFiles` has it.

    Raises:
        UserError: as `load_checkpoint`, and where an entry is missing.
    """
    if not path.is_file():
        raise UserError(
            f"--resume {path}: no such checkpoint. Name a *_last.pt, or leave --resume out: the same command "
            "resumes from the newest in model_dir."
        )
    content = load_checkpoint(path)
    if "stepper" not in content:
        raise UserError(
            f"{path}: holds weights but no optimiser, so no training can resume from it. Name a *_last.pt."
        )
    for key in TO_GO_ON_FROM[name]:
        if key not in content:
            raise UserError(f"{path}: {key} is missing; the training of {name} cannot resume from it.")
    return {**content, "path": path}
