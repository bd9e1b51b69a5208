"""Process groups of a layout: built by megatron-core, checked against the layout's own arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from parallel.eager_imports import eager_imports
from parallel.layout import Layout

with eager_imports():
    from megatron.core import parallel_state


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The process groups of this rank, one per axis, as megatron-core built them and `Layout` predicts them."""

    layout: Layout
    rank: int
    tensor: dist.ProcessGroup
    context: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    data: dist.ProcessGroup
    expert: dist.ProcessGroup  # ep: data ranks that together hold every expert of a layer once
    expert_data: dist.ProcessGroup  # edp: data ranks that hold the same experts
    model: dist.ProcessGroup  # tp x ep x pp: everybody who holds a part of one model replica
    replicas: dist.ProcessGroup  # cp x dp: everybody who holds the same part of the model

    @property
    def coordinates(self):
        return self.layout.coordinates(self.rank)

    @property
    def replica(self) -> int:
        """This rank's place among those that hold the same weights."""
        return self.layout.replica(self.rank)


def answer_for_cuda() -> None:
    """Let megatron-core's questions for the current CUDA device be answered where there is none.

    Its regions allocate on `torch.cuda.current_device()`, also for gloo. With no CUDA the right answer is the CPU; this
    one line saves a second implementation of its layers.
    """
    if not torch.cuda.is_available():
        # torch declares a number; megatron-core passes the answer on as a device.
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]


def build_groups(layout: Layout, timeout_seconds: float = 1800.0) -> Groups:
    """Create every axis's group and check them against the layout's own arithmetic.

    Args:
        timeout_seconds: how long a collective on one of them may take.

    Raises:
        RuntimeError: megatron-core places a rank in another group than `Layout` says (an internal error).
    """
    answer_for_cuda()
    rank = dist.get_rank()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout_seconds / 60,
    )
    groups = Groups(
        layout=layout,
        rank=rank,
        tensor=parallel_state.get_tensor_model_parallel_group(),
        context=parallel_state.get_context_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        data=parallel_state.get_data_parallel_group(),
        expert=parallel_state.get_expert_model_parallel_group(),
        expert_data=parallel_state.get_expert_data_parallel_group(),
        model=parallel_state.get_expert_tensor_model_pipeline_parallel_group(),
        replicas=parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
    for axis, group in (("tp", groups.tensor), ("cp", groups.context), ("pp", groups.pipeline), ("dp", groups.data),
                        ("ep", groups.expert), ("edp", groups.expert_data), ("model", groups.model),
                        ("replicas", groups.replicas)):
        expected, found = layout.group(axis, rank), dist.get_process_group_ranks(group)
        if sorted(expected) != sorted(found):
            raise RuntimeError(f"rank {rank}: axis {axis} should hold ranks {expected}, megatron-core built {found}")
    return groups


def destroy_groups() -> None:
    """Forget every group, so that another layout can be built in the same process."""
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_global_memory_buffer()


class Units:
    """The model-parallel unit (`mpu`) that DeepSpeed asks for groups, answered by megatron-core under its names.

    What DeepSpeed calls data parallel are the ranks that hold the same weights, so the context axis is part of it.
    """

    get_data_parallel_group = staticmethod(partial(parallel_state.get_data_parallel_group, True))
    get_data_parallel_world_size = staticmethod(partial(parallel_state.get_data_parallel_world_size, True))
    get_data_parallel_rank = staticmethod(partial(parallel_state.get_data_parallel_rank, True))
    get_data_parallel_src_rank = staticmethod(partial(parallel_state.get_data_parallel_src_rank, True))

    def __getattr__(self, name: str):
        return getattr(parallel_state, name.replace("get_model_parallel", "get_tensor_model_parallel"))
