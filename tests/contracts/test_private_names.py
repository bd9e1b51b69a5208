"""Names of libraries that are not part of their public interface and that we use: each is still there.

A library may rename them in any release. This test then says which file of ours has to be looked at, before a run says
it in another way. A method or attribute of a class is looked up on the class; an attribute that only instances have is
looked up in the source of the class.
"""

from __future__ import annotations

import ast
import inspect
import re
from importlib import import_module

import pytest

from tests.contracts.test_house_rules import SOURCES, name, tree

ZERO_12 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
ZERO_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
BF16 = "deepspeed.runtime.bf16_optimizer:BF16_Optimizer"
PARTITION = "deepspeed.runtime.zero.partition_parameters:Init"
PIPELINE = "deepspeed.runtime.pipe.module:PipelineModule"
FOLDED = "deepspeed.runtime.pipe.dualpipev:DualPipeVModule"
FRAGMENTS = "deepspeed.utils.tensor_fragment"
USED = {  # file of ours: where the names are defined, and the names
    "parallel/zero/optimizer_state.py": {
        FRAGMENTS: ("_hp_mapping", "_index_in_param_group"),
        f"{FRAGMENTS}:tensor_fragment": ("get_hp_fragment_address", "lp_fragment_address", "param_group_index"),
        ZERO_12: ("_link_all_hp_params", "update_lp_params", "optimizer"),
        BF16: ("_link_all_hp_params", "fp32_groups_gradient_flat_partition", "update_lp_params", "optimizer"),
        ZERO_3: ("fp16_groups", "fp32_partitioned_groups_flat", "averaged_gradients", "offload_optimizer",
                 "persistent_parameters", "_reassign_or_swap_out_partitioned_parameters", "optimizer"),
        PARTITION: ("ds_tensor", "ds_numel", "ds_shape", "ds_status", "ds_persist", "partition_numel", "partition",
                    "all_gather"),
    },
    "parallel/zero/frozen_weights.py": {PARTITION: ("ds_tensor", "ds_numel", "partition_numel")},
    "parallel/zero/engine.py": {
        ZERO_12: ("_use_compact_grad_partition_buffer",),
        PIPELINE: ("_synchronize_tied_weights",),
    },
    "parallel/zero/pipeline_module.py": {
        PIPELINE: ("_partition_layers", "_build", "_set_bounds", "_topo", "_layer_specs", "parts", "global_rank",
                   "tied_modules", "tied_weight_attrs", "forward_funcs", "get_tied_weights_and_groups", "num_stages",
                   "stage_id", "_local_start", "_local_stop"),
        FOLDED: ("phase_bounds", "phase_funcs", "phase_checkpointable", "activate_phase"),
        ZERO_12: ("grad_accum", "ds_pipe_replicated"),
    },
    "parallel/zero/expert_groups.py": {
        "deepspeed.utils.groups": ("_EXPERT_PARALLEL_GROUP", "_EXPERT_PARALLEL_GROUP_RANKS",
                                   "_EXPERT_DATA_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP_RANKS"),
        "deepspeed.moe.layer:MoE": ("set_deepspeed_parallelism", "num_experts"),
        "deepspeed.runtime.engine:DeepSpeedEngine": ("has_moe_layers",),
    },
    "parallel/zero/host_adam.py": {"deepspeed.ops.adam:DeepSpeedCPUAdam": ("ds_opt_adam", "opt_id", "adam_update")},
    "parallel/zero/fused_loss.py": {"deepspeed.sequence.linear_cross_entropy": (
        "vocab_parallel_linear_cross_entropy",)},
    "parallel/tensor_parallel.py": {
        "megatron.core.tensor_parallel:ColumnParallelLinear": ("_forward_impl", "tp_group"),
        "megatron.core.tensor_parallel:RowParallelLinear": ("_forward_impl", "tp_group"),
    },
    "parallel/process_groups.py": {
        "megatron.core.parallel_state": ("get_expert_tensor_model_pipeline_parallel_group",
                                         "get_expert_data_parallel_group", "destroy_global_memory_buffer"),
        "torch.cuda": ("current_device",),  # replaced on machines without CUDA
    },
    "parallel/zero/step_hooks.py": {"torch": ("_foreach_mul_", "_foreach_norm")},
    "parallel/ranks/agreement.py": {"torch.distributed.distributed_c10d": ("_get_default_store",)},
    "parallel/ranks/rendezvous.py": {"torch.distributed.distributed_c10d": ("_get_default_store",
                                                                           "_abort_process_group")},
}
CASES = [(file, owner, found) for file, owners in USED.items() for owner, names in owners.items() for found in names]
# Documented in spite of their looks, or the only names that argparse has for its types.
OF_PYTHON = {"_replace", "_asdict", "_fields", "_exit", "_make", "_SubParsersAction", "_ArgumentGroup"}


@pytest.mark.parametrize(("file", "owner", "found"), CASES, ids=lambda value: value)
def test_the_name_is_still_there(file, owner, found):
    module, _, attribute = owner.partition(":")
    where = import_module(module)
    where = getattr(where, attribute) if attribute else where
    if hasattr(where, found):
        return
    sources = [inspect.getsource(kind) for kind in where.__mro__[:-1] if kind.__module__.split(".")[0] != "torch"] \
        if inspect.isclass(where) else [inspect.getsource(where)]
    assert any(re.search(rf"\b{found}\b", source) for source in sources), \
        f"{owner} has no {found} any more; {file} depends on it"


def test_every_private_name_of_a_library_is_in_the_table():
    """A name with an underscore that nothing of ours defines belongs to somebody else."""
    defined: set[str] = set(OF_PYTHON)
    used: dict[str, set[str]] = {}
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                is_own = isinstance(node.value, ast.Name) and node.value.id == "self"
                if isinstance(node.ctx, ast.Store) and is_own:
                    defined.add(node.attr)
                else:
                    used.setdefault(node.attr, set()).add(name(path))
    told = {(file, found) for file, _, found in CASES}
    missing = [f"{file}: {found}" for found, files in used.items() for file in files
               if found not in defined and (file, found) not in told]
    assert not missing, "private names of libraries that the table does not have:\n" + "\n".join(sorted(missing))
