"""Precision and memory layout in which a CPU computes fast, by its instructions.

By instructions and not by timing: a choice by timing could differ between a run and its resume, which then
would not be exact. What was measured: docs/PERFORMANCE.md, "Precision and layout on a CPU".
"""

import os
import platform
from pathlib import Path

import torch

NONE, AVX512, AVX512_BF16, AMX = range(4)  # AVX2, ARM and Apple are NONE
# oneDNN computes the convolutions, and this variable limits its instructions. Names that it does not know
# it ignores.
CAPS = {
    **dict.fromkeys(("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2"), NONE),
    **dict.fromkeys(("AVX512_CORE", "AVX512_CORE_VNNI"), AVX512),
    **dict.fromkeys(("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512", "AVX10_2_512"), AVX512_BF16),
}
CPU_INFO = Path("/proc/cpuinfo")  # of Linux


def level() -> int:
    """The widest of the instructions above that convolutions may use: NONE, AVX512, AVX512_BF16 or AMX.

    The variables are oneDNN's (developer guide, "CPU Dispatcher Control"). ATEN_CPU_CAPABILITY limits torch's
    other operations, which are a small part of a step, and is not asked.
    """
    has = NONE
    if torch.cpu._is_avx512_supported():
        has = AVX512_BF16 if torch.cpu._is_avx512_bf16_supported() else AVX512
    if torch.cpu._is_amx_tile_supported():
        has = AMX
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", ""))
    return min(has, CAPS.get(cap.upper(), AMX))


def is_fast_in_bfloat16() -> bool:
    """Whether convolutions in bfloat16 are faster than in float32: with AMX, and with AVX512_BF16 of AMD.

    Intel's AVX512_BF16 without AMX was measured as slower than float32, AMD's as 1.3 to 2.6 times as fast.
    """
    return level() == AMX or (level() == AVX512_BF16 and _is_amd())


def _is_amd() -> bool:
    about = CPU_INFO.read_text() if CPU_INFO.exists() else platform.processor()
    return "AuthenticAMD" in about


def wants_channels_last(
    device: torch.device, amp_dtype: torch.dtype | None, frozen_autoencoder: bool = False
) -> bool:
    """Whether the convolutions of a network are fastest in channels last, else in torch's own layout.

    Args:
        amp_dtype: of mixed precision, or None for float32.
        frozen_autoencoder: it encodes or decodes without gradients.
    """
    if device.type != "cpu":
        return False  # CUDA's group norm needs contiguous input
    return amp_dtype is not None or (frozen_autoencoder and level() >= AVX512)
