"""Models of images and text: the text part is pruned, the rest is copied."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, Gemma3Config, Qwen2_5_VLConfig, Qwen2VLConfig

from cook.base.tensor_files import open_safetensors_folder
from cook.export.pruned_folder import mask_model, prune_to_folder, reshaped_source
from cook.families.source import load_model, open_model, with_biases
from tests.families.tiny_models import EXACT, difference
from tests.tiny_families import draw_weights
from tests.tiny_pruning import random_masks

TEXT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
IMAGE, START, END = 58, 59, 60
GEMMA_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
QWEN_VISION = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 1]}
QWEN_TEXT = TEXT | {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": ROPE}
QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": 57, "vision_start_token_id": START, "vision_end_token_id": END}
CONFIGS = {
    "gemma3": lambda: Gemma3Config(
        # A norm after a block of few dims divides rounding by almost nothing, unless it adds something to it.
        text_config=TEXT | {"head_dim": 6, "query_pre_attn_scalar": 16, "sliding_window": 5, "rms_norm_eps": 0.1},
        vision_config=GEMMA_VISION | {"image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_id=IMAGE,
        boi_token_id=START,
        eoi_token_id=END,
    ),
    "qwen2_vl": lambda: Qwen2VLConfig(
        text_config=QWEN_TEXT,
        vision_config=QWEN_VISION | {"embed_dim": 16, "hidden_size": 32},
        **QWEN_IDS,
    ),
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(
        text_config=QWEN_TEXT,
        vision_config=QWEN_VISION
        | {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "fullatt_block_indexes": [0]},
        **QWEN_IDS,
    ),
}
IDS = torch.randint(3, 57, (2, 9), generator=torch.Generator().manual_seed(0))


def with_image(name):
    """A row of text with one image of four tokens."""
    random = torch.Generator().manual_seed(0)
    ids = torch.cat([IDS[:1, :3], torch.tensor([[START, *[IMAGE] * 4, END]]), IDS[:1, 3:]], 1)
    is_image = (ids == IMAGE).long()
    if name == "gemma3":
        return {
            "input_ids": ids,
            "pixel_values": torch.randn(1, 3, 16, 16, generator=random),
            "token_type_ids": is_image,
        }
    patches = torch.randn(16, 3 * 2 * 4 * 4, generator=random)
    inputs = {"input_ids": ids, "pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return inputs | {"mm_token_type_ids": is_image}


@pytest.fixture(params=CONFIGS)
def opened(request, tmp_path):
    model = draw_weights(AutoModelForImageTextToText.from_config(CONFIGS[request.param](), dtype=torch.float32)).eval()
    model.save_pretrained(tmp_path / "model")
    return request.param, model, open_model(tmp_path / "model")


@torch.no_grad()
def test_masked_and_reshaped_are_equal_with_and_without_an_image(opened, tmp_path):
    name, model, source = opened
    for unit in ("kv_group", "query_head"):
        space = source.adapter.space(source.config, unit)
        assert space.hidden is None and all("language_model" in g.gate.module for g in space.groups)
        masks = random_masks(space, 1, blocks=0.8)
        masks["head_dims"] = torch.ones(space.head_dims.size).index_fill(0, torch.tensor([1]), 0)
        small = load_model(reshaped_source(source, space, masks))
        attached = mask_model(model, space, masks)
        for inputs in ({"input_ids": IDS}, with_image(name)):
            assert difference(model(**inputs).logits, small(**inputs).logits) <= EXACT
        attached.remove()
    prune_to_folder(source, space, masks, tmp_path / "small")
    loaded, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "small", trust_remote_code=True, output_loading_info=True
    )
    assert not any(report.values())
    mask_model(model, space, masks)
    inputs = with_image(name)
    assert difference(model(**inputs).logits, loaded(**inputs).logits) <= EXACT
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options), loaded.generate(**inputs, **options))
    assert not torch.equal(model(**inputs).logits[:, -1], model(input_ids=inputs["input_ids"]).logits[:, -1])


@torch.no_grad()
def test_a_stock_class_loads_fewer_layers_and_dims_and_the_rest_is_copied(opened, tmp_path):
    name, model, source = opened
    space = source.adapter.space(source.config)
    masks = {g.name: torch.tensor([float(g.layer != 1)]) for g in space.of("layer")}
    masks |= {g.name: ((torch.arange(g.size) + g.layer) % 2).float() for g in space.of("dimff")}
    pruned = prune_to_folder(source, space, masks, tmp_path / "small")
    assert not pruned.needs_remote_code and pruned.auto_class == "AutoModelForImageTextToText"
    text = json.loads((tmp_path / "small" / "config.json").read_text())["text_config"]
    assert (text["num_hidden_layers"], text["intermediate_size"]) == (2, 10)
    small = AutoModelForImageTextToText.from_pretrained(tmp_path / "small")
    before, after = open_safetensors_folder(source.path), open_safetensors_folder(tmp_path / "small")
    vision = [path for path in before if "vis" in path or "projector" in path]
    assert vision and all(torch.equal(before[path], after[path]) for path in vision)
    mask_model(model, space, masks)
    inputs = with_image(name)
    assert difference(model(**inputs).logits, small(**inputs).logits) <= EXACT


@torch.no_grad()
@pytest.mark.parametrize("opened", ["gemma3"], indirect=True)
def test_a_stock_class_loads_fewer_head_dims(opened, tmp_path):
    _, model, source = opened
    space = source.adapter.space(source.config)
    masks = {"head_dims": torch.tensor([0.0, 1.0, 1.0])}
    pruned = prune_to_folder(source, space, masks, tmp_path / "small")
    assert not pruned.needs_remote_code and pruned.config["text_config"]["head_dim"] == 4
    small = AutoModelForImageTextToText.from_pretrained(tmp_path / "small")
    mask_model(model, space, masks)
    for inputs in ({"input_ids": IDS}, with_image("gemma3")):
        assert difference(model(**inputs).logits, small(**inputs).logits) <= EXACT


@torch.no_grad()
def test_biases_are_added_to_the_language_part_alone(opened, tmp_path):
    name, model, source = opened
    wide = with_biases(source)
    added = wide.tensors.keys() - source.tensors.keys()
    assert all("language_model" in path for path in added) and bool(added) == (name == "gemma3")
    space, inputs = wide.adapter.space(wide.config), with_image(name)
    prune_to_folder(wide, space, {}, tmp_path / "same")
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "same", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)


@torch.no_grad()
def test_packed_samples_do_not_see_each_other(opened):
    _, model, source = opened
    batch = {"input": IDS[:1], "position": torch.tensor([[*range(4), *range(5)]])}
    packed = model(**source.adapter.inputs(batch)).logits
    for begin, end in ((0, 4), (4, 9)):
        alone = model(input_ids=IDS[:1, begin:end]).logits
        assert difference(alone, packed[:, begin:end]) <= EXACT
