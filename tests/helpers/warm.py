"""Preloaded by the fork server once, so that every rank of every case starts with its imports done."""

import contextlib
import io
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["GLOO_SOCKET_IFNAME"] = "lo"

with contextlib.redirect_stdout(io.StringIO()):
    import pretrain.commands.train
    import pretrain.training.loop  # noqa: F401
