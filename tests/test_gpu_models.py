"""Whole models on a CUDA device that is not there: one Triton kernel a linear, one kernel a quantization."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from test_models import Outputs, llama
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from torchao.quantization.quant_primitives import MappingType
from transformers import BertConfig, BertModel

from qfuse.records import recording

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import fake_cuda


def minilm() -> nn.Module:
    """Two of the six layers of all-MiniLM-L6-v2: 2 · (q, k, v, o, in, out) + pooler = 13 linears."""
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
    return BertModel(BertConfig(vocab_size=256, num_hidden_layers=2, **sizes))


def quantizations(generated: fake_cuda.Generated) -> list[int]:
    """Return, of each launch that writes int8, how many tensors of it."""
    counts = [generated.outputs(name).count("*i8") for name in generated.launches]
    return [count for count in counts if count]


#: Four activations are quantized in each layer, and one in front of the pooler or of lm_head.
@pytest.mark.parametrize(("make", "linears", "activations"), [(minilm, 13, 9), (llama, 15, 9)], ids=["minilm", "llama"])
def test_model(make: Callable[[], nn.Module], linears: int, activations: int) -> None:
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
    assert quantizations(generated) == [1] * activations


class Attention(nn.Module):
    """Three linears of one activation."""

    def __init__(self, k: int, mapping: MappingType) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(k, 48, dtype=torch.bfloat16) for _ in range(3))
        quantize_(self, Int8DynamicActivationInt8WeightConfig(act_mapping_type=mapping))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.query(x), self.key(x), self.value(x)


@pytest.mark.parametrize("mapping", [MappingType.SYMMETRIC, MappingType.ASYMMETRIC], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("rows", [(3, 101), (1, 4096), (2, 14336)], ids=str)
def test_one_kernel_quantizes_for_all(rows: tuple[int, int], mapping: MappingType) -> None:
    """However long a row is: stock Inductor splits long ones, and makes three kernels."""
    generated = fake_cuda.generate(Attention(rows[1], mapping), torch.randn(rows).bfloat16(), binaries=False)
    assert quantizations(generated) == [1]
    if rows[0] > 1 or mapping is MappingType.SYMMETRIC:  # else the bias is computed from the zero point
        assert len(generated.launches) == 4


@pytest.mark.parametrize("freezing", [True, False], ids=["frozen", "not frozen"])
def test_nothing_beside_linears_and_quantizations(freezing: bool) -> None:
    """A bias is read in its own dtype, and GELU is in the kernel of the linear that it follows."""
    model = nn.Sequential(nn.Linear(384, 1536), nn.GELU(), nn.Linear(1536, 384)).bfloat16()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    generated = fake_cuda.generate(model, torch.randn(2, 24, 384).bfloat16(), freezing=freezing, binaries=False)
    kinds = [name.split("_")[1] for name in generated.launches]  # a pointwise kernel would be a "poi"
    assert [kind in ("per", "red") for kind in kinds] == [True, False, True, False]
    assert kinds[1::2] == ["tem", "tem"]
    assert quantizations(generated) == [1, 1]
    (gelu,) = [name for name in generated.launches if "erf" in str(generated.kernels[name].fn.src)]
    assert gelu == generated.launches[1]
