"""Published feature networks, built from MONAI's ResNet, with weights from a local file.

MedicalNet (Chen et al., 2019, arXiv 1904.00625) and RadImageNet (Mei et al., 2022) differ from MONAI's
defaults in strides, dilation and biases. With the defaults their weights load too, but give other features.
"""

from pathlib import Path

import torch
from monai.networks.nets import resnet10, resnet50
from torch import nn

from ldm import UserError
from ldm.models.weights import load_weights, plain_names
from ldm.system.checkpoints import load_checkpoint
from ldm.system.files import sha256_of

MEDICALNET = {10: resnet10, 50: resnet50}
RADIMAGENET_EPS = 1.001e-5  # of batch norm in Keras, from which the weights were converted


def medicalnet(depth: int, state: dict | None, where: str) -> nn.Module:
    """MedicalNet's 3D ResNet: stride 2 at the first convolution, dilation 2 and 4 in place of the last two
    strides.

    Args:
        state: its weights. None: random ones.
        where: their file, for messages.
    """
    network = MEDICALNET[depth](
        spatial_dims=3,
        n_input_channels=1,
        feed_forward=False,
        conv1_t_stride=2,
        shortcut_type="B",
        bias_downsample=False,
    )
    for layer, dilation in ((network.layer3, 2), (network.layer4, 4)):
        for conv in (module for module in layer.modules() if isinstance(module, nn.Conv3d)):
            conv.stride = (1, 1, 1)
            if conv.kernel_size == (3, 3, 3):
                conv.dilation = conv.padding = (dilation,) * 3
    if state is not None:
        load_weights(network, state, where)
    return network


def radimagenet(state: dict | None, where: str) -> nn.Module:
    """RadImageNet's 2D ResNet-50 as converted from Keras: convolutions have a bias, and the stride of a block
    is in its first convolution."""
    network = resnet50(
        spatial_dims=2, n_input_channels=3, feed_forward=False, conv1_t_stride=2, shortcut_type="B"
    )
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:
            module.bias = nn.Parameter(torch.zeros(module.out_channels))
        if isinstance(module, nn.BatchNorm2d):
            module.eps = RADIMAGENET_EPS
    for layer in (network.layer2, network.layer3, network.layer4):
        layer[0].conv1.stride, layer[0].conv2.stride = layer[0].conv2.stride, (1, 1)
    if state is not None:
        load_weights(network, state, where)
    return network


def trunk(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The last feature map of one of these networks, (B, C, ...) -> (B, c, ...)."""
    x = network.maxpool(network.act(network.bn1(network.conv1(x))))
    return network.layer4(network.layer3(network.layer2(network.layer1(x))))


def standardised(x: torch.Tensor) -> torch.Tensor:
    """Each channel of each volume (B, C, D, H, W) with mean 0 and standard deviation 1, as for MedicalNet's
    training."""
    return (x - x.mean((2, 3, 4), keepdim=True)) / (x.std((2, 3, 4), keepdim=True) + 1e-6)


def read_weights(path: Path, digest: str | None) -> tuple[dict, str]:
    """The weights in a published file, and its SHA-256.

    Args:
        digest: the expected SHA-256, or its first digits (at least 8). None: any.

    Raises:
        UserError: the file is missing, has another hash, or holds no weights.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file. Check the path of the weights.")
    found = sha256_of(path)
    if digest and not (len(digest) >= 8 and found.startswith(digest.lower())):
        raise UserError(
            f"{path}: its SHA-256 is {found}, not {digest}. Fetch the file again, or fix the hash."
        )
    return plain_names(load_checkpoint(path)["model"]), found


def medicalnet_depth(state: dict, where: str) -> int:
    """The depth of MedicalNet's network that has these weights, by its blocks.

    Raises:
        UserError: none has.
    """
    blocks = tuple(
        len({name.split(".")[1] for name in state if name.startswith(f"layer{i}.")}) for i in range(1, 5)
    )
    known = {(1, 1, 1, 1): 10, (3, 4, 6, 3): 50}
    if blocks not in known:
        raise UserError(f"{where}: not the weights of MedicalNet's ResNet-10 or ResNet-50.")
    return known[blocks]
