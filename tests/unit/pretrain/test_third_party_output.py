"""Third parties are kept quiet, and nothing of ours is: each case is a process of its own with real descriptors."""

import os
import subprocess
import sys
import textwrap

import pytest

from pretrain.training.third_party_output import CPU_ADAM_OP, SHARED_MEMORY_OP, compile_notice


def run_script(tmp_path, body, *, fails=False):
    """Run a script that has `third_party_output` and `log` (the path); returns its (stdout, stderr, log text)."""
    log = tmp_path / "logs" / "rank-0.log"
    head = """
        import logging, os, subprocess, sys, threading, warnings
        from pretrain.training.third_party_output import third_party_output
        log = sys.argv[1]
    """
    script = textwrap.dedent(head) + textwrap.dedent(body)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(log)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=120)
    assert (result.returncode != 0) == fails, result.stderr
    return result.stdout, result.stderr, log.read_text()


def test_prints_subprocesses_warnings_and_loggers_go_to_the_log(tmp_path):
    out, err, log = run_script(
        tmp_path,
        """
        print("before")
        with third_party_output(log) as quiet:
            print("a print")
            subprocess.run(["sh", "-c", "echo a compiler; echo its error >&2"])
            os.write(2, b"C++ words\\n")
            warnings.warn("deprecated thing", FutureWarning)
            noisy = logging.getLogger("DeepSpeed")
            noisy.addHandler(logging.StreamHandler(sys.stdout))
            noisy.warning("DeepSpeed words")
            logging.getLogger("megatron.core").warning("megatron words")
            quiet.terminal.write("our words\\n")
        print("after")
        """,
    )
    assert (out, err) == ("before\nour words\nafter\n", "")
    for words in ("a print", "a compiler", "its error", "C++ words", "deprecated thing", "megatron words"):
        assert words in log
    assert log.count("DeepSpeed words") == 1


def test_after_release_only_loggers_and_warnings_stay_quiet(tmp_path):
    out, err, log = run_script(
        tmp_path,
        """
        with third_party_output(log) as quiet:
            noisy = logging.getLogger("DeepSpeed")
            noisy.propagate = False
            noisy.addHandler(logging.StreamHandler(sys.stdout))
            quiet.release()
            print("a print")
            noisy.warning("DeepSpeed words")
            logging.getLogger("megatron.core").warning("megatron words")
            warnings.warn("deprecated thing", FutureWarning)
            os.write(2, b"a crash report\\n")
        noisy.warning("after the run")
        """,
    )
    assert (out, err) == ("a print\nafter the run\n", "a crash report\n")
    assert [log.count(w) for w in ("DeepSpeed words", "megatron words", "deprecated thing")] == [1, 1, 1]


@pytest.mark.parametrize("release", ["", "quiet.release()"])
def test_an_exception_is_seen(tmp_path, release):
    _, err, _ = run_script(
        tmp_path,
        f"""
        with third_party_output(log) as quiet:
            {release}
            raise RuntimeError("ours to show")
        """,
        fails=True,
    )
    assert "Traceback" in err and "RuntimeError: ours to show" in err


def test_an_exception_in_a_thread_is_seen(tmp_path):
    _, err, _ = run_script(
        tmp_path,
        """
        with third_party_output(log):
            thread = threading.Thread(target=lambda: 1 / 0)
            thread.start()
            thread.join()
        """,
    )
    assert "exception in a thread" in err and "ZeroDivisionError" in err


def test_our_warnings_are_shown_on_the_main_rank_and_logged_on_all(tmp_path):
    body = """
        with third_party_output(log, is_main={is_main}) as quiet:
            ours = logging.getLogger("data_pipeline.loader")
            ours.info("a note")
            ours.warning("look at %s", "this")
            quiet.show_through(lambda text: quiet.terminal.write(f"[{{text}}]\\n"))
            ours.warning("again")
    """
    out, err, log = run_script(tmp_path, body.format(is_main=True))
    assert (out, err) == ("[warning: again]\n", "warning: look at this\n")
    assert "a note" in log and "WARNING data_pipeline.loader: look at this" in log
    out, err, log = run_script(tmp_path, body.format(is_main=False))
    assert (out, err) == ("", "") and log.count("again") == 2


@pytest.mark.slow
def test_the_real_deepspeed_is_quiet(tmp_path):
    out, err, log = run_script(
        tmp_path,
        """
        with third_party_output(log) as quiet:
            from deepspeed.utils import logger
            logger.warning("during start-up")
            quiet.release()
            logger.warning("while training")
        """,
    )
    assert (out, err) == ("", "")
    assert log.count("during start-up") == 1 and log.count("while training") == 1


@pytest.mark.parametrize(("op", "told"), [
    (SHARED_MEMORY_OP, "shared-memory op, once per machine, about a minute"),
    (CPU_ADAM_OP, "Adam for the CPU, once per machine, about two minutes"),
])  # fmt: skip
def test_the_notice_before_an_op_is_compiled(op, told, tmp_path):
    assert compile_notice(str(tmp_path), op) == f"compiling DeepSpeed's {told}"
    folder = tmp_path / op
    folder.mkdir()
    (folder / "lock").touch()
    assert f"delete {folder / 'lock'}" in compile_notice(str(tmp_path), op)
    (folder / "lock").unlink()
    (folder / f"{op}.so").touch()
    assert compile_notice(str(tmp_path), op) is None


def test_the_notice_looks_where_torch_builds(tmp_path, monkeypatch):
    from torch.utils import cpp_extension

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path))
    folder = cpp_extension._get_build_directory(SHARED_MEMORY_OP, verbose=False)
    assert compile_notice(None, SHARED_MEMORY_OP).startswith("compiling")
    with open(os.path.join(folder, f"{SHARED_MEMORY_OP}.so"), "w"):
        pass
    assert compile_notice(None, SHARED_MEMORY_OP) is None
