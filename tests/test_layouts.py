"""What is taken for an image, a label and a subject, and what is passed over and said: in the layouts of
public data sets, under the names that their authors give, and in folders as users keep them."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import numpy as np
import pytest

from ldm import UserError
from ldm.layouts import find_cases

VOLUME = nibabel.Nifti1Image(np.arange(64, dtype=np.float32).reshape(4, 4, 4), np.eye(4)).to_bytes()


def make(root: Path, *names: str) -> Path:
    """Files of one small volume below a folder, whatever their names end in: finding opens none."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(VOLUME)
    return root


def listed(root: Path, content: dict) -> Path:
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return root


@dataclass
class Layout:
    """A public data set: its files, and what is to be found in them, by names below its folder.

    `passed` is the end of the line, without names; `refused` are the kinds that the message lists where no key chooses, and `keys` what then chooses.
    """

    files: list[str]
    images: list[str]
    subjects: list[str]
    labels: list[str] = field(default_factory=list)
    passed: str = ""
    refused: str = ""
    keys: dict = field(default_factory=dict)
    dataset_json: dict | None = None
    validation: int = 0


BRATS21 = [
    f"BraTS2021_{i:05d}/BraTS2021_{i:05d}_{c}.nii.gz"
    for i in (0, 2)
    for c in ("flair", "seg", "t1", "t1ce", "t2")
]
BRATS23 = [
    f"BraTS-GLI-{i}/BraTS-GLI-{i}-{c}.nii.gz"
    for i in ("00005-100", "00005-101", "00006-100")
    for c in ("seg", "t1c", "t1n", "t2f", "t2w")
]
FMRIPREP = [
    f"sub-{i}/anat/sub-{i}_{end}.nii.gz"
    for i in ("01", "02")
    for end in (
        "desc-brain_mask",
        "desc-preproc_T1w",
        "dseg",
        "label-GM_probseg",
        "space-MNI152NLin2009cAsym_desc-brain_mask",
        "space-MNI152NLin2009cAsym_desc-preproc_T1w",
    )
]
FREESURFER = [
    f"{s}/mri/{f}.mgz"
    for s in ("bert", "ernie")
    for f in (
        "T1",
        "aparc+aseg",
        "aparc.a2009s+aseg",
        "aseg",
        "aseg.auto",
        "brain",
        "brainmask",
        "filled",
        "lh.ribbon",
        "norm",
        "nu",
        "orig",
        "ribbon",
        "wm",
        "wm.seg",
        "wmparc",
    )
]
LAYOUTS = {
    "TotalSegmentator": Layout(
        [
            f"{s}/{f}.nii.gz"
            for s in ("s0000", "s0001")
            for f in ("ct", "segmentations/liver", "segmentations/vertebrae_L1")
        ],
        ["s0000/ct.nii.gz", "s0001/ct.nii.gz"],
        ["s0000_ct", "s0001_ct"],
        passed="4 masks",
    ),
    "BraTS 2021": Layout(
        BRATS21,
        [f for f in BRATS21 if "_seg" not in f],
        ["BraTS2021_00000", "BraTS2021_00002"],
        [f for f in BRATS21 if "_seg" in f],
        refused="_flair, _t1, _t1ce, _t2",
        keys={"contrasts": ["_flair", "_t1", "_t1ce", "_t2"]},
    ),
    "BraTS 2023": Layout(
        BRATS23,
        [f for f in BRATS23 if "-t1n" in f],
        ["BraTS-GLI-00005", "BraTS-GLI-00006"],
        [f for f in BRATS23 if "-seg" in f],
        "9 files that data.pattern leaves out",
        "-t1c, -t1n, -t2f, -t2w",
        {"pattern": "**/*-t1n.nii.gz"},
    ),
    "KiTS19": Layout(
        [f"case_{i:05d}/{f}.nii.gz" for i in (0, 1) for f in ("imaging", "segmentation")],
        ["case_00000/imaging.nii.gz", "case_00001/imaging.nii.gz"],
        ["case_00000_imaging", "case_00001_imaging"],
        ["case_00000/segmentation.nii.gz", "case_00001/segmentation.nii.gz"],
    ),
    "LiTS": Layout(
        [f"Training Batch 1/{f}-{i}.nii" for i in range(3) for f in ("segmentation", "volume")],
        [f"Training Batch 1/volume-{i}.nii" for i in range(3)],
        ["volume-0", "volume-1", "volume-2"],
        [f"Training Batch 1/segmentation-{i}.nii" for i in range(3)],
    ),
    "AMOS22": Layout(
        ["imagesTr/amos_0001.nii.gz", "imagesVa/amos_0008.nii.gz", "imagesTs/amos_0002.nii.gz"]
        + ["labelsTr/amos_0001.nii.gz", "labelsVa/amos_0008.nii.gz"],
        ["imagesTr/amos_0001.nii.gz", "imagesVa/amos_0008.nii.gz"],
        ["amos_0001", "amos_0008"],
        ["labelsTr/amos_0001.nii.gz", "labelsVa/amos_0008.nii.gz"],
        "1 test scan of the list",
        dataset_json={
            "training": [{"image": "./imagesTr/amos_0001.nii.gz", "label": "./labelsTr/amos_0001.nii.gz"}],
            "validation": [{"image": "./imagesVa/amos_0008.nii.gz", "label": "./labelsVa/amos_0008.nii.gz"}],
            "test": [{"image": "./imagesTs/amos_0002.nii.gz"}],
        },
        validation=1,
    ),
    "nnU-Net version 1": Layout(
        [f"imagesTr/la_{i}_{c:04d}.nii.gz" for i in ("003", "004") for c in (0, 1)]
        + ["labelsTr/la_003.nii.gz"],
        [f"imagesTr/la_003_{c:04d}.nii.gz" for c in (0, 1)],
        ["la_003"],
        ["labelsTr/la_003.nii.gz"],
        "1 test scan of the list, 2 files that dataset.json does not name",
        dataset_json={
            "modality": {"0": "T1", "1": "T2"},
            "training": [{"image": "./imagesTr/la_003.nii.gz", "label": "./labelsTr/la_003.nii.gz"}],
            "test": ["./imagesTs/la_001.nii.gz"],
        },
    ),
    "IXI": Layout(
        ["IXI-T1/IXI002-Guys-0828-T1.nii.gz", "IXI-T1/IXI012-HH-1211-T1.nii.gz"]
        + ["IXI-T2/IXI002-Guys-0828-T2.nii.gz", "IXI-T2/IXI012-HH-1211-T2.nii.gz"],
        ["IXI-T1/IXI002-Guys-0828-T1.nii.gz", "IXI-T1/IXI012-HH-1211-T1.nii.gz"],
        ["IXI002", "IXI012"],
        [],
        "2 files that data.pattern leaves out",
        "IXI-T1, IXI-T2",
        {"pattern": "**/IXI-T1/**/*"},
    ),
    "OASIS of Learn2Reg": Layout(
        [
            f"OASIS_OAS1_{i}_MR1/{f}.nii.gz"
            for i in ("0001", "0002")
            for f in ("aligned_norm", "aligned_orig", "aligned_seg35", "aligned_seg4")
        ],
        [f"OASIS_OAS1_{i}_MR1/aligned_norm.nii.gz" for i in ("0001", "0002")],
        ["OAS1_0001", "OAS1_0002"],
        [],
        "4 masks, 2 files that data.pattern leaves out",
        "aligned_norm, aligned_orig",
        {"pattern": "**/aligned_norm.*"},
    ),
    "ADNI": Layout(
        ["003_S_0003/m12/T1.nii.gz", "003_S_0003/m24/T1.nii.gz", "011_S_0005/bl/T1.nii.gz"],
        ["003_S_0003/m12/T1.nii.gz", "003_S_0003/m24/T1.nii.gz", "011_S_0005/bl/T1.nii.gz"],
        ["003_S_0003", "011_S_0005"],
    ),
    "fMRIPrep": Layout(
        FMRIPREP,
        [f for f in FMRIPREP if "MNI152NLin2009cAsym_desc-preproc" in f],
        ["sub-01", "sub-02"],
        [],
        "8 masks, 2 files that data.pattern leaves out",
        "desc-preproc_T1w, space-MNI152NLin2009cAsym_desc-preproc_T1w",
        {"pattern": "**/*_space-MNI152NLin2009cAsym_desc-preproc_T1w.*"},
    ),
    "FreeSurfer": Layout(
        FREESURFER,
        ["bert/mri/norm.mgz", "ernie/mri/norm.mgz"],
        ["bert_mri_norm", "ernie_mri_norm"],
        [],
        "22 masks, 8 files that data.pattern leaves out",
        "T1, brain, norm, nu, orig",
        {"pattern": "**/norm.mgz"},
    ),
    "ATLAS 2.0": Layout(
        ["MNI152NLin2009aSym.nii.gz"]
        + [
            f"Training/R001/sub-r001s00{i}/ses-1/anat/sub-r001s00{i}_ses-1_space-MNI152NLin2009aSym_{end}.nii.gz"
            for i in (1, 2)
            for end in ("T1w", "label-L_desc-T1lesion_mask")
        ],
        [
            f"Training/R001/sub-r001s00{i}/ses-1/anat/sub-r001s00{i}_ses-1_space-MNI152NLin2009aSym_T1w.nii.gz"
            for i in (1, 2)
        ],
        ["sub-r001s001", "sub-r001s002"],
        [],
        "1 template, 2 masks",
    ),
    "ISLES 2022": Layout(
        [
            f"sub-strokecase000{i}/ses-0001/{f[0]}/sub-strokecase000{i}_ses-0001_{f[1]}.nii.gz"
            for i in (1, 2)
            for f in (("anat", "FLAIR"), ("dwi", "adc"), ("dwi", "dwi"))
        ]
        + [
            f"derivatives/sub-strokecase000{i}/ses-0001/sub-strokecase000{i}_ses-0001_msk.nii.gz"
            for i in (1, 2)
        ],
        [
            f"sub-strokecase000{i}/ses-0001/dwi/sub-strokecase000{i}_ses-0001_{c}.nii.gz"
            for i in (1, 2)
            for c in ("dwi", "adc")
        ],
        ["sub-strokecase0001", "sub-strokecase0002"],
        [],
        "2 files under derivatives, 2 other contrasts",
        "FLAIR, adc, dwi",
        {"contrasts": ["_dwi", "_adc"]},
    ),
    "WMH": Layout(
        [
            f"{s}/{f}.nii.gz"
            for s in ("GE3T/100", "Singapore/50", "Utrecht/0")
            for f in ("orig/3DT1", "orig/FLAIR", "orig/T1", "pre/FLAIR", "pre/T1", "wmh")
        ],
        [f"{s}/pre/FLAIR.nii.gz" for s in ("GE3T/100", "Singapore/50", "Utrecht/0")],
        ["GE3T_100_pre_FLAIR", "Singapore_50_pre_FLAIR", "Utrecht_0_pre_FLAIR"],
        [],
        "12 files that data.pattern leaves out, 3 masks",
        "3DT1, FLAIR, T1",
        {"pattern": "**/pre/FLAIR.*"},
    ),
    "NFBS": Layout(
        [
            f"A000{i}/sub-A000{i}_ses-NFB3_T1w{end}.nii.gz"
            for i in ("28185", "28352")
            for end in ("", "_brain", "_brainmask")
        ],
        [f"A000{i}/sub-A000{i}_ses-NFB3_T1w_brain.nii.gz" for i in ("28185", "28352")],
        ["sub-A00028185", "sub-A00028352"],
        [],
        "2 files that data.pattern leaves out, 2 masks",
        "T1w, T1w_brain",
        {"pattern": "**/*_T1w_brain.*"},
    ),
    "Calgary-Campinas 359": Layout(
        ["Original/CC0001_philips_15_55_M.nii.gz", "Original/CC0002_philips_15_56_M.nii.gz"]
        + [
            "Silver-standard-machine-learning/CC0001_philips_15_55_M_ss.nii.gz",
            "STAPLE/CC0001_philips_15_55_M_staple.nii.gz",
        ],
        ["Original/CC0001_philips_15_55_M.nii.gz", "Original/CC0002_philips_15_56_M.nii.gz"],
        ["CC0001_philips_15_55_M", "CC0002_philips_15_56_M"],
        [],
        "2 masks",
    ),
    "HCP": Layout(
        [
            f"{s}/T1w/{f}.nii.gz"
            for s in ("100206", "100307")
            for f in (
                "T1w_acpc_dc_restore",
                "T1w_acpc_dc_restore_brain",
                "T2w_acpc_dc_restore",
                "aparc+aseg",
                "brainmask_fs",
                "ribbon",
                "wmparc",
            )
        ],
        [f"{s}/T1w/T1w_acpc_dc_restore_brain.nii.gz" for s in ("100206", "100307")],
        ["100206_T1w_T1w_acpc_dc_restore_brain", "100307_T1w_T1w_acpc_dc_restore_brain"],
        [],
        "4 files that data.pattern leaves out, 8 masks",
        "T1w_acpc_dc_restore, T1w_acpc_dc_restore_brain, T2w_acpc_dc_restore",
        {"pattern": "**/T1w_acpc_dc_restore_brain.*"},
    ),
    "FeTA": Layout(
        [f"sub-00{i}/anat/sub-00{i}_rec-mial_{end}.nii.gz" for i in (1, 2) for end in ("T2w", "dseg")],
        [f"sub-00{i}/anat/sub-00{i}_rec-mial_T2w.nii.gz" for i in (1, 2)],
        ["sub-001", "sub-002"],
        [f"sub-00{i}/anat/sub-00{i}_rec-mial_dseg.nii.gz" for i in (1, 2)],
    ),
    "MM-WHS": Layout(
        [
            f"{m}_train/{m}_train_{i}_{end}.nii.gz"
            for m in ("ct", "mr")
            for i in (1001, 1002)
            for end in ("image", "label")
        ],
        [f"ct_train/ct_train_{i}_image.nii.gz" for i in (1001, 1002)],
        ["ct_train_1001_image", "ct_train_1002_image"],
        [f"ct_train/ct_train_{i}_label.nii.gz" for i in (1001, 1002)],
        "2 files that data.pattern leaves out, 2 masks",
        "ct_train, mr_train",
        {"pattern": "**/ct_train/**/*"},
    ),
    "BTCV": Layout(
        [f"RawData/Training/{f}/{f}000{i}.nii.gz" for f in ("img", "label") for i in (1, 2)],
        [f"RawData/Training/img/img000{i}.nii.gz" for i in (1, 2)],
        ["img0001", "img0002"],
        [f"RawData/Training/label/label000{i}.nii.gz" for i in (1, 2)],
    ),
    "FDG-PET-CT-Lesions": Layout(
        [
            f"PETCT_{s}/{f}.nii.gz"
            for s in ("01140d52d8/08-13-2005-NA", "01140d52d8/12-02-2005-NA", "0143bab87a/05-01-2003-NA")
            for f in ("CT", "CTres", "PET", "SEG", "SUV")
        ],
        [
            f"PETCT_{s}/{f}.nii.gz"
            for s in ("01140d52d8/08-13-2005-NA", "01140d52d8/12-02-2005-NA", "0143bab87a/05-01-2003-NA")
            for f in ("SUV", "CTres")
        ],
        ["PETCT_01140d52d8", "PETCT_0143bab87a"],
        [
            f"PETCT_{s}/SEG.nii.gz"
            for s in ("01140d52d8/08-13-2005-NA", "01140d52d8/12-02-2005-NA", "0143bab87a/05-01-2003-NA")
        ],
        "6 other contrasts",
        "CT, CTres, PET, SUV",
        {"contrasts": ["SUV", "CTres"]},
    ),
    "ACDC": Layout(
        [
            f"training/patient00{i}/patient00{i}_{end}.nii.gz"
            for i in (1, 2)
            for end in ("4d", "frame01", "frame01_gt", "frame12", "frame12_gt")
        ],
        [f"training/patient00{i}/patient00{i}_frame{f}.nii.gz" for i in (1, 2) for f in ("01", "12")],
        ["patient001", "patient002"],
        [f"training/patient00{i}/patient00{i}_frame{f}_gt.nii.gz" for i in (1, 2) for f in ("01", "12")],
        "2 files that data.pattern leaves out",
        "_4d, _frame01, _frame12",
        {"pattern": "**/*_frame[0-9][0-9].nii.gz"},
    ),
    "VerSe": Layout(
        ["dataset-verse19training/rawdata/sub-verse004/sub-verse004_ct.nii.gz"]
        + ["dataset-verse19training/derivatives/sub-verse004/sub-verse004_seg-vert_msk.nii.gz"],
        ["dataset-verse19training/rawdata/sub-verse004/sub-verse004_ct.nii.gz"],
        ["sub-verse004"],
        [],
        "1 file under derivatives",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_public_data_set_is_read_as_its_authors_mean_it(tmp_path, name):
    layout = LAYOUTS[name]
    root = make(tmp_path / "data", *layout.files)
    if layout.dataset_json:
        listed(root, layout.dataset_json)
    if layout.refused:
        with pytest.raises(
            UserError, match=re.escape(f"holds several kinds of image ({layout.refused})")
        ) as error:
            find_cases(root)
        # The advice is followed as it stands: a kind alone, one image a scan.
        advised = json.loads(re.search(r'"data": (\{"pattern": .*?\})', str(error.value))[1])
        alone, _ = find_cases(root, **advised)
        assert len({(case.subject, case.images[0].parent) for case in alone}) == len(alone)
    said = []
    cases, validation = find_cases(root, **layout.keys, say=said.append)

    def below(paths):
        return [path.relative_to(root).as_posix() for path in paths]

    every = [*cases, *validation]
    assert sorted(below(path for case in every for path in case.images)) == sorted(layout.images)
    assert sorted(below(case.label for case in every if case.label)) == sorted(layout.labels)
    assert sorted({case.subject for case in every}) == layout.subjects
    assert len(validation) == layout.validation
    [line] = said
    passed = re.sub(r" \([^()]*\)", "", line.partition("; passed over: ")[2])
    assert line.startswith("found: ") and sorted(passed.split(", ")) == sorted(layout.passed.split(", "))
