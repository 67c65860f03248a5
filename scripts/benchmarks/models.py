"""The models that are measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.decoder import Decoder, Prefill, Size, Step

BATCH, TOKENS = 8, 128
CALIBRATION = 16  # inputs

Inputs = tuple[Tensor, ...]


@dataclass
class Example:
    """A model in float32 that returns a tuple of tensors, the first of which is compared, and inputs for it.

    embeds: the first output is token vectors, whose mean over each text is a sentence embedding. calibration: inputs
    for quantization with static scales.
    """

    model: nn.Module
    inputs: Inputs
    embeds: bool = False
    calibration: list[Inputs] = field(default_factory=list)


class Hidden(nn.Module):
    """A model of transformers that returns only its hidden states."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """ids, mask: [batch, tokens]."""
        return (self.model(ids, mask, return_dict=False)[0],)


def minilm() -> Example:
    """all-MiniLM-L6-v2 with its real weights, on real sentences."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from demo_run import full_batch, load, tokenize
    from demo_sentences import SENTENCES

    tokenizer, model = load()
    texts = [" ".join(SENTENCES[(7 * i + j) % len(SENTENCES)] for j in range(6)) for i in range(CALIBRATION * BATCH)]
    calibration = [tokenize(tokenizer, texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
    return Example(Hidden(model), full_batch(tokenizer), embeds=True, calibration=calibration)


def bert() -> Example:
    """BERT-base with random weights."""
    return _bert(vocabulary=30522, layers=12, batch=BATCH, tokens=TOKENS)


def _bert(*, vocabulary: int, batch: int, tokens: int, **size: int) -> Example:
    from transformers import BertConfig, BertModel

    names = {"layers": "num_hidden_layers", "hidden": "hidden_size", "heads": "num_attention_heads"}
    config = BertConfig(vocab_size=vocabulary, **{names.get(name, name): value for name, value in size.items()})

    def inputs() -> Iterator[Inputs]:
        while True:
            yield torch.randint(vocabulary, (batch, tokens)), torch.ones(batch, tokens, dtype=torch.int64)

    return _example(Hidden(BertModel(config, add_pooling_layer=False).eval()), inputs())


def prefill() -> Example:
    """The Llama-like decoder, 256 tokens."""
    return _prefill(Size())


def _prefill(size: Size) -> Example:
    def inputs() -> Iterator[Inputs]:
        while True:
            yield (torch.randint(size.vocabulary, (1, size.positions)),)

    return _example(Prefill(Decoder(size)).eval(), inputs())


def decode() -> Example:
    """The Llama-like decoder, the last of 256 tokens."""
    return _decode(Size())


def _decode(size: Size) -> Example:
    decoder = Decoder(size)

    def inputs() -> Iterator[Inputs]:
        while True:
            ids = torch.randint(size.vocabulary, (1, size.positions))
            _, *past = decoder.run(ids[:, :-1], 0, ())
            yield ids[:, -1:], *past

    return _example(Step(decoder).eval(), inputs())


def _example(model: nn.Module, inputs: Iterator[Inputs]) -> Example:
    return Example(model, next(inputs), calibration=[next(inputs) for _ in range(CALIBRATION)])


_TINY = Size(hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, vocabulary=64, positions=16)

#: What can be measured: title, and how it is made. The tiny ones are for tests.
MODELS: dict[str, tuple[str, Callable[[], Example]]] = {
    "minilm": (f"MiniLM-L6, {BATCH}×{TOKENS}", minilm),
    "bert": (f"BERT-base, random, {BATCH}×{TOKENS}", bert),
    "llama-prefill": ("Llama-like, random, prefill of 256", prefill),
    "llama-decode": ("Llama-like, random, decode at 256", decode),
    "tiny-bert": (
        "tiny BERT",
        lambda: _bert(vocabulary=64, batch=2, tokens=8, layers=1, hidden=64, heads=2, intermediate_size=96),
    ),
    "tiny-prefill": ("tiny prefill", lambda: _prefill(_TINY)),
    "tiny-decode": ("tiny decode", lambda: _decode(_TINY)),
}
#: What the command line calls them.
GROUPS = {"minilm": ["minilm"], "bert": ["bert"], "llama": ["llama-prefill", "llama-decode"]}


def make(name: str) -> Example:
    """Return a model with the same weights in each process."""
    torch.manual_seed(0)
    return MODELS[name][1]()


def in_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Return inputs with those that are floats in `dtype`."""
    return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in inputs)
