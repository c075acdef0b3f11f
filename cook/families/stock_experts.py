"""The stock class that holds some models with experts exactly, so that they need no modeling file.

Router and experts of GLM-4 MoE compute what those of `cook.models.cook_experts` compute if a token uses one routed
expert: its normalised weight is then 1. With several, stock routers weigh the experts by their scores, and no stock
class has weights of 1. Attention is that of Llama, Qwen2 or Qwen3, as its fields say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from cook.families.stock_models import config_object, is_ragged
from cook.pruning.family import Experts, ModelConfig

TARGET, TARGET_CLASS = "glm4_moe", "Glm4MoeForCausalLM"
COMMON = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps use_cache tie_word_embeddings attention_dropout "
    "bos_token_id eos_token_id pad_token_id"
).split()
"""Fields with the same meaning in both configs."""


def stock_config_of(config: ModelConfig) -> dict[str, Any] | None:
    """The config of the stock class that holds a model with experts; None if no class does."""
    if not is_ragged(config) or config["stock_type"] not in ("llama", "mistral", "qwen2", "qwen3"):
        return None
    made, structure = config_object(config), config["structure"]
    experts: Experts = structure.get("experts", {})
    changed = any(value for name, value in structure.items() if name != "experts")
    layers = sorted(int(path.split(".")[2]) for path in experts)
    entries = [{k: v for k, v in entry.items() if k not in ("ins", "out")} for entry in experts.values()]
    one = entries[0] if entries else {}
    fits = (
        not changed
        and bool(entries)
        and all(entry == one for entry in entries)
        and layers == list(range(layers[0], made.num_hidden_layers))
        and one["active"] == 1
        and one["routed"] > 1
        and one["size"] % 8 == 0  # transformers' grouped products want rows of whole 16 bytes
        and one["shared"] >= one["size"]
        and one["shared"] % one["size"] == 0
        and made.hidden_act == "silu"
        and not getattr(made, "mlp_bias", False)
        and not getattr(made, "attention_bias", False)
        and set(getattr(made, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and (config["stock_type"] != "mistral" or made.sliding_window is None)
    )
    if not fits:
        return None
    rope = dict(made.rope_parameters or {})
    return {name: getattr(made, name, None) for name in COMMON} | {
        "model_type": TARGET,
        "architectures": [TARGET_CLASS],
        "head_dim": getattr(made, "head_dim", None) or made.hidden_size // made.num_attention_heads,
        "rope_parameters": rope | {"partial_rotary_factor": 1.0},
        "attention_bias": config["stock_type"] == "qwen2",
        "use_qk_norm": config["stock_type"] == "qwen3",
        "first_k_dense_replace": layers[0],
        "moe_intermediate_size": one["size"],
        "n_shared_experts": one["shared"] // one["size"],
        "n_routed_experts": one["routed"],
        "num_experts_per_tok": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
    }


def stock_tensors(config: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a model with experts under the names in the files of the stock class."""
    experts: Experts = config["structure"]["experts"]
    blocks = {path.rpartition(".")[0]: entry for path, entry in experts.items()}
    for name, tensor in tensors.items():
        block, _, rest = name.partition(".mlp.")
        entry = blocks.get(f"{block}.mlp")
        if entry is None:
            yield name, tensor
        elif rest == "router.weight":
            yield f"{block}.mlp.gate.weight", tensor
        elif rest == "router.bias":
            yield f"{block}.mlp.gate.e_score_correction_bias", tensor.float()
        else:
            dim = 1 if rest == "down_proj.weight" else 0
            shared, *routed = tensor.split([entry["shared"], *[entry["size"]] * entry["routed"]], dim)
            yield f"{block}.mlp.shared_experts.{rest}", shared.contiguous()
            for number, part in enumerate(routed):
                yield f"{block}.mlp.experts.{number}.{rest}", part.contiguous()
