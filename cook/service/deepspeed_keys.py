"""The keys of a DeepSpeed configuration that a submission may set: none of them names a file or a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cook.base.errors import UserError

ANY = "*"
_OFFLOAD = ("device", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu", "pipeline_read", "pipeline_write")
_FP16 = (
    "enabled",
    "auto_cast",
    "loss_scale",
    "initial_scale_power",
    "loss_scale_window",
    "hysteresis",
    "consecutive_hysteresis",
    "min_loss_scale",
    "fp16_master_weights_and_grads",
)
_BF16 = ("enabled", "immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads")
_ZERO = (
    "stage",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "use_multi_rank_bucket_allreduce",
    "allgather_partitions",
    "allgather_bucket_size",
    "overlap_comm",
    "compute_grad_norm",
    "sub_group_size",
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "model_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_gather_16bit_weights_on_model_save",
    "gather_16bit_weights_on_model_save",
    "module_granularity_threshold",
    "use_all_reduce_for_fetch_params",
    "stage3_use_all_reduce_for_fetch_params",
    "allgather_sequential",
    "ignore_unused_parameters",
    "round_robin_gradients",
    "parameter_alignment",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
    "memory_efficient_linear",
    "override_module_apply",
)
_TOP = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "gradient_predivide_factor",
    "prescale_gradients",
    "communication_data_type",
    "seq_parallel_communication_data_type",
    "steps_per_print",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "disable_allgather",
    "sparse_gradients",
    "wall_clock_breakdown",
    "memory_breakdown",
)
Allowed = Mapping[str, Any]
"""Allowed keys. The value is None for a plain value, or the allowed keys of an object."""
ALLOWED: Allowed = {
    **dict.fromkeys(_TOP),
    "optimizer": {"type": None, "params": {ANY: None}, "legacy_fusion": None},
    "scheduler": {"type": None, "params": {ANY: None}},
    "fp16": dict.fromkeys(_FP16),
    "bf16": dict.fromkeys(_BF16),
    "data_types": {"grad_accum_dtype": None, "param_dtype": None},
    "zero_optimization": {
        **dict.fromkeys(_ZERO),
        "offload_param": dict.fromkeys(_OFFLOAD),
        "offload_optimizer": dict.fromkeys((*_OFFLOAD, "fast_init", "ratio")),
    },
}
DEVICES = ("none", "cpu")


def refused_keys(config: Mapping[str, Any]) -> Iterator[UserError]:
    """Yields an error for every key of a DeepSpeed configuration that a submission must not set."""
    yield from _refused(config, ALLOWED, "deepspeed")
    zero = config.get("zero_optimization")
    if not isinstance(zero, dict):
        return
    for key in ("offload_param", "offload_optimizer"):
        offload = zero.get(key)
        device = offload.get("device", "none") if isinstance(offload, dict) else "none"
        if device not in DEVICES:
            where = f"deepspeed.zero_optimization.{key}.device"
            yield UserError(f"{where}: a service does not offload to files", wanted=" or ".join(DEVICES), got=device)


def _refused(value: Mapping[str, Any], allowed: Allowed, place: str) -> Iterator[UserError]:
    for key, entry in value.items():
        where = f"{place}.{key}"
        if key not in allowed and ANY not in allowed:
            yield UserError(
                f"{where}: a service does not accept this key, which may name or write files",
                wanted="one of " + ", ".join(sorted(allowed)),
                remedy="remove it",
            )
            continue
        below = allowed.get(key)
        if isinstance(entry, dict):
            if below is None:
                yield UserError(f"{where}: not a plain value", got="an object")
            else:
                yield from _refused(entry, below, where)
