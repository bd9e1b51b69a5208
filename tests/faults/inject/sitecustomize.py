"""Makes one rank of a run fail by itself: Python imports this first where the folder stands in PYTHONPATH.

FAULT_RANK and FAULT_CODE say which rank ends with which code, once the file FAULT_FILE exists.
"""

import os
import sys
import threading
import time

RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")


def _fail() -> None:
    while not os.path.exists(os.environ["FAULT_FILE"]):
        time.sleep(0.02)
    code = int(os.environ["FAULT_CODE"])
    sys.stderr.write(f"Traceback (most recent call last):\nInjectedFault: exit code {code} on purpose\n")
    sys.stderr.flush()
    os._exit(code)


_rank = next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), None)
if "FAULT_FILE" in os.environ and sys.orig_argv[1:4] == ["-m", "pretrain", "train"] \
        and os.environ["FAULT_RANK"] == _rank:
    threading.Thread(target=_fail, daemon=True).start()
