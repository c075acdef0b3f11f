"""Values of the model, the corpus, the batch and DeepSpeed that must fit one another."""

from __future__ import annotations

import json

import pytest


def test_a_model_needs_a_source(errors_of, bmcook):
    bmcook["model"] = {"type": "cpm_ant"}
    assert errors_of()[0].startswith("model: neither config nor path")


def test_a_pt_file_needs_its_description(errors_of, bmcook, elsewhere):
    (elsewhere / "m.pt").write_text("x")
    bmcook["model"] = {"type": "cpm_ant", "path": "m.pt"}
    assert errors_of()[0].startswith("model.config: a .pt file does not describe")


def test_mask_modules_has_a_pair_a_layer(errors_of, load):
    assert load("model.config.mask_modules=[[false, false], [true, false]]")
    assert "mask_modules: wrong number of layers" in errors_of("model.config.mask_modules=[[false, false]]")[0]


def test_the_tokenizer_fits_the_model(errors_of, load):
    assert load("tokenizer.vocab_size=100")
    assert "at most 128" in errors_of("tokenizer.vocab_size=129")[0]
    assert errors_of("tokenizer.type=hf")[0].startswith("tokenizer.path: missing")


def test_a_row_holds_more_than_the_prompt(errors_of, load):
    assert load("data.max_length=5")
    assert "more than 4" in errors_of("data.max_length=4")[0]


@pytest.mark.parametrize(
    "micro, world_size, fits",
    [
        (2, None, True),
        (3, None, False),
        (2, 4, True),
        (2, 3, False),
        (8, 1, True),
        (8, 2, True),
        (8, 16, False),
        (1, 8, True),
    ],
)
def test_the_batch_is_whole(errors_of, load, micro, world_size, fits):
    setting = f"training.micro_batch_size={micro}"  # train_batch_size is 8
    if fits:
        load(setting, world_size=world_size)
    else:
        [message] = errors_of(setting, world_size=world_size)
        assert "train_batch_size = micro_batch_size × accumulation steps × ranks" in message


def test_the_batch_error_explains_itself(errors_of):
    [message] = errors_of("training.train_batch_size=20", world_size=4)
    assert "a multiple of micro_batch_size 2 × 4 ranks = 8" in message and "set it to 16 or 24," in message
    [message] = errors_of("training.train_batch_size=3", world_size=4)
    assert "set it to 4," in message


def test_a_rank_holds_no_more_than_its_share(load):
    training = load("training.micro_batch_size=8", world_size=4).training  # train_batch_size is 8
    assert [training.rows_at_once(world) for world in (1, 2, 4, 8)] == [8, 4, 2, 1]


def test_a_micro_batch_that_is_searched_for_begins_with_a_ranks_share(load, errors_of):
    training = load("training.micro_batch_size=auto", world_size=4).training
    assert [training.rows_at_once(world) for world in (1, 2, 4, 8)] == [8, 4, 2, 1]
    [message] = errors_of("training.micro_batch_size=all")
    assert 'an integer from 1 to 1000000000, or "auto"' in message
    # What is not known yet cannot be equal to a number of DeepSpeed's.
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        [message] = errors_of("training.micro_batch_size=auto", f"deepspeed.{key}=1", world_size=2)
        assert key in message and '"auto"' in message


def test_a_stage_has_a_batch_of_its_own(errors_of):
    [message] = errors_of("stages.att_mask.training.micro_batch_size=5")
    assert message.startswith("stages.att_mask.training.train_batch_size: ")


@pytest.mark.parametrize(
    "setting, fits",
    [
        ("train_batch_size=8", True),
        ("train_batch_size=16", False),
        ("train_batch_size=auto", True),
        ("train_batch_size=many", False),
        ("train_batch_size=true", False),
        ("train_micro_batch_size_per_gpu=2", True),
        ("train_micro_batch_size_per_gpu=4", False),
        ("gradient_accumulation_steps=2", True),  # on two ranks: 8 = 2 × 2 × 2
        ("gradient_accumulation_steps=4", False),
        ("gradient_accumulation_steps=0", False),
        ("gradient_accumulation_steps=null", False),
        ("gradient_accumulation_steps=true", False),
        ("gradient_clipping=1", True),
        ("gradient_clipping=0.5", False),
        ("optimizer.params.lr=0.01", True),
        ("optimizer.params.lr=0.02", False),
        ("optimizer.params.lr=auto", True),
        ("optimizer.params.weight_decay=0.1", False),
        ("zero_optimization.stage=3", True),
        ("zero_optimization=3", False),
        ("bf16=true", False),
        ("bf16.enabled=auto", True),
        ("bf16.enabled=true", True),
        ("bf16.enabled=yes", False),
        ("monitor_config.anything.deeper=1", True),
        ("zero_optimization.compute_grad_norm=false", False),
        ("zero_optimization.compute_grad_norm=true", True),
        ("zero_optimization.load_from_fp32_weights=false", False),
        ("zero_optimization.elastic_checkpoint=true", False),
        ("checkpoint.use_node_local_storage=true", False),
    ],
)
def test_deepspeed_says_the_same(errors_of, load, setting, fits):
    if fits:
        load(f"deepspeed.{setting}", world_size=2)
    else:
        [message] = errors_of(f"deepspeed.{setting}", world_size=2)
        assert f"deepspeed.{setting.partition('=')[0]}" in message


def test_accumulation_without_the_number_of_ranks(errors_of, load):
    load("deepspeed.gradient_accumulation_steps=4")
    assert len(errors_of("deepspeed.gradient_accumulation_steps=3")) == 1


def test_deepspeeds_numbers_hold_for_every_stage(errors_of):
    [message] = errors_of("deepspeed.optimizer.params.lr=0.01", "stages.att_mask.training.learning_rate=0.5")
    assert "differs from stages.att_mask.training.learning_rate" in message


@pytest.mark.parametrize(
    "precision, bf16, fp16, fits",
    [
        ("auto", "true", "auto", True),
        ("auto", "true", "true", False),
        ("fp32", "true", "auto", False),
        ("fp32", "false", "false", True),
        ("bf16", "true", "false", True),
        ("bf16", "false", "auto", False),
        ("bf16", "auto", "true", False),
        ("fp16", "auto", "true", True),
    ],
)
def test_precision(errors_of, load, precision, bf16, fp16, fits):
    settings = f"training.precision={precision}", f"deepspeed.bf16.enabled={bf16}", f"deepspeed.fp16.enabled={fp16}"
    if fits:
        load(*settings)
    else:
        assert len(errors_of(*settings)) == 1


def test_a_hugging_face_model_is_a_folder(errors_of, load, bmcook, elsewhere):
    for model in ({"type": "hf"}, {"type": "hf", "path": "m.pt"}):
        bmcook["model"] = model
        assert any(error.startswith("model.path: missing") for error in errors_of())
    (elsewhere / "model").mkdir()
    sizes = {"vocab_size": 128, "num_attention_heads": 4, "intermediate_size": 48}
    (elsewhere / "model" / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    bmcook["model"] = {"type": "hf", "path": "model"}
    bmcook["tokenizer"]["path"] = None
    assert any("newly trained" in error for error in errors_of())
    (elsewhere / "own.model").write_bytes(b"")
    bmcook["tokenizer"]["path"] = "own.model"
    positions = {"model_type": "llama", **sizes, "max_position_embeddings": 8}
    (elsewhere / "model" / "config.json").write_text(json.dumps(positions))
    assert any(error.startswith("data.max_length: more than the model's number of positions") for error in errors_of())
    (elsewhere / "model" / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    assert load("fine-grained.coarse_mask=null", "stages=[]").model.type == "hf"
    assert "at most 128" in errors_of("tokenizer.vocab_size=129")[0]
    assert "dim_ff: differs from the model" in errors_of("fine-grained.dim_ff=40")[0]


def test_a_hugging_face_models_folder_describes_it(errors_of, bmcook, elsewhere):
    (elsewhere / "model").mkdir()
    (elsewhere / "model" / "config.json").write_text('{"model_type": "llama"}')
    bmcook["model"] |= {"type": "hf", "path": "model"}
    assert any(error.startswith("model.config: the folder of a Hugging Face") for error in errors_of())


PAIR = '["[pre]a:[post]b"]'


@pytest.mark.parametrize(
    "settings, said",
    [
        ([], "ce_scale, mse_hidn_scale and mse_att_scale are all 0"),
        (["distillation.mse_hidn_scale=1"], "mse_hidn_scale and mse_hidn_module must be given together"),
        (["distillation.mse_att_scale=1"], "mse_att_scale and mse_att_module must be given together"),
        (["distillation.ce_scale=1", f"distillation.mse_hidn_module={PAIR}"], "must be given together"),
        (["distillation.ce_scale=1", f"distillation.mse_att_module={PAIR}"], "must be given together"),
        (["distillation.ce_scale=1", 'distillation.mse_hidn_module=["a:b"]'], "wrong value at"),
        (["distillation.ce_scale=1", "distillation.ce_temp=0"], "wrong value at"),
        (["distillation.ce_scale=1", "distillation.mse_hidn_proj=true"], "no hidden states are compared"),
        (["distillation.ce_scale=1", "distillation.teacher_device=disk"], "wrong value at"),
        (["distillation.ce_scale=1", 'distillation.stages=["pretrain"]'], "wrong value at"),
        (["distillation.ce_scale=1", 'distillation.stages=["ffn_mask"]'], "ffn_mask is not a stage of the recipe"),
    ],
)
def test_distillation(errors_of, bmcook, settings, said):
    bmcook["distillation"] = {"teacher": "results/tiny/dense"}
    [message] = errors_of(*settings)
    assert said in message


def test_all_mistakes_at_once(errors_of, bmcook):
    bmcook["distillation"] = {
        "teacher": "self",
        "teacher_device": "cpu",
        "stages": ["ffn_mask", "att_mask"],
        "mse_att_module": ["[pre]a:[pre]a"],
        "mse_hidn_proj": True,
    }
    said = (
        "are all 0",
        "mse_att_scale and",
        "no hidden states",
        "not a stage of the recipe",
        "no weights of its own",
        "stay fixed",
    )
    messages = errors_of()
    assert len(messages) == len(said) and all(words in m for words, m in zip(said, messages, strict=True))


FROZEN = {"train_weights": False}


@pytest.mark.parametrize(
    "stages, named, unfit",
    [
        ([("pretrain", {}), ("layer_mask", FROZEN), ("att_mask", FROZEN)], [], None),
        (
            [("pretrain", {}), ("layer_mask", FROZEN), ("layer_finetune", {}), ("att_mask", FROZEN)],
            ["layer_mask", "att_mask"],
            None,
        ),
        ([("pretrain", {}), ("layer_mask", FROZEN), ("layer_finetune", {})], [], "layer_finetune (it learns no mask)"),
        ([("layer_mask", FROZEN), ("att_mask", {})], [], "att_mask (it trains weights)"),
        ([("layer_mask", FROZEN), ("att_mask", {})], ["layer_mask"], None),
        ([], [], "layer_mask (it trains weights)"),
    ],
)
def test_a_model_teaches_itself_only_while_its_weights_stand_still(load, errors_of, bmcook, stages, named, unfit):
    bmcook["distillation"] = {"teacher": "self", "ce_scale": 1, "stages": named}
    bmcook["pruning"]["mask_method"] = "coarse-grained"
    bmcook["model"]["path"] = None
    bmcook["stages"] = [{"name": name, "training": training} for name, training in stages]
    if unfit is None:
        assert load().distillation.teacher == "self"
    else:
        [message] = errors_of()
        assert "the teacher would change with the student" in message and f"got:    {unfit}" in message


@pytest.mark.parametrize("target, fits", [([0.8, 0.5], True), (0.5, False)])
def test_the_largest_of_several_sizes_may_teach_while_weights_are_trained(
    load, errors_of, bmcook, scheme, target, fits
):
    bmcook["distillation"] = {"teacher": "self", "ce_scale": 1}
    bmcook["pruning"]["mask_method"], bmcook["model"]["path"] = "joint", None
    bmcook["stages"] = [{"name": name} for name in ("pretrain", "joint_mask", "joint_finetune")]
    scheme["joint"] = {"train_mask": True, "scope": "global", "target_params": target}
    if fits:
        assert load().distillation.teacher == "self"
    else:
        [message] = errors_of()
        assert "joint_mask (it trains weights), joint_finetune (it learns no mask)" in message


def test_frozen_weights_of_the_one_stage_that_is_described(load, bmcook):
    bmcook["distillation"], bmcook["stages"] = {"teacher": "self", "ce_scale": 1}, []
    bmcook["pruning"]["mask_method"] = "coarse-grained"
    assert load("training.train_weights=false").distillation.teacher == "self"
