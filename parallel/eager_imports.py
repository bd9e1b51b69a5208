"""Imports of libraries without the compiler for which they decorate their functions."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

SWITCH = "TORCHDYNAMO_DISABLE"


@contextmanager
def eager_imports() -> Iterator[None]:
    """While it lasts, `torch.compile` returns the function that it is given, and no warning is shown.

    megatron-core and DeepSpeed decorate functions that nothing here calls. The first decoration imports torch's
    inductor, which took 3 of the 8 seconds of CPU time in which a rank starts. Their warnings at import, that Apex and
    Transformer Engine are absent, are about what nothing here uses.
    """
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "1"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before
