"""From a data set and a GPU to a config in which each choice has its reason.

geometry    spacing, sizes, downsampling
choices     the plan: intensities, networks, losses, optimisers, augmentation
memory      widths, patches and batches: the largest that the memory forecast allows
"""
