"""Expert parallelism as DeepSpeed has to be told of it: the groups, and which parameters are experts."""

from __future__ import annotations

import torch
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups as expert_groups
from torch import nn

from parallel.parameter_plan import plan_of
from parallel.process_groups import Groups


class _ExpertGroups(MoE):
    """Registers the groups of the expert axis with DeepSpeed.

    DeepSpeed looks for experts only in a model that holds a module of its own class. This one has no parameters and is
    never called; DeepSpeed calls `set_deepspeed_parallelism` before it asks for groups.

    DeepSpeed's four tables belong to the process. An entry is found by the expert degree, so engines on the same
    process groups share one and don't disturb each other; an entry of an earlier layout with this degree is replaced.
    """

    def __init__(self, groups: Groups):
        nn.Module.__init__(self)
        self.num_experts = groups.layout.expert  # DeepSpeed keeps it for its own checkpoints
        self.groups = groups

    def set_deepspeed_parallelism(self, *_) -> None:
        name, layout, rank = _expert_group_name(self.groups), self.groups.layout, self.groups.rank
        for table, value in ((expert_groups._EXPERT_PARALLEL_GROUP, self.groups.expert),
                             (expert_groups._EXPERT_PARALLEL_GROUP_RANKS, layout.group("ep", rank)),
                             (expert_groups._EXPERT_DATA_PARALLEL_GROUP, self.groups.expert_data),
                             (expert_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS, layout.group("edp", rank))):
            table[name] = value


def _expert_group_name(groups: Groups) -> str:
    return f"ep_size_{groups.layout.expert}"  # DeepSpeed reads the degree from it


def separate_experts(model: nn.Module, optimizer: torch.optim.Optimizer, groups: Groups) -> None:
    """Mark the experts' parameters as reduced over the expert-data group only, and give them groups of their own."""
    name = _expert_group_name(groups)
    separated = []
    for group in optimizer.param_groups:
        experts = [p for p in group["params"] if plan_of(p).stack]
        for parameter in experts:
            parameter.allreduce, parameter.group_name = False, name
        rest = [p for p in group["params"] if not plan_of(p).stack]
        if rest:
            separated.append({**group, "params": rest})
        if experts:
            separated.append({**group, "params": experts, "moe": True, "name": name})
    if any(group.get("moe") for group in separated):
        model.expert_groups = _ExpertGroups(groups)
        optimizer.param_groups[:] = separated
