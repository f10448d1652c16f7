"""An autoencoder that starts as a block transform codes as the principal components of blocks do."""

import pytest
import torch
from monai.networks.nets import AutoencoderKL

from ldm import UserError
from ldm.models.initialisation import start_as_block_transform


def make(latents, channels=(16, 32), image_channels=1, convtranspose=True):
    torch.manual_seed(0)
    return AutoencoderKL(
        spatial_dims=3,
        in_channels=image_channels,
        out_channels=image_channels,
        channels=channels,
        latent_channels=latents,
        num_res_blocks=1,
        norm_num_groups=4,
        attention_levels=[False] * len(channels),
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
        use_convtranspose=convtranspose,
    )


def volume(channels=1, size=12):
    x = torch.rand((1, channels, size, size, size), generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.avg_pool3d(x, 3, 1, 1) * 3


def block_rows(x, side):
    for axis in (2, 3, 4):
        x = x.unfold(axis, side, side)
    return x.permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(-1, x.shape[1] * side**3)


@torch.no_grad()
def reconstruct(network, x):
    return network.decode(network.encode(x)[0])


@pytest.mark.parametrize("image_channels", [1, 2])
def test_a_complete_transform_gives_the_volume_back(image_channels):
    x = volume(image_channels)
    network = make(8 * image_channels, image_channels=image_channels)
    start_as_block_transform(network, x)
    assert (reconstruct(network, x) - x).abs().max() < 1e-3


def test_fewer_channels_lose_what_the_smallest_components_hold():
    x = volume()
    network = make(3)
    start_as_block_transform(network, x)
    rows = block_rows(x, 2).double()
    lost = torch.linalg.eigvalsh(rows.T @ rows).flip(0)[3:].sum() / rows.numel()
    assert (reconstruct(network, x) - x).double().square().mean() == pytest.approx(lost.item(), rel=1e-2)


def test_two_levels_code_blocks_of_four_better_than_their_mean_and_slopes():
    x = volume(size=16)
    network = make(16, channels=(16, 32, 64))
    start_as_block_transform(network, x)
    rows = block_rows(x, 4).double()
    best = torch.linalg.eigvalsh(rows.T @ rows).flip(0)[16:].sum() / rows.numel()
    # The first level keeps all eight components, so the two together are the transform of the whole block.
    assert (reconstruct(network, x) - x).double().square().mean() == pytest.approx(best.item(), rel=2e-2)


def test_latents_have_mean_zero_and_unit_variance_on_average():
    x = volume()
    network = make(8)
    start_as_block_transform(network, x)
    with torch.no_grad():
        mean, _ = network.encode(x)
    assert mean.mean((0, 2, 3, 4)).abs().max() < 1e-2
    assert mean.var((0, 2, 3, 4)).mean() == pytest.approx(1, abs=0.01)


def test_a_network_that_cannot_hold_it_is_refused():
    with pytest.raises(UserError, match="use_convtranspose"):
        start_as_block_transform(make(8, convtranspose=False), volume())
    with pytest.raises(UserError, match="Widen"):
        start_as_block_transform(make(8, channels=(4, 4), image_channels=5), volume(5))
