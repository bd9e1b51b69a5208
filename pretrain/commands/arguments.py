"""Types of arguments that several verbs take."""

import argparse
import re
from pathlib import Path


def local_path(text: str) -> Path:
    """A path on this machine. A URL would become a folder named after its scheme, so it is refused."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*(::|://)", text):
        raise argparse.ArgumentTypeError(
            f"{text} is a URL; give a path of this machine (or of a file system mounted here), and copy what is "
            "written there afterwards")
    return Path(text)
