"""Initialise an autoencoder as the PCA of image blocks, the best linear code of its size.

An AutoencoderKL with transposed convolutions contains, at each level, every orthogonal transform of
2 x 2 x 2 blocks and its inverse: a convolution of stride 2 reads a block, a transposed one of size 2 writes
it. With zero residual branches (Zhang et al., 2019, "Fixup") the network is a cascade of such transforms. The
principal components of the training volumes' blocks (the Karhunen-Loeve transform) make it a good linear code
before the first step, which shortens training most where only minutes are available.
"""

import torch
from monai.networks.nets import AutoencoderKL
from monai.networks.nets.autoencoderkl import AEKLDownsample, AEKLResBlock
from torch import nn

from ldm import UserError

WHITENING = 0.5  # 0 keeps the variances of the components, 1 makes them equal


@torch.no_grad()
def start_as_block_transform(autoencoder: nn.Module, volumes: torch.Tensor) -> None:
    """Set the weights in place: encoding gives the principal components of blocks, decoding inverts it.

    Channels that the transform does not use keep their random weights; used channels do not read them. The
    standard deviation of a latent channel is that of its component to the power 1 - WHITENING, so that weak
    components, which hold fine detail, are not lost in the noise of posterior and diffusion.

    Args:
        autoencoder: monai.networks.nets.AutoencoderKL with `use_convtranspose`.
        volumes: some training volumes (N, C, D, H, W), each side a multiple of the factor.

    Raises:
        UserError: the network is of another kind, or has too few channels.
    """
    if not isinstance(autoencoder, AutoencoderKL) or not any(
        isinstance(m, nn.ConvTranspose3d) for m in autoencoder.modules()
    ):
        raise UserError(
            "autoencoder_train.initialise: block_transform needs monai.networks.nets.AutoencoderKL with "
            '"use_convtranspose": true in autoencoder_def. Set that, or "initialise": "random".'
        )
    encoder, decoder = autoencoder.encoder.blocks, autoencoder.decoder.blocks
    downs = [block for block in encoder if isinstance(block, AEKLDownsample)]
    components, bases = volumes.float(), []
    for block in encoder:
        if isinstance(block, AEKLDownsample):
            conv, blocks = block.conv.conv, _blocks(components)
            width = min(conv.out_channels, blocks.shape[1])
            if block is downs[-1]:
                width = min(width, autoencoder.latent_channels)
            _, vectors = torch.linalg.eigh((blocks.T @ blocks).double())
            basis = vectors.flip(1)[:, :width].float()  # (C * 8, width), largest first
            bases.append(basis)
            _use(conv, basis.T.unflatten(1, (-1, 2, 2, 2)), (slice(0, 2),) * 3)
            components = _apply(components, basis)
        elif isinstance(block, AEKLResBlock):
            _pass_through(block, components.shape[1])
        elif block is encoder[0]:
            _use_matrix(block.conv, torch.eye(components.shape[1]))
    mean, std = components.mean((0, 2, 3, 4)), components.std((0, 2, 3, 4)).clamp_min(1e-6)
    gain = std**-WHITENING
    gain = gain / (gain * std).square().mean().sqrt()  # the channels' mean variance is 1
    _use_matrix(encoder[-1].conv, torch.diag(gain), -mean * gain)
    for conv in (autoencoder.quant_conv_mu.conv, autoencoder.post_quant_conv.conv):
        _use_matrix(conv, torch.eye(autoencoder.latent_channels))

    _use_matrix(decoder[0].conv, torch.diag(1 / gain), mean)
    used = components.shape[1]
    for block in list(decoder)[1:]:
        if isinstance(block, AEKLResBlock):
            _pass_through(block, used)
        elif deconv := next((m for m in block.modules() if isinstance(m, nn.ConvTranspose3d)), None):
            basis = bases.pop()
            used = len(basis) // 8
            deconv.weight[: basis.shape[1], :].zero_()
            deconv.weight[:, :used].zero_()
            deconv.weight[: basis.shape[1], :used] = basis.T.unflatten(1, (used, 2, 2, 2))
            deconv.bias[:used].zero_()
    _use_matrix(decoder[-1].conv, torch.eye(used))
    _undo_normalisation(decoder, _undo_normalisation(encoder, volumes))


def _blocks(x: torch.Tensor) -> torch.Tensor:
    """(N, C, D, H, W) -> the 2 x 2 x 2 blocks of all volumes as rows, (M, C * 8)."""
    for axis in (2, 3, 4):
        x = x.unfold(axis, 2, 2)
    return x.permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(-1, x.shape[1] * 8)


def _apply(x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    n, _, *sides = x.shape
    return (_blocks(x) @ basis).reshape(n, *(side // 2 for side in sides), -1).permute(0, 4, 1, 2, 3)


def _use(conv: nn.Module, weight: torch.Tensor, taps: tuple, bias: torch.Tensor | None = None) -> None:
    """Set the first outputs of a convolution to depend only on its first inputs, at these taps."""
    out, used = weight.shape[:2]
    if out > conv.out_channels or used > conv.in_channels:
        raise UserError(
            f"autoencoder_train.initialise: block_transform needs at least {max(out, used)} channels where "
            f"the autoencoder has {min(conv.out_channels, conv.in_channels)}. Widen it, or set random."
        )
    conv.weight[:out].zero_()
    conv.weight[(slice(0, out), slice(0, used), *taps)] = weight
    conv.bias[:out] = 0 if bias is None else bias


def _use_matrix(conv: nn.Module, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Set the first outputs of a convolution to a matrix times its first inputs, voxel by voxel."""
    centre = tuple(slice(k // 2, k // 2 + 1) for k in conv.kernel_size)
    _use(conv, matrix[..., None, None, None], centre, bias)


def _pass_through(block: AEKLResBlock, used: int) -> None:
    block.conv2.conv.weight.zero_()
    block.conv2.conv.bias.zero_()
    if not isinstance(block.nin_shortcut, nn.Identity):
        _use_matrix(block.nin_shortcut.conv, torch.eye(used))


def _undo_normalisation(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    """Run the blocks, and set scale and shift of each group norm so that it changes nothing on average."""
    for block in blocks:
        if isinstance(block, nn.GroupNorm):
            groups = x.reshape(len(x), block.num_groups, -1)
            each = x.shape[1] // block.num_groups
            block.weight.copy_(groups.std(2).mean(0).repeat_interleave(each))
            block.bias.copy_(groups.mean(2).mean(0).repeat_interleave(each))
        x = block(x)
    return x
