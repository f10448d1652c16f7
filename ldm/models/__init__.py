"""Networks.

definitions     from a config section to a network, checked
autoencoder     one interface for every autoencoder
denoiser        one call for every diffusion network and its conditions
layers          checkpointing, fused attention, group norm, frozen parameters
weights         state dicts of any origin
perceptual      the frozen networks of perceptual losses and of evaluation
initialisation  an autoencoder that starts as a block transform
strides         downsampling along some axes only
slicewise       2D networks on volumes, slice by slice
wavelet         Haar wavelets in the place of an autoencoder
quantised       autoencoders with quantised latents: VQ-VAE, FSQ
embedding       covariates added to the time embedding
control         a ControlNet beside a frozen diffusion network
maisi           MAISI's networks, on any device and size
"""

from ldm.models.quantised import FSQ
from ldm.models.wavelet import Haar

__all__ = ["FSQ", "Haar"]  # what a config may name as ldm.models.Haar
