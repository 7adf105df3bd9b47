"""Which numbers a processor trains in."""

import pytest
import torch

from edge_agent.precision import training_dtype


@pytest.mark.parametrize(
    ("able", "dtype"),
    [
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        ({"cpu_name": "AMD EPYC 9R14", "avx512_bf16": True}, torch.bfloat16),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, torch.float32),
        ({"cpu_name": "AMD EPYC 7B13", "avx512_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_a_processor_trains_in_bfloat16_only_where_that_is_faster(able, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert training_dtype(torch.device("cpu")) is dtype
