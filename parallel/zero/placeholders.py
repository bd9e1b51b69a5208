"""Parameters that nothing computes with, for the groups of an optimizer that a pipeline stage would leave empty.

DeepSpeed's ZeRO optimizer takes a gradient norm for each parameter group, each with a collective over the stages. A
stage with fewer groups than another (all its parameters are frozen, or it has no experts) would leave the others
waiting; and no optimizer of DeepSpeed takes an empty group.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.distributed as dist
from torch import nn

from parallel.parameter_plan import Stack, plan_of, plan_parameter, planned
from parallel.pipeline_stages import Stage
from parallel.process_groups import Groups

KINDS = tuple(product((False, True), (False, True)))  # without weight decay, of experts spread over ranks


def trained_parameters(stage: Stage, groups: Groups, device: torch.device) -> list[tuple[str, nn.Parameter]]:
    """(global name, parameter) of what the optimizer of this stage gets: no frozen parameters, and a placeholder for
    each kind of parameter that only other stages have. A collective of the pipeline group.
    """
    named = [(name, parameter) for name, parameter in stage.named_global_parameters() if parameter.requires_grad]
    if groups.layout.pipeline == 1:
        return named
    here = {(planned(parameter).no_decay, bool(plan_of(parameter).stack) and groups.layout.expert > 1)
            for _, parameter in named}
    anywhere = torch.tensor([int(kind in here) for kind in KINDS], device=device)
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX, group=groups.pipeline)  # pipeline group: all stages of a model
    stage.placeholders = nn.ParameterList()
    for kind, is_somewhere in zip(KINDS, anywhere.tolist(), strict=True):
        if is_somewhere and kind not in here:
            stage.placeholders.append(_placeholder(*kind, device))
            named.append((f"placeholder.{len(stage.placeholders)}", stage.placeholders[-1]))
    return named


def _placeholder(no_decay: bool, is_expert: bool, device: torch.device) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(1, device=device))
    plan_parameter(parameter, no_decay=no_decay, stack=Stack("", range(1)) if is_expert else None)
    return parameter
