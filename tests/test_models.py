"""Whole models from transformers, random weights, quantized by torchao: every quantized linear fuses."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support import error, unfused
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import qfuse
from qfuse.records import recording


def llama() -> nn.Module:
    """Two layers: 2 · (q, k, v, o, gate, up, down) + lm_head = 15 linears."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def bert() -> nn.Module:
    """Two layers: 2 · (q, k, v, o, in, out) + pooler = 13 linears."""
    config = BertConfig(
        vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4
    )
    return BertModel(config)


class Outputs(nn.Module):
    """A model of token ids that returns tensors: logits, or hidden states and pooler output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model(ids, return_dict=False)[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("make", "linears"), [(llama, 15), (bert, 13)], ids=["llama", "bert"])
def test_every_linear_fuses(make: Callable[[], nn.Module], linears: int, dtype: torch.dtype) -> None:
    model = Outputs(make()).eval().to(dtype)
    reference = copy.deepcopy(model).float()
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == linears
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    ids = torch.randint(256, (2, 9))
    with recording() as (matches, misses):
        result = torch.compile(model, options={"emulate_precision_casts": True})(ids)
    report = qfuse.Report(matches, misses)
    assert (len(report.matches), len(report.misses)) == (linears, 0), report
    assert {m.lowering for m in report.matches} == {"onednn"}
    modules = [m.module for m in report.matches]
    assert all(isinstance(model.get_submodule(m), nn.Linear) for m in modules)
    assert len(set(modules)) == linears
    # Quantized again in each layer, tiny differences flip roundings: so the truth is the model before quantization.
    truth = tuple(t.double() for t in reference(ids))
    assert error(result, truth) <= 1.1 * error(unfused(model, ids), truth)
