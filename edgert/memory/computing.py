"""How long computing a pass takes, when every byte of its weights is there: products, attention, and what comes beside.

Pure functions, in seconds, of a model's shape, a device's profile, a plan's sizes and the number of tokens; before what
answers have taught.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from edgert.memory.hits import HIT_CURVE, asked_share, linear
from edgert.memory.profile import DeviceProfile, HitCurve, Layout
from edgert.memory.shape import ModelShape, Phase
from edgert.memory.sizes import Sizes

# Of a model that was not rehearsed: norms, RoPE, residual sums, products, and the threads' meeting after each; and
# Python's part of a block (lease, binding, call), of which a layer has two. Measured on two cores of 2025.
_OPS_PER_LAYER, _OP_S = 24, 4e-6
_BLOCKS_PER_LAYER, _BLOCK_S = 2, 6e-5
# Prefill in parts over prefill in whole batches of 512 (measured, edgert/engine/blockwise.py).
_PART_COST = {256: 1.02, 128: 1.09}
# What a prompt takes of one thread beside products and attention, for each value of a hidden state and layer: norms,
# rotations, sums, and rounding for products (27, 22 and 25 ns: SmolLM2-135M, Qwen2.5-0.5B, SmallThinker-4B's shape).
# And for each value of a chosen expert's output: its input gathered, its output put in order, weighed and added.
_VALUE_S, _EXPERT_VALUE_S = 25e-9, 12e-9


def products(shape: ModelShape, profile: DeviceProfile, sizes: Sizes, n_tokens: int, batch_size: int) -> float:
    """Sum over batches and types: bytes of the matrices * seconds per byte at the batch's size; the head once, for the
    last token."""
    phase: Phase = "decode" if n_tokens <= 4 else "prefill"
    total_s = sum(profile.multiply(t, sizes.layout(t, phase), n_bytes, 1) for t, n_bytes in shape.head_bytes.items())
    for n in _batches(n_tokens, batch_size):
        total_s += sum(profile.multiply(t, sizes.layout(t, phase), n_bytes, n)
                       for t, n_bytes in shape.matrix_bytes.items())
    in_parts = sizes.weights == "streamed" and n_tokens > sizes.part_tokens and not shape.n_experts
    return total_s * (_PART_COST.get(sizes.part_tokens, 1.0) if in_parts else 1.0)


def expert_products(shape: ModelShape, profile: DeviceProfile, sizes: Sizes, n_tokens: int, batch_size: int,
                    curve: HitCurve = HIT_CURVE) -> float:
    """Those that a batch asks for, each by its share of the tokens; and for more than one token, what they move."""
    if not shape.n_experts:
        return 0.0
    phase: Phase = "decode" if n_tokens <= 4 else "prefill"
    used, total_s = shape.n_experts_used / shape.n_experts, 0.0
    for n, (type_id, n_bytes) in product(_batches(n_tokens, batch_size), shape.expert_bytes.items()):
        layout: Layout = "experts" if sizes.layout(type_id, phase) == "plain" else "repack"
        asked = asked_share(used, n, curve)
        total_s += profile.multiply(type_id, layout, n_bytes * asked, n * used / asked)
    n_values = (n_tokens > 1) * n_tokens * shape.n_experts_used * shape.n_layers * shape.hidden_size
    return expert_layers(shape, n_tokens) * (total_s + n_values * _EXPERT_VALUE_S / profile.n_threads)


def expert_layers(shape: ModelShape, n_tokens: int) -> float:
    """The share of the layers whose experts a pass needs: of a prompt, the last layer's are for one token alone."""
    return 1.0 if n_tokens == 1 else 1 - 1 / shape.n_layers


def attention_products(shape: ModelShape, n_tokens: int, n_cached: int) -> float:
    """2 (K and V) * heads * head size * cached tokens that each token sees, summed over layers."""
    n_seen = n_cached if shape.kv is None or n_tokens > 1 else shape.kv.attended(n_cached)
    seen = n_tokens * (n_seen + (n_tokens + 1) / 2)
    n_full = shape.n_layers - shape.n_window_layers
    in_window = min(seen, n_tokens * shape.window)
    return 2 * shape.n_heads * shape.head_dim * (n_full * seen + shape.n_window_layers * in_window)


def attention(shape: ModelShape, profile: DeviceProfile, n_tokens: int, n_cached: int) -> float:
    """Products * seconds for each, as heads of this size were measured. For one token of a model that was rehearsed:
    what its attention took over as many products, linear between the lengths that were tried and beyond."""
    rehearsal, n_products = profile.rehearsals.get(shape.key), attention_products(shape, n_tokens, n_cached)
    if rehearsal is None or n_tokens > 1:
        return profile.attend(shape.head_dim, n_products, n_tokens)
    points = [(attention_products(shape, 1, n), seconds) for n, seconds in sorted(rehearsal.attend_s.items())]
    return linear(points, n_products)


def overhead(shape: ModelShape, profile: DeviceProfile, sizes: Sizes, n_tokens: int, batch_size: int) -> float:
    """What the pass of one token takes beyond its products, as it was rehearsed; else layers * 24 small operations and,
    where blocks come one by one, 2 blocks a layer of Python's time. More tokens add what each value takes."""
    rehearsal, streams = profile.rehearsals.get(shape.key), sizes.weights == "streamed"
    n_batches = -(-n_tokens // batch_size)
    values_s = (n_tokens - 1) * shape.n_layers * shape.hidden_size * _VALUE_S / profile.n_threads
    if rehearsal is None:
        blocks_s = (shape.n_layers * _BLOCKS_PER_LAYER + 1) * _BLOCK_S * streams
        return n_batches * (shape.n_layers * _OPS_PER_LAYER * _OP_S + blocks_s) + values_s
    plain = replace(sizes, repacked={})
    products_s = products(shape, profile, plain, 1, 1) + expert_products(shape, profile, plain, 1, 1)
    beyond_s = (rehearsal.blocks_s if streams else rehearsal.fused_s) - products_s
    # A rehearsal can be quicker than the products alone were measured to be: that is right for one token, not for more.
    return n_batches * (beyond_s if n_tokens == 1 else max(0.0, beyond_s)) + values_s


def touched_bytes(shape: ModelShape) -> float:
    """What one token is multiplied with: matrices, head, and the experts that it uses."""
    used = shape.n_experts_used / shape.n_experts if shape.n_experts else 0.0
    return sum((*shape.matrix_bytes.values(), *shape.head_bytes.values())) + used * sum(shape.expert_bytes.values())


def _batches(n_tokens: int, batch_size: int) -> list[int]:
    full, rest = divmod(n_tokens, batch_size)
    return [batch_size] * full + [rest] * (rest > 0)
