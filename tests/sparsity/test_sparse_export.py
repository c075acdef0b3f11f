from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
)

from cook.base.errors import UserError
from cook.sparsity.kernels import sparse_bert
from cook.sparsity.matrices import encoder_matrices
from cook.sparsity.pattern_masks import apply_masks, make_masks
from cook.sparsity.sparse_export import export_sparse
from cook.sparsity.spec import PatternSpec

SIZES = dict(
    vocab_size=50,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=40,
)
IDS = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(20) < torch.tensor([[20], [13], [7]])).long()


def masked_model(folder, spec, sparsity, kind=BertForSequenceClassification, changes=None):
    """A random model under a pattern, saved; biases are not 0, so that a constant that is forgotten shows."""
    torch.manual_seed(0)
    labels = 2 if kind is BertForQuestionAnswering else 3
    model = kind(BertConfig(**SIZES, num_labels=labels)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    matrices = encoder_matrices(shapes, head_size=16)
    scores = {m.path: torch.rand(m.shape) for m in matrices}
    masks = make_masks(scores, matrices, spec, sparsity=sparsity)
    for path, mask in (changes or {}).items():
        masks[path] = mask
    apply_masks(model, masks)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n")
    return model, masks


def close(found, wanted):
    # fp32, sums in another order through two layers: measured 2e-6 of logits of size 5.
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


PATTERNS = [(0, 50), (1, 50), (2, 75), (3, 50), (4, 75), (5, 75), (6, 40), (7, 75), (8, 75), ("unstructured", 50)]


@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
def test_the_export_computes_what_the_masked_model_does(tmp_path, pattern, sparsity):
    spec = PatternSpec(type=pattern, granularity=32, block=16, local_granularities=(16, 32))
    model, masks = masked_model(tmp_path / "masked", spec, sparsity)
    result = export_sparse(tmp_path / "masked", tmp_path / "out", masks, block=16 if pattern == 5 else None)
    assert result.kind == "sparse" and (tmp_path / "out" / "vocab.txt").exists()
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    for mask in (None, MASK):
        with torch.no_grad():
            wanted, found = (m(IDS, attention_mask=mask).logits for m in (model, small))
        close(found, wanted)
        close(small(IDS, attention_mask=mask).logits, wanted)  # with gradients the other way is taken
    small.zero_grad()
    torch.nn.functional.cross_entropy(small(IDS, attention_mask=MASK).logits, torch.arange(3)).backward()
    weight = small.bert.encoder.layers[0].output.weight
    assert weight.grad is not None and float(weight.grad.abs().max()) > 0
    structured = pattern not in (4, "unstructured")
    assert (result.parameters[1] < 0.8 * result.parameters[0]) == structured
    assert any("have no tiles" in note for note in result.notes) == (not structured)
    kinds = {type(module).__name__ for module in small.modules()}
    assert ("BlockWiseLinear" in kinds) == (pattern == 5)


@pytest.mark.parametrize("kind", [BertModel, BertForQuestionAnswering])
def test_every_head_can_be_exported_and_runs_in_parts_and_in_bf16(tmp_path, kind, monkeypatch):
    model, masks = masked_model(tmp_path / "masked", PatternSpec(type=8, granularity=16), 60, kind)
    export_sparse(tmp_path / "masked", tmp_path / "out", masks)
    own = getattr(sparse_bert, sparse_bert.CLASSES[kind.__name__][1])
    small = own.from_pretrained(tmp_path / "out").eval()
    monkeypatch.setattr(sparse_bert, "ROWS_AT_ONCE", 25)
    with torch.no_grad():
        wanted, found = (m(IDS, attention_mask=MASK)[0] for m in (model, small))
        close(found, wanted)
        half = small.to(torch.bfloat16)(IDS, attention_mask=MASK)[0].float()
    # bf16 keeps 8 bits; through two layers of LayerNorm'd activations of size about 1.
    assert float((half - wanted).abs().mean()) < 0.05 * float(wanted.abs().mean())


def test_an_export_can_be_copied_and_saved_again(tmp_path):
    model, masks = masked_model(tmp_path / "masked", PatternSpec(type=8, granularity=16), 60)
    export_sparse(tmp_path / "masked", tmp_path / "out", masks)
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    with torch.no_grad():
        wanted = small(IDS).logits  # plans have been made, and travel with nothing
        assert torch.equal(copy.deepcopy(small)(IDS).logits, wanted)
        small.save_pretrained(tmp_path / "again")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
        close(again(IDS).logits, wanted)
        close(wanted, model(IDS).logits)


def test_emptied_units_make_a_smaller_stock_model(tmp_path):
    stem = "bert.encoder.layer.{}.{}.dense.weight"
    changes = {}
    for layer, kept in ((0, 40), (1, 24)):
        first = torch.ones(128, 64, dtype=torch.bool)
        first[kept:] = False  # their outputs are constants, which the next bias must take over
        changes[stem.format(layer, "intermediate")] = first
        second = torch.ones(64, 128, dtype=torch.bool)
        second[:, :4] = False  # nobody reads these
        changes[stem.format(layer, "output")] = second
    model, masks = masked_model(tmp_path / "masked", PatternSpec(type="unstructured"), 0, changes=changes)
    masks = {path: mask if path in changes else torch.ones_like(mask) for path, mask in masks.items()}
    model = BertForSequenceClassification.from_pretrained(tmp_path / "masked").eval()
    result = export_sparse(tmp_path / "masked", tmp_path / "out", masks)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (result.kind, config["model_type"], config["intermediate_size"]) == ("stock", "bert", 36)
    assert "auto_map" not in config and any("zeros pad" in note for note in result.notes)
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        close(small(IDS, attention_mask=MASK).logits, model(IDS, attention_mask=MASK).logits)


def test_heads_are_gone_from_the_sparse_model_and_zeros_in_a_stock_one(tmp_path):
    model, masks = masked_model(tmp_path / "masked", PatternSpec(type=0, granularity=64), 50)
    sparse = export_sparse(tmp_path / "masked", tmp_path / "sparse", masks)
    stock = export_sparse(tmp_path / "masked", tmp_path / "stock", masks, stock=True)
    entry = json.loads((tmp_path / "sparse" / "config.json").read_text())["sparse_layers"][0]
    assert entry["heads"] == 2 and entry["qkv"]["outputs"] == 3 * 2 * 16
    assert "4 of 8 heads are removed" in sparse.notes[0] and "stay as zeros" in stock.notes[0]
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "stock").eval()
    with torch.no_grad():
        close(small(IDS).logits, model(IDS).logits)


def test_dims_of_heads_are_gone_too(tmp_path):
    _, masks = masked_model(tmp_path / "masked", PatternSpec(type=1, granularity=64), 50)
    export_sparse(tmp_path / "masked", tmp_path / "out", masks)
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["sparse_layers"][0]
    assert (entry["heads"], entry["qkv"]["outputs"], entry["scale"]) == (4, 3 * 4 * 8, 0.25)


def test_it_loads_where_cook_is_not_installed(tmp_path):
    model, masks = masked_model(tmp_path / "masked", PatternSpec(type=7, granularity=32), 75)
    export_sparse(tmp_path / "masked", tmp_path / "out", masks)
    code = (
        "import sys, torch\nfrom transformers import AutoModel, AutoModelForSequenceClassification\n"
        "ids = torch.load('ids.pt')\n"
        "model = AutoModelForSequenceClassification.from_pretrained('out', trust_remote_code=True).eval()\n"
        "assert AutoModel.from_pretrained('out', trust_remote_code=True).encoder.layers\n"
        "assert not any(name == 'cook' or name.startswith('cook.') for name in sys.modules)\n"
        "torch.save(model(ids).logits.detach(), 'logits.pt')\n"
    )
    torch.save(IDS, tmp_path / "ids.pt")
    command = [sys.executable, "-W", "ignore", "-c", code]
    subprocess.run(command, cwd=tmp_path, check=True, env={"PATH": "/usr/bin", "HF_HOME": str(tmp_path / "hf")})
    close(torch.load(tmp_path / "logits.pt", weights_only=True), model(IDS).logits.detach())


def test_mistakes_are_the_users(tmp_path):
    _, masks = masked_model(tmp_path / "masked", PatternSpec(type=7, granularity=32), 75)
    path = next(iter(masks))
    with pytest.raises(UserError, match="does not fit"):
        export_sparse(tmp_path / "masked", tmp_path / "out", {path: torch.ones(1, 1)})
    with pytest.raises(UserError, match="overwrite"):
        export_sparse(tmp_path / "masked", tmp_path / "masked", masks)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="not contain a model"):
        export_sparse(tmp_path / "masked", tmp_path / "other", masks)
    config = json.loads((tmp_path / "masked" / "config.json").read_text()) | {"model_type": "gpt2"}
    (tmp_path / "masked" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="gpt2"):
        export_sparse(tmp_path / "masked", tmp_path / "out", masks)
    assert not (tmp_path / "out").exists()


def test_the_stock_auto_class_is_not_enough(tmp_path):
    _, masks = masked_model(tmp_path / "masked", PatternSpec(type=7, granularity=32), 75)
    export_sparse(tmp_path / "masked", tmp_path / "out", masks)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=False)
