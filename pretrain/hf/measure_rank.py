"""One rank of the measurement of `trainyard checkpoint export`, started by it and by nobody else.

`python -m pretrain.hf.measure_rank CKPT INPUTS OUTPUTS DTYPE`: the checkpoint's model on the tensor axis of
all ranks, its outputs for the tensors in INPUTS written to OUTPUTS by rank 0.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import ExitCode
from parallel.ranks.rank_info import RankInfo, read_rank_info
from pretrain.cli import report
from pretrain.config.run_config import config_from


def main(argv: Sequence[str]) -> int:
    """The exit code of this rank."""
    folder, inputs, outputs, dtype = argv
    info = read_rank_info()
    return report(lambda: _measure(info, Path(folder), Path(inputs), Path(outputs), dtype))


def _measure(info: RankInfo, folder: Path, inputs: Path, outputs: Path, dtype: str) -> int:
    from safetensors.torch import load_file, save_file

    from parallel.layout import Layout
    from parallel.precision import DTYPES
    from parallel.process_groups import build_groups, destroy_groups
    from parallel.ranks.rendezvous import join, leave
    from pretrain.checkpoint.reader import Checkpoint
    from pretrain.hf.certificate import training_outputs

    checkpoint = Checkpoint(folder)
    config = config_from(checkpoint.manifest["config"], str(folder))
    join(info)
    try:
        groups = build_groups(Layout(tensor=info.world_size, sequence=config.parallel.sequence))
        found = training_outputs(config.model, groups, checkpoint.read, DTYPES[dtype],
                                 sample=load_file(inputs))
        if info.rank == 0:
            save_file(found, outputs)
    finally:
        destroy_groups()
        leave()
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
