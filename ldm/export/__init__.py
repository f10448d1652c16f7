"""What leaves the project.

records        the JSON beside each sample, and making a sample again from it
formats        safetensors and TorchScript
bundle         a MONAI bundle
model_card     the model card
usage          its code examples
dicom          a generated volume as a DICOM series
contours       outlines of a label's regions
segmentations  the label as SEG and RTSTRUCT
"""
