"""Wrap a network for training: gradient checkpointing, torch.compile, DDP, in this order."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ldm.models.layers import add_checkpointing, on_device
from ldm.system.ranks import Run


def prepare_network(network: nn.Module, section: dict, run: Run) -> nn.Module:
    """Move to the device; gradient checkpointing and synchronised batch norm change the network in place."""
    if section["gradient_checkpointing"]:
        add_checkpointing(network)
    if run.world_size > 1 and run.device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return on_device(network, run)


def wrap_network(network: nn.Module, section: dict, run: Run, compiled: bool) -> nn.Module:
    """torch.compile, then DDP, after `prepare_network`. The parameters stay those of `network`."""
    if compiled:
        network = torch.compile(network)
    if run.world_size > 1:
        # With accumulation, the first backward runs under no_sync, which a static graph does not allow.
        network = DistributedDataParallel(
            network,
            device_ids=[run.device.index] if run.device.type == "cuda" else None,
            static_graph=section["accumulate_steps"] == 1,
            gradient_as_bucket_view=True,
        )
    return network
