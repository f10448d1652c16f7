"""Start an autoencoder as the best linear block transform of the data, instead of from noise.

An AutoencoderKL whose decoder upsamples by transposed convolution contains, at each level, every orthogonal
transform of 2 x 2 x 2 blocks and its inverse: a stride-2 convolution reads a whole block, a transposed one of
size 2 writes one. With the residual branches set to zero (as in Zhang et al., 2019, "Fixup") the network is
that cascade of block transforms. Taking the principal components of the training volumes' blocks (the
Karhunen-Loeve transform), it starts where a linear code of the same size ends, and training improves on it.
With minutes to train, that is most of the way.
"""

import torch
from monai.networks.nets import AutoencoderKL
from monai.networks.nets.autoencoderkl import AEKLDownsample, AEKLResBlock
from torch import nn

from ldm import UserError

WHITENING = 0.5  # 0 keeps the variances of the components, 1 makes them equal


@torch.no_grad()
def start_as_block_transform(autoencoder: nn.Module, volumes: torch.Tensor) -> None:
    """Set the weights, in place, so that encoding is the principal components of blocks, and decoding their
    inverse.

    Channels that the transform does not use keep their random start, but nothing that it uses reads them. A
    latent channel's standard deviation is that of its component to the power 1 - WHITENING: fine detail, weak
    in the image, is then not lost in the noise of the posterior and of the diffusion.

    Args:
        autoencoder: monai.networks.nets.AutoencoderKL with `use_convtranspose`.
        volumes: some training volumes (N, C, D, H, W) of a size that the network can take.

    Raises:
        UserError: a network of another kind, or too narrow for the transform.
    """
    if not isinstance(autoencoder, AutoencoderKL) or not any(
        isinstance(m, nn.ConvTranspose3d) for m in autoencoder.modules()
    ):
        raise UserError(
            "autoencoder_train.initialise: block_transform needs monai.networks.nets.AutoencoderKL with "
            '"use_convtranspose": true in autoencoder_def. Set that, or "initialise": "random".'
        )
    latents = autoencoder.latent_channels
    downs = [block for block in autoencoder.encoder.blocks if isinstance(block, AEKLDownsample)]
    components, bases = volumes.float(), []
    for block in autoencoder.encoder.blocks:
        if isinstance(block, AEKLDownsample):
            conv = block.conv.conv
            blocks = _blocks(components)
            width = min(
                conv.out_channels, blocks.shape[1], latents if block is downs[-1] else conv.out_channels
            )
            _, vectors = torch.linalg.eigh((blocks.T @ blocks).double())
            basis = vectors.flip(1)[:, :width].float()  # (C * 8, width), largest first
            bases.append(basis)
            _use(conv, basis.T.unflatten(1, (-1, 2, 2, 2)), (slice(0, 2),) * 3)
            components = _apply(components, basis)
        elif isinstance(block, AEKLResBlock):
            _pass_through(block, components.shape[1])
        elif block is autoencoder.encoder.blocks[0]:
            _use(block.conv, torch.eye(components.shape[1])[..., None, None, None], (slice(1, 2),) * 3)
    mean, std = components.mean((0, 2, 3, 4)), components.std((0, 2, 3, 4)).clamp_min(1e-6)
    gain = std**-WHITENING
    gain = gain / (gain * std).square().mean().sqrt()  # the channels' mean variance is 1
    _use(
        autoencoder.encoder.blocks[-1].conv,
        torch.diag(gain)[..., None, None, None],
        (slice(1, 2),) * 3,
        -mean * gain,
    )
    for conv in (autoencoder.quant_conv_mu.conv, autoencoder.post_quant_conv.conv):
        conv.weight.copy_(torch.eye(latents)[..., None, None, None])
        conv.bias.zero_()

    _use(
        autoencoder.decoder.blocks[0].conv,
        torch.diag(1 / gain)[..., None, None, None],
        (slice(1, 2),) * 3,
        mean,
    )
    used = components.shape[1]
    for block in list(autoencoder.decoder.blocks)[1:]:
        if isinstance(block, AEKLResBlock):
            _pass_through(block, used)
        elif deconv := next((m for m in block.modules() if isinstance(m, nn.ConvTranspose3d)), None):
            basis = bases.pop()
            used = len(basis) // 8
            deconv.weight[: basis.shape[1], :].zero_()
            deconv.weight[:, :used].zero_()
            deconv.weight[: basis.shape[1], :used] = basis.T.unflatten(1, (used, 2, 2, 2))
            deconv.bias[:used].zero_()
    _use(autoencoder.decoder.blocks[-1].conv, torch.eye(used)[..., None, None, None], (slice(1, 2),) * 3)
    latent = _undo_normalisation(autoencoder.encoder.blocks, volumes)
    _undo_normalisation(autoencoder.decoder.blocks, latent)


def _blocks(x: torch.Tensor) -> torch.Tensor:
    """(N, C, D, H, W) -> the 2 x 2 x 2 blocks of all volumes as rows, (M, C * 8)."""
    for axis in (2, 3, 4):
        x = x.unfold(axis, 2, 2)
    return x.permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(-1, x.shape[1] * 8)


def _apply(x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    n, _, *sides = x.shape
    return (_blocks(x) @ basis).reshape(n, *(side // 2 for side in sides), -1).permute(0, 4, 1, 2, 3)


def _use(conv: nn.Module, weight: torch.Tensor, taps: tuple, bias: torch.Tensor | None = None) -> None:
    """Make the first outputs of a convolution a function of its first inputs at these taps alone."""
    out, used = weight.shape[:2]
    if out > conv.out_channels or used > conv.in_channels:
        raise UserError(
            f"autoencoder_train.initialise: block_transform needs at least {max(out, used)} channels where "
            f"the autoencoder has {min(conv.out_channels, conv.in_channels)}. Widen it, or set random."
        )
    conv.weight[:out].zero_()
    conv.weight[(slice(0, out), slice(0, used), *taps)] = weight
    conv.bias[:out] = 0 if bias is None else bias


def _pass_through(block: AEKLResBlock, used: int) -> None:
    block.conv2.conv.weight.zero_()
    block.conv2.conv.bias.zero_()
    if not isinstance(block.nin_shortcut, nn.Identity):
        _use(block.nin_shortcut.conv, torch.eye(used)[..., None, None, None], (slice(0, 1),) * 3)


def _undo_normalisation(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    """Run the blocks; set the scale and shift of their last group norm to what it takes away, on average."""
    for block in blocks:
        if isinstance(block, nn.GroupNorm):
            groups = x.reshape(len(x), block.num_groups, -1)
            each = x.shape[1] // block.num_groups
            block.weight.copy_(groups.std(2).mean(0).repeat_interleave(each))
            block.bias.copy_(groups.mean(2).mean(0).repeat_interleave(each))
        x = block(x)
    return x
