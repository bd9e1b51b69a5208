"""What this machine says to a job before it is started."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from launchers import machine_check
from launchers.job import Job
from launchers.run_folder.run_lock import RunLock
from parallel.ranks.rank_info import alone

JOB = Job(name="tiny", config=Path("/data/tiny.yaml"), folder=Path("/runs/tiny"), work_dir=Path("/srv"),
          python="python", ranks_per_node=2)


def problems(job=JOB, folders=(), nodes=(), starts_here=True):
    return [problem.where for problem in machine_check.problems(job, folders, nodes, starts_here)]


def test_a_free_port_and_one_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.listen()
        on_taken = replace(JOB, master_port=port, master_address="127.0.0.1")
        assert problems(on_taken) == ["--master-port"]
        assert problems(on_taken, starts_here=False) == []  # a scheduler's nodes are not this machine
        assert problems(replace(on_taken, node_rank=1, nodes=2)) == []  # the first node opens it
        assert problems(replace(on_taken, elastic="1:2")) == []  # another agent of the job may hold it
        assert problems(replace(on_taken, master_address="192.0.2.1")) == []  # another machine's
    assert problems(on_taken) == []


def test_a_locked_run_folder(tmp_path):
    with RunLock(tmp_path, alone()):
        assert problems(folders=[tmp_path]) == ["run.dir"]
        by_hand = replace(JOB, nodes=2, node_rank=1, master_address="127.0.0.1", master_port=1)
        assert problems(by_hand, folders=[tmp_path]) == []  # node 0 of the same job may have begun
    assert problems(folders=[tmp_path]) == []


def test_nodes_have_addresses():
    assert problems(nodes=["localhost", "no-such-host.invalid"]) == ["--hostfile"]


@pytest.mark.parametrize(("devices", "expected"), [(None, []), (0, []), (1, ["--ranks-per-node"]), (2, [])])
def test_more_ranks_than_devices(monkeypatch, devices, expected):
    monkeypatch.setattr(machine_check, "devices_here", lambda: devices)
    assert problems() == expected
