"""Downsampling along some axes only: by hand, exactly the networks' own where all axes are halved."""

import pytest
import torch

from ldm import UserError
from ldm.lowmem.slabwise import Budget, decode_within
from ldm.models.autoencoder import Autoencoder
from ldm.models.definitions import NETWORKS, downsampling_factor, instantiate
from ldm.models.strides import check_strides

AUTOENCODER = {"_target_": "monai.networks.nets.AutoencoderKL", "spatial_dims": 3, "in_channels": 1}
AUTOENCODER |= {"out_channels": 1, "latent_channels": 2, "channels": [8, 8, 8], "num_res_blocks": 1}
AUTOENCODER |= {"norm_num_groups": 4, "attention_levels": [False] * 3}
AUTOENCODER |= {"with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False}
UNET = {"_target_": "monai.networks.nets.DiffusionModelUNet", "spatial_dims": 3, "in_channels": 2}
UNET |= {"out_channels": 2, "channels": [8, 8, 8], "num_res_blocks": 1, "norm_num_groups": 4}
UNET |= {"attention_levels": [False] * 3, "num_head_channels": 8}
THICK = [[2, 2, 1], [2, 2, 2]]


def build(definition, **more):
    torch.manual_seed(0)
    return instantiate({**definition, **more}, NETWORKS, "network").eval()


def test_an_axis_of_thick_slices_waits():
    network = build(AUTOENCODER, level_strides=THICK)
    autoencoder = Autoencoder(network)
    assert autoencoder.factor == (4, 4, 2) == downsampling_factor({**AUTOENCODER, "level_strides": THICK})
    images = torch.rand(1, 1, 16, 16, 6)
    mean, _ = autoencoder.encode(images)
    assert mean.shape == (1, 2, 4, 4, 3) and autoencoder.decode(mean).shape == images.shape
    unet, latents = build(UNET, level_strides=[[2, 2, 1], [1, 2, 1]]), torch.rand(1, 2, 4, 8, 3)
    assert unet(latents, timesteps=torch.zeros(1)).shape == latents.shape
    pooling = build(UNET, level_strides=[[2, 2, 1], [1, 2, 1]], resblock_updown=True)
    assert pooling(latents, timesteps=torch.zeros(1)).shape == latents.shape


@pytest.mark.parametrize("definition", [AUTOENCODER, UNET], ids=["autoencoder", "unet"])
def test_weights_and_names_stay(definition):
    plain, thick = build(definition), build(definition, level_strides=THICK)
    all_halved = build(definition, level_strides=[[2] * 3] * 2)
    assert all(torch.equal(plain.state_dict()[key], value) for key, value in thick.state_dict().items())
    if definition is UNET:
        x = torch.rand(1, 2, 8, 8, 8)
        assert torch.equal(plain(x, timesteps=torch.ones(1)), all_halved(x, timesteps=torch.ones(1)))
    else:
        x = torch.rand(1, 1, 8, 8, 8)
        assert torch.equal(plain.reconstruct(x), all_halved.reconstruct(x))


def test_a_slice_by_hand():
    """A kernel that takes the middle of three leaves voxels in place along the axis that is not halved; along
    the others every second one is taken, as before."""
    down = build(AUTOENCODER, level_strides=THICK).encoder.blocks[2]
    with torch.no_grad():
        down.conv.conv.weight.zero_()
        down.conv.conv.weight[range(8), range(8), 0, 0, 1] = 1
        down.conv.conv.bias.zero_()
    x = torch.rand(1, 8, 6, 4, 5)
    assert torch.equal(down(x), x[:, :, ::2, ::2])


def test_decoding_in_slabs_is_the_same():
    network = build(AUTOENCODER, level_strides=THICK)
    latents = torch.randn(1, 2, 12, 8, 8)
    whole = network.decode(latents)
    slabs = decode_within(network, latents, Budget(0.5 * 2**28, like_gpu=True))
    assert torch.allclose(slabs, whole, atol=1e-4)


@pytest.mark.parametrize("strides", ["2", [[2, 2]], [[2, 2, 3]], [[2, 2, True]], [2, 2, 1]])
def test_wrong_strides_are_named(strides):
    with pytest.raises(UserError, match="level_strides: expected lists such as"):
        check_strides(strides, 3, "autoencoder_def")


def test_other_layers_are_refused():
    for more in ({"level_strides": THICK[:1]}, {"level_strides": THICK, "use_convtranspose": True}):
        with pytest.raises(UserError, match="one for each level after the first"):
            build(AUTOENCODER, **more)
