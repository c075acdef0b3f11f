from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

import cook.models.cook_experts as cook_experts
import cook.models.cpm_ant as cpm_ant
from cook.models.cpm_ant import Bias, BiasedAttention, CpmAntConfig, CpmAntForCausalLM, score_blocks
from tests.models.cpm_ant_reference import bucket, row_logits
from tests.models.cpm_ant_tiny import RAGGED, random_batch, tiny_config, tiny_model

VARIANTS = [{}, RAGGED, {"gated_ffn": False}, {"mask_modules": [[True, True], [False, False], [True, False]]}]


def numpy_weights(model):
    return {name: value.double().numpy() for name, value in model.state_dict().items()}


# --- the forward pass ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("grad", [False, True])
def test_logits_equal_the_slow_reference(variant, seed, grad):
    model = tiny_model(seed, **variant)
    batch = random_batch(seed, model.config)
    with torch.set_grad_enabled(grad):
        logits = model(**batch).logits.detach()
    for row in range(3):
        expected = row_logits(model.config, numpy_weights(model), {k: v[row].numpy() for k, v in batch.items()})
        torch.testing.assert_close(logits[row].double(), torch.from_numpy(expected), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_plain_call_is_task_2_with_the_prompt_as_its_context(grad):
    model = tiny_model(2)
    text, prompt = torch.randint(0, 61, (2, 9)), model.config.prompt_length
    rows = torch.cat([(torch.arange(prompt) + 2 * prompt).expand(2, -1), text], 1)
    is_text = torch.arange(prompt + 9) >= prompt
    with torch.set_grad_enabled(grad):
        plain = model(input_ids=text).logits
        full = model(
            input=rows,
            length=torch.tensor([14, 14]),
            context=~is_text.expand(2, -1),
            segment=(is_text * 2).expand(2, -1),
            span=torch.zeros_like(rows),
        ).logits
    torch.testing.assert_close(plain, full[:, prompt:])
    row = dict(input=rows[0], length=14, context=~is_text, segment=is_text * 2, span=is_text * 0)
    row = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in row.items()}
    expected = torch.from_numpy(row_logits(model.config, numpy_weights(model), row))
    torch.testing.assert_close(full[0].double(), expected, atol=2e-5, rtol=2e-5)


def test_rows_that_agree_share_their_bias_and_give_the_same():
    model = tiny_model(3)
    batch = random_batch(3, model.config, rows=1)
    double = {k: v.repeat(4, *[1] * (v.dim() - 1)) for k, v in batch.items()}
    torch.testing.assert_close(model(**double).logits, model(**batch).logits.expand(4, -1, -1))


@pytest.mark.parametrize("alike", ["context", "segment", "span", "length"])
@pytest.mark.parametrize("grad", [False, True])
def test_rows_that_agree_in_part_are_computed_as_if_alone(alike, grad):
    model = tiny_model(3)
    batch = random_batch(4, model.config)
    for name, value in {**batch}.items():
        batch[name] = value[:1].repeat(3, *[1] * (value.dim() - 1)) if name == alike else value
    with torch.set_grad_enabled(grad):
        logits = model(**batch).logits
        for row in range(3):
            alone = model(**{name: value[row : row + 1] for name, value in batch.items()}).logits
            torch.testing.assert_close(logits[row : row + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_buckets, max_distance", [(16, 12), (512, 2048), (32, 100)])
def test_buckets(num_buckets, max_distance):
    config = tiny_config(position_bias_num_buckets=num_buckets, position_bias_max_distance=max_distance)
    table = CpmAntForCausalLM(config).position_bias
    distances = torch.arange(-3000, 3001)
    expected = [bucket(int(d), num_buckets, max_distance) for d in distances]
    assert table.bucket(distances).tolist() == expected
    assert table.bucket(distances).max() == num_buckets - 1


@pytest.mark.parametrize("grad", [False, True])
def test_a_packed_row_equals_its_samples_alone(grad):
    model = tiny_model(4, **RAGGED)
    first, second = (random_batch(seed, model.config, rows=1, length=n) for seed, n in ((5, 13), (6, 11)))
    for sample in (first, second):
        sample["span"].zero_()
        sample["segment"].clamp_(min=1)
        sample["segment"][:, : model.config.prompt_length] = 0
        sample["length"].fill_(sample["input"].shape[1])
    packed = {k: torch.cat([first[k], second[k]], 1) for k in ("input", "context", "position", "segment")}
    packed = {k: F.pad(v, (0, 3)) for k, v in packed.items()}
    packed["span"] = torch.tensor([[0] * 13 + [1] * 11 + [2] * 3])
    packed["length"] = torch.tensor([24])
    with torch.set_grad_enabled(grad):
        logits = model(**packed).logits
        torch.testing.assert_close(logits[:, :13], model(**first).logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits[:, 13:24], model(**second).logits, atol=1e-5, rtol=1e-5)


def test_no_future_leaks_into_text():
    model = tiny_model(5)
    text = torch.randint(0, 61, (1, 12))
    changed = text.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 61
    before, after = model(input_ids=text).logits, model(input_ids=changed).logits
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-3


def test_removed_blocks_have_no_parameters_and_the_keys_are_cpm_lives():
    keys = set(tiny_model(0, **RAGGED).state_dict())
    assert not any(key.startswith(("encoder.layers.0.self_att", "encoder.layers.1.ffn")) for key in keys)
    layer = "encoder.layers.2."
    expected = {
        *(
            f"{layer}self_att.self_attention.{name}.weight"
            for name in ("project_q", "project_k", "project_v", "attention_out")
        ),
        *(f"{layer}ffn.ffn.{name}.weight" for name in ("w_in.w_0", "w_in.w_1", "w_out")),
        f"{layer}self_att.layernorm_before_attention.weight",
        f"{layer}ffn.layernorm_before_ffn.weight",
    }
    assert {key for key in keys if key.startswith(layer)} == expected
    assert {key for key in keys if ".layers." not in key} == {
        "encoder.output_layernorm.weight",
        "prompt_embedding.weight",
        "segment_embedding.weight",
        "input_embedding.weight",
        "position_bias.relative_attention_bias",
    }
    plain = tiny_model(0, gated_ffn=False).state_dict()
    assert plain["encoder.layers.0.ffn.ffn.w_in.w.weight"].shape == (20, 24)


def test_outputs_are_called_once_with_features_head_by_head():
    model = tiny_model(6)
    calls = []
    for layer in model.encoder.layers:
        layer.self_att.self_attention.attention_out.register_forward_pre_hook(lambda m, x: calls.append(x[0].shape))
        layer.ffn.ffn.w_out.register_forward_pre_hook(lambda m, x: calls.append(x[0].shape))
    model(input_ids=torch.zeros(2, 4, dtype=torch.long))
    assert calls == [(2, 9, 24), (2, 9, 20)] * 3
    # head 1 owns features 6..11: without its values they are zero, and only they
    attention, seen = model.encoder.layers[0].self_att.self_attention, []
    with torch.no_grad():
        attention.project_v.weight[6:12] = 0
    attention.attention_out.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    model(input_ids=torch.zeros(2, 4, dtype=torch.long))
    assert (seen[0].abs().amax((0, 1)) == 0).nonzero().flatten().tolist() == list(range(6, 12))


# --- losses -------------------------------------------------------------------------------------------------------


def test_labels_are_shifted_in_plain_calls_and_aligned_in_cpm_lives():
    model = tiny_model(7)
    text = torch.randint(0, 61, (2, 8))
    labels = text.masked_fill(torch.arange(8) < 3, -100)
    out = model(input_ids=text, labels=labels)
    expected = F.cross_entropy(out.logits[:, 2:-1].reshape(-1, 61), text[:, 3:].reshape(-1))
    torch.testing.assert_close(out.loss, expected)
    aligned = F.pad(labels[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(input_ids=text, targets=aligned).loss, expected)
    batch = random_batch(7, model.config)
    targets = torch.randint(0, 61, batch["input"].shape)
    targets[:, ::3] = -100
    out = model(**batch, labels=targets)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits.reshape(-1, 61), targets.reshape(-1)))
    torch.testing.assert_close(model(**batch, targets=targets).loss, out.loss)
    assert model(**batch, targets=torch.full_like(targets, -100)).loss == 0


def test_logits_to_keep_hidden_states_and_tuples():
    model = tiny_model(8)
    text = torch.randint(0, 61, (2, 8))
    out = model(input_ids=text, output_hidden_states=True)
    torch.testing.assert_close(model(input_ids=text, logits_to_keep=2).logits, out.logits[:, -2:])
    kept = torch.tensor([1, 5])
    torch.testing.assert_close(model(input_ids=text, logits_to_keep=kept).logits, out.logits[:, kept])
    assert [state.shape for state in out.hidden_states] == [(2, 8, 24)] * 4
    torch.testing.assert_close(model.logits(out.hidden_states[-1]), out.logits)
    assert model(input_ids=text, return_dict=False)[0].shape == (2, 8, 61)
    embeds = model.get_input_embeddings()(text)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, out.logits)


# --- padding, cache, generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("grad", [False, True])
def test_padding_changes_nothing(side, grad):
    model = tiny_model(9, **RAGGED)
    texts = [torch.randint(0, 61, (n,)) for n in (9, 4, 6)]
    pad = [((9 - len(t), 0) if side == "left" else (0, 9 - len(t))) for t in texts]
    ids = torch.stack([F.pad(t, p, value=60) for t, p in zip(texts, pad, strict=True)])
    mask = torch.stack([F.pad(torch.ones_like(t), p) for t, p in zip(texts, pad, strict=True)])
    with torch.set_grad_enabled(grad):
        logits = model(input_ids=ids, attention_mask=mask).logits
        for row, text in enumerate(texts):
            alone = model(input_ids=text[None]).logits[0]
            torch.testing.assert_close(logits[row][mask[row].bool()], alone, atol=1e-5, rtol=1e-5)
    assert logits.isfinite().all()


NO_ATTENTION = {"mask_modules": [[True, False]] * 3}
FIRST_LAYER_WITHOUT = {"mask_modules": [[True, False], [False, False], [False, True]]}


@pytest.mark.parametrize("variant", [{}, RAGGED, FIRST_LAYER_WITHOUT, NO_ATTENTION])
def test_cached_equals_uncached(variant):
    model = tiny_model(10, **variant)
    text = torch.randint(0, 61, (2, 12))
    mask = torch.ones_like(text)
    mask[1, :3] = 0
    with torch.no_grad():
        whole = model(input_ids=text, attention_mask=mask).logits
        cache, parts = DynamicCache(), []
        for begin, end in ((0, 5), (5, 6), (6, 10), (10, 12)):
            out = model(input_ids=text[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", [{}, RAGGED, FIRST_LAYER_WITHOUT, NO_ATTENTION])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_equals_a_loop_of_argmax(variant, use_cache):
    model = tiny_model(11, **variant)
    texts = [torch.randint(0, 61, (n,)) for n in (6, 3)]
    expected = []
    for text in texts:
        for _ in range(7):
            with torch.no_grad():
                text = torch.cat([text, model(input_ids=text[None]).logits[0, -1].argmax()[None]])
        expected.append(text[-7:])
    ids = torch.stack([F.pad(t, (6 - len(t), 0)) for t in texts])
    mask = torch.stack([F.pad(torch.ones_like(t), (6 - len(t), 0)) for t in texts])
    options = dict(attention_mask=mask, max_new_tokens=7, do_sample=False, pad_token_id=0, use_cache=use_cache)
    assert model.generate(ids, **options)[:, 6:].tolist() == torch.stack(expected).tolist()


def test_generation_samples_searches_beams_and_continues_from_a_cache():
    model = tiny_model(12, **RAGGED)
    text = torch.randint(0, 61, (2, 5))
    torch.manual_seed(0)
    sampled = model.generate(text, max_new_tokens=6, do_sample=True, top_k=10, pad_token_id=0)
    assert sampled.shape == (2, 11)
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, num_beams=3)
    beams = model.generate(text, use_cache=True, **options)
    assert beams.tolist() == model.generate(text, use_cache=False, **options).tolist()
    greedy = dict(do_sample=False, pad_token_id=0)
    whole = model.generate(text, max_new_tokens=6, **greedy)
    cache = DynamicCache()
    half = model.generate(text, max_new_tokens=3, past_key_values=cache, **greedy)
    assert model.generate(half, max_new_tokens=3, past_key_values=cache, **greedy).tolist() == whole.tolist()


# --- gradients ----------------------------------------------------------------------------------------------------


def gradients(model, **batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def batches(model, seed=13):
    """Batches that share the bias and the mask, only the bias, and nothing."""
    text = torch.randint(0, 61, (3, 12))
    batch = random_batch(seed, model.config)
    batch["labels"] = torch.randint(0, 61, batch["input"].shape)
    alike = {**batch, "segment": batch["segment"][:1].expand(3, -1)}
    return {"shared": {"input_ids": text, "labels": text}, "masks differ": alike, "all differ": batch}


@pytest.mark.parametrize("kind", ["shared", "masks differ", "all differ"])
@pytest.mark.parametrize("block_scores", [1 << 19, 64])
def test_blockwise_attention_has_the_gradients_of_the_plain_path(monkeypatch, kind, block_scores):
    model = tiny_model(14, **RAGGED)
    batch = batches(model)[kind]
    monkeypatch.setattr(cpm_ant, "BLOCK_SCORES", block_scores)
    ours = gradients(model, **batch)

    def plain(q, k, v, bias_RHQK, bias, scale):
        added = bias_RHQK if bias.hidden_BQK is None else bias_RHQK.masked_fill(bias.hidden_BQK[:, None], -3e4)
        added = torch.where(bias.added_RHQK < -2e4, bias.added_RHQK, added)
        return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5 + added, -1) @ v

    monkeypatch.setattr(BiasedAttention, "apply", plain)
    expected = gradients(model, **batch)
    assert ours.keys() == expected.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("rows, hides", [(1, False), (1, True), (2, False)])
@pytest.mark.parametrize("length", [7, 1100])
def test_blockwise_attention_against_autograd(rows, hides, length):
    generator = torch.Generator().manual_seed(0)
    batch, heads, dim = 2, 1 if length > 7 else 3, 4
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.double, requires_grad=True)  # noqa: E731
    q, k, v = (draw(batch, heads, length, dim) for _ in range(3))
    bias = draw(rows, heads, length, length)
    hidden = torch.rand(batch if hides else rows, length, length, generator=generator) < 0.4
    hidden |= torch.ones(length, length).triu(2).bool()
    hidden[:, 3] = True  # a query that sees nothing must not spoil the others
    if hides:
        record = Bias(added_RHQK=bias.detach(), bias_RHQK=bias, hidden_BQK=hidden, blocks=score_blocks(hidden, heads))
    else:
        added = bias.detach().masked_fill(hidden[:, None], -3e4)
        record = Bias(added_RHQK=added, bias_RHQK=bias, blocks=score_blocks(hidden, heads))
    keep = (~hidden.all(-1))[:, None, :, None]
    out = BiasedAttention.apply(q, k, v, bias, record, q.shape[-1] ** -0.5) * keep
    scores = (q @ k.mT / dim**0.5 + bias).masked_fill(hidden[:, None], float("-inf"))
    expected = torch.softmax(scores, -1).nan_to_num(0.0) @ v
    torch.testing.assert_close(out, expected)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.double)
    ours = torch.autograd.grad((out * weights).sum(), (q, k, v, bias))
    scores = (q @ k.mT / dim**0.5 + bias).masked_fill(hidden[:, None], -1e30)
    theirs = torch.autograd.grad((torch.softmax(scores, -1) @ v * keep * weights).sum(), (q, k, v, bias))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_half_precision_stays_near_fp32():
    model = tiny_model(15)
    batch = batches(model)["masks differ"]
    expected = gradients(model, **batch)
    logits = model(**batch).logits
    half = tiny_model(15).to(torch.bfloat16)
    ours = gradients(half, **batch)
    assert half(**batch).logits.dtype == torch.bfloat16
    assert (half(**batch).logits - logits).norm() / logits.norm() < 0.03
    for name in expected:
        assert (ours[name].float() - expected[name]).norm() <= 0.1 * expected[name].norm(), name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (model(**batch).logits - logits).norm() / logits.norm() < 0.03
        ours = gradients(model, **batch)
    for name in expected:
        assert (ours[name] - expected[name]).norm() <= 0.1 * expected[name].norm(), name


def test_padding_gives_nothing_to_attention_and_finite_gradients():
    model = tiny_model(16)
    batch = batches(model)["all differ"]
    batch["length"] = torch.tensor([6, 17, 9])
    seen = []
    model.encoder.layers[0].self_att.self_attention.attention_out.register_forward_hook(
        lambda module, args, out: seen.append(out)
    )
    loss = model(**batch).loss
    loss.backward()
    assert (seen[0][0, 6:] == 0).all() and (seen[0][2, 9:] == 0).all() and (seen[0][0, :6] != 0).any()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_has_the_same_gradients(dropout):
    model = tiny_model(17, **RAGGED, dropout_p=dropout).train()
    batch = batches(model)["masks differ"]
    torch.manual_seed(1)
    expected = gradients(model, **batch)
    model.activation_checkpointing_enable()
    calls = []
    model.encoder.layers[1].register_forward_pre_hook(lambda *args: calls.append(1))
    torch.manual_seed(1)
    ours = gradients(model, **batch)
    assert len(calls) == 2 and model.is_activation_checkpointing
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], msg=name)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


# --- construction, saving and loading -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mask_modules": [[True, False]]}, "3 entries"),
        ({"mask_modules": [[True], [True], [False]]}, "attention removed, ffn removed"),
        ({"layer_heads": [[0], [], [1]]}, r"layer_heads\[1\]"),
        ({"layer_heads": [[0], [1, 0], [1]]}, "ascending"),
        ({"layer_heads": [[0], [4], [1]]}, r"0\.\.3"),
        ({"layer_dim_ff": [3, 0, 2]}, r"layer_dim_ff\[1\]"),
        ({"layer_dim_ff": [3]}, "3 entries"),
        ({"unpruned": {"dim_model": 32}}, "unpruned lacks dim_ff, dim_head, heads"),
        (
            {"unpruned": {"dim_model": 32, "dim_head": 6, "heads": [4], "dim_ff": [20] * 3}},
            "unpruned.heads must have 3",
        ),
        ({"num_layers": 0}, "num_layers"),
        ({"prompt_types": 2}, "prompt_types"),
        ({"position_bias_num_buckets": 10}, "multiple of 4"),
        ({"position_bias_max_distance": 4}, "max_distance"),
        ({"dropout_p": 1.0}, "dropout_p"),
    ],
)
def test_contradictions_in_the_config_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_config_defaults_names_and_round_trip(tmp_path):
    config = CpmAntConfig()
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (4096, 32, 48)
    assert (config.dim_ff, config.dim_head, config.vocab_size, config.half) == (10240, 128, 30720, True)
    ragged = tiny_config(**RAGGED, pad_token_id=0, eos_token_id=7, bos_token_id=6)
    ragged.save_pretrained(tmp_path)
    loaded = CpmAntConfig.from_pretrained(tmp_path)
    for name in ("mask_modules", "layer_heads", "layer_dim_ff", "pad_token_id", "eos_token_id", "bos_token_id", "eps"):
        assert getattr(loaded, name) == getattr(ragged, name), name


@pytest.mark.parametrize("names", [[], ["input_ids", "input"], ["input"], ["input_ids", "inputs_embeds"]])
def test_incomplete_or_mixed_batches_are_errors(names):
    tensors = {name: torch.zeros(1, 8, dtype=torch.long) for name in names}
    with pytest.raises(ValueError, match="CPM-Live"):
        tiny_model()(**tensors)


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load(tmp_path, variant):
    model = tiny_model(18, **variant)
    model.save_pretrained(tmp_path)
    loaded, report = CpmAntForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert loaded.state_dict().keys() == model.state_dict().keys()
    text = torch.randint(0, 61, (1, 6))
    assert torch.equal(loaded(input_ids=text).logits, model(input_ids=text).logits)
    half = CpmAntForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_missing_weights_are_initialised_and_the_meta_device_works(tmp_path):
    model = tiny_model(19)
    weights = model.state_dict()
    name = "encoder.layers.1.ffn.ffn.w_in.w_0.weight"
    kept = weights.pop(name)
    model.save_pretrained(tmp_path, state_dict=dict(weights))
    loaded, report = CpmAntForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {name}
    new = loaded.state_dict()[name]
    assert 0.8 < new.std() < 1.2 and not torch.equal(new, kept)
    other = "encoder.layers.1.ffn.ffn.w_in.w_1.weight"
    assert torch.equal(loaded.state_dict()[other], model.state_dict()[other])
    with torch.device("meta"):
        empty = CpmAntForCausalLM(tiny_config(**RAGGED))
    assert all(p.is_meta for p in empty.parameters()) and not list(empty.buffers())


def test_starts_at_the_loss_of_a_blind_guess():
    torch.manual_seed(0)
    config = tiny_config(vocab_size=500, dim_model=64, num_layers=8)
    text = torch.randint(0, 500, (8, 64))
    loss = CpmAntForCausalLM(config)(input_ids=text, labels=text).loss
    assert abs(loss - torch.tensor(500.0).log()) < 0.7


@pytest.mark.slow
def test_loads_with_remote_code_where_cook_is_not(tmp_path):
    model = tiny_model(20, **RAGGED)
    names = {"AutoConfig": "CpmAntConfig", "AutoModelForCausalLM": "CpmAntForCausalLM"}
    model.config.auto_map = {key: f"modeling_cook_cpm_ant.{name}" for key, name in names.items()}
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    shutil.copy(cpm_ant.__file__, folder / "modeling_cook_cpm_ant.py")
    shutil.copy(cook_experts.__file__, folder)
    text = torch.tensor([[4, 5, 6]])
    torch.save(model(input_ids=text).logits, tmp_path / "logits.pt")
    script = f"""
        import importlib.util, torch
        assert importlib.util.find_spec("cook") is None
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
        logits = model(input_ids=torch.tensor([[4, 5, 6]])).logits
        torch.testing.assert_close(logits, torch.load({str(tmp_path / "logits.pt")!r}))
        longer = model.generate(torch.tensor([[4, 5, 6]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert longer.shape == (1, 6)
        print("same")
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "same" in done.stdout, done.stderr
