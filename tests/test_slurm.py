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


def submit(tmp_path: Path, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "node-[1-2]"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SRUN_"))}
    return subprocess.run(
        ["bash", "slurm.sbatch", *(command or ("./train_ldm.sh", "--exp-name", "x"))],  # noqa: S607  whichever bash there is
        cwd=ROOT,
        env=kept | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"} | job | environment,
        capture_output=True,
        text=True,
        check=check,
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


def test_what_could_not_be_told_to_stop_is_refused(tmp_path):
    """launch.sh names no script: every python process of the job would be signalled, launchers too."""
    answer = submit(tmp_path, "./launch.sh", "train_ldm.py", check=False)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "give a wrapper, such as ./train_ldm.sh" in answer.stderr
    assert submit(tmp_path, "./run_experiment.sh", "table1/sendvae-80", SLURM_JOB_NUM_NODES="1").stdout
