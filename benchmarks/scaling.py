"""Arithmetic and memory by volume size, from the networks alone, on any machine.

    python -m benchmarks.scaling
    python -m benchmarks.scaling -c config/config_train_32g.json --sizes 64 128 256

For one whole cube of each size: the arithmetic of a training step of both stages, of one prediction and of
decoding, and the predicted peak memory of both stages on a GPU. Only shapes are computed.
"""

import argparse
from collections.abc import Callable, Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import train_autoencoder
import train_diffusion
import utils
from benchmarks.measure import count_flops
from ldm import UserError, configs
from ldm.models.autoencoder import Autoencoder
from ldm.models.definitions import check_size, latent_size, network_divisor
from ldm.training.memory import Forecast, highest

SIZES = (64, 128, 192, 256, 384, 512)
STAGES = {"autoencoder_train": train_autoencoder, "diffusion_train": train_diffusion}


def arithmetic(config: dict, size: int) -> list[float]:
    """TFLOP for a volume of this side: a step of stage 1 and of stage 2 without discriminator and
    perceptual network, a prediction of the UNet, a decoding."""
    with FakeTensorMode():
        encoder = Autoencoder(configs.define_network(config, "autoencoder_def"))
        unet = configs.define_network(config, "diffusion_def")
        images = torch.zeros(1, config["image_channels"], *[size] * 3)
        latents = torch.zeros(1, config["diffusion_def"]["in_channels"], *latent_size(config, [size] * 3))
        calls: list[Callable] = [
            lambda: encoder(images, latents)[0].sum().backward(),
            lambda: unet(latents, timesteps=torch.zeros(1)).sum().backward(),
            torch.no_grad()(lambda: unet(latents, timesteps=torch.zeros(1))),
            torch.no_grad()(lambda: encoder.decode(latents)),
        ]
        return [count_flops(call) / 1e12 for call in calls]


def memory(config: dict, size: int) -> list[float]:
    """Predicted peaks in GB of both stages on a GPU, in mixed precision, batch 1."""
    peaks = []
    for stage, script in STAGES.items():
        forecast = Forecast(script.rehearse, stage, [[size] * 3] * 3, True, torch.bfloat16)
        peaks.append(highest(forecast.peaks(config)).total / 1e9)
    return peaks


@utils.command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-c", "--config-file", default=str(utils.ROOT / "config/config_train_16g.json"))
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="sides of cubes, in voxels")
    args = parser.parse_args(argv)
    if min(args.sizes) < 1:
        raise UserError("--sizes: expected sides of at least one voxel.")
    config = utils.load_config(args.config_file, ["autoencoder_train.perceptual_weight=0"])
    for section in STAGES:
        config[section] |= {"batch_size": 1, "patch_size": None, "sample_interval": 0}
    config["autoencoder_train"]["val_patch_size"] = None
    print("| side | stage 1, TFLOP | stage 2 | a prediction | decoding | stage 1, GB | stage 2, GB |")
    print("|---|---|---|---|---|---|---|")
    for size in args.sizes:
        check_size([size] * 3, network_divisor(config), "--sizes")
        cells = [*arithmetic(config, size), *memory(config, size)]
        print(f"| {size} | {' | '.join(f'{cell:.3g}' for cell in cells)} |", flush=True)


if __name__ == "__main__":
    main()
