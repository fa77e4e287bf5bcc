"""slurm.sbatch with stand-ins for srun and scontrol."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STUBS = {
    "srun": 'echo "cpus ${SRUN_CPUS_PER_TASK-as srun likes}: $*"',
    "scontrol": "echo node-1",
}


def submit(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "node-[1-2]"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SRUN_"))}
    return subprocess.run(
        ["bash", "slurm.sbatch", "./train_ldm.sh", "--exp-name", "x"],  # noqa: S607  whichever bash there is
        cwd=ROOT,
        env=kept | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"} | job | environment,
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.parametrize(
    ("environment", "cpus"), [({"SLURM_CPUS_PER_TASK": "64"}, "cpus 64:"), ({}, "cpus as srun likes:")]
)
def test_the_job_s_cpus_reach_its_processes(tmp_path, environment, cpus):
    """From 22.05 on srun takes sbatch's --cpus-per-task from SRUN_CPUS_PER_TASK alone."""
    lines = submit(tmp_path, **environment).stdout.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(cpus)
    assert lines[0].endswith("./train_ldm.sh --exp-name x")
