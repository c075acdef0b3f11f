from __future__ import annotations

import json

import pytest
import torch
from transformers.models.cpmant import CpmAntConfig as StockConfig
from transformers.models.cpmant import CpmAntForCausalLM as StockModel

from cook.base.errors import UserError
from cook.families.cpm_ant_formats import NATIVE_FIELDS, from_stock, native_config, to_native_config, to_stock
from cook.models.cpm_ant import CpmAntConfig, CpmAntForCausalLM
from tests.models.cpm_ant_tiny import RAGGED, SIZES, tiny_config, tiny_model


def stock_model(seed: int = 0) -> StockModel:
    torch.manual_seed(seed)
    names = {"dim_model": "hidden_size", "num_heads": "num_attention_heads", "num_layers": "num_hidden_layers"}
    model = StockModel(StockConfig(**{names.get(name, name): value for name, value in SIZES.items()})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 1 if "bias" in name else 0.3)
            if "norm" in name:
                parameter.abs_().add_(0.5)
        model.lm_head.weight.copy_(model.cpmant.input_embedding.weight[: SIZES["vocab_size"]])
    return model


def our_logits(model: CpmAntForCausalLM, text: torch.Tensor) -> torch.Tensor:
    """What the stock class computes: every position is context, id 0 is padding of segment 0."""
    prompt = model.config.prompt_length
    ids = torch.cat([(torch.arange(prompt) + 2 * prompt).expand(len(text), -1), text], 1)
    logits = model(
        input=ids,
        length=torch.full((len(text),), ids.shape[1]),
        context=torch.ones_like(ids).bool(),
        segment=torch.cat([torch.zeros_like(ids[:, :prompt]), torch.full_like(text, 2)], 1),
        span=torch.zeros_like(ids),
    ).logits
    return logits[:, prompt:]


@pytest.mark.parametrize("seed", range(3))
def test_stock_models_compute_the_same_through_the_mapping(seed):
    stock = stock_model(seed)
    fields, tensors = from_stock(stock.config.to_dict(), stock.state_dict())
    model = CpmAntForCausalLM(CpmAntConfig(**fields)).eval()
    model.load_state_dict(dict(tensors), strict=True)
    text = torch.randint(1, 61, (2, 30))
    with torch.no_grad():
        expected = stock(input_ids=text).logits
        assert (our_logits(model, text) - expected).abs().max() <= 1e-4
        assert (model(input_ids=text).logits - expected).abs().max() > 1e-2  # that class attends to the future


def test_our_models_compute_the_same_as_stock_ones():
    model = tiny_model(3)
    fields, tensors = to_stock(model.config, model.state_dict())
    assert fields["model_type"] == "cpmant" and fields["hidden_size"] == 24
    stock = StockModel(StockConfig(**fields)).eval()
    stock.load_state_dict(dict(tensors), strict=True)
    text = torch.randint(1, 61, (2, 30))
    with torch.no_grad():
        assert (our_logits(model, text) - stock(input_ids=text).logits).abs().max() <= 1e-4
    again, back = from_stock(json.loads(json.dumps(fields)), tensors)
    assert CpmAntConfig(**again).to_diff_dict() == CpmAntConfig(**{**again, "half": True}).to_diff_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(back[name], value, msg=name)
    assert set(back) == set(model.state_dict())


def test_tensors_are_computed_one_at_a_time_and_keep_their_type():
    model, reads = tiny_model(4).to(torch.bfloat16), []

    class Counting(dict):
        def __getitem__(self, name):
            reads.append(name)
            return super().__getitem__(name)

    _, tensors = to_stock(model.config, Counting(model.state_dict()))
    assert reads == [] and len(tensors) == len(list(tensors)) == len(model.state_dict())  # - prompts, + lm_head
    name = "cpmant.encoder.layers.1.ffn.ffn.w_out.weight"
    assert name in tensors and tensors[name].dtype == torch.bfloat16
    assert reads == [name.removeprefix("cpmant.")]


@pytest.mark.parametrize("changes", [RAGGED, {"layer_dim_ff": [3, 4, 5]}, {"layer_heads": [[0, 1]] * 3}])
def test_ragged_models_are_refused(changes):
    model = tiny_model(5, **changes)
    with pytest.raises(UserError, match="cannot load this model"):
        to_stock(model.config, model.state_dict())
    with pytest.raises(UserError, match="cannot load this model"):
        to_native_config(model.config)


@pytest.mark.parametrize("changes", [{"mask_modules": [[True, False]] * 3}, {"gated_ffn": False}])
def test_what_the_stock_class_lacks_is_refused(changes):
    model = tiny_model(6, **changes)
    with pytest.raises(UserError, match="every block present"):
        to_stock(model.config, model.state_dict())


def test_wrong_tensors_and_configs_are_errors():
    stock = stock_model()
    config, tensors = stock.config.to_dict(), dict(stock.state_dict())
    with pytest.raises(UserError, match="model_type cpmant"):
        from_stock({**config, "model_type": "bert"}, tensors)
    missing = {name: value for name, value in tensors.items() if "layers.1.ffn.ffn.w_out" not in name}
    with pytest.raises(UserError, match=r"missing: cpmant\.encoder\.layers\.1\.ffn\.ffn\.w_out"):
        from_stock(config, missing)
    with pytest.raises(UserError, match="unexpected: other"):
        from_stock(config, {**tensors, "other": tensors["lm_head.weight"]})
    _, mapped = from_stock(config, {**tensors, "lm_head.weight": tensors["lm_head.weight"] + 1})
    with pytest.raises(UserError, match="output projection"):
        mapped["input_embedding.weight"]
    _, mapped = from_stock({**config, "vocab_size": 60}, tensors)
    with pytest.raises(UserError, match="80 rows"):
        mapped["input_embedding.weight"]


def test_cpm_lives_json():
    published = {
        "vocab_size": 30720,
        "dropout_p": 0.0,
        "eps": 1e-6,
        "half": True,
        "dim_model": 4096,
        "dim_ff": 3735,
        "num_heads": 20,
        "dim_head": 128,
        "num_layers": 2,
        "position_bias_num_buckets": 512,
        "position_bias_max_distance": 2048,
        "prompt_types": 32,
        "prompt_length": 32,
        "segment_types": 32,
        "mask_modules": [[False, True], [True, False]],
    }
    assert native_config(published) == published
    config = CpmAntConfig(**native_config(published))
    assert config.has_attention(0) and not config.has_ffn(0) and not config.has_attention(1) and config.has_ffn(1)
    assert to_native_config(config) == published
    assert native_config({})["num_layers"] == 48 and set(native_config({})) == set(NATIVE_FIELDS)
    with pytest.raises(UserError, match="num_layer"):
        native_config({"num_layer": 3})
    with pytest.raises(UserError, match="contradicts"):
        native_config({"num_layers": 3, "mask_modules": [[True, False]]})
    with pytest.raises(UserError, match="contradicts"):
        native_config({"num_layers": "3"})


def test_heads_named_in_full_are_no_rag():
    config = tiny_config(layer_heads=[[0, 1, 2, 3]] * 3, layer_dim_ff=[20] * 3)
    assert to_native_config(config)["num_heads"] == 4
