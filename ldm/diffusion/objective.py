"""What the diffusion network learns: its loss, and the held-out loss at fixed noise and times."""

from collections.abc import Callable

import torch
from torch import nn

from ldm.data.datasets import among, stream
from ldm.data.posteriors import Posteriors
from ldm.diffusion.conditioning import UNCONDITIONED, Conditions
from ldm.diffusion.process import NoiseProcess
from ldm.models.denoiser import predict
from ldm.system.ranks import Run


def diffusion_loss(
    process: NoiseProcess,
    prediction: torch.Tensor,
    z0: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    min_snr_gamma: float | None = None,
) -> torch.Tensor:
    """Mean squared error of a prediction at z_t, (B, c, d, h, w), for times (B,): a scalar, float32.

    Args:
        min_snr_gamma: weights the error by time (Hang et al., 2023); None: all times alike.
    """
    target = process.target(z0, noise, t)
    if min_snr_gamma is None:
        return nn.functional.mse_loss(prediction.float(), target)
    errors = (prediction.float() - target).square().flatten(1).mean(1)
    return (process.min_snr_weight(t, min_snr_gamma) * errors).mean()


@torch.no_grad()
def validate(
    unet: nn.Module,
    dataset: Posteriors,
    scale_factor: float,
    process: NoiseProcess,
    section: dict,
    seed: int,
    run: Run,
    conditions: Conditions = UNCONDITIONED,
    further: Callable[[int], dict[str, torch.Tensor]] | None = None,
    weights: Callable[[int], torch.Tensor] | None = None,
) -> dict[str, float]:
    """Losses over the held-out volumes at fixed noise and fixed times, each rank its share.

    Unweighted by time, of the posterior means, at times that are evenly spread before the `shift` of
    rectified flow: not comparable with the training loss.

    Args:
        dataset: its items hold a posterior's `mean`.
        section: of the config, of the stage that is trained.
        further: what else case `i` is conditioned on, without a batch dimension.
        weights: of the latent voxels of case `i`, (1, 1, d, h, w) of mean 1; None: all alike.

    Returns:
        The mean as `loss`; `loss_quarter_1` is that of the quarter of the times with the least noise,
        `loss_quarter_4` of that with the most.
    """
    times, batch_size = section["val_times"], section["batch_size"]
    unet.eval()
    even = (torch.arange(times) + 0.5) / times
    sums = torch.zeros(times, dtype=torch.float64, device=run.device)
    for i in range(run.rank, len(dataset), run.world_size):
        item = dataset[(0, i)]
        z0 = item["mean"][None, ..., among(item)].to(run.device) * scale_factor
        generator = stream(seed, "validation", dataset.cases[i].name)
        noise = torch.randn(times, *z0.shape[1:], generator=generator).to(run.device)
        t = process.at(item["mean"].shape[1:]).draw_times(even).to(run.device)
        one, errors = conditions.at(item["mean"].shape).of(dataset.cases[i]), []
        one |= further(i) if further else {}
        if "channels" in one:
            one["channels"] = one["channels"][..., among(item)]
        for some, at in zip(noise.split(batch_size), t.split(batch_size), strict=True):
            cond = {key: value.to(run.device).expand(len(at), *value.shape) for key, value in one.items()}
            with run.autocast():
                prediction = predict(unet, process.add_noise(z0, some, at), at, cond)
            target = process.target(z0.expand_as(some), some, at)
            square = (prediction.float() - target).square()
            errors.append((square * weights(i) if weights else square).flatten(1).mean(1))
        sums += torch.cat(errors)  # read when all are computed
    by_time = (run.sum(sums) / len(dataset))[process.draw_times(even).argsort()]
    quarters = ((torch.arange(times) + 0.5) * 4 / times).long()
    named = {f"loss_quarter_{q + 1}": by_time[quarters == q].mean().item() for q in quarters.unique()}
    return {"loss": by_time.mean().item(), **named}
