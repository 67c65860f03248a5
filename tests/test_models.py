"""Whole models from transformers, random weights, quantized by torchao: every quantized linear fuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import one_translation_unit, trace, unfused
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from torchao.quantization.quant_primitives import MappingType
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5EncoderModel,
    TorchAoConfig,
    ViTConfig,
    ViTModel,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import qfuse
from qfuse.records import recording

#: Two layers: 2 · (q, k, v, o, gate, up, down) + lm_head = 15 linears.
DECODER = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "use_cache": False,
}


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**DECODER))


def bert() -> nn.Module:
    """Two layers: 2 · (q, k, v, o, in, out) + pooler = 13 linears."""
    config = BertConfig(
        vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4
    )
    return BertModel(config)


def qwen2() -> nn.Module:
    return Qwen2ForCausalLM(Qwen2Config(**DECODER))


def vit() -> nn.Module:
    return ViTModel(
        ViTConfig(
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
    )


def t5() -> nn.Module:
    return T5EncoderModel(T5Config(vocab_size=256, d_model=64, d_kv=16, d_ff=160, num_layers=2, num_heads=4))


def whisper() -> nn.Module:
    config = WhisperConfig(
        d_model=64,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=160,
        num_mel_bins=16,
        max_source_positions=12,
    )
    return WhisperEncoder(config)


class Outputs(nn.Module):
    """A model that returns tensors: logits, or hidden states and pooler output."""

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
    with recording() as (matches, misses), one_translation_unit():
        result = torch.compile(model, options={"emulate_precision_casts": True})(ids)
    report = qfuse.Report(matches, misses)
    assert (len(report.matches), len(report.misses)) == (linears, 0), report
    assert {m.lowering for m in report.matches} == {"cpp"}
    modules = [m.module for m in report.matches]
    assert all(isinstance(model.get_submodule(m), nn.Linear) for m in modules)
    assert len(set(modules)) == linears
    # Quantized again in each layer, tiny differences flip roundings: so the truth is the model before quantization, and
    # the distance from it is that of all values together, of which single ones are chance.
    truth = reference(ids)
    assert distance(result, truth) <= 1.05 * distance(unfused(model, ids), truth)


def distance(result: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """Return the largest relative deviation of an output, in the Euclidean norm."""
    pairs = [(r.double(), t.double()) for r, t in zip(result, truth, strict=True)]
    return max(((r - t).norm() / t.norm()).item() for r, t in pairs)


#: Each model with what it is called with; how many linears it has is counted.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.dtype], Tensor]]] = {
    "llama": (llama, lambda dtype: torch.randint(256, (2, 9))),
    "qwen2": (qwen2, lambda dtype: torch.randint(256, (2, 9))),
    "bert": (bert, lambda dtype: torch.randint(256, (2, 9))),
    "vit": (vit, lambda dtype: torch.randn(2, 3, 32, 32, dtype=dtype)),
    "t5 encoder": (t5, lambda dtype: torch.randint(256, (2, 9))),
    "whisper encoder": (whisper, lambda dtype: torch.randn(2, 16, 24, dtype=dtype)),
}


@pytest.mark.parametrize("mapping", [MappingType.SYMMETRIC, MappingType.ASYMMETRIC], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_linear_of_every_architecture_matches(name: str, dtype: torch.dtype, mapping: MappingType) -> None:
    make, example = MODELS[name]
    model = Outputs(make()).eval().to(dtype)
    quantize_(model, Int8DynamicActivationInt8WeightConfig(act_mapping_type=mapping))
    linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    traced = trace(model, example(dtype))
    assert not traced.report.misses, traced.report
    assert {m.module for m in traced.report.matches} == linears
    suffix = "_asymmetric" if mapping is MappingType.ASYMMETRIC else ""
    assert {m.pattern for m in traced.report.matches} == {"int8.dynamic_per_token" + suffix}


def test_transformers_own_quantization(tmp_path: Path) -> None:
    """`from_pretrained(quantization_config=TorchAoConfig(...))`."""
    llama().save_pretrained(tmp_path)
    config = TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    traced = trace(Outputs(model.eval()), torch.randint(256, (2, 9)))
    # transformers leaves lm_head in float
    assert (len(traced.report.matches), len(traced.report.misses)) == (14, 0), traced.report
