"""The report: what is told about a miss and about a match, as text and as a page."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from producers import T2, TorchAO
from torch import Tensor, nn

import qfuse
from qfuse.fusion_pass import FUSION_PASS
from qfuse.inductor import compile_like_inductor
from qfuse.records import Match, Miss
from qfuse.report import group

MISS = Miss(
    anchor="aten._int_mm.default (_int_mm_3)",
    pattern="int8",
    reason="used by 2 nodes: aten.mul.Tensor, aten.sum.dim_IntList, a reason that is too long for a column",
    node="mul_2",
    hint="change <it>",
    module="layers.0.wq",
    source="/home/someone/model/attention.py:28",
    step="Multiply",
    node_source="/home/someone/model/attention.py:31",
    code="return acc * acc",
    chain=("    %x = placeholder : int8[7, 64]", "%mul_2 = aten.mul.Tensor(%x, %x) : int8[7, 64]"),
)
MATCH = Match(
    pattern="int8.dynamic_per_token",
    lowering="cpp",
    shape="1024×4096×4096",
    dtypes="uint8 → bfloat16",
    module="model.layers.0.self_attn.q_proj",
    source="/home/someone/site-packages/transformers/models/llama/modeling_llama.py:241",
)


class Odd(nn.Module):
    """An integer matmul, and a function of it that is no quantized linear."""

    def __init__(self, forward: Callable[[Odd, Tensor], Any]) -> None:
        super().__init__()
        self.register_buffer("w", torch.randint(-128, 128, (48, 64), dtype=torch.int8))
        self.register_buffer("ws", torch.rand(48))
        self._forward = forward

    def forward(self, q: Tensor) -> Any:
        return self._forward(self, torch._int_mm(q, self.w.t()))


def _miss(forward: Callable[[Odd, Tensor], Any]) -> Miss:
    (miss,) = qfuse.explain(Odd(forward), torch.randint(-128, 128, (7, 64), dtype=torch.int8)).misses
    return miss


@pytest.mark.parametrize(
    ("forward", "step", "hint"),
    [
        (lambda s, acc: acc, "", "apply the scales in the compiled model"),
        (lambda s, acc: acc.float().relu() * s.ws, "", "apply it after the scales"),
        (lambda s, acc: (acc.float() * s.ws, acc.sum()), "", "take what else needs this value"),
        (lambda s, acc: acc.double() * s.ws, "Convert", "compute in float32, bfloat16 or float16"),
        (lambda s, acc: acc.view(-1, 24).float() * s.ws[:24], "Multiply", "keep the shape"),
        (lambda s, acc: acc * 2, "Multiply", "convert the accumulator to float first"),
        (lambda s, acc: (acc - 3).float() * s.ws, "Subtract", "subtract nothing but zero point"),
        (lambda s, acc: torch.add(acc.float(), s.ws, alpha=2) * s.ws, "Add", "instead of by `alpha`"),
        (lambda s, acc: acc.float() * s.ws.expand(7, 48).cumsum(0), "Multiply", "no groups along K"),
        (lambda s, acc: acc.float() + s.ws.expand(7, 48).cumsum(0), "Add", "apply the scales first"),
        (lambda s, acc: 1 / acc.float(), "", ""),
        (lambda s, acc: (f := acc.float()) * f, "Multiply", ""),
    ],
)
def test_a_miss_tells_the_step_and_what_to_change(forward: Callable[..., Any], step: str, hint: str) -> None:
    miss = _miss(forward)
    assert (miss.step, hint in miss.hint) == (step, True), miss
    assert bool(hint) == bool(miss.hint) or not step


def test_a_miss_tells_where_in_the_code() -> None:
    def forward(s: Odd, acc: Tensor) -> Tensor:
        scaled = acc.float()
        return scaled * scaled  # here

    miss = _miss(forward)
    here = next(i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line.endswith("# here"))
    assert re.search(rf"test_report\.py:{here}$", miss.node_source)
    assert miss.code.startswith("return scaled * scaled")
    assert miss.source != miss.node_source
    assert any(line.startswith(f"%{miss.node} = aten.mul.Tensor(") for line in miss.chain)


def test_code_that_python_does_not_find() -> None:
    namespace: dict[str, Any] = {}
    exec(compile("def forward(s, acc):\n    return acc.float().relu()", "<generated>", "exec"), namespace)
    miss = _miss(namespace["forward"])
    assert (miss.node_source, miss.code) == ("<generated>:2", "")


def test_hints_without_a_lowering() -> None:
    model = T2(48, 64, torch.float32, True)
    with qfuse.config.patch(disabled_patterns=["int8.dynamic_per_token"]):
        (miss,) = qfuse.explain(model, *model.inputs(7)).misses
    assert "qfuse.config.disabled_patterns" in miss.hint
    with qfuse.config.patch(disabled_lowerings=["cpp", "onednn", "aten"]):
        (miss,) = qfuse.explain(model, *model.inputs(7)).misses
    assert miss.hint == "take cpp, onednn, aten out of qfuse.config.disabled_lowerings"
    with torch._inductor.config.patch(freezing=False):
        (miss,) = qfuse.explain(model, *model.inputs(7)).misses
    assert "leave freezing on" in miss.hint


def test_before_and_after() -> None:
    model = TorchAO(48, 64, torch.float32, True)
    (match,) = qfuse.explain(model, *model.inputs(7)).matches
    before, after = match.before, match.after
    line = r"%\w+ = [\w.]+(\(.*\))?( : \w+\[[\d, ]*\])"
    assert all(re.fullmatch(line, text.strip()) for text in before + after), before + after
    assert any(re.match(r"%\w+ = aten\._int_mm\.default\(%\w+, %\w+\) : int32\[7, 48\]", text) for text in before)
    assert before[-1].endswith(" : float32[7, 48]")
    assert any(text.startswith("    ") for text in before)
    assert re.match(r"%\w+ = qfuse\.int8_linear\.default\(", after[-1])
    assert not any("_int_mm" in text for text in after)


def test_no_text_is_collected_in_a_normal_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def unwanted(*args: object) -> None:
        raise AssertionError

    monkeypatch.setattr("qfuse.graph_text.lines", unwanted)

    def backend(gm: Any, inputs: Any) -> Any:
        def call(gm: Any, inputs: Any, **_: Any) -> Any:
            run = lambda args: gm(*args)  # noqa: E731
            run._boxed_call = True  # type: ignore[attr-defined]
            return run

        return compile_like_inductor(gm, inputs, graph_pass=FUSION_PASS, mode=None, options=None, inner_compile=call)

    model = T2(48, 64, torch.float32, True)
    torch.compile(model, backend=backend)(*model.inputs(7))
    assert qfuse.stats() == {"int8.dynamic_per_token": 1}


def _of_layer(i: int) -> Miss:
    return replace(MISS, module=f"layers.{i}.wq", anchor=f"aten._int_mm.default (_int_mm_{i})", node=f"mul_{i}")


def test_equal_misses_are_told_once() -> None:
    (misses,) = group([_of_layer(i) for i in range(6)])
    assert misses.where == ("6 × aten._int_mm.default in layers.0.wq, layers.1.wq, layers.2.wq, layers.3.wq and 2 more")
    assert misses.source == "model/attention.py:28"
    assert len(group([_of_layer(0), replace(MISS, reason="other")])) == 2
    assert len(group([_of_layer(0), replace(MISS, source="elsewhere.py:1")])) == 2
    nobody = replace(MISS, node="", step="", node_source="", code="")
    (misses,) = group([nobody, replace(nobody, source="elsewhere.py:1")])
    assert misses.source == ""


@pytest.mark.parametrize("columns", [60, 100, 120, 300])
def test_text_fits(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = str(qfuse.Report([MATCH], [MISS])).splitlines()
    assert max(map(len, lines)) <= max(columns, 80)
    assert lines[0] == "qfuse fused 1 of 2 quantized matmuls"
    text = "\n".join(lines)
    assert ("modeling_llama" in text) == (columns == 300)
    if columns >= 120:
        assert "model.layers.0.self_attn.q_proj" in text
    if columns >= 100:
        assert "ended at  mul_2 in Multiply, model/attention.py:31" in lines
        assert "change    change <it>" in lines
        assert "code      return acc * acc" in lines


class _Page(HTMLParser):
    """Collects the text of a page, and checks that its elements are closed, and that it needs no other resource."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not {"src", "href"} & {name for name, _ in attributes}

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_html(tmp_path: Path) -> None:
    match = replace(MATCH, before=("    %x = placeholder : int8[7, 64]", "%a = old"), after=("%b = new",))
    path = tmp_path / "report.html"
    qfuse.Report([match], [MISS], note="a <note>").to_html(path)
    page = _Page(path.read_text(encoding="utf-8"))
    text = "".join(page.texts)
    for expected in (
        "qfuse fused 1 of 2 quantized matmuls: a <note>",
        "change <it>",
        "mul_2 in Multiply, model/attention.py:31",
        "%mul_2 = aten.mul.Tensor(%x, %x) : int8[7, 64]",
        "%a = old",
        "%b = new",
        "model.layers.0.self_attn.q_proj",
    ):
        assert expected in text
    assert "script" not in page.tags
    assert not {"it", "note"} & set(page.tags)
    assert page.tags.count("details") == 2


def test_html_of_nothing(tmp_path: Path) -> None:
    qfuse.Report([], []).to_html(str(tmp_path / "report.html"))
    assert "0 of 0" in (tmp_path / "report.html").read_text(encoding="utf-8")
