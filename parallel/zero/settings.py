"""DeepSpeed's configuration for a layout, with every key that matters written out.

DeepSpeed's defaults are not ours: it clips at 1.0 when nothing is said and accepts unknown keys.
"""

from __future__ import annotations

from parallel.config import ParallelConfig, PrecisionConfig
from parallel.layout import Layout

BUCKET_ELEMENTS = 500_000_000  # largest bucket in which gradients are exchanged


def deepspeed_config(
    parallel: ParallelConfig, precision: PrecisionConfig, layout: Layout, on_accelerator: bool
) -> dict:
    """The whole DeepSpeed configuration of a run; gradient clipping is off because parallel/engine.py owns it."""
    sharded = parallel.zero_stage > 0
    half = precision.compute if sharded else "fp32"  # at stage 0 bf16 is cast on use, see parallel/precision.py
    return {
        "train_micro_batch_size_per_gpu": parallel.micro_batch,
        "gradient_accumulation_steps": parallel.global_batch // (parallel.micro_batch * layout.data),
        # its ranks of data are our replicas, which count a sample once on each context rank
        "train_batch_size": parallel.global_batch * layout.context,
        "gradient_clipping": 0.0,
        "prescale_gradients": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": False,
        "communication_data_type": precision.compute if precision.reduce == "compute" else "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": half == "bf16", "immediate_grad_update": True},
        "fp16": {
            "enabled": half == "fp16",
            "loss_scale": 0,
            "initial_scale_power": precision.initial_scale_power,
            "loss_scale_window": precision.scale_window,
            "hysteresis": 1,
            "min_loss_scale": 1,
        },
        "zero_optimization": {
            **_offload(parallel.offload, on_accelerator),
            "stage": parallel.zero_stage,
            "overlap_comm": on_accelerator and parallel.zero_stage >= 2,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "round_robin_gradients": False,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "sub_group_size": 1_000_000_000,
        },
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False, "activation_checkpoint_interval": 0},
        "activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False},
        "tensorboard": {"enabled": False},
        "flops_profiler": {"enabled": False},
        "comms_logger": {"enabled": False},
    }


def _offload(what: str, on_accelerator: bool) -> dict:
    """What of the states lies in host memory, pinned where an accelerator copies from it."""
    host = {"device": "cpu", "pin_memory": on_accelerator}
    sections = {"none": (), "optimizer": ("offload_optimizer",), "parameters": ("offload_optimizer", "offload_param")}
    return dict.fromkeys(sections[what], host)
