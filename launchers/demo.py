"""From data to new images: brains, an autoencoder, a diffusion model, eight new brains, a page of metrics.

    ./demo.sh                                        # simulates 96 brains and trains on them
    ./demo.sh --data DIR                             # trains on the volumes in DIR instead
    ./demo.sh --set diffusion_train.max_minutes=20   # another value than config/config_demo.json has

Started by demo.sh and demo.bat with any Python from 3.11 on: makes .venv first (see environment.py), then
runs the project's scripts in it and prints each command. Everything is written to outputs/demo: data (the
simulated brains), models, tensorboard, samples, evaluation (the page). Another run moves the results of the
one before to old-1, old-2, ... in the same folder and starts over; the simulated brains are reused.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import environment
from environment import ROOT

CONFIG = "config/config_demo.json"
ENOUGH_STEPS = 300  # of stage 2, for samples with the shape of brains
DATA, MODELS, TENSORBOARD, SAMPLES, EVALUATION = "data", "models", "tensorboard", "samples", "evaluation"
LOG = "log.txt"  # in MODELS
# What train_diffusion.py prints after its first steps.
EXPECTED = r"diffusion: about (\d+) steps in ([\d.]+) minutes"
ENVIRONMENT = "environment.json"  # its presence marks a folder as the output of a demo
MIRRORED = """note: volumes mirrored left to right are learned and drawn as well, as is right for brains.
For organs that lie on one side, add --set diffusion_train.augment={}"""


def main(argv=None):
    args = parse(argv)
    begin = time.monotonic()

    # Step 0: folders
    data, out = folders(args)
    python = environment.ready("requirements.txt")
    set_aside(out)
    paths = {
        "data_base_dir": shown(data),
        "model_dir": shown(out / MODELS),
        "tfevent_path": shown(out / TENSORBOARD),
        "output_dir": shown(out / SAMPLES),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / ENVIRONMENT).write_text(json.dumps(paths, indent=4) + "\n", encoding="utf-8")

    # Step 1: brains to train on, healthy ones, which ten minutes can learn
    if args.data is None and (data / "dataset.json").exists():
        print(f"the simulated brains of an earlier demo are used again: {shown(data)}", flush=True)
    elif args.data is None:
        step(python, "simulate_brains.py", "--out", shown(data), "--spacing", "4", "--tumour-fraction", "0")

    # Steps 2 to 5: both stages, new brains, evaluation
    common = ["-c", CONFIG, "-e", shown(out / ENVIRONMENT)]
    if args.data is None:
        common += ["--set", "channel=1"]  # of the four simulated contrasts, T1w
    for override in args.overrides:
        common += ["--set", override]
    if args.data is not None and not any(one.startswith("diffusion_train.augment") for one in args.overrides):
        print(MIRRORED)
    step(python, "train_autoencoder.py", *common)
    step(python, "train_diffusion.py", *common, log=out / MODELS / LOG)
    step(python, "inference.py", *common, "--num", "8", "--batch-size", "4", "--steps", "50")
    step(python, "evaluate.py", *common, "--out", shown(out / EVALUATION))

    minutes, seconds = divmod(round(time.monotonic() - begin), 60)
    print(f"\nDone in {minutes} min {seconds} s.")
    print(f"  trained on        {shown(data)}")
    print(f"  models            {shown(out / MODELS)}")
    print(f"  environment file  {shown(out / ENVIRONMENT)}")
    print(f"  config            {shown(out / MODELS / 'config_diffusion.json')}")
    print(f"  training curves   {shown(python)} -m tensorboard.main --logdir {shown(out / TENSORBOARD)}")
    for folder in (MODELS, SAMPLES, EVALUATION):
        for path in sorted((out / folder).glob("*")):
            if path.name.endswith((".nii.gz", ".png", ".gif", ".html")):
                print(f"  written           {shown(path)}")
    log = out / MODELS / "train_log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    entries = [entry for entry in map(json.loads, lines) if entry["stage"] == "diffusion"]
    steps = max((entry["step"] for entry in entries), default=0)
    minutes = max((entry.get("seconds", 0) for entry in entries), default=0) / 60
    if 0 < steps < ENOUGH_STEPS:
        print(f"note: stage 2 took only {steps} steps. {advice(steps, minutes)}")


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="demo.bat" if os.name == "nt" else "./demo.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data", metavar="DIR", help="volumes to train on; default: simulated brains")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="output folder; default: outputs/demo, with --data DIR outputs/demo-NAME-OF-DIR",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a config key; passed to all scripts; may be repeated",
    )
    return parser.parse_args(argv)


def folders(args):
    """The data and output folders, absolute; the user names them relative to the working directory."""
    name = "demo" if args.data is None else f"demo-{Path(os.path.abspath(args.data)).name}"
    out = Path(os.path.abspath(args.out or ROOT / "outputs" / name))
    data = out / DATA if args.data is None else Path(os.path.abspath(args.data))
    if args.data is not None:
        if not data.is_dir():
            fail(f"--data {args.data}: no such folder.")
        # Samples among the data would be read as data; data among the outputs would be moved with them.
        if data.resolve().is_relative_to(out.resolve()) or out.resolve().is_relative_to(data.resolve()):
            fail(f"--data {data} and --out {out}: one lies in the other. Name another folder by --out.")
    if out.exists() and not out.is_dir():
        fail(f"--out {out} is a file. Name a folder.")
    if results(out) and not (out / ENVIRONMENT).exists():
        fail(f"--out {out} holds files that no demo made. Name a new or empty folder.")
    return data, out


def results(out):
    """What an earlier demo left in `out`: all but simulated data and what was set aside before."""
    kept = [path for path in out.glob("*") if path.name != DATA and not path.name.startswith("old-")]
    return sorted(kept, key=lambda path: path.name == ENVIRONMENT)  # the mark is moved last


def set_aside(out):
    """Move the results of an earlier demo to a new `old-N`."""
    if not (paths := results(out)):
        return
    number = 1
    while (aside := out / f"old-{number}").exists():
        number += 1
    aside.mkdir()
    for path in paths:
        try:
            path.rename(aside / path.name)
        except OSError as error:  # Windows renames nothing that is open
            fail(f"{path} cannot be moved ({error.strerror}). Close what uses it, such as TensorBoard.")
    print(f"the results of the demo before are now in {shown(aside)}", flush=True)


def step(python, script, *arguments, log=None):
    """Run one of the project's scripts in the project's folder; where it fails, end with its exit code.

    `log` is the file in which it says, after its first steps, how many it will take; then what to expect is
    printed.
    """
    print(f"\n== python {shlex.join([script, *arguments])}", flush=True)
    with subprocess.Popen([str(python), script, *arguments], cwd=ROOT) as process:
        try:
            while log is not None and process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
                if log.is_file() and (said := expectation(log.read_text(encoding="utf-8", errors="replace"))):
                    print(f"\n{said}", flush=True)
                    log = None
            code = process.wait()
        except BaseException:  # as subprocess.run does
            process.kill()
            raise
    if code:
        print(f"the demo stopped: {script} ended with exit code {code}", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)


def expectation(log):
    """What to expect of stage 2 by its log; None where it does not say how many steps it will take."""
    if not (found := re.findall(EXPECTED, log)):
        return None
    steps, minutes = max(int(found[-1][0]), 1), float(found[-1][1])
    pace = f"stage 2 will take about {steps} steps in {minutes:g} minutes"
    if steps >= ENOUGH_STEPS:
        return f"note: {pace}. Expect brains; their shape shows from about {ENOUGH_STEPS}."
    return f"note: {pace}. {advice(steps, minutes)} (Ctrl-C ends this one.)"


def advice(steps, minutes):
    """How long stage 2 needs on a machine that takes these steps in these minutes."""
    needed = math.ceil(minutes * ENOUGH_STEPS / steps)
    return (
        f"Below about {ENOUGH_STEPS}, samples are shapeless.\n"
        f"      This machine needs about {needed} minutes: run the demo again with\n"
        f"      --set diffusion_train.max_minutes={needed}"
    )


def shown(path):
    """A path as the scripts get it: relative to the project where it lies inside."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def fail(message):
    """End with a message and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # on an exception subprocess.run ends its child
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
