"""Running a test file as two processes of one training run."""

import os
import socket
import subprocess
import sys


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def run_two_processes(file: str, *arguments: str, returncode: int = 0, timeout: int = 300) -> None:
    """Run `python FILE ARGUMENTS` twice at once, as ranks 0 and 1 of 2, each of which has to end with `returncode`."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, file, *arguments],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for worker in workers:
            printed, _ = worker.communicate(timeout=timeout)
            assert worker.returncode == returncode, printed[-4000:]
    finally:
        for worker in workers:  # the other one, if one failed
            worker.kill()
