"""Preloaded by the fork server once, so that every rank of every case starts with its imports done."""

import contextlib
import gc
import importlib
import io
import os
import pkgutil

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["GLOO_SOCKET_IFNAME"] = "lo"

with contextlib.redirect_stdout(io.StringIO()):
    # matplotlib: the first rank draws its curve with it; its import took half the time of a short run
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    from PIL import Image

    import data_pipeline
    import parallel
    import pretrain

    Image.init()
    for room in (data_pipeline, parallel, pretrain):
        for module in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    # DeepSpeed loads these when an engine starts
    for name in ("module_inject.auto_ep_layer", "ops.op_builder.all_ops"):
        importlib.import_module(f"deepspeed.{name}")

# A collection in a rank would walk the million objects of these imports, and copy their pages out of the server's: half
# a second each, and DeepSpeed asks for one whenever it shards weights.
gc.collect()
gc.freeze()
