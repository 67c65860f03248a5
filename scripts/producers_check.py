"""Check one torchao release, the one that this process imports: what it quantizes, and what of it qfuse fuses.

`scripts/producers` runs this once for each release, in an environment of its own, and reads the cases that it appends
to a file, a line of JSON each. The tests' directory has to be on the path: how a model is run without generating code
is theirs.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from producers_case import Case, one_line
from support import trace, unfused
from torch import Tensor, nn

Quantize = Callable[[nn.Module, Tensor], None]  # in place; the input is what to calibrate with

DTYPES = (torch.float32, torch.bfloat16)
IGNORED_OPS = ("prims.", "aten.", ".default", ".Tensor", ".dim_IntList")
OPS_BEFORE, OPS_AFTER = 20, 9  # of an aten sequence around a matmul


class UnknownAPIError(Exception):
    """A release has no API that this script knows."""


def main(release: str, path: str) -> None:
    """Append the cases of the release to the file at `path`.

    Raises:
        RuntimeError: this environment has another release.
    """
    if version("torchao") != release:
        raise RuntimeError(f"this is torchao {version('torchao')}: remove {sys.prefix} and run this again")
    warnings.simplefilter("ignore")
    # torchao reports that its C++ does not load; torch, that torchao registers its enums the old way.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with Path(path).open("a") as file, torch.no_grad():
        for case in cases():
            file.write(case.to_json())
            file.flush()  # what is known is kept if this process ends early


def cases() -> Iterator[Case]:
    """Yield what comes of every configuration, model and dtype; what qfuse raises is raised."""
    try:
        configurations = list(torchao_configurations())
    except Exception as error:
        yield Case("import", error=one_line(error))
        return
    for name, quantize in configurations:
        for make in (mlp, llama):
            for dtype in DTYPES:
                case = Case(name, make.__name__, str(dtype).removeprefix("torch."))
                torch._dynamo.reset()
                torch.manual_seed(0)
                try:
                    subject = Subject.of(*make(), dtype, quantize)
                except Exception as error:
                    yield dataclasses.replace(case, error=one_line(error))
                else:
                    yield check(case, subject)


def torchao_configurations() -> Iterator[tuple[str, Quantize]]:
    """Yield a name and a function for every way to quantize to int8 × int8 dynamically that this release has.

    Raises:
        ImportError: and whatever else importing a release raises that was made for another torch.
        UnknownAPIError: it has no API that is known here.
    """
    from torchao import quantization
    from torchao.quantization.quant_primitives import MappingType

    config = getattr(quantization, "Int8DynamicActivationInt8WeightConfig", None)
    make = config or getattr(quantization, "int8_dynamic_activation_int8_weight", None)
    if make is None:
        raise UnknownAPIError("torchao.quantization has no int8 dynamic activation with int8 weight")
    versions = _versions(config) if config is not None else []
    for mapping in (MappingType.SYMMETRIC, MappingType.ASYMMETRIC):
        name = mapping.name.lower()
        for v in versions:
            yield f"version {v}, {name}", _plain(partial(make, version=v, act_mapping_type=mapping))
        if not versions:
            yield name, _plain(partial(make, act_mapping_type=mapping))
    if hasattr(quantization, "swap_linear_with_smooth_fq_linear"):
        yield "SmoothQuant (legacy)", _smooth_legacy
    if versions:
        yield "SmoothQuant", _smooth(partial(make, version=2))


def _versions(config: type) -> list[int]:
    """Return the versions that a configuration can have: its default, which is the oldest one left, to 2."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return list(range(defaults["version"], 3)) if "version" in defaults else []


def _plain(config: Callable[[], object]) -> Quantize:
    def quantize(model: nn.Module, x: Tensor) -> None:
        from torchao.quantization import quantize_

        quantize_(model, config())

    return quantize


def _smooth_legacy(model: nn.Module, x: Tensor) -> None:
    from torchao.quantization import smooth_fq_linear_to_inference, swap_linear_with_smooth_fq_linear

    swap_linear_with_smooth_fq_linear(model)
    model(x)
    smooth_fq_linear_to_inference(model)


def _smooth(base: Callable[[], object]) -> Quantize:
    def quantize(model: nn.Module, x: Tensor) -> None:
        from torchao.prototype.smoothquant import SmoothQuantConfig
        from torchao.quantization import quantize_

        quantize_(model, SmoothQuantConfig(base_config=base(), step="prepare"))
        model(x)
        quantize_(model, SmoothQuantConfig(base_config=base(), step="convert"))

    return quantize


def mlp() -> tuple[nn.Module, Tensor]:
    """Return two linears with bias, and an input of three dimensions."""
    return nn.Sequential(nn.Linear(64, 160), nn.GELU(), nn.Linear(160, 48)).eval(), torch.randn(2, 9, 64)


def llama() -> tuple[nn.Module, Tensor]:
    """Return a Llama of two layers, 2 · (q, k, v, o, gate, up, down) + lm_head = 15 linears, and token ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = LlamaForCausalLM(config)

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids, return_dict=False)[0]

    return Logits().eval(), torch.randint(256, (2, 9))


@dataclass
class Subject:
    """A quantized model and its input, with the results of the model before, and of the quantized one unfused."""

    model: nn.Module
    x: Tensor
    truth: Tensor
    plain: Tensor

    @classmethod
    def of(cls, model: nn.Module, x: Tensor, dtype: torch.dtype, quantize: Quantize) -> Subject:
        """Quantize `model`; qfuse has no part in this, so what is raised is the release's."""
        # Quantized again in each layer, tiny differences flip roundings: the truth is the model before quantization.
        truth = model(x)
        model = model.to(dtype)
        x = x.to(dtype) if x.is_floating_point() else x
        quantize(model, x)
        return cls(model, x, truth, unfused(model, x))


def check(case: Case, subject: Subject) -> Case:
    """Trace a model with qfuse, and return what was fused and how exact it is."""
    traced = trace(subject.model, subject.x)
    return dataclasses.replace(
        case,
        quantized=count_quantized(subject.model),
        integer_matmuls=sum("_int_mm" in op or "out_dtype" in op for op in traced.before),
        fused=len(traced.report.matches),
        patterns=sorted({match.pattern for match in traced.report.matches}),
        reasons=sorted({miss.reason for miss in traced.report.misses}),
        plain_error=deviation(subject.plain, subject.truth),
        fused_error=deviation(traced.result, subject.truth),
        sequence=around_matmul(traced.before),
    )


def count_quantized(model: nn.Module) -> int:
    """Return the number of linears whose weight is a subclass of tensor, or that have been swapped for torchao's."""
    return sum(
        isinstance(module, nn.Linear)
        and (type(module).__module__.startswith("torchao") or type(module.weight.data) is not Tensor)
        for module in model.modules()
    )


def deviation(result: Tensor, truth: Tensor) -> float:
    """Return the norm of the deviation, relative to the norm of the truth."""
    return ((result.double() - truth.double()).norm() / truth.double().norm()).item()


def around_matmul(ops: list[str]) -> str:
    """Return the operators around the first matmul of a graph, in the graph's order."""
    first = next((i for i, op in enumerate(ops) if "mm" in op), 0)
    names = ops[max(0, first - OPS_BEFORE) : first + OPS_AFTER]
    for ignored in IGNORED_OPS:
        names = [name.replace(ignored, "") for name in names]
    return " → ".join(names).replace("convert_element_type", "cvt")


if __name__ == "__main__":
    main(*sys.argv[1:])
