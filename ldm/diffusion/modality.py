"""MAISI's codes of modalities, as classes of a diffusion network.

A case has the `modality` of its entry in a list: a name, or the code itself. Training replaces some codes by
the generic one of CT or MR, and then some by 0, unknown.
"""

import torch

from ldm import UserError, brief
from ldm.data.cases import Case

NAME = "modality"  # of an entry, and in `--condition`
CODES = {
    "unknown": 0,
    "ct": 1,
    "ct_wo_contrast": 2,
    "ct_contrast": 3,
    "mri": 8,
    "mri_t1": 9,
    "mri_t2": 10,
    "mri_flair": 11,
    "mri_pd": 12,
    "mri_dwi": 13,
    "mri_adc": 14,
    "mri_ssfp": 15,
    "mri_mra": 16,
    "mri_t1c": 17,
    "mri_swi": 20,
}
CT, MR = CODES["ct"], CODES["mri"]
LAST_CT = 7  # codes of CT end before those of MR begin


def code_of(text: str, where: str) -> int:
    """The code of a name or of a number. Raises UserError: it is none; `where` is named."""
    if text in CODES:
        return CODES[text]
    if text.isascii() and text.isdigit():
        return int(text)
    raise UserError(f"{where}{brief(text)}: expected a whole number, or one of {', '.join(CODES)}.")


def name_of(code: int) -> str:
    """The name of a code; of one without a name the number."""
    return next((name for name, value in CODES.items() if value == code), str(code))


def modality_of(case: Case) -> str:
    """The modality of a case, as its entry has it. Raises UserError: it has none, or an unknown one."""
    found = case.covariates.get(NAME)
    if found is None:
        raise UserError(f"{case.name}: {NAME}: missing. conditions.modality needs it of each case in a list.")
    code_of(str(found), f"{case.name}: {NAME}: ")
    return str(found)


def generic(code: int) -> int:
    """The code of CT for one of CT, of MR for one of MR."""
    return 0 if code == 0 else CT if code <= LAST_CT else MR


def dropped(modality: str, share: float, generator: torch.Generator) -> str:
    """A modality of training, which is replaced by its generic code with a chance of `share`."""
    if float(torch.rand((), generator=generator)) < share:
        return str(generic(code_of(modality, "")))
    return modality
