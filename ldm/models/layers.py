"""What is changed in the layers of a network that a config names: checkpointing, attention, norms."""

import torch
from monai.networks.blocks import CrossAttentionBlock, SABlock
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper


class _Gradients(nn.Module):
    """Within one call, so that activations that are computed again see the same parameters."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, parameters: list[torch.Tensor], args: tuple, kwargs: dict) -> tuple:
        made = self.network(*args, **kwargs)
        made = [made] if isinstance(made, torch.Tensor) else made
        return torch.autograd.grad(sum(one.sum() for one in made), parameters, allow_unused=True)


def freeze_unreached(network: nn.Module, *args, **kwargs) -> list[str]:
    """Freeze the parameters that no loss can reach: those that a call of the network with these arguments, on
    the meta device, does not use. DDP waits for a gradient of every parameter that is not frozen. Returns the
    names of those that are.

    Call it as training does: what another call would use, such as a class embedding, is frozen too.
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
    """Compute the activations of each block again in the backward pass, in place.

    `DiffusionModelUNet` has no switch for it, and `AutoencoderKL`'s covers encoder and decoder as one piece
    each, which lowers the peak little. Names in the state dict stay as they are.
    """
    lists = [getattr(network, name, None) for name in ("down_blocks", "up_blocks")]
    lists += [getattr(getattr(network, part, None), "blocks", None) for part in ("encoder", "decoder")]
    for blocks in lists:
        for i, block in enumerate(blocks if isinstance(blocks, nn.ModuleList) else []):
            blocks[i] = checkpoint_wrapper(block)
    if isinstance(getattr(network, "middle_block", None), nn.Module):
        network.middle_block = checkpoint_wrapper(network.middle_block)


def fuse_attention(network: nn.Module) -> nn.Module:
    """Let MONAI's attention blocks use torch's fused attention, in place: the same to rounding, without the
    matrix of all pairs of voxels in memory. A block that needs the matrix is left as it is, as is one with
    dropout, which MONAI passes to the fused kernels in evaluation too."""
    for block in network.modules():
        if isinstance(block, SABlock | CrossAttentionBlock):
            plain = block.attention_dtype is None and not block.dropout_rate and not block.save_attn
            block.use_flash_attention = plain and block.rel_positional_embedding is None
    return network


class GroupNorm(nn.GroupNorm):
    """Group norm that gives bfloat16 for bfloat16.

    Under autocast CUDA would give float32, which every block keeps for its backward pass: twice the memory
    and the traffic. The kernels add up in float32 in any case, and a CPU's autocast does as here.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, ...) -> the same."""
        if x.dtype != torch.bfloat16:
            return super().forward(x)
        weight, bias = self.weight, self.bias
        if self.affine and x.is_cuda:  # whose kernels take no two types
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.group_norm(x, self.num_groups, weight, bias, self.eps)


def norm_in_half(network: nn.Module) -> nn.Module:
    """Make every group norm a `GroupNorm`, in place; names and values stay."""
    for module in network.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = GroupNorm
    return network


def on_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Move to the device; on a CPU with the channels last in memory, as its convolutions are fastest (docs/
    PERFORMANCE.md)."""
    last = torch.channels_last_3d if device.type == "cpu" else torch.preserve_format
    return network.to(device, memory_format=last)
