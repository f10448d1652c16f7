"""Decoding within a memory limit: peak memory and time compared with the whole volume, and the difference.

    python -m benchmarks.decoding --size 64       # limits: a half and a quarter of the plain peak
    python -m benchmarks.decoding --size 512 --max-memory 12 --amp

The autoencoder has 64, 128 and 256 channels, two residual blocks per level, eight latent channels and random
weights. Each row is a separate process. Peaks exclude weights and latents: on a GPU
`torch.cuda.max_memory_allocated`, on a CPU the growth of the resident set (Linux).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.measure import forget_peak, resident
from ldm.lowmem import slabwise
from ldm.lowmem.slabwise import Budget, decode_within, weights_bytes
from ldm.models.definitions import NETWORKS, instantiate
from ldm.models.layers import on_device
from ldm.system.ranks import Run

DEFINITION = {
    "_target_": "monai.networks.nets.AutoencoderKL",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 8,
    "channels": [64, 128, 256],
    "num_res_blocks": 2,
    "norm_num_groups": 32,
    "attention_levels": [False, False, False],
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
}


def build(device: torch.device) -> torch.nn.Module:
    """The autoencoder, as inference.py has it on this machine."""
    torch.manual_seed(0)
    return on_device(instantiate(DEFINITION, NETWORKS, "here").eval(), Run(0, 1, device), True)


def latents_of(size: int) -> torch.Tensor:
    return torch.randn(1, 8, *[size // 4] * 3, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def measure(size: int, amp: bool, limit: float, out: Path) -> None:
    """Decode within `limit` bytes (0: no limit) in this process; write the volume and its cost to a file."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autoencoder, latents, budget = build(device), latents_of(size), Budget(limit)

    def decode(z: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            return decode_within(autoencoder, z, budget) if limit else autoencoder.decode(z.to(device)).cpu()

    autoencoder.decode(latents[..., :4, :4, :4].to(device))  # one-time allocations of libraries
    latents = latents.to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        forget_peak()
        before = resident("VmRSS")
    start, busy = time.perf_counter(), time.process_time()
    volume = decode(latents)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")
    torch.save((volume, peak - before, seconds, busy), out)


def compare(size: int, amp: bool, limits: list[float]) -> None:
    """Print a row of the table for the whole volume and for each limit."""
    print("| limit, GB | peak, GB | seconds | CPU seconds | largest difference, share of the range |")
    print("|---|---|---|---|---|", flush=True)
    whole = None
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "volume.pt"
        for limit in (0.0, *limits):
            line = [sys.executable, "-m", "benchmarks.decoding", "--size", str(size)]
            line += ["--limit", str(limit), "--out", str(out)]
            done = subprocess.run([*line, *["--amp"] * amp], capture_output=True, text=True)
            given = f"{limit / 1e9:.2f}" if limit else "all"
            if done.returncode:
                print(f"| {given} | {done.stderr.strip().splitlines()[-1]} | | | |", flush=True)
                continue
            volume, peak, seconds, busy = torch.load(out, weights_only=True)
            whole = volume if whole is None and not limit else whole
            apart = (
                float((volume - whole).abs().max() / (whole.max() - whole.min()))
                if whole is not None
                else None
            )
            apart = f"{apart:.1e}" if limit and apart is not None else ""
            print(f"| {given} | {peak / 1e9:.2f} | {seconds:.1f} | {busy:.1f} | {apart} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", type=int, default=64, help="voxels along each side")
    add("--max-memory", type=float, nargs="*", default=[], metavar="GB", help="default: a half and a quarter")
    add("--amp", action="store_true", help="bfloat16")
    add("--limit", type=float, default=None, help=argparse.SUPPRESS)
    add("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    limits = [1e9 * one for one in args.max_memory]
    if args.limit is not None:
        return measure(args.size, args.amp, args.limit, args.out)
    if not limits:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        autoencoder = build(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            plain = slabwise._plain_peak(autoencoder.decode, latents_of(args.size), device)
        limits = [weights_bytes(autoencoder) + plain / share for share in (2, 4)]
    compare(args.size, args.amp, limits)


if __name__ == "__main__":
    main()
