"""Types of arguments that several verbs take."""

import argparse
from pathlib import Path


def local_path(text: str) -> Path:
    """A path on this machine. A URL would become a folder named after its scheme, so it is refused."""
    from data_pipeline.text.open_input import is_url

    if is_url(text):
        raise argparse.ArgumentTypeError(
            f"{text} is a URL; give a path of this machine (or of a file system mounted here), and copy what is "
            "written there afterwards")
    return Path(text)
