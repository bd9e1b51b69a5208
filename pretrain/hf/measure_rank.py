"""The training side of a certificate on several ranks of this machine: starts them, and is the program of each.

`python -m pretrain.hf.measure_rank CKPT INPUTS OUTPUTS DTYPE` builds the checkpoint's model on the tensor axis of all
ranks and computes its logits for the tensors in the file INPUTS; rank 0 writes them to the file OUTPUTS.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import ConversionError, ExitCode
from launchers.local.ranks_here import run_ranks
from parallel.ranks.rank_info import RankInfo, alone, read_rank_info
from pretrain.config.run_config import config_from
from pretrain.reporting import report

if TYPE_CHECKING:
    from pretrain.models.hf_adapter import Tensors


def outputs_of_ranks(checkpoint: Path, num_ranks: int, sample: "Tensors", dtype: str) -> "Tensors":
    """Logits of a checkpoint's model for a sample, at a tensor degree of `num_ranks`.

    Raises:
        ConversionError: a rank failed.
    """
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory(prefix="trainyard-export-") as folder:
        inputs, outputs = Path(folder, "inputs.safetensors"), Path(folder, "outputs.safetensors")
        save_file(sample, inputs)
        code = run_ranks([sys.executable, "-m", "pretrain.hf.measure_rank", str(checkpoint), str(inputs),
                          str(outputs), dtype], num_ranks, Path(folder))
        if code:
            raise ConversionError(f"{checkpoint}: the training model could not be run on {num_ranks} ranks of this "
                                  "machine to measure it; export with --no-certificate to leave that out")
        return load_file(outputs)


def main(argv: Sequence[str]) -> int:
    """The exit code of this rank."""
    folder, inputs, outputs, dtype = argv
    info = read_rank_info() or alone()
    return report(lambda: _measure(info, Path(folder), Path(inputs), Path(outputs), dtype=dtype))


def _measure(info: RankInfo, folder: Path, inputs: Path, outputs: Path, *, dtype: str) -> int:
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
