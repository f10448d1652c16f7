"""The diffusion model.

process       noise schedules, targets, times
samplers      from noise to latents
objective     the loss, and the held-out loss
conditioning  classes, their dropout, classifier-free guidance
coverage      spacing and body regions as conditions
modality      MAISI's codes of modalities as classes
"""
