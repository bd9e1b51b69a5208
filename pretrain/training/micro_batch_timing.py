"""Times forward and backward of one micro-batch in a number format.

`python -m pretrain.training.micro_batch_timing CONFIG COMPUTE THREADS [section.key=value ...]` prints the seconds.
`trainyard demo` uses it to choose the format that is faster on this machine, and the number of steps.
"""

from __future__ import annotations

import sys
import time

import torch

from data_pipeline.batch_plan import BatchPlan
from data_pipeline.corruption.noise_seed import NoiseSeed
from data_pipeline.loader import ReadOptions, heldout_batches
from parallel.pipeline_stages import Stage
from parallel.precision import DTYPES
from parallel.single_rank import single_rank
from parallel.tensor_parallel import TensorParallel
from pretrain.config.run_config import RunConfig, load_config
from pretrain.models.build import layer_list
from pretrain.objectives import make_loss, make_stages
from pretrain.training.datasets import open_dataset

WARM_UP, TIMED = 2, 4


def micro_batch_seconds(config: RunConfig, compute: str) -> float:
    """Best time of one forward and backward of the recipe's own data in `compute`, weights in that format, one rank."""
    with single_rank() as groups:
        tp = TensorParallel(groups, torch.device("cpu"))
        specs = layer_list(config.model, tp)
        stage = Stage(specs, (0, len(specs)))
        for parameter in stage.parameters():
            parameter.data.normal_(0.0, 0.02)
        stage.to(DTYPES[compute])
        objective = make_loss(config.objective, config.model, tp)
        dataset = open_dataset(config, config.data.train)
        stages = make_stages(config.objective, config.model, dataset, NoiseSeed(config.run.seed))
        size = config.parallel.micro_batch
        batch = next(heldout_batches(dataset, BatchPlan.heldout(size), ReadOptions(config.window_tokens, stages=stages),
                                     num_samples=size))
        times = []
        for _ in range(WARM_UP + TIMED):
            started = time.perf_counter()
            sum(objective.losses(stage.run(objective.inputs(batch)), objective.targets(batch)).values()).backward()
            times.append(time.perf_counter() - started)
            stage.zero_grad()
        return min(times[WARM_UP:])


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    sys.stdout.write(f"{micro_batch_seconds(load_config(sys.argv[1], sys.argv[4:]), sys.argv[2])}\n")
