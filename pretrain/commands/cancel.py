"""`trainyard cancel`: ends the jobs of a run."""

import argparse
import sys

from common.errors import UserError
from common.files import writing
from launchers.run_folder.stop_requests import STOP
from launchers.slurm_control import cancel
from launchers.slurm_jobs import job_ids_of
from pretrain.commands.status import folder_of


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("cancel", help="end the jobs of a run", allow_abbrev=False,
                                   description="Ends the Slurm jobs of a run; a running one saves if it has the time.")
    parser.add_argument("target", metavar="RUN", help="run folder, or the config of the run")


def run(args: argparse.Namespace) -> int:
    """Cancels the jobs. Raises UserError when no job is known or Slurm refuses."""
    folder = folder_of(args.target)
    job_ids = job_ids_of(folder)
    if not job_ids:
        with writing(folder):
            (folder / STOP).touch()
        raise UserError(f"{folder}: no Slurm job is known here. The file {STOP} was made there instead: a run that "
                        "still writes this folder saves and ends after its present step")
    for job_id in job_ids:
        cancel(job_id)
        sys.stdout.write(f"cancelled job {job_id}\n")
    return 0
