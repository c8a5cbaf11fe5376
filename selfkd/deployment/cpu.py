"""The processor that a file is served on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from selfkd.deployment import processor

_SETS = {
    "avx2": "AVX2",
    "avx512_f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX-512 VNNI",
    "amx_int8": "AMX int8",
    "neon": "NEON",
    "dot": "dot product",
    "i8mm": "int8 matrix product",
}
_INT8 = ("avx_vnni", "avx512_vnni", "amx_int8", "dot", "i8mm")


def describe_cpu() -> str:
    """Return the name of the processor, and its instruction sets that matter for int8."""
    found = _capabilities()
    sets = [words for key, words in _SETS.items() if found.get(key)]
    if not has_int8():
        sets.append("no instructions for int8 known")
    return f"{found.get('cpu_name') or processor()} ({', '.join(sets)})"


def has_int8() -> bool:
    """Return whether the processor has instructions for sums of int8 products: VNNI, AMX, dot.

    Without them int8 is slower, and on x86 sums of full range saturate.
    """
    return any(_capabilities().get(key) for key in _INT8)


@cache
def _capabilities() -> Mapping[str, Any]:
    import torch

    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    before = {  # older torch
        "avx2": "_is_avx2_supported",
        "avx512_f": "_is_avx512_supported",
        "avx512_vnni": "_is_vnni_supported",
    }
    return {key: getattr(torch.cpu, name, bool)() for key, name in before.items()}
