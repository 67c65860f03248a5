"""Whole models on a CUDA device that is not there: one Triton kernel a linear, one kernel a quantization."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from test_models import Outputs, llama
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from transformers import BertConfig, BertModel

from qfuse.records import recording

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import fake_cuda


def minilm() -> nn.Module:
    """Two of the six layers of all-MiniLM-L6-v2: 2 · (q, k, v, o, in, out) + pooler = 13 linears."""
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
    return BertModel(BertConfig(vocab_size=256, num_hidden_layers=2, **sizes))


def is_quantization(generated: fake_cuda.Generated, name: str) -> bool:
    return any(kind in ("*i8", "*u8") for kind in generated.outputs(name))


#: Four activations are quantized in each layer, and one in front of the pooler or of lm_head.
@pytest.mark.parametrize(
    ("make", "linears", "quantizations"), [(minilm, 13, 9), (llama, 15, 9)], ids=["minilm", "llama"]
)
def test_model(make: Callable[[], nn.Module], linears: int, quantizations: int) -> None:
    model = Outputs(make()).eval().bfloat16()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    with recording() as (matches, misses):
        generated = fake_cuda.generate(model, torch.randint(256, (2, 24)), binaries=False)
    assert not misses
    assert [m.lowering for m in matches] == ["triton"] * linears
    launches = generated.launches
    assert sum(name.startswith("triton_tem_") for name in launches) == linears
    assert "_int_mm(" not in generated.calls
    assert "torch.ops." not in generated.calls  # what is not lowered
    assert "torch.int32" not in generated.calls
    writing = [name for name in launches if is_quantization(generated, name)]
    assert len(writing) == quantizations
    assert all(len([k for k in generated.outputs(name) if k == "*i8"]) == 1 for name in writing)
