"""Tests of the words for a processor."""

from __future__ import annotations

import pytest
import torch

from selfkd.deployment import cpu


@pytest.fixture(autouse=True)
def forget():
    cpu._capabilities.cache_clear()
    yield
    cpu._capabilities.cache_clear()


@pytest.mark.parametrize(
    ("found", "words", "int8"),
    [
        ({"avx2": True, "avx512_f": False}, "AVX2", False),
        ({"avx2": True, "avx_vnni": True}, "AVX2, AVX-VNNI", True),
        (
            {"avx2": True, "avx512_f": True, "avx512_vnni": True, "amx_int8": True},
            "AVX2, AVX-512, AVX-512 VNNI, AMX int8",
            True,
        ),
        ({"neon": True}, "NEON", False),
        ({"neon": True, "dot": True, "i8mm": True}, "NEON, dot product, int8 matrix product", True),
        ({}, "", False),
    ],
)
def test_instruction_sets(found, words, int8, monkeypatch):
    given = {"cpu_name": "Processor", **found}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: given, raising=False)
    said = [words] * bool(words) + ["no instructions for int8 known"] * (not int8)
    assert cpu.describe_cpu() == f"Processor ({', '.join(said)})"
    assert cpu.has_int8() is int8


def test_older_torch(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False, raising=False)
    monkeypatch.setattr(cpu, "processor", lambda: "Processor")
    assert cpu.describe_cpu() == "Processor (AVX2, no instructions for int8 known)"
    assert not cpu.has_int8()


def test_this_processor_has_a_name():
    assert cpu.processor()
    assert not cpu.describe_cpu().startswith(" ")
