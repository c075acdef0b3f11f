"""The arithmetic of a plan, against counts by hand, torch's own record of what it keeps, and DeepSpeed's estimators."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cook.families.registry import by_config
from cook.pruning.counts import forward_flops
from cook.recipe.estimate import (
    Card,
    Setup,
    activations,
    communication,
    estimate,
    memory_of,
    state_bytes,
    step_flops,
    step_seconds,
)
from cook.recipe.model_shape import Block, Shape, shape_of
from cook.recipe.suggest import USABLE, Planned, largest_rows, suggest

LLAMA = dict(
    model_type="llama",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
ROWS, LENGTH = 8, 64
SETUP = Setup(zero=0, half=False, ranks=1, rows=ROWS, length=LENGTH)
CARD = Card(name="any", memory=80e9, half=3e14, single=2e13, bandwidth=2e12, link=3e11)
BLOCKS = (
    Block(layer=0, weights=4 * 64, norms=8, inner=8, keys=8),
    Block(layer=0, weights=3 * 8 * 20, norms=8, inner=20, inputs=2),
)
SHAPE = Shape(parameters=1000, hidden=8, vocab=30, tied=True, bias=False, blocks=BLOCKS)


def test_flops_are_three_forward_passes():
    adapter = by_config(LLAMA)
    llama = shape_of(adapter.space(LLAMA))
    products, attention = step_flops(llama, SETUP)
    forward = forward_flops(adapter.space(LLAMA), context=LENGTH)
    # Attention: 3.5 forward passes, as FlashAttention computes its scores again in the backward pass.
    assert products / 3 + attention / 3.5 == pytest.approx(ROWS * LENGTH * forward)
    frozen, _ = step_flops(llama, replace(SETUP, trains=False))
    again, _ = step_flops(llama, replace(SETUP, checkpointing=True))
    assert frozen / products == pytest.approx(2 / 3)
    layers = 2 * 3 * (64 * 192 + 3 * 64 * 160)
    assert again - products == pytest.approx(ROWS * LENGTH * layers)


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_zero_2_needs_what_deepspeeds_estimator_says(ranks):
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    _, expected = estimate_zero2_model_states_mem_needs(10**6, num_gpus_per_node=ranks, cpu_offload=False)
    setup = replace(SETUP, zero=2, half=True, ranks=ranks)
    # It counts the fp32 copy of a rank's gradients, which exists during the update, as state.
    assert sum(state_bytes(10**6, setup)) + 4 * 10**6 / ranks == pytest.approx(expected)


def test_zero_3_needs_what_deepspeeds_estimator_says():
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    _, found, largest = estimate_zero3_model_states_mem_needs(
        10**6, 10**5, num_gpus_per_node=4, num_nodes=2, cpu_offload=False, cpu_offload_params=False
    )
    state = sum(state_bytes(10**6, replace(SETUP, zero=3, half=True, ranks=8)))
    # Its 18 bytes hold the fp32 copy, but not the partitioned weights.
    assert found - largest == pytest.approx(state + (4 - 2) * 10**6 / 8)


@pytest.mark.parametrize(
    ("zero", "expected"),
    # fp32: 4000 bytes of gradients and of weights; four ranks send three quarters of a ring's parts; two micro-batches.
    [(0, 2 * 3000), (1, 2 * 3000 + 3000), (2, 2 * 2 * 3000 + 3000), (3, 2 * 3000 + 2 * 3000)],
)
def test_bytes_sent_per_step(zero, expected):
    assert sum(communication(SHAPE, replace(SETUP, zero=zero, ranks=4, accumulation=2))) == expected


def test_a_large_model_gathers_its_weights_twice():
    setup = replace(SETUP, zero=3, ranks=4, accumulation=2, live=999)
    assert communication(SHAPE, setup) == (2 * 3000, 2 * 2 * 3000)


def test_one_rank_sends_nothing_and_frozen_weights_little():
    assert sum(communication(SHAPE, SETUP)) == 0
    assert communication(SHAPE, replace(SETUP, zero=2, ranks=2, trains=False)) == (0, 0)
    assert communication(SHAPE, replace(SETUP, zero=3, ranks=2, trains=False)) == (0, 2000)


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer():
    kept, again = (activations(SHAPE, SETUP, checkpointing=on) for on in (False, True))
    # By hand, in fp32: attention 3 norms, q, k, v and result; FFN 3 norms and 4 tensors of 20; ends 4 tensors of 8.
    layer = 4 * (3 * 8 + 4 * 8) + 4 * (3 * 8 + 4 * 20)
    assert kept == ROWS * LENGTH * (layer + 4 * 4 * 8)
    assert again == ROWS * LENGTH * (layer + 4 * 8 + 4 * 4 * 8)


def test_a_layer_is_recomputed_after_the_losss_temporaries_are_freed():
    setup, layer = replace(SETUP, checkpointing=True), 4 * (3 * 8 + 4 * 8) + 4 * (3 * 8 + 4 * 20)
    many = replace(SHAPE, vocab=10_000)
    for shape, moment in ((many, 12 * 10_000), (replace(SHAPE, vocab=0), layer)):
        inputs = activations(shape, setup, checkpointing=True) - ROWS * LENGTH * layer
        assert memory_of(shape, setup).peak == (4 + 8) * 1000 + inputs + ROWS * LENGTH * moment


def test_offloaded_state_is_on_the_host_unless_that_is_the_same_memory():
    setup = replace(SETUP, zero=2, half=True, ranks=2)
    here, there = memory_of(SHAPE, setup), memory_of(SHAPE, replace(setup, offload_optimizer=True))
    # Half of 1000 parameters: states, gradients in fp32, new weights in bf16; and one weight as large as the largest.
    table = 2 * SHAPE.vocab * SHAPE.hidden
    assert (here.host, there.host) == (0, (12 + 4 + 2) * 1000 / 2 + table)
    assert here.state - there.state == (12 + 2) * 1000 / 2 - table
    both = memory_of(SHAPE, replace(setup, offload_optimizer=True), shared=True)
    assert both.state - here.state == (4 + 2) * 1000 / 2 + 2 * table and both.host == 0
    assert both.peak - here.peak == both.state - here.state
    last = replace(setup, zero=3)
    at_3 = [memory_of(SHAPE, replace(last, offload_optimizer=on), shared=True).state for on in (False, True)]
    assert at_3[1] - at_3[0] == 4 * 1000 / 2


def big(layers: int = 40, hidden: int = 5120) -> Shape:
    """About 12 · 40 · 5120² = 12.6 billion parameters."""
    blocks = []
    for layer in range(layers):
        blocks.append(Block(layer=layer, weights=4 * hidden**2, norms=hidden, inner=hidden, keys=hidden))
        blocks.append(Block(layer=layer, weights=8 * hidden**2, norms=hidden, inner=4 * hidden))
    count = sum(block.weights for block in blocks) + 32000 * hidden
    return Shape(parameters=count, hidden=hidden, vocab=32000, tied=True, bias=False, blocks=tuple(blocks))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_largest_micro_batch_fits_and_the_next_does_not(checkpointing):
    setup = replace(SETUP, zero=3, half=True, ranks=16, length=2048, checkpointing=checkpointing)
    rows = largest_rows(big(), setup, CARD, batch=1024)
    assert rows in (1, 2, 4, 8, 16, 32)

    def peak(rows: int) -> float:
        return memory_of(big(), replace(setup, rows=rows, accumulation=64 // rows)).peak

    assert peak(rows) <= USABLE * 80e9 < peak(2 * rows)


def test_what_cannot_fit_is_said_and_offloading_is_the_last_resort():
    setup = replace(SETUP, zero=2, half=True, ranks=1, length=512)
    assert largest_rows(big(), setup, CARD, batch=8) is None
    planned = [Planned(shape=big(), setup=setup, batch=8, steps=10)]
    found = suggest(planned, CARD)
    assert found is not None and found.offload_optimizer and found.rows * found.accumulation == 8
    assert suggest(planned, replace(CARD, memory=1e9)) is None


def test_small_models_get_the_simplest_setup():
    planned = [Planned(shape=SHAPE, setup=replace(SETUP, half=True, ranks=8), batch=64, steps=10)]
    found = suggest(planned, CARD)
    assert found is not None and (found.zero, found.checkpointing, found.rows) == (1, False, 8)


def test_the_suggestion_is_the_fastest_that_fits():
    setup = replace(SETUP, half=True, ranks=16, hosts=2, length=512)
    planned = [Planned(shape=big(), setup=setup, batch=256, steps=10)]
    found = suggest(planned, CARD, network=1.25e10)
    assert found is not None and not found.offload_optimizer
    assert memory_of(big(), found).peak <= USABLE * CARD.memory
    for zero in (1, 2, 3):
        for checkpointing in (False, True):
            other = replace(setup, zero=zero, checkpointing=checkpointing)
            if rows := largest_rows(big(), other, CARD, batch=256):
                other = replace(other, rows=rows, accumulation=16 // rows)
                seconds = [step_seconds(big(), one, CARD, network=1.25e10) for one in (found, other)]
                assert seconds[0] <= seconds[1] / 0.95


def test_seconds_are_the_sum_of_their_parts():
    # A card whose only slow part is one of them; the sizes are those of SHAPE by hand.
    fast = Card(
        name="fast", memory=1, half=1e30, single=1e30, bandwidth=1e30, link=1e30, latency=0, launch=0, overlaps=False
    )
    setup = replace(SETUP, zero=0, ranks=2)
    products, attention = step_flops(SHAPE, setup)
    assert step_seconds(SHAPE, setup, replace(fast, single=1.0)) == pytest.approx(products + attention / 0.5)
    assert step_seconds(SHAPE, setup, replace(fast, link=1.0)) == pytest.approx(4000)
    assert step_seconds(SHAPE, setup, replace(fast, update=1.0)) == pytest.approx(28 * 1000)
    assert step_seconds(SHAPE, setup, replace(fast, copies=1.0)) == pytest.approx(4 * 8 * 1000)
    half = replace(setup, half=True, zero=3)  # gradients in half precision are copied to fp32 on their way
    assert step_seconds(SHAPE, half, replace(fast, copies=1.0)) == pytest.approx(4 * 12 * 1000)
    logits = setup.tokens * setup.accumulation * SHAPE.vocab
    assert step_seconds(SHAPE, setup, replace(fast, loss=1.0)) == pytest.approx(4 * 11 * logits)
    assert step_seconds(SHAPE, setup, fast, network=2.0) == pytest.approx(2000)
    assert step_seconds(SHAPE, replace(setup, accumulation=3), replace(fast, launch=1.0)) == pytest.approx(2 * 3)
    found = estimate(SHAPE, setup, CARD)
    assert found.seconds is not None
    assert found.tokens_per_second == pytest.approx(2 * ROWS * LENGTH / found.seconds)
