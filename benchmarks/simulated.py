"""What the benchmarks of conditions share: their options, simulated brains, and a model trained on them."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import simulate_brains
import train_autoencoder
import train_diffusion

ROOT = Path(__file__).resolve().parents[1]


def parser(manual: str, num: int, what: str) -> argparse.ArgumentParser:
    """The options of both.

    Args:
        num: default number of samples.
        what: they are samples of.
    """
    found = argparse.ArgumentParser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--out", type=Path, required=True)
    add("--minutes", type=float, nargs=2, default=[2, 6], help="of both stages")
    add("--spacing", type=float, default=4, help="mm of the volumes")
    add("--num", type=int, default=num, help=f"samples of {what}")
    add("--guidance", type=float, nargs="+", default=[1, 2, 4])
    return found


def demo_config(spacing: float) -> dict:
    """The demo's config for volumes of this spacing in mm."""
    config = json.loads((ROOT / "config/config_demo.json").read_text())
    return config | {"longest_side": round(192 / spacing)}


def train(args: argparse.Namespace, config: dict, simulation: Sequence[str] = ()) -> list[str]:
    """Simulate brains in `--out`/data, unless they are there, and train both stages.

    Args:
        simulation: further options of simulate_brains.py.

    Returns:
        The options that name config and environment file.
    """
    data = args.out / "data"
    if not data.exists():
        simulate_brains.main(["--out", str(data), "--spacing", str(args.spacing), *simulation])
    (args.out / "config.json").write_text(json.dumps(config))
    files = samples_in(args.out, "samples")
    scripts = {"autoencoder": train_autoencoder, "diffusion": train_diffusion}
    for (stage, script), minutes in zip(scripts.items(), args.minutes, strict=True):
        script.main([*files, "--set", f"{stage}_train.max_minutes={minutes}"])
    return files


def samples_in(out: Path, name: str) -> list[str]:
    """Write an environment file whose output_dir is `out`/name; the options that name it and the config."""
    paths = {
        "data_base_dir": "data",
        "model_dir": "models",
        "tfevent_path": "tensorboard",
        "output_dir": name,
    }
    environment = {key: str(out / path) for key, path in paths.items()}
    (out / "environment.json").write_text(json.dumps(environment))
    return ["-c", str(out / "config.json"), "-e", str(out / "environment.json")]
