"""What offload needs of a machine, and optimizer state in files of a local disk where host memory is too small."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import cpp_extension

from common.errors import NoRoom
from parallel.config import ParallelConfig


def lacking_for_offload(parallel: ParallelConfig, device_type: str) -> str | None:
    """What this machine has not got for offload as asked, and what to do; None when nothing is missing."""
    what = parallel.offload
    if what == "none":
        return None
    if what == "parameters" and device_type == "cpu":
        return ("parallel.offload=parameters needs an accelerator: it moves weights out of device memory, and here "
                "they are in host memory already. Set parallel.offload=optimizer or none")
    compiler = cpp_extension.get_cxx_compiler()
    missing = [] if shutil.which(compiler) else [f"the C++ compiler {compiler}"]
    missing += [] if cpp_extension.is_ninja_available() else ["ninja"]
    if missing:
        return (f"parallel.offload={what} steps with DeepSpeed's Adam for the CPU, which is compiled on the machine, "
                f"and {' and '.join(missing)} cannot be found: install it (Debian: apt-get install g++ ninja-build; "
                "another compiler by the variable CXX), or set parallel.offload=none")
    folder = parallel.offload_folder
    if folder and not (Path(folder).is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        return (f"parallel.offload_folder={folder} is not a folder that this process may write to: name one on a local "
                "disk of every node (NVMe), or leave it empty to keep the optimizer in host memory")
    return None


class MappedFiles:
    """Tensors whose memory is a file: the kernel writes them to the disk and reads them back as room requires.

    A file has no name from the moment it is mapped, so that its room is free again however the process ends.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def zeros_like(self, tensor: Tensor) -> Tensor:
        """Raises NoRoom when the disk is full: better now than by SIGBUS at the first write."""
        num_bytes = max(1, tensor.numel()) * tensor.element_size()
        try:
            with tempfile.NamedTemporaryFile(prefix="trainyard-", suffix=".optimizer", dir=self.folder) as file:
                os.posix_fallocate(file.fileno(), 0, num_bytes)
                mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
                return mapped.view(tensor.shape)
        except OSError as error:
            raise NoRoom(f"parallel.offload_folder={self.folder}: {num_bytes / 1e9:.1f} GB more for this rank's "
                         f"optimizer: {error.strerror}; it takes 12 bytes for each parameter of the share. Make room, "
                         "name another folder, or use more data ranks") from None
