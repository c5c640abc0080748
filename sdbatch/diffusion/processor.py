"""The processor at hand: its name, how it computes the same every time, and which number format it is fast in."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def processor() -> str:
    """Its name with the vector units that torch chooses code by: pictures of two that differ in it may differ too."""
    named = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), named)
    units = [torch.backends.cpu.get_cpu_capability(), *(["bfloat16"] if computes_bfloat16() else [])]
    return f"{named} ({', '.join(units)})"


def compute_alike(threads: int) -> None:
    """Have this thread compute the same every time. First of all: libraries look at what is set here but once."""
    # Without it what cuBLAS computes may depend on what other streams do.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Thread counts belong to the thread that sets them, and they can change a picture's last bits.
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True


def computes_bfloat16() -> bool:
    """Has it units for bfloat16 (AVX-512 BF16, AMX)? Without them it is slower than float32, up to 25 times."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def best_dtype(device: str) -> str:
    """The format that this machine's ``device``, cpu or cuda, is fastest in and that no eye tells from float32."""
    if device == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
    return "bfloat16" if computes_bfloat16() else "float32"
