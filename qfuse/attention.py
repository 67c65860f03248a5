"""The fifth pass: attention, in a graph with quantized linears, becomes `qfuse::attention`, on CPU.

Once the linears are fused, attention takes a third of the time of a small encoder. It is the same operation as ATen's,
in a faster kernel, which also reads keys and values that several heads share without copying them for each. Models
without quantized linears are left alone.
"""

from __future__ import annotations

import logging
import operator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from qfuse import attention_op  # noqa: F401  registers the op
from qfuse.inductor import are_equal_now, arguments_of, copy_origin, fake_value, is_training_graph
from qfuse.normal_form import reshaped_input, same_sizes

aten, ops = torch.ops.aten, torch.ops.qfuse
log = logging.getLogger(__name__)

#: Beyond, scores scaled twice, by this and by log₂ e, might leave float32's range.
_LARGEST_SCALE = 1e30

_FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default


def fuse_attention(graph: Graph) -> int:
    """Replace attention in a `graph` that has fused linears, in place; return how many there were."""
    found = graph.find_nodes(op="call_function", target=_FLASH)
    linears = graph.find_nodes(op="call_function", target=ops.int8_linear.default)
    if not found or not linears or is_training_graph(graph):
        return 0
    replaced = sum([_try_to_replace(node) for node in found])
    if replaced:
        graph.eliminate_dead_code()
        log.info("%d of %d attentions in one kernel each", replaced, len(found))
    return replaced


@dataclass(frozen=True)
class Attention:
    """The arguments of `qfuse::attention`."""

    q: Node
    k: Node
    v: Node
    mask: Node | None
    is_causal: bool
    scale: float | None

    @staticmethod
    def of(flash: Node) -> Attention:
        """Read the arguments of ATen's op; keys and values before they are repeated for the heads that share them."""
        arguments = arguments_of(flash)
        q, k, v = (arguments[name] for name in ("query", "key", "value"))
        shared_k, shared_v = _before_repetition(k), _before_repetition(v)
        if shared_k and shared_v and are_equal_now(fake_value(shared_k).shape, fake_value(shared_v).shape):
            k, v = shared_k, shared_v
        return Attention(q, k, v, arguments["attn_mask"], arguments["is_causal"], arguments["scale"])


def _try_to_replace(flash: Node) -> bool:
    try:
        reason = _replace(flash)
    except Exception:
        log.debug("qfuse failed at %s", flash.format_node(), exc_info=True)
        return False
    if reason:
        log.debug("%s stays: %s", flash, reason)
    return reason is None


def _replace(flash: Node) -> str | None:
    """Replace one, or return why not."""
    from qfuse.lowerings import attention as lowering

    if any(user.target is not operator.getitem or user.args[1] != 0 for user in flash.users):
        return "its logarithm of sums is used"
    if arguments_of(flash)["dropout_p"] != 0:
        return "it has dropout"
    call = Attention.of(flash)
    if isinstance(call.scale, float) and not abs(call.scale) < _LARGEST_SCALE:
        return "its scale is out of float32's range"
    values = [None if node is None else fake_value(node) for node in (call.q, call.k, call.v, call.mask)]
    if (reason := lowering.why_unsupported(*values)) is not None:
        return reason
    with flash.graph.inserting_before(flash):
        new = flash.graph.call_function(
            ops.attention.default, (call.q, call.k, call.v, call.mask, call.is_causal, call.scale)
        )
    new.meta["val"] = fake_value(flash)[0]
    copy_origin(flash, [new])
    for user in list(flash.users):
        user.replace_all_uses_with(new)
    return None


def _before_repetition(heads: Node) -> Node | None:
    """Return x, [B, H, N, D], if `heads` is x[:, :, None].expand(B, H, G, N, D).reshape(B, H · G, N, D)."""
    node = heads
    while node.target is not aten.expand.default and (inner := reshaped_input(node)) is not None:
        node = inner
    if node.target is not aten.expand.default:
        return None
    unsqueezed = node.args[0]
    if not isinstance(unsqueezed, Node) or unsqueezed.target is not aten.unsqueeze.default:
        return None
    x, dim = unsqueezed.args
    if not isinstance(x, Node) or dim not in (2, -3):
        return None
    repeated, shape, result = fake_value(node).shape, fake_value(x).shape, fake_value(heads).shape
    if len(shape) != 4 or len(repeated) != 5 or len(result) != 4:
        return None
    batch, kv_heads, keys, size = shape
    wanted = (batch, kv_heads * repeated[2], keys, size)
    same = same_sizes(repeated, (batch, kv_heads, repeated[2], keys, size)) and same_sizes(result, wanted)
    return x if same else None
