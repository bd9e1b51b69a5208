"""Preloaded by the fork server once, so that every rank of every case starts with its imports done."""

import contextlib
import gc
import io
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["GLOO_SOCKET_IFNAME"] = "lo"

with contextlib.redirect_stdout(io.StringIO()):
    # matplotlib: the first rank draws its curve with it; its import took half the time of a short run
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401

    import pretrain.commands.train
    import pretrain.training.loop  # noqa: F401

# A collection in a rank would walk the million objects of these imports, and copy their pages out of the server's: half
# a second each, and DeepSpeed asks for one whenever it shards weights.
gc.collect()
gc.freeze()
