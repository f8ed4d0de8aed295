"""submitit's executors, with the batch script made from our template."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import submitit
from submitit.local.local import LocalJob

from titan_slurm.cluster import local, slurm
from titan_slurm.launch.script import python_of_ranks, render, sbatch_options
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.plan import Plan


class SlurmExecutor(submitit.SlurmExecutor):  # type: ignore[misc]
    """Submits with sbatch. Can be made, and can show its script, on a machine without Slurm."""

    def __init__(self, plan: Plan, run: RunDirectory) -> None:
        super().__init__(run.submitit_folder, python=shlex.quote(python_of_ranks(plan)))
        self.plan, self.run = plan, run
        self.parameters = {"nodes": plan.layout.nodes, "ntasks_per_node": plan.layout.tasks_per_node}

    @classmethod
    def affinity(cls) -> int:
        """submitit refuses to be made where there is no srun; a dry run needs none."""
        return 2

    def script(self) -> str:
        """The text of the batch script."""
        return self._make_submission_file_text(self._submitit_command_str, "")

    def job_record(self, job: Any) -> dict[str, Any]:
        """What the run directory keeps of a submitted job."""
        return {"job_id": job.job_id, "cluster": "slurm"}

    def _make_submission_file_text(self, command: str, uid: str) -> str:  # noqa: ARG002 (submitit's signature)
        return render(self.plan, self.run, command)

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return [*slurm.sbatch(sbatch_options(self.plan, self.run)), str(submission_file_path)]


class LocalExecutor(submitit.LocalExecutor):  # type: ignore[misc]
    """Runs the same script on this machine, in a session of its own: it outlives the terminal."""

    def __init__(self, plan: Plan, run: RunDirectory) -> None:
        # Not submitit's own: it makes the folder, and a dry run makes nothing.
        submitit.core.core.PicklingExecutor.__init__(self, run.submitit_folder)
        self.python = shlex.quote(sys.executable)
        self.plan, self.run = plan, run
        self.parameters = {"tasks_per_node": plan.layout.world_size}

    def script(self) -> str:
        """The text of the script."""
        return render(self.plan, self.run, self._submitit_command_str)

    def job_record(self, job: Any) -> dict[str, Any]:
        """What the run directory keeps of a started job: a process id means one process only with its start."""
        return {"job_id": job.job_id, "cluster": "local", "process_started": local.started(int(job.job_id))}

    def _submit_command(self, command: str) -> Any:
        # Inside a job of Slurm's, its names would be taken for those of this one.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        environment = inherited | {
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_COMMAND": command,
            "SUBMITIT_LOCAL_NTASKS": str(self.plan.layout.world_size),
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_STDERR_TO_STDOUT": "1",
            # The controller takes the shell that started it for the job, and never ends it by time.
            "SUBMITIT_LOCAL_WITH_SHELL": "1",
            "SUBMITIT_LOCAL_TIMEOUT_S": "0",
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "0",
        }
        with (self.run.path / "job.log").open("ab") as log:
            process = subprocess.Popen(
                ["bash", str(self.run.script_file)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        tasks = list(range(self.plan.layout.world_size))
        return LocalJob(folder=self.folder, job_id=str(process.pid), process=process, tasks=tasks)


def executor(plan: Plan, run: RunDirectory) -> SlurmExecutor | LocalExecutor:
    """The executor for the plan's cluster."""
    return SlurmExecutor(plan, run) if plan.cluster == "slurm" else LocalExecutor(plan, run)
