"""From a folder of scans to batches, from the bottom up:

reading        headers and voxels of NIfTI and MGH files
intensity      intensities to [0, 1] and back
preprocessing  orientation, spacing, intensity: from a file to a volume
cases          what a case is; spacing and size of cases by their headers
extent         size, spacing and field of view: trained on, and asked for
names          what file names mean: masks, contrasts, patients
folders        the cases of a plain or BIDS-like folder
layouts        the cases of any data set: `find_cases`
label_names    the names of label values; label maps under other values
labels         labels as channels; sizes of structures; a structure taken out
structures     how bright structures are
masks, checks  what is wrong with a data set
augmentation   random crops, flips, affine and intensity changes
datasets       volumes as a loader serves them; the order of cases
splits         training and validation cases, free of leaks
embeddings     latents that MAISI's scripts have encoded
posteriors     posteriors as a loader serves them; encoding them
latent_cache   posteriors on disk
prepare        all of this from a config and an environment file
display        volumes for display, on a common grid
raw_cases      raw scans in any format, with label and brain mask
foreign        DICOM, NRRD and MetaImage files
scan           from a raw scan to one that is ready: mask, crop, resampling, intensities
body           the body in a CT, and the regions that a volume begins and ends in
download       MSD Task01
simulation     simulated brains
"""
