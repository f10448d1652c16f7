"""Kill trainings at random moments, in saves too, go on each time, and compare the end with that of a
training that nobody disturbed: every weight, moment and average to the bit, and every line of the log.

    ./test.sh tests/faults --kills 50
    PYTHONPATH=.:tests python tests/faults/kill.py --kills 1000 --seed 7      # an evening

Each training is a child of this process, forked after the imports and ended by SIGKILL: every other one at a
random moment, every other one as soon as a half-written checkpoint lies in the model folder. A training that
comes to its end is compared; if kills are left, one of the other stage begins. Exit code 1 and the folder of
the training where one differs. Not for Windows, which has neither fork nor SIGKILL.
"""

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import chain

import train_autoencoder
import train_diffusion

FILES = {
    train_autoencoder: ("autoencoder.pt", "autoencoder_last.pt"),
    train_diffusion: ("diffusion_unet.pt", "diffusion_unet_last.pt"),
}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill-"))

    # Step 1: a training of each stage that nobody disturbs
    undisturbed = chain.Project(folder / "undisturbed", chain.make_data(folder / "data"))
    for stage in ("autoencoder_train", "diffusion_train"):
        short = {"batch_size": 1, "max_epochs": 4, "save_minutes": 0, "val_interval": 2}
        undisturbed.change(**{stage: undisturbed.config[stage] | short})
    duration = {}
    for script in FILES:
        begin = time.monotonic()
        assert os.waitstatus_to_exitcode(os.waitpid(started(script, undisturbed), 0)[1]) == 0
        duration[script] = time.monotonic() - begin

    # Step 2: the same, killed again and again
    kills = during_saves = trainings = 0
    while kills < args.kills:
        script = list(FILES)[trainings % 2]
        names = () if script is train_autoencoder else ("autoencoder.pt", "split.json")
        project = chain.copy_of(undisturbed, folder / f"killed-{trainings}", *names)
        ended = False
        while not ended:
            child, in_a_save = started(script, project), kills % 2 == 1
            patience = rng.uniform(0, duration[script])
            ended = not killed(child, project.model_dir, patience, in_a_save, kills < args.kills)
            kills += not ended
            during_saves += not ended and any(project.model_dir.glob(".*.part"))
        trainings += 1
        stage = "autoencoder" if script is train_autoencoder else "diffusion"
        wrong = chain.differences(project.log(stage), undisturbed.log(stage), "log")
        for name in FILES[script]:
            wrong += chain.differences(project.checkpoint(name), undisturbed.checkpoint(name), name)
        if wrong:
            print(f"{project.folder}: differs from {undisturbed.folder} in {', '.join(wrong[:5])}")
            return 1
    print(
        f"{kills} kills, {during_saves} of them in the middle of a save, in {trainings} trainings: each "
        "ended to the bit as the one that was never disturbed"
    )
    return 0


def started(script, project: chain.Project) -> int:
    """The process number of a training that has just begun."""
    child = os.fork()
    if child:
        return child
    try:  # this is the child, and it must never return into its parent's code
        os.dup2(os.open(project.folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        with contextlib.redirect_stdout(sys.stderr):
            script.main(project.argv("--no-amp"))
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def killed(child: int, model_dir: Path, patience: float, in_a_save: bool, allowed: bool) -> bool:
    """Kill a training after so many seconds or, after those, in its next save; False if it ended before."""
    begin = time.monotonic()
    while True:
        number, status = os.waitpid(child, os.WNOHANG)
        if number:
            if code := os.waitstatus_to_exitcode(status):
                raise SystemExit(f"a training ended with exit code {code}: {model_dir.parent / 'output.txt'}")
            return False
        late = allowed and time.monotonic() - begin > patience
        if late and (not in_a_save or any(model_dir.glob(".*.part"))):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(0 if late else 0.005)


if __name__ == "__main__":
    sys.exit(main())
