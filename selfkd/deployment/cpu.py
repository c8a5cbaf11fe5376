"""The processor that a file is served on."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache
from typing import Any

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
    """Return the name of the processor and its instruction sets that matter for int8."""
    found = _capabilities()
    sets = [words for key, words in _SETS.items() if found.get(key)]
    name = str(found.get("cpu_name") or platform.processor() or platform.machine())
    return f"{name} ({', '.join(sets) or 'no instruction sets known'})"


def has_int8() -> bool:
    """Return whether the processor multiplies int8 in one instruction: VNNI, AMX or dot product."""
    return any(_capabilities().get(key) for key in _INT8)


@cache
def _capabilities() -> Mapping[str, Any]:
    import torch

    return dict(torch.cpu.get_capabilities())
