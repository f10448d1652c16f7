"""What is taken for an image, a label and a subject, and what is passed over and said: in the layouts of
public data sets, under the names that their authors give, and in folders as users keep them."""

import gzip
import itertools
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import numpy as np
import pytest

from ldm import UserError
from ldm.data.checks import check_headers
from ldm.data.layouts import find_cases

VOLUME = nibabel.Nifti1Image(np.arange(64, dtype=np.float32).reshape(4, 4, 4), np.eye(4)).to_bytes()


def make(root: Path, *names: str) -> Path:
    """Files of one small volume below a folder, whatever their names end in: finding opens none."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(gzip.compress(VOLUME) if name.lower().endswith("gz") else VOLUME)
    return root


def listed(root: Path, content: dict) -> Path:
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return root


@dataclass
class Layout:
    """A public data set: its files, and what is to be found in them, as names below its folder. In these `*`
    stands for each of `each`, and `{a,b}` for a and for b; ` | ` separates them.

    `passed` is the end of the line, without names; `refused` are the kinds that the message lists where no
    key chooses, and `keys` what then chooses.
    """

    each: str
    files: str
    images: str
    subjects: str
    labels: str = ""
    passed: str = ""
    refused: str = ""
    keys: dict = field(default_factory=dict)
    dataset_json: dict | None = None
    validation: int = 0

    def expanded(self, names: str) -> list[str]:
        found = set()
        for name in (name.replace("*", one) for name in names.split(" | ") for one in self.each.split()):
            parts = [part.split(",") for part in re.split(r"[{}]", name)]
            found |= set(map("".join, itertools.product(*parts)))
        return sorted(found)


ATLAS = "Training/R001/sub-*/ses-1/anat/sub-*_ses-1_space-MNI152NLin2009aSym_"
FMRIPREP = "sub-*/anat/sub-*_{,space-MNI152NLin2009cAsym_}desc-"
FREESURFER = (
    "T1,aparc+aseg,aparc.a2009s+aseg,aseg,aseg.auto,brain,brainmask,filled,lh.ribbon,norm,nu,orig,ribbon,wm,"
    "wm.seg,wmparc"
)
ISLES = "sub-*/ses-0001/{dwi/sub-*_ses-0001_dwi,dwi/sub-*_ses-0001_adc,anat/sub-*_ses-0001_FLAIR}.nii.gz"
LAYOUTS = {
    "TotalSegmentator": Layout(
        "s0000 s0001",
        "*/{ct,segmentations/liver,segmentations/vertebrae_L1}.nii.gz",
        "*/ct.nii.gz",
        "*_ct",
        passed="4 masks",
    ),
    "BraTS 2021": Layout(
        "BraTS2021_00000 BraTS2021_00002",
        "*/*_{flair,seg,t1,t1ce,t2}.nii.gz",
        "*/*_{flair,t1,t1ce,t2}.nii.gz",
        "*",
        "*/*_seg.nii.gz",
        refused="_flair, _t1, _t1ce, _t2",
        keys={"contrasts": ["_flair", "_t1", "_t1ce", "_t2"]},
    ),
    "BraTS 2023": Layout(
        "00005-100 00005-101 00006-100",
        "BraTS-GLI-*/BraTS-GLI-*-{seg,t1c,t1n,t2f,t2w}.nii.gz",
        "BraTS-GLI-*/BraTS-GLI-*-t1n.nii.gz",
        "BraTS-GLI-0000{5,6}",
        "BraTS-GLI-*/BraTS-GLI-*-seg.nii.gz",
        "9 files that data.pattern leaves out",
        "-t1c, -t1n, -t2f, -t2w",
        {"pattern": "**/*-t1n.nii.gz"},
    ),
    "KiTS19": Layout(
        "case_00000 case_00001",
        "*/{imaging,segmentation}.nii.gz",
        "*/imaging.nii.gz",
        "*_imaging",
        "*/segmentation.nii.gz",
    ),
    "LiTS": Layout(
        "0 1 2",
        "Training Batch 1/{segmentation,volume}-*.nii",
        "Training Batch 1/volume-*.nii",
        "volume-*",
        "Training Batch 1/segmentation-*.nii",
    ),
    "AMOS22": Layout(
        "Tr/amos_0001 Va/amos_0008",
        "{images,labels}*.nii.gz | imagesTs/amos_0002.nii.gz",
        "images*.nii.gz",
        "amos_000{1,8}",
        "labels*.nii.gz",
        "1 test scan of the list",
        dataset_json={
            "training": [{"image": "./imagesTr/amos_0001.nii.gz", "label": "./labelsTr/amos_0001.nii.gz"}],
            "validation": [{"image": "./imagesVa/amos_0008.nii.gz", "label": "./labelsVa/amos_0008.nii.gz"}],
            "test": [{"image": "./imagesTs/amos_0002.nii.gz"}],
        },
        validation=1,
    ),
    "nnU-Net version 1": Layout(
        "la_003 la_004",
        "imagesTr/*_000{0,1}.nii.gz | labelsTr/la_003.nii.gz",
        "imagesTr/la_003_000{0,1}.nii.gz",
        "la_003",
        "labelsTr/la_003.nii.gz",
        "1 test scan of the list, 2 files that dataset.json does not name",
        dataset_json={
            "modality": {"0": "T1", "1": "T2"},
            "training": [{"image": "./imagesTr/la_003.nii.gz", "label": "./labelsTr/la_003.nii.gz"}],
            "test": ["./imagesTs/la_001.nii.gz"],
        },
    ),
    "IXI": Layout(
        "T1 T2",
        "IXI-*/{IXI002-Guys-0828,IXI012-HH-1211}-*.nii.gz",
        "IXI-T1/{IXI002-Guys-0828,IXI012-HH-1211}-T1.nii.gz",
        "IXI0{02,12}",
        passed="2 files that data.pattern leaves out",
        refused="IXI-T1, IXI-T2",
        keys={"pattern": "**/IXI-T1/**/*"},
    ),
    "OASIS of Learn2Reg": Layout(
        "0001 0002",
        "OASIS_OAS1_*_MR1/aligned_{norm,orig,seg35,seg4}.nii.gz",
        "OASIS_OAS1_*_MR1/aligned_norm.nii.gz",
        "OAS1_*",
        passed="4 masks, 2 files that data.pattern leaves out",
        refused="aligned_norm, aligned_orig",
        keys={"pattern": "**/aligned_norm.*"},
    ),
    "ADNI": Layout(
        "003_S_0003/m12 003_S_0003/m24 011_S_0005/bl", "*/T1.nii.gz", "*/T1.nii.gz", "003_S_0003 | 011_S_0005"
    ),
    "fMRIPrep": Layout(
        "01 02",
        f"{FMRIPREP}{{brain_mask,preproc_T1w}}.nii.gz | sub-*/anat/sub-*_{{dseg,label-GM_probseg}}.nii.gz",
        "sub-*/anat/sub-*_space-MNI152NLin2009cAsym_desc-preproc_T1w.nii.gz",
        "sub-*",
        passed="8 masks, 2 files that data.pattern leaves out",
        refused="desc-preproc_T1w, space-MNI152NLin2009cAsym_desc-preproc_T1w",
        keys={"pattern": "**/*_space-MNI152NLin2009cAsym_desc-preproc_T1w.*"},
    ),
    "FreeSurfer": Layout(
        "bert ernie",
        f"*/mri/{{{FREESURFER}}}.mgz",
        "*/mri/norm.mgz",
        "*_mri_norm",
        passed="22 masks, 8 files that data.pattern leaves out",
        refused="T1, brain, norm, nu, orig",
        keys={"pattern": "**/norm.mgz"},
    ),
    "ATLAS 2.0": Layout(
        "r001s001 r001s002",
        f"MNI152NLin2009aSym.nii.gz | {ATLAS}{{T1w,label-L_desc-T1lesion_mask}}.nii.gz",
        f"{ATLAS}T1w.nii.gz",
        "sub-*",
        passed="1 template, 2 masks",
    ),
    "ISLES 2022": Layout(
        "strokecase0001 strokecase0002",
        f"{ISLES} | derivatives/sub-*/ses-0001/sub-*_ses-0001_msk.nii.gz",
        "sub-*/ses-0001/dwi/sub-*_ses-0001_{dwi,adc}.nii.gz",
        "sub-*",
        passed="2 files under derivatives, 2 other contrasts",
        refused="FLAIR, adc, dwi",
        keys={"contrasts": ["_dwi", "_adc"]},
    ),
    "WMH": Layout(
        "GE3T/100 Singapore/50 Utrecht/0",
        "*/{orig/3DT1,orig/FLAIR,orig/T1,pre/FLAIR,pre/T1,wmh}.nii.gz",
        "*/pre/FLAIR.nii.gz",
        "{GE3T_100,Singapore_50,Utrecht_0}_pre_FLAIR",
        passed="12 files that data.pattern leaves out, 3 masks",
        refused="3DT1, FLAIR, T1",
        keys={"pattern": "**/pre/FLAIR.*"},
    ),
    "NFBS": Layout(
        "A00028185 A00028352",
        "*/sub-*_ses-NFB3_T1w{,_brain,_brainmask}.nii.gz",
        "*/sub-*_ses-NFB3_T1w_brain.nii.gz",
        "sub-*",
        passed="2 files that data.pattern leaves out, 2 masks",
        refused="T1w, T1w_brain",
        keys={"pattern": "**/*_T1w_brain.*"},
    ),
    "Calgary-Campinas 359": Layout(
        "CC0001_philips_15_55_M CC0002_philips_15_56_M",
        "Original/*.nii.gz | Silver-standard-machine-learning/CC0001_philips_15_55_M_ss.nii.gz"
        " | STAPLE/CC0001_philips_15_55_M_staple.nii.gz",
        "Original/*.nii.gz",
        "*",
        passed="2 masks",
    ),
    "HCP": Layout(
        "100206 100307",
        "*/T1w/{T1w_acpc_dc_restore,T1w_acpc_dc_restore_brain,T2w_acpc_dc_restore,aparc+aseg,brainmask_fs,"
        "ribbon,wmparc}.nii.gz",
        "*/T1w/T1w_acpc_dc_restore_brain.nii.gz",
        "*_T1w_T1w_acpc_dc_restore_brain",
        passed="4 files that data.pattern leaves out, 8 masks",
        refused="T1w_acpc_dc_restore, T1w_acpc_dc_restore_brain, T2w_acpc_dc_restore",
        keys={"pattern": "**/T1w_acpc_dc_restore_brain.*"},
    ),
    "MM-WHS": Layout(
        "ct mr",
        "*_train/*_train_100{1,2}_{image,label}.nii.gz",
        "ct_train/ct_train_100{1,2}_image.nii.gz",
        "ct_train_100{1,2}_image",
        "ct_train/ct_train_100{1,2}_label.nii.gz",
        "2 files that data.pattern leaves out, 2 masks",
        "ct_train, mr_train",
        {"pattern": "**/ct_train/**/*"},
    ),
    "FLARE22": Layout(
        "FLARE22_Tr_0001 FLARE22_Tr_0002",
        "images/*_0000.nii.gz | labels/*.nii.gz",
        "images/*_0000.nii.gz",
        "*_0000",
        "labels/*.nii.gz",
    ),
    "BTCV": Layout(
        "0001 0002",
        "RawData/Training/{img/img,label/label}*.nii.gz",
        "RawData/Training/img/img*.nii.gz",
        "img*",
        "RawData/Training/label/label*.nii.gz",
    ),
    "FDG-PET-CT-Lesions": Layout(
        "01140d52d8/08-13-2005-NA 01140d52d8/12-02-2005-NA 0143bab87a/05-01-2003-NA",
        "PETCT_*/{CT,CTres,PET,SEG,SUV}.nii.gz",
        "PETCT_*/{SUV,CTres}.nii.gz",
        "PETCT_01{140d52d8,43bab87a}",
        "PETCT_*/SEG.nii.gz",
        "6 other contrasts",
        "CT, CTres, PET, SUV",
        {"contrasts": ["SUV", "CTres"]},
    ),
    "ACDC": Layout(
        "patient001 patient002",
        "training/*/*_{4d,frame01,frame01_gt,frame12,frame12_gt}.nii.gz",
        "training/*/*_frame{01,12}.nii.gz",
        "*",
        "training/*/*_frame{01,12}_gt.nii.gz",
        "2 files that data.pattern leaves out",
        "_4d, _frame01, _frame12",
        {"pattern": "**/*_frame[0-9][0-9].nii.gz"},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_public_data_set_is_read_as_its_authors_mean_it(tmp_path, name):
    layout = LAYOUTS[name]
    root = make(tmp_path / "data", *layout.expanded(layout.files))
    if layout.dataset_json:
        listed(root, layout.dataset_json)
    if layout.refused:
        message = re.escape(f"holds several kinds of image ({layout.refused})")
        with pytest.raises(UserError, match=message) as error:
            find_cases(root)
        # The advice is followed as it stands: a kind alone, one image a scan.
        advised = json.loads(re.search(r'"data": (\{"pattern": .*?\})', str(error.value))[1])
        alone, _ = find_cases(root, **advised)
        assert len({(case.subject, case.images[0].parent) for case in alone}) == len(alone)
    lines = []
    cases, validation = find_cases(root, **layout.keys, log=lines.append)

    def below(paths):
        return sorted(path.relative_to(root).as_posix() for path in paths)

    every = [*cases, *validation]
    assert below(path for case in every for path in case.images) == layout.expanded(layout.images)
    labels = below(case.label for case in every if case.label)
    assert labels == (layout.expanded(layout.labels) if layout.labels else [])
    assert sorted({case.subject for case in every}) == layout.expanded(layout.subjects)
    assert len(validation) == layout.validation
    [line] = lines
    passed = re.sub(r" \([^()]*\)", "", line.partition("; passed over: ")[2])
    assert line.startswith("found: ") and sorted(passed.split(", ")) == sorted(layout.passed.split(", "))


def found(root: Path, **keys) -> tuple[list[str], dict[str, str], str]:
    """Names of the images below a folder, subjects by case, and what the line says was passed over."""
    said = []
    cases, validation = find_cases(root, **keys, log=said.append)
    images = [path.relative_to(root).as_posix() for case in [*cases, *validation] for path in case.images]
    return images, {case.name: case.subject for case in cases}, said[0].partition("; passed over: ")[2]


# ---- files that are not read


def test_other_formats_hidden_files_and_upper_case_are_told_by_kind(tmp_path):
    root = make(
        tmp_path, "a.nii.gz", "B.NII.GZ", "c.mha", "d.mha", "e.img", "e.hdr", "f/1.dcm", "._a.nii.gz", "x.txt"
    )
    images, _, passed = found(root)
    assert sorted(images) == ["B.NII.GZ", "a.nii.gz"]
    assert nibabel.load(root / "B.NII.GZ").shape == (4, 4, 4)
    assert passed == (
        "1 hidden file (._a.nii.gz), 2 .mha files not read (c.mha, d.mha), 1 .hdr file not read "
        "(e.hdr), 1 .img file not read (e.img), 1 .dcm file not read (f/1.dcm)"
    )


def test_where_there_is_no_image_the_message_says_what_there_is(tmp_path):
    make(tmp_path, "Case00.mhd", "Case00.raw", "Case00_segmentation.mhd")  # PROMISE12
    with pytest.raises(UserError, match=r"no image .* there \(passed over: 2 \.mhd files not read"):
        find_cases(tmp_path)
    make(tmp_path / "masks", "a_seg.nii.gz")
    with pytest.raises(UserError, match=r"there \(passed over: 1 mask \(a_seg\.nii\.gz\)\)"):
        find_cases(tmp_path / "masks")
    assert found(tmp_path / "masks", pattern="*_seg.nii.gz")[0] == ["a_seg.nii.gz"]  # masks that are meant
    with pytest.raises(UserError, match=r"no image matches '\*_T2w\.nii\.gz'"):
        find_cases(tmp_path / "masks", "*_T2w.nii.gz")


@pytest.fixture
def link():
    def make_link(path: Path, to: Path) -> None:
        try:
            path.symlink_to(to, target_is_directory=to.is_dir())
        except OSError:
            pytest.skip("this user may not make links")

    return make_link


def test_links_are_followed_once_and_never_in_circles(tmp_path, link):
    root = make(tmp_path / "data", "a.nii.gz", "real/b.nii.gz")
    outside = make(tmp_path / "outside", "c.nii.gz", "deep/d.nii.gz")
    link(root / "elsewhere", outside)
    link(outside / "deep" / "back", root)
    link(root / "again.nii.gz", root / "a.nii.gz")
    link(root / "again", root / "real")
    link(root / "gone.nii.gz", tmp_path / "gone.nii.gz")
    link(root / "itself", root / "itself")
    images, _, passed = found(root)
    assert images == ["a.nii.gz", "elsewhere/c.nii.gz", "elsewhere/deep/d.nii.gz", "real/b.nii.gz"]
    assert passed == (
        "2 links to nowhere (gone.nii.gz, itself), "
        "2 links to a folder that is read anyway (again, elsewhere/deep/back), "
        + "1 link to a file that is read anyway (again.nii.gz)"
    )


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    root = make(tmp_path, "a.nii.gz", "closed/b.nii.gz")
    make(tmp_path, "lost+found/c.nii.gz")  # closed to all but root on every ext4 disk, and no data
    listing = os.scandir

    def scandir(path):
        if Path(path).name in {"closed", "lost+found"}:
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr("ldm.data.layouts.os.scandir", scandir)
    with pytest.raises(UserError, match=r"closed: this folder cannot be read \(Permission denied\)"):
        find_cases(root)


def test_what_the_run_wrote_is_no_data(tmp_path):
    made = ("runs/models/b.nii.gz", "runs/out/c.nii.gz", "shown/sample_000001.nii.gz")
    root = make(tmp_path, "a.nii.gz", *made)
    record = {"format": 1, "seed": 1, "sampler": "ddim", "volume": {}}
    (root / "shown" / "sample_000001.json").write_text(json.dumps(record))
    (root / "a.json").write_text('{"MagneticFieldStrength": 3}')  # as BIDS has beside each scan
    outputs = [root / "runs" / "models", root / "runs" / "out", root]
    images, _, passed = found(root, outputs=outputs, generated=False)
    assert images == ["a.nii.gz"]
    assert passed == (
        f"2 folders of this run (such as {root / 'runs' / 'models'}), "
        "1 volume that inference.py made (shown/sample_000001.nii.gz)"
    )
    assert "shown/sample_000001.nii.gz" in found(root)[0]  # which is what an evaluation asks for


def test_lists_of_a_dataset_json_that_are_not_used_are_counted(tmp_path):
    root = make(tmp_path / "Task", "imagesTr/a.nii.gz", "imagesTr/b.nii.gz", "imagesTr/._a.nii.gz")
    listed(root, {"training": ["imagesTr/a.nii.gz"], "test": ["imagesTs/c.nii.gz"]})
    (tmp_path / "siteB").mkdir()
    line = []
    cases, validation = find_cases(tmp_path, log=line.append)
    assert len(cases) == 1 and not validation
    assert line == [
        f"found: 1 image, 0 labels, 1 subject in {root}; passed over: 1 folder beside it (siteB), "
        "1 test scan of the list (imagesTs/c.nii.gz), 1 file that dataset.json does not name (b.nii.gz)"
    ]
    find_cases(root, "*.nii.gz", log=line.append)
    assert f"in {root} (data.pattern is for plain folders, and not used); passed over" in line[1]
    with pytest.raises(UserError, match=r"data\.contrasts is for plain folders"):
        find_cases(root, contrasts=["_t1"])


# ---- contrasts


@pytest.mark.parametrize(
    "files, kinds, patients",
    [
        (["P001/P001_t1.nii.gz", "P001/P001_t2.nii.gz"], "_t1, _t2", 1),
        (["p1_pre.nii.gz", "p1_post.nii.gz", "p2_pre.nii.gz", "p2_post.nii.gz"], "_post, _pre", 2),
        (["p1/pre.nii.gz", "p1/post.nii.gz", "p2/pre.nii.gz", "p2/post.nii.gz"], "post, pre", 2),
        (["T1/p1.nii.gz", "T2/p1.nii.gz"], "T1, T2", 1),
        (["p1/T1/x.nii.gz", "p1/FLAIR/x.nii.gz"], "FLAIR, T1", 1),
        (["p1/ct.nii", "p1/o/liver.nii", "p1/o/skin.nii", "p2/ct.nii", "p2/o/liver.nii"], "ct, liver", 2),
        (["p1.nii.gz", "p1_brain.nii.gz"], "no ending, _brain", 1),
        (["p1.nii", "mp1.nii", "p2.nii", "mp2.nii"], "no beginning, m", 2),  # SPM
        (["p1_0000.nii", "p1_0001.nii", "p2_0000.nii", "p2_0001.nii"], "_0000, _0001", 2),  # nnU-Net
    ],
)
def test_several_images_of_a_patient_are_refused_or_stay_on_one_side(tmp_path, files, kinds, patients):
    root = make(tmp_path, *files)
    with pytest.raises(UserError, match=re.escape(f"holds several kinds of image ({kinds})")):
        find_cases(root)
    _, subjects, _ = found(root, pattern="**/*")  # all of them, since the user says so
    assert len(subjects) == len(files) and len(set(subjects.values())) == patients


@pytest.mark.parametrize(
    "files",
    [
        ["a.nii.gz", "b.nii", "c.mgz"],
        ["scan_1.nii.gz", "scan_2.nii.gz"],
        ["patient_anna.nii.gz", "patient_bob.nii.gz"],
        ["siteA/s01.nii.gz", "siteA/s02.nii.gz", "siteA/s03.nii.gz", "siteB/s01.nii.gz", "siteB/s02.nii.gz"],
        ["train/p1.nii.gz", "train/p2.nii.gz", "test/p3.nii.gz"],
        ["AD/p1.nii.gz", "AD/p2.nii.gz", "CN/p3.nii.gz", "CN/p4.nii.gz"],
        ["siteA/p1/T1.nii.gz", "siteA/p2/T1.nii.gz", "siteB/p3/T1.nii.gz", "siteB/p4/T1.nii.gz"],
        ["T1_masked.nii", "vol_unmasked.nii"],
        ["Breast_MRI_001/pre.nii", "Breast_MRI_002/pre.nii"],
        [f"scan_{i:04d}.nii" for i in range(3)],
    ],
)
def test_scans_of_different_patients_are_subjects_of_their_own(tmp_path, files):
    images, subjects, passed = found(make(tmp_path, *files))
    assert len(images) == len(set(subjects.values())) == len(files) and not passed


def test_contrasts_become_channels_and_a_case_that_lacks_one_is_an_error_of_that_case(tmp_path):
    names = [f"{p}/{p}_{c}.nii.gz" for p in ("P001", "P002") for c in ("t1", "t1ce", "t2")]
    root = make(tmp_path, *names, "P001/P001_seg.nii.gz")
    (root / "P002" / "P002_t1ce.nii.gz").unlink()
    cases, _ = find_cases(root, contrasts=["_t1ce", "_t1"])
    assert [[path.name for path in case.images] for case in cases] == [
        ["P001_t1ce.nii.gz", "P001_t1.nii.gz"],
        ["P002_t1ce.nii.gz", "P002_t1.nii.gz"],
    ]
    assert [case.label and case.label.name for case in cases] == ["P001_seg.nii.gz", None]
    [problem] = check_headers(cases, labels=False)
    assert problem.case == "P002" and problem.file.name == "P002_t1ce.nii.gz"
    assert "no such file" in problem.reason
    with pytest.raises(UserError, match=r"no image ends like one of data\.contrasts \(_pd\)"):
        find_cases(root, contrasts=["_pd"])


def test_contrasts_in_folders_of_their_own_and_as_whole_names(tmp_path):
    ixi = make(tmp_path / "ixi", *(f"IXI-{c}/IXI00{i}-Guys-{c}.nii.gz" for i in (2, 3) for c in ("T1", "PD")))
    cases, _ = find_cases(ixi, contrasts=["-T1", "-PD"])
    assert [case.name for case in cases] == ["IXI002-Guys", "IXI003-Guys"] and all(
        len(c.images) == 2 for c in cases
    )
    wmh = make(tmp_path / "wmh", *(f"{i}/{c}.nii.gz" for i in ("s0", "s1") for c in ("T1", "FLAIR", "seg")))
    cases, _ = find_cases(wmh, contrasts=["FLAIR", "T1"])
    assert [case.name for case in cases] == ["s0", "s1"] and cases[0].label == wmh / "s0" / "seg.nii.gz"


def test_maps_that_spm_makes_of_a_scan_are_passed_over(tmp_path):
    root = make(
        tmp_path, *(f"{begin}{scan}.nii" for scan in ("p1", "c1") for begin in ("", "c1", "mwc2", "y_"))
    )
    images, _, passed = found(root)
    assert images == ["c1.nii", "p1.nii"] and passed.startswith("6 maps of SPM")


# ---- subjects


def test_visits_below_a_patient_stay_together(tmp_path):
    visits = [
        f"{p}/{v}/T1.nii.gz"
        for p, many in (("anna", 2), ("bob", 1), ("eve", 3))
        for v in ("bl", "m12", "m24")[:many]
    ]
    said = []
    cases, _ = find_cases(make(tmp_path, *visits), log=said.append)
    assert [case.subject for case in cases] == ["anna"] * 2 + ["bob"] + ["eve"] * 3
    assert "3 subjects (a folder or name each, such as anna) in" in said[0]
    dates = [f"s/{p}/{d}.nii.gz" for p in ("anna", "bob", "eve") for d in ("2001-01-01", "2003-01-01")]
    assert len(set(found(make(tmp_path / "b", *dates))[1].values())) == 3


@pytest.mark.parametrize("visits", [("bl", "m12"), ("1", "2"), ("ses1", "ses2")])
def test_visits_in_one_folder_stay_together(tmp_path, visits):
    names = [f"p{i}_{visit}.nii.gz" for i in range(3) for visit in visits]
    assert sorted(set(found(make(tmp_path, *names))[1].values())) == ["p0", "p1", "p2"]


def test_a_scan_that_is_named_after_another_is_of_its_patient(tmp_path):
    root = make(tmp_path, "P01.nii.gz", "P02.nii.gz", "P03.nii.gz", "P03_gad.nii.gz", "P4-2.nii.gz")
    assert sorted(set(found(root)[1].values())) == ["P01", "P02", "P03", "P4-2"]
    assert len(set(found(make(tmp_path / "sets", "brain.nii.gz", "brain_1.nii.gz"))[1].values())) == 2


def test_subject_is_a_regular_expression_with_one_group(tmp_path):
    root = make(tmp_path, "x1-a.nii.gz", "x1-b.nii.gz", "x2-a.nii.gz")
    keys = {"pattern": "*.nii.gz", "subject": r"^(x\d)"}
    assert found(root, **keys)[1] == {"x1-a": "x1", "x1-b": "x1", "x2-a": "x2"}
    listed(root, {"training": ["x1-a.nii.gz", {"image": "x1-b.nii.gz", "subject": "other"}, "x2-a.nii.gz"]})
    assert found(root, subject=r"^(x\d)")[1] == {"x1-a": "x1", "x1-b": "other", "x2-a": "x2"}
    for subject, message in (
        (r"x(\d", "no regular expression"),
        (r"x\d", "expected one group in parentheses, found 0"),
        (r"(x)(\d)", "expected one group in parentheses, found 2"),
        (r"y(\d)", r"finds no subject in x1-a\.nii\.gz"),
    ):
        with pytest.raises(UserError, match=r"data\.subject is .*" + message):
            find_cases(root, subject=subject)
