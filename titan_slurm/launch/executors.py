"""submitit's executors, with the batch script made from our template."""

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission, FailedJobError
from submitit.local.local import LocalJob

from titan_slurm.cluster import local, slurm
from titan_slurm.launch.script import python_of_ranks, render, sbatch_options
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.nodes import excluded, to_exclude
from titan_slurm.run.plan import Plan
from titan_slurm.run.task import RankTask


class SlurmExecutor(submitit.SlurmExecutor):  # type: ignore[misc]
    """Submits with sbatch. Can be made, and can show its script, on a machine without Slurm. `held`: the descriptor of
    the run's lock."""

    def __init__(self, plan: Plan, run: RunDirectory, held: int | None = None, dependency: str = "") -> None:
        super().__init__(run.submitit_folder, python=shlex.quote(python_of_ranks(plan)))
        self.plan, self.run, self.held = plan, run, held
        self.more = [f"--dependency={dependency}"] if dependency else []
        self.parameters = {"nodes": plan.layout.nodes, "ntasks_per_node": plan.layout.tasks_per_node}

    @classmethod
    def affinity(cls) -> int:
        """submitit refuses to be made where there is no srun; a dry run needs none."""
        return 2

    def script(self) -> str:
        """The text of the batch script."""
        return self._make_submission_file_text(self._submitit_command_str, "")

    def place(self) -> dict[str, Any]:
        """What the run directory keeps of where its jobs are."""
        return place_in_slurm()

    def job_record(self, job: Any) -> dict[str, Any]:
        """What it keeps of a submitted job."""
        return {"job_id": job.job_id} | self.place()

    def _make_submission_file_text(self, command: str, uid: str) -> str:  # noqa: ARG002 (submitit's signature)
        return render(self.plan, self.run, command)

    def submit_chain(self, task: RankTask, jobs: int) -> list[Any]:
        """Submit several jobs of which each starts when the one before has ended. The first is held: whoever has
        written them down releases it. If one is refused, none stays."""
        chain: list[Any] = []
        try:
            for _ in range(jobs):
                self.more = [f"--dependency=afterany:{chain[-1].job_id}"] if chain else ["--hold", *self.more]
                chain.append(self.submit(task))
        except BaseException:
            if chain:
                slurm.scancel([job.job_id for job in chain])
            raise
        return chain

    def _submit_command(self, command: str) -> Any:  # noqa: ARG002 (submitit's signature)
        # Nodes that have failed since the script was written.
        bad = [f"--exclude={','.join(to_exclude(self.run, self.plan))}"] if excluded(self.run) else []
        held = [] if self.held is None else [self.held]
        options = sbatch_options(self.plan, self.run)
        job_id = call_sbatch(options, *bad, *self.more, str(self.run.script_file), held=held)
        return self.job_class(folder=self.folder, job_id=job_id, tasks=list(range(self._num_tasks())))


def place_in_slurm() -> dict[str, Any]:
    """What a run directory keeps of where its jobs are, for those of Slurm."""
    return {"cluster": "slurm", "slurm_cluster": slurm.cluster_name()}


def call_sbatch(options: Iterable[str], *arguments: str, held: Sequence[int]) -> str:
    """The id of the job that sbatch makes of a script with these options. `held`: the descriptors of its runs' locks.
    Raises FailedJobError if there is none."""
    done = subprocess.run(
        [*slurm.sbatch(options), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        # If this process is killed, the locks stay with sbatch while that is at work: nobody can take a run for one
        # without a job a moment before it has one.
        pass_fds=held,
    )
    if done.returncode:
        raise FailedJobError(done.stderr.strip() or f"sbatch left with exit code {done.returncode}")
    return str(SlurmExecutor._get_job_id_from_submission_command(done.stdout))


def put_task(run: RunDirectory, folder: Path) -> None:
    """Pickle what each rank of a run calls, before its job has an id: the job gives it the name by which submitit finds
    it."""
    task = DelayedSubmission(RankTask(str(run.path)))
    task.set_timeout(0, 0)
    folder.mkdir()
    task.dump(folder / "task.pkl")


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

    def place(self) -> dict[str, Any]:
        """What the run directory keeps of where its jobs are."""
        return {"cluster": "local", "host": socket.gethostname()}

    def job_record(self, job: Any) -> dict[str, Any]:
        """What it keeps of a started job: a process id means one process only with its start."""
        return {"job_id": job.job_id, "process_started": local.started(int(job.job_id))} | self.place()

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


def executor(
    plan: Plan, run: RunDirectory, held: int | None = None, dependency: str = ""
) -> SlurmExecutor | LocalExecutor:
    """The executor for the plan's cluster; for one that submits, `held` is the descriptor of the run's lock."""
    return SlurmExecutor(plan, run, held, dependency) if plan.cluster == "slurm" else LocalExecutor(plan, run)
