"""The diffusion model.

process       noise schedules, targets, times
samplers      from noise to latents
objective     the loss, and the held-out loss
conditioning  classes, covariates and channels, their dropout
coverage      spacing and body regions as conditions
modality      MAISI's codes of modalities as classes
covariates    numbers and categories
sources       what a config's network needs as conditions
guidance      classifier-free guidance, autoguidance
inversion     a sampler's steps backwards
inpainting    a region of an image redrawn
"""
