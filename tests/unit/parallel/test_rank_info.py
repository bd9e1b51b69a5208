"""The one reader of rank variables: every launcher, nesting, disagreement, half-set and malformed values."""

import pytest

from parallel.ranks.rank_info import RankInfoError, alone, read_rank_info
from parallel.ranks.slurm_node_list import NodeListError, expand_node_list, expand_tasks_per_node

TORCH = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n1",
         "MASTER_PORT": "29500"}
TORCHRUN = TORCH | {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "2"}
STEP = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
        "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURMD_NODENAME": "n2"}
OPENMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
           "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}


def facts(environ):
    info = read_rank_info(environ)
    return info.source, info.rank, info.world_size, info.local_rank, info.local_world_size, info.master_address


def test_no_launcher():
    assert read_rank_info({"PATH": "/bin", "MASTER_ADDR": "n1", "RANK": ""}) is None
    assert alone().world_size == 1


@pytest.mark.parametrize(("environ", "expected"), [
    (TORCHRUN, ("torchrun", 3, 4, 1, 2, "n1")),
    (TORCH, ("environment", 3, 4, 1, 2, "n1")),
    (TORCH | {"TRAINYARD_LAUNCHER": "local"}, ("local", 3, 4, 1, 2, "n1")),
    (TORCH | {"CROSS_RANK": "1", "CROSS_SIZE": "2"}, ("deepspeed", 3, 4, 1, 2, "n1")),
    (STEP, ("slurm", 3, 4, 1, 2, "n1")),
    (OPENMPI, ("openmpi", 1, 2, 1, 2, "127.0.0.1")),
    (HYDRA, ("hydra", 1, 2, 0, 1, None)),
])
def test_every_launcher(environ, expected):
    assert facts(environ) == expected


@pytest.mark.parametrize("inner", [
    TORCHRUN,
    TORCH | {"TRAINYARD_LAUNCHER": "local"},
    TORCH | {"CROSS_RANK": "1", "CROSS_SIZE": "2"},
    OPENMPI | {"MASTER_ADDR": "n1"},
    HYDRA | {"MASTER_ADDR": "n1"},
])
def test_the_innermost_launcher_wins_over_the_step_around_it(inner):
    around = STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "1",
                     "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_NODELIST": "n1"}
    assert facts(around | inner) == facts(inner)


def test_the_batch_script_is_no_rank():
    batch = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}
    assert read_rank_info(batch) is None


def test_variables_exported_in_the_job_script_must_agree_with_the_step():
    agreeing = STEP | {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
    assert facts(agreeing) == ("slurm", 3, 4, 1, 2, "10.0.0.1")
    assert facts(STEP | {"WORLD_SIZE": "4"})[0] == "slurm"
    with pytest.raises(RankInfoError, match="disagree.*RANK=1.*slurm says RANK=3.*unset RANK"):
        read_rank_info(STEP | {"RANK": "1"})
    with pytest.raises(RankInfoError, match="disagree.*WORLD_SIZE=2.*openmpi says WORLD_SIZE=2|disagree"):
        read_rank_info(OPENMPI | {"WORLD_SIZE": "3"})


@pytest.mark.parametrize(("environ", "named"), [
    ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK"),
    ({"WORLD_SIZE": "2"}, "without RANK, LOCAL_RANK"),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR and MASTER_PORT"),
    ({name: text for name, text in STEP.items() if name != "SLURM_LOCALID"}, "SLURM_LOCALID"),
    ({name: text for name, text in OPENMPI.items() if not name.endswith("LOCAL_SIZE")}, "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ({"PMI_RANK": "0"}, "PMI_SIZE"),
    ({"MPI_LOCALRANKID": "0"}, "PMI_RANK"),
])
def test_half_set(environ, named):
    with pytest.raises(RankInfoError, match=f"half set.*{named}"):
        read_rank_info(environ)


@pytest.mark.parametrize(("change", "message"), [
    ({"RANK": "x"}, "RANK='x' is not a whole number"),
    ({"RANK": "-1"}, "RANK='-1'"),
    ({"RANK": "4"}, "out of range: rank 4 of 4"),
    ({"LOCAL_RANK": "2"}, "out of range"),
    ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
])
def test_malformed(change, message):
    with pytest.raises(RankInfoError, match=message):
        read_rank_info(TORCHRUN | change)


def test_job_id_and_attempt():
    info = read_rank_info(STEP | {"SLURM_RESTART_COUNT": "2"})
    assert (info.job_id, info.attempt, info.node, info.nodes) == ("77", 3, "n2", ("n1", "n2"))
    assert read_rank_info(TORCHRUN).attempt == 3
    assert read_rank_info(STEP | {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "4"}).job_id == "70_4"


def test_ports_are_the_same_on_all_ranks_and_differ_between_jobs():
    first, same = read_rank_info(STEP), read_rank_info(STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    other = read_rank_info(STEP | {"SLURM_JOB_ID": "78"})
    assert first.ports == same.ports
    assert len(set(first.ports)) == 8
    assert not set(first.ports) & set(other.ports)
    assert all(20_000 <= port < 32_000 for port in first.ports)
    assert read_rank_info(STEP | {"MASTER_PORT": "4000"}).ports == (4000,)


def test_store_fd_belongs_to_rank_zero():
    assert read_rank_info(TORCH | {"TRAINYARD_STORE_FD": "7"}).store_fd is None
    assert read_rank_info(TORCH | {"RANK": "0", "LOCAL_RANK": "0", "TRAINYARD_STORE_FD": "7"}).store_fd == 7


def test_export():
    environ = {}
    read_rank_info(STEP).export(environ)
    assert environ["RANK"] == "3"
    assert environ["MASTER_ADDR"] == "n1"
    again = read_rank_info(environ)
    assert (again.rank, again.world_size, again.local_rank, again.local_world_size) == (3, 4, 1, 2)


@pytest.mark.parametrize(("text", "names"), [
    ("n1", ["n1"]),
    ("n[1-3,7],m2", ["n1", "n2", "n3", "n7", "m2"]),
    ("gpu[08-11]", ["gpu08", "gpu09", "gpu10", "gpu11"]),
    ("r[1-2]n[1-2]-ib", ["r1n1-ib", "r1n2-ib", "r2n1-ib", "r2n2-ib"]),
    ("a-b.c[001]", ["a-b.c001"]),
])
def test_node_lists(text, names):
    assert expand_node_list(text) == names


@pytest.mark.parametrize("text", ["", "n[1", "n1]", "n[[1]]", "n[3-1]", "n[1-999999999]", "n1,,n2", "$(touch x)",
                                  "n[a]", "n 1"])
def test_not_node_lists(text):
    with pytest.raises(NodeListError):
        expand_node_list(text)


@pytest.mark.parametrize(("text", "seconds"), [("1795266868", 1795266868.0), ("", None), ("N/A", None)])
def test_when_the_job_ends(text, seconds):
    environ = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "SLURM_JOB_END_TIME": text}
    assert read_rank_info(environ).end_unix_seconds == seconds


def test_tasks_per_node():
    assert expand_tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(NodeListError):
        expand_tasks_per_node("2(y3)")


def test_no_torch():
    import subprocess
    import sys
    code = "import sys, parallel.ranks.rank_info; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
