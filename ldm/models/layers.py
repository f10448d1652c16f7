"""Changes to the layers of a network: checkpointing, fused attention, group norm in bfloat16."""

import torch
from monai.networks.blocks import CrossAttentionBlock, SABlock
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ldm.system.instructions import wants_channels_last
from ldm.system.ranks import Run


class _Gradients(nn.Module):
    """Forward and gradient in one call, so that checkpointed activations see the same parameters."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, parameters: list[torch.Tensor], args: tuple, kwargs: dict) -> tuple:
        outputs = self.network(*args, **kwargs)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        return torch.autograd.grad(sum(one.sum() for one in outputs), parameters, allow_unused=True)


def freeze_unreached(network: nn.Module, *args, **kwargs) -> list[str]:
    """Freeze the parameters that a call of the network with these arguments does not use. DDP waits for a
    gradient of every parameter that is not frozen. The arguments are on the meta device.

    Call it as training does, with its conditions: else the layers of the conditions are frozen too.

    Returns:
        The names of the frozen parameters.
    """
    network_and_call = _Gradients(network)
    parameters, buffers = (
        {name: torch.empty_like(tensor, device="meta") for name, tensor in named}
        for named in (network_and_call.named_parameters(), network_and_call.named_buffers())
    )
    values = [value.requires_grad_() for value in parameters.values()]
    with torch.enable_grad():
        gradients = torch.func.functional_call(
            network_and_call, {**parameters, **buffers}, (values, args, kwargs)
        )
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        parameter.requires_grad_(parameter.requires_grad and gradient is not None)
    return [name for name, parameter in network.named_parameters() if not parameter.requires_grad]


def add_checkpointing(network: nn.Module) -> None:
    """Checkpoint each block, in place: its activations are computed again in the backward pass.

    `DiffusionModelUNet` has no option for it, and that of `AutoencoderKL` takes encoder and decoder as one
    block each, which saves little. Names in the state dict stay the same.
    """
    lists = [getattr(network, name, None) for name in ("down_blocks", "up_blocks")]
    lists += [getattr(getattr(network, part, None), "blocks", None) for part in ("encoder", "decoder")]
    for blocks in lists:
        for i, block in enumerate(blocks if isinstance(blocks, nn.ModuleList) else []):
            blocks[i] = checkpoint_wrapper(block)
    if isinstance(getattr(network, "middle_block", None), nn.Module):
        network.middle_block = checkpoint_wrapper(network.middle_block)


def fuse_attention(network: nn.Module) -> nn.Module:
    """Use torch's fused attention in MONAI's attention blocks, in place. It is equal up to rounding, without
    the matrix of all pairs of voxels.

    Blocks that need the matrix stay as they are, and those with dropout, which MONAI applies with fused
    attention in evaluation too.
    """
    for block in network.modules():
        if isinstance(block, SABlock | CrossAttentionBlock):
            plain = block.attention_dtype is None and not block.dropout_rate and not block.save_attn
            block.use_flash_attention = plain and block.rel_positional_embedding is None
    return network


class GroupNorm(nn.GroupNorm):
    """Group norm that returns bfloat16 for bfloat16.

    CUDA's autocast returns float32, which every block keeps for its backward pass: twice the memory. The
    kernels accumulate in float32 in either case, and a CPU's autocast returns bfloat16 too.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, ...) -> the same."""
        if x.dtype != torch.bfloat16:
            return super().forward(x)
        weight, bias = self.weight, self.bias
        if self.affine and x.is_cuda:  # its kernels need one dtype
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.group_norm(x, self.num_groups, weight, bias, self.eps)


def norm_in_half(network: nn.Module) -> nn.Module:
    """Make every group norm a `GroupNorm`, in place; names and values stay."""
    for module in network.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = GroupNorm
    return network


def on_device(network: nn.Module, run: Run, frozen_autoencoder: bool = False) -> nn.Module:
    """Move to the run's device and to the layout of `wants_channels_last`. Weights are the same in either."""
    if not wants_channels_last(run.device, run.amp_dtype, frozen_autoencoder):
        return network.to(run.device)
    is_3d = any(parameter.ndim == 5 for parameter in network.parameters())
    return network.to(run.device, memory_format=torch.channels_last_3d if is_3d else torch.channels_last)
