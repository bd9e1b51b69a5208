"""Ranks find each other and part: with real gloo ranks, and every way in which they do not."""

import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from parallel.ranks.rank_info import RankInfo, process_environment
from parallel.ranks.rendezvous import RendezvousError, join

ROOT = Path(__file__).resolve().parents[3]
RANK = """
import os, sys
from parallel.ranks.rank_info import alone, read_rank_info
from parallel.ranks.rendezvous import join, leave
info = read_rank_info() or alone()
join(info, 60, 60)
import torch, torch.distributed as dist
total = torch.ones(2) * (info.rank + 1)
dist.all_reduce(total)
sockets = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")
           if os.path.islink(f"/proc/self/fd/{name}")]
for table in ("tcp", "tcp6"):
    for line in open(f"/proc/self/net/{table}").read().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
            print("listens", fields[1].split(":")[0])
print("total", int(total[0]), flush=True)
leave()
"""


def clean_environment(**more):
    environ = {name: text for name, text in process_environment().items() if not name.startswith(("SLURM", "MASTER"))}
    return environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def slurm_rank(rank, world_size, job):
    return clean_environment(
        SLURM_JOB_ID=job, SLURM_STEP_ID="0", SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank),
        SLURM_STEP_NUM_TASKS=str(world_size), SLURM_STEP_NODELIST="n1", SLURM_STEP_TASKS_PER_NODE=str(world_size))


def run_all(environments):
    ranks = [subprocess.Popen([sys.executable, "-c", RANK], env=environ, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True) for environ in environments]
    results = [rank.communicate(timeout=100) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), results
    return [out for out, _ in results]


def info(rank, world_size, port=None, address="127.0.0.1", **more):
    return RankInfo(rank, world_size, rank, world_size, master_address=address, master_port=port or free_port(),
                    source="test", node="n1", nodes=("n1",),
                    port_is_fixed=True, **more)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_one_rank_alone():
    assert "total 1" in run_all([clean_environment()])[0]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_taken_ports_are_passed_over_by_all_ranks_and_nothing_listens_beyond_loopback():
    from parallel.ranks.rank_info import read_rank_info
    job = "4711"
    ports = read_rank_info(slurm_rank(0, 2, job)).ports
    with socket.socket() as silent, socket.socket() as refusing:
        for foreign, port in ((silent, ports[0]), (refusing, ports[1])):
            foreign.bind(("127.0.0.1", port))
        silent.listen(8)  # connects, and then never says a word; the other one is bound but refuses
        outputs = run_all([slurm_rank(rank, 2, job) for rank in range(2)])
    for output in outputs:
        assert "total 3" in output
        addresses = re.findall(r"listens (\w+)", output)
        assert addresses
        assert set(addresses) == {"0100007F"}


@pytest.mark.slow
@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_a_name_with_only_an_ipv6_address():
    port = str(free_port())
    environments = [clean_environment(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2",
                                      MASTER_ADDR="::1", MASTER_PORT=port) for rank in range(2)]
    assert all("total 3" in output for output in run_all(environments))


def test_a_missing_rank_is_named():
    with pytest.raises(RendezvousError, match=r"rank 0 on n1: 2 of 3 ranks did not join in time: 1, 2;") as caught:
        join(info(0, 3), timeout_seconds=1)
    assert (caught.value.is_mistake, caught.value.node) == (False, None)


@pytest.mark.parametrize(("nodes", "suspect"), [(("n1", "n2"), "n2"), (("n1", "n2", "n3", "n4"), None)])
def test_a_node_is_suspected_when_it_alone_sent_nobody(nodes, suspect):
    with pytest.raises(RendezvousError) as caught:
        join(replace(info(0, len(nodes)), nodes=nodes), timeout_seconds=1)
    assert caught.value.node == suspect


def test_rank_zero_is_not_there():
    with pytest.raises(RendezvousError, match=r"rank 1 on n1 did not find rank 0 at 127\.0\.0\.1 port \d+ .*refused"):
        join(info(1, 2), timeout_seconds=0.1)


def test_a_name_without_address():
    for rank in (0, 1):
        with pytest.raises(RendezvousError, match=r"no-such-host\.invalid.*(no address|set MASTER_ADDR)"):
            join(info(rank, 2, address="no-such-host.invalid"), timeout_seconds=0.1)


def test_a_chosen_port_that_is_taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        words = f"cannot listen on 127.0.0.1 .*port {port}: .*in use.*MASTER_PORT"
        with pytest.raises(RendezvousError, match=words) as caught:
            join(info(0, 2, port), timeout_seconds=1)
        assert caught.value.is_mistake


def test_every_interface_is_refused():
    with pytest.raises(RendezvousError, match="means every interface"):
        join(info(0, 2, address="0.0.0.0"), timeout_seconds=1)
