"""The label of a generated volume as DICOM: a SEG, made by highdicom, or an RTSTRUCT.

highdicom is an optional dependency. Sections, such as A.51, are those of DICOM PS3.3.
"""

from collections.abc import Iterator, Sequence

import nibabel as nib
import numpy as np
from scipy.ndimage import find_objects

from ldm.export.contours import outlines
from ldm.export.dicom import SOFTWARE, SYNTHETIC, Pair, header, package
from ldm.figures import PALETTE

SEG, RTSTRUCT = "SEG", "RTSTRUCT"
NO_DATE = ("19700101", "000000")  # where one is required: nothing was acquired, and equal files stay equal


def colour(value: int) -> tuple[int, int, int]:
    """Of a label value, red, green and blue from 0 to 255."""
    return tuple(bytes.fromhex(PALETTE[(value - 1) % len(PALETTE)].removeprefix("#")))


def segmentation(pair: Pair, series: Sequence, number: int, names: dict[int, str]):
    """The label as a binary SEG (A.51), a segment for each value, made by highdicom.

    Args:
        series: the datasets of the image that the label is of.
        number: of the SEG's series.
        names: of label values.
    """
    highdicom = package("highdicom")
    codes, code = package("pydicom.sr.codedict").codes, package("pydicom.sr.coding").Code
    algorithm = highdicom.AlgorithmIdentificationSequence(
        SOFTWARE, codes.cid7162.ArtificialIntelligence, version="unknown"
    )
    segments = [
        highdicom.seg.SegmentDescription(
            segment,
            name := names.get(value, f"label {value}"),
            codes.SCT.Tissue,
            code(str(value), "99LABEL", name),  # a private scheme: what a label is has no code
            "AUTOMATIC",
            algorithm,
            tracking_uid=pair.uid("segment", value, pair.hashes[1]),
            tracking_id=f"label {value}",
            display_color=highdicom.color.CIELabColor.from_rgb(*colour(value)),
        )
        for segment, value in enumerate(pair.values, 1)
    ]
    of = (SEG, series[0].SeriesInstanceUID, pair.hashes[1], sorted(names.items()))
    ordered = np.searchsorted([0, *pair.values], pair.label).astype(np.uint16)  # 0, 1, 2, ...
    dataset = highdicom.seg.Segmentation(
        series,
        np.ascontiguousarray(ordered.T),  # (slices, rows, columns)
        "BINARY",
        segments,
        pair.uid("series", *of),
        number,
        pair.uid(*of),
        1,
        SOFTWARE,
        "export_dicom.py",
        "unknown",
        "none",
        content_label="SYNTHETIC",
        content_description="Label of a synthetic image",
        series_description="Synthetic label",
        content_date=NO_DATE[0],
        content_time=NO_DATE[1],
    )
    del dataset.InstanceCreationDate, dataset.InstanceCreationTime
    for item in dataset.ContributingEquipmentSequence:
        item.pop("ContributionDateTime", None)
    dataset.SyntheticData, dataset.ImageComments = "YES", f"{SYNTHETIC} {pair.origin}"
    for item in (*dataset.DimensionOrganizationSequence, *dataset.DimensionIndexSequence):
        item.DimensionOrganizationUID = pair.uid("dimensions", *of)  # highdicom's is drawn at random
    return dataset


def structure_set(pair: Pair, series: Sequence, number: int, names: dict[int, str]):
    """The outlines of the label in each slice as an RTSTRUCT (A.19); the number of an ROI is its label value.

    Args: as of `segmentation`.
    """
    pydicom = package("pydicom")

    def items(**entries: object) -> list:
        item = pydicom.Dataset()
        for key, value in entries.items():
            setattr(item, key, value)
        return [item]

    image, frame = series[0], pair.uid("frame of reference")
    of = (RTSTRUCT, image.SeriesInstanceUID, pair.hashes[1], sorted(names.items()))
    dataset = header(pair, "RTStructureSetStorage", RTSTRUCT, of, number)
    # In an explicit one no contour is longer than 64 kB.
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    dataset.SOPInstanceUID, dataset.InstanceNumber = pair.uid(*of), 1
    dataset.SeriesDescription, dataset.StructureSetLabel = "Synthetic label", "SYNTHETIC"
    dataset.StructureSetDescription = f"{SYNTHETIC} {pair.origin}"
    dataset.StructureSetDate = dataset.StructureSetTime = dataset.OperatorsName = ""
    dataset.ApprovalStatus = "UNAPPROVED"
    slices = [
        items(ReferencedSOPClassUID=one.SOPClassUID, ReferencedSOPInstanceUID=one.SOPInstanceUID)
        for one in series
    ]
    referenced = items(SeriesInstanceUID=image.SeriesInstanceUID, ContourImageSequence=sum(slices, []))
    study = items(
        ReferencedSOPClassUID="1.2.840.10008.3.1.2.3.1",  # Detached Study Management, retired; required here
        ReferencedSOPInstanceUID=image.StudyInstanceUID,
        RTReferencedSeriesSequence=referenced,
    )
    dataset.ReferencedFrameOfReferenceSequence = items(
        FrameOfReferenceUID=frame, RTReferencedStudySequence=study
    )
    rois, contours, observations = [], [], []
    for value in pair.values:
        rois += items(
            ROINumber=value,
            ReferencedFrameOfReferenceUID=frame,
            ROIName=names.get(value, f"label {value}"),
            ROIGenerationAlgorithm="AUTOMATIC",
        )
        parts = []
        for k, points in polygons(pair, value):
            parts += items(
                ContourImageSequence=slices[k],
                ContourGeometricType="CLOSED_PLANAR",
                NumberOfContourPoints=len(points),
                ContourData=[f"{number:.4f}" for number in points.ravel()],
            )
        contours += items(ReferencedROINumber=value, ROIDisplayColor=[*colour(value)], ContourSequence=parts)
        observations += items(
            ObservationNumber=value, ReferencedROINumber=value, RTROIInterpretedType="", ROIInterpreter=""
        )
    dataset.StructureSetROISequence = rois
    dataset.ROIContourSequence, dataset.RTROIObservationsSequence = contours, observations
    return dataset


def polygons(pair: Pair, value: int) -> Iterator[tuple[int, np.ndarray]]:
    """The slice and the corners in mm, (N, 3), of each outline of a label value."""
    box = find_objects(pair.label)[value - 1]
    inside, (left, top, first) = pair.label[box] == value, (one.start for one in box)
    for k in range(inside.shape[2]):
        for corners in outlines(inside[..., k]):
            flat = np.column_stack([corners + (left, top), np.full(len(corners), k + first)])
            yield k + first, nib.affines.apply_affine(pair.affine, flat)


MAKERS = {SEG: segmentation, RTSTRUCT: structure_set}
