"""Folders of uneven models against the stock models whose units were set to zero."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    ContinuousBatchingConfig,
    GenerationConfig,
)

import cook
from cook.export.pruned_folder import mask_model, prune_to_folder
from cook.families.source import load_model, open_model
from tests.families.test_stock_space import stock_model
from tests.families.tiny_models import EXACT, difference
from tests.tiny_families import tiny_config, tiny_source

IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
NAMES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
"""Of 8 query heads over 4 key-value heads, and 20 dims, in 3 layers."""
SMALL_CACHE = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)
"""By default the cache fills most of the machine's memory, and each step a mask of 8192 tokens times the cache."""
QUERIES = {f"layers.{n}.heads": torch.tensor([1.0, 0] * 4 if n == 1 else [1.0] * 8) for n in range(3)}
GROUPS = {
    "layers.0.heads": torch.tensor([1.0, 1, 0, 1, 1, 1, 1, 0]),
    "layers.2.heads": torch.tensor([1.0, 1, 0, 0, 0, 1, 0, 0]),
    "layers.2.keys": torch.tensor([1.0, 0, 1, 0]),
}
"""Query heads, other numbers of them in the key-value groups of a layer."""
KEYS = {"layers.0.heads": torch.tensor([0.0, 1, 1, 0]), "layers.2.heads": torch.tensor([0.0, 0, 1, 0])}
DIMS = {"layers.1.dimff": (torch.arange(20) % 3 > 0).float(), "layers.2.ffn": torch.zeros(1)}


def export(folder, name, unit, masks):
    """The stock model with zeroed weights, and a folder of the small one."""
    model = stock_model(name, 4)
    model.save_pretrained(folder / "model")
    source = open_model(folder / "model")
    space = source.adapter.space(source.config, unit)
    pruned = prune_to_folder(source, space, masks, folder / "small")
    assert pruned.needs_remote_code
    for number, layer in enumerate(model.model.layers):
        heads = masks.get(f"layers.{number}.heads", torch.ones(8))
        width = layer.self_attn.o_proj.weight.shape[1]
        layer.self_attn.o_proj.weight.data *= heads.repeat_interleave(width // len(heads))
        layer.self_attn.o_proj.weight.data *= masks.get(f"layers.{number}.att", torch.ones(1))
        layer.mlp.down_proj.weight.data *= masks.get(f"layers.{number}.dimff", torch.ones(20))
        layer.mlp.down_proj.weight.data *= masks.get(f"layers.{number}.ffn", torch.ones(1))
        if not masks.get(f"layers.{number}.ffn", torch.ones(1)).all() and layer.mlp.down_proj.bias is not None:
            layer.mlp.down_proj.bias.data.zero_()
    model.save_pretrained(folder / "zeroed")
    return model, folder / "small"


@torch.no_grad()
@pytest.mark.parametrize("unit, heads", [("kv_group", KEYS), ("query_head", GROUPS)])
@pytest.mark.parametrize("name", NAMES)
def test_every_auto_class_gives_what_the_stock_model_computes(tmp_path, name, unit, heads):
    zeroed, small = export(tmp_path, name, unit, heads | DIMS)
    base = AutoModel.from_pretrained(small, trust_remote_code=True)
    expected = AutoModel.from_pretrained(tmp_path / "zeroed")(input_ids=IDS, attention_mask=PADDED).last_hidden_state
    hidden = base(input_ids=IDS, attention_mask=PADDED).last_hidden_state
    assert difference(expected[PADDED.bool()], hidden[PADDED.bool()]) <= EXACT
    classifier = AutoModelForSequenceClassification.from_pretrained(small, trust_remote_code=True, num_labels=3)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "zeroed", num_labels=3)
    stock.score.weight.copy_(classifier.score.weight)
    assert difference(stock(input_ids=IDS).logits, classifier(input_ids=IDS).logits) <= EXACT
    for made, auto_class in ((base, AutoModel), (classifier, AutoModelForSequenceClassification)):
        made.save_pretrained(tmp_path / "again")
        again, report = auto_class.from_pretrained(tmp_path / "again", trust_remote_code=True, output_loading_info=True)
        assert not any(report.values())
        assert torch.equal(again(input_ids=IDS)[0], made(input_ids=IDS)[0])


@torch.no_grad()
@pytest.mark.parametrize("unit, heads", [("kv_group", KEYS), ("query_head", GROUPS)])
@pytest.mark.parametrize("name", NAMES)
def test_generation_is_that_of_the_stock_model(tmp_path, name, unit, heads):
    zeroed, small = export(tmp_path, name, unit, heads | DIMS)
    model = AutoModelForCausalLM.from_pretrained(small, trust_remote_code=True)
    for options in ({}, {"use_cache": False}, {"num_beams": 3}, {"cache_implementation": "static"}):
        options |= {"max_new_tokens": 8, "do_sample": False, "attention_mask": PADDED, "pad_token_id": 0}
        assert torch.equal(zeroed.generate(IDS, **options), model.generate(IDS, **options)), options


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_models_and_configs_can_be_copied_and_pickled(tmp_path, name):
    _, small = export(tmp_path, name, "query_head", QUERIES | GROUPS | DIMS)
    for auto_class in (AutoModelForCausalLM, AutoModel):
        model = auto_class.from_pretrained(small, trust_remote_code=True)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(other) is type(model) and type(other.config) is type(model.config)
            assert torch.equal(other(input_ids=IDS)[0], model(input_ids=IDS)[0])
    config = AutoConfig.from_pretrained(small, trust_remote_code=True)
    assert pickle.loads(pickle.dumps(config)).to_dict() == copy.deepcopy(config).to_dict() == config.to_dict()


def test_another_process_reads_the_pickle(tmp_path):
    _, small = export(tmp_path, "llama", "query_head", GROUPS | DIMS)
    model = AutoModelForCausalLM.from_pretrained(small, trust_remote_code=True)
    torch.save((model, IDS, model(input_ids=IDS).logits.detach()), tmp_path / "model.pt")
    script = """
        import sys, torch
        from transformers.dynamic_module_utils import init_hf_modules
        init_hf_modules()
        torch.set_num_threads(int(sys.argv[2]))  # the order of sums depends on it
        model, ids, logits = torch.load(sys.argv[1], weights_only=False)
        assert torch.equal(model(input_ids=ids).logits, logits)
    """
    code, threads = "\n".join(line.strip() for line in script.splitlines()), str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pt"), threads],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "unit, masks",
    [
        ("query_head", QUERIES),
        ("query_head", {"layers.0.heads": GROUPS["layers.0.heads"]}),
        ("kv_group", DIMS | {"layers.0.att": torch.zeros(1)}),
    ],
)
def test_continuous_batching_is_exact(tmp_path, unit, masks):
    zeroed, small = export(tmp_path, "qwen3", unit, masks)
    model = AutoModelForCausalLM.from_pretrained(small, trust_remote_code=True)
    prompts = [IDS[0, :4].tolist(), IDS[1].tolist()]
    options = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = [
        zeroed.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), generation_config=options)
        for ids in prompts
    ]
    options.eos_token_id = -1
    found = model.generate_batch(prompts, generation_config=options, continuous_batching_config=SMALL_CACHE)
    tokens = {tuple(output.prompt_ids): output.generated_tokens for output in found.values()}
    wanted = [output[0, len(ids) :].tolist() for output, ids in zip(expected, prompts, strict=True)]
    assert [tokens[tuple(ids)] for ids in prompts] == wanted


def test_continuous_batching_is_refused_where_caches_differ(tmp_path):
    _, small = export(tmp_path, "qwen3", "kv_group", KEYS)
    model = AutoModelForCausalLM.from_pretrained(small, trust_remote_code=True)
    with pytest.raises(ValueError, match="different numbers of key-value heads: use generate"):
        model.generate_batch([[5, 6, 7]], generation_config=GenerationConfig(max_new_tokens=2, eos_token_id=-1))


CLASSIFIER = """
import sys, torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True, num_labels=3)
ids, labels = torch.arange(3, 21).view(2, 9), torch.tensor([0, 2])
model.config.pad_token_id = 0
output = model(input_ids=ids, labels=labels)
print(bool(torch.isclose(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))))
"""


@pytest.mark.parametrize("made", ["by the export", "in memory"])
def test_another_process_loads_a_classifier_and_its_loss(tmp_path, made):
    """Without the classes that other tests have loaded: the model inside of the classifier is built by its config."""
    zeroed, small = export(tmp_path, "llama", "query_head", GROUPS | DIMS)
    if made == "in memory":
        small = tmp_path / "in memory"
        cook.reshape(zeroed, GROUPS | DIMS).save_pretrained(small)
    done = subprocess.run(
        [sys.executable, "-c", CLASSIFIER, str(small)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0 and done.stdout.split()[-1] == "True", done


@torch.no_grad()
@pytest.mark.parametrize("name", ["modernbert", "bert", "llama", "gpt2", "gemma2"])
def test_the_loss_is_that_of_the_stock_class(name, tmp_path):
    """transformers takes the loss from the name of a class."""
    source = tiny_source(name)
    space = source.adapter.space(source.config)
    gone = [group for group in space.of("dimff") if group.layer == 1]
    masks = {group.name: (torch.arange(group.size) % 3 > 0).float() for group in gone}
    pruned = prune_to_folder(source, space, masks, tmp_path / "small")
    auto_class = getattr(transformers, pruned.auto_class)
    small, whole = auto_class.from_pretrained(tmp_path / "small", trust_remote_code=True), load_model(source)
    mask_model(whole, space, masks)
    labels = IDS.clone()
    labels[:, -3:] = -100
    wanted, got = (model(input_ids=IDS, labels=labels).loss for model in (whole, small))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)  # fp32, sums in another order


@torch.no_grad()
def test_a_phi3_with_fewer_head_dims_is_saved_and_saved_again(tmp_path):
    """Its own check of rotary positions wants the factors of all pairs."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_config("phi3"))).eval()
    units = tiny_source("phi3").adapter.space(tiny_source("phi3").config).head_dims.size
    small = cook.reshape(model, {"head_dims": (torch.arange(units) != 1).float()})
    small.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    again.save_pretrained(tmp_path / "again")
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    for loaded in (again, last):
        assert torch.equal(loaded(input_ids=IDS).logits, small(input_ids=IDS).logits)
