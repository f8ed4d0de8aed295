"""Where everything of a run stands and how to read it. What Slurm says of the run does not live here."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_slurm.run import metrics
from titan_slurm.run.attempt import Attempt
from titan_slurm.run.checkpoints import newest_committed_step
from titan_slurm.run.events import COMMAND, EVENTS_FILE, SUBMIT, EventLog
from titan_slurm.run.files import append_json_line, locked, read_json, read_json_lines, write_json
from titan_slurm.run.plan import Plan

# What stands in a run beside its checkpoints.
_OWN = frozenset(
    {
        *("assets", "attempts", "cache", "code", "export", "history", "patches", "submitit", "tensorboard", "wandb"),
        *("training_script", "cancel.json", "events.jsonl", "job.log", "job.sh", "jobs.jsonl", "lock.json"),
        *("metrics.jsonl", "nodes.json", "plan.json", "recipe.toml", "submission.json"),
    }
)


@dataclass(frozen=True)
class RunDirectory:
    """A run: one training from its first submission to its last step, over all its attempts."""

    path: Path

    @property
    def plan_file(self) -> Path:
        """The frozen plan. Its presence makes a folder a run."""
        return self.path / "plan.json"

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe: no `extends`, every override in place."""
        return self.path / "recipe.toml"

    @property
    def script_file(self) -> Path:
        """The exact batch script."""
        return self.path / "job.sh"

    @property
    def jobs_file(self) -> Path:
        """One line per submission, oldest first."""
        return self.path / "jobs.jsonl"

    @property
    def metrics_file(self) -> Path:
        """One line per logged step, in the order of logging; after a fall-back steps repeat and the newest count."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard_folder(self) -> Path:
        """TensorBoard's files of all attempts, where the recipe asks for them."""
        return self.path / "tensorboard"

    @property
    def wandb_folder(self) -> Path:
        """wandb's own files: what it calls a segment for each attempt that was logged offline."""
        return self.path / "wandb"

    @property
    def events_file(self) -> Path:
        """One line for each thing that happened."""
        return self.path / EVENTS_FILE

    @property
    def lock_file(self) -> Path:
        """What the run is made of."""
        return self.path / "lock.json"

    @property
    def code_folder(self) -> Path:
        """The run's own copy of the code: what its batch script and its ranks import."""
        return self.path / "code"

    @property
    def script_folder(self) -> Path:
        """The user's script, where one trains, and the modules that lay beside it."""
        return self.path / "training_script"

    @property
    def cache_folder(self) -> Path:
        """What torch has compiled, for the next attempt."""
        return self.path / "cache"

    @property
    def attempts_folder(self) -> Path:
        """Holds one folder per attempt: 0001, 0002, …"""
        return self.path / "attempts"

    @property
    def submitit_folder(self) -> Path:
        """Where submitit keeps its pickles."""
        return self.path / "submitit"

    @property
    def assets_folder(self) -> Path:
        """The built-in text and its tokenizer, prepared by the first attempt, the same for all later ones."""
        return self.path / "assets"

    @property
    def export_folder(self) -> Path:
        """The final weights in Hugging Face's format, where the recipe asks for them: step-N."""
        return self.path / "export"

    @property
    def nodes_file(self) -> Path:
        """The nodes that have failed this run."""
        return self.path / "nodes.json"

    @property
    def cancel_file(self) -> Path:
        """The user's wish to end the run, written before the scheduler is told."""
        return self.path / "cancel.json"

    @property
    def flock_file(self) -> Path:
        """The empty file that `lock` locks. Runs that are submitted together have a single one until they are."""
        return self.path / ".lock"

    @property
    def submission_file(self) -> Path:
        """Here while a job is being submitted, and after that if whoever submitted it was killed meanwhile."""
        return self.path / "submission.json"

    @property
    def checkpoints_folder(self) -> Path:
        """Where the plan in force has its checkpoints; not always inside the run."""
        return Path(self.plan().torchtitan["checkpoint.folder"])

    def setup_failures(self, job_id: str) -> list[tuple[str, str]]:
        """What failed in a job's batch script before its next attempt could begin: node and what, oldest first."""
        with contextlib.suppress(OSError):
            lines = self._setup_file(job_id).read_text(encoding="utf-8", errors="replace").split("\n")
            return [(node, what) for node, _, what in (line.partition("\t") for line in lines) if what]
        return []

    def forget_setup_failures(self, job_id: str) -> None:
        """An attempt has begun."""
        self._setup_file(job_id).unlink(missing_ok=True)

    def _setup_file(self, job_id: str) -> Path:
        return self.path / f"setup_failed.{job_id}"

    def owns(self, path: Path) -> bool:
        """Whether a path is the run itself, or something in it that is no place for checkpoints."""
        if not path.is_relative_to(self.path):
            return False
        first = (*path.relative_to(self.path).parts, ".")[0]
        return first in _OWN or first.startswith(".")

    def exists(self) -> bool:
        """Whether this folder is a run."""
        return self.plan_file.is_file()

    @property
    def name(self) -> str:
        """The run's name, which is its folder's."""
        return self.path.name

    def plan(self) -> Plan:
        """The plan in force."""
        return Plan.from_dict(json.loads(self.plan_file.read_text(encoding="utf-8")))

    def keep_plan_in_history(self) -> None:
        """Copy the plan in force to `history/`, before another takes its place."""
        write_json(self.next_in_history("plan", ".json"), self.plan().to_dict())

    def next_in_history(self, name: str, ending: str) -> Path:
        """Where to keep what is about to be replaced: `history/NAME.0001ENDING` and so on."""
        folder = self.path / "history"
        folder.mkdir(exist_ok=True)
        return folder / f"{name}.{len(list(folder.glob(f'{name}.*'))) + 1:04d}{ending}"

    def events(self) -> Iterator[dict[str, Any]]:
        """All that happened, oldest first; `titan_slurm.run.events` says what there is."""
        return read_json_lines(self.events_file)

    def submissions(self) -> EventLog:
        """The run's events, for whoever submits it."""
        return EventLog(self.events_file, SUBMIT)

    def jobs(self) -> list[dict[str, Any]]:
        """All submissions: {"job_id", "cluster", "time", "user"}; of local runs also "host" and "process_started" (Unix
        time), of Slurm's "slurm_cluster", and of the jobs of a chain "chain": the ids of all, first to last."""
        return list(read_json_lines(self.jobs_file))

    def chain(self, job_id: str) -> list[str]:
        """The jobs that go on with the run one after another, of which this is one; itself where it is alone."""
        found = [job["chain"] for job in self.jobs() if job["job_id"] == job_id and "chain" in job]
        return list(found[-1]) if found else [job_id]

    def add_job(self, job: dict[str, Any]) -> None:
        """Record a submission."""
        append_json_line(self.jobs_file, job)

    def submission(self) -> dict[str, Any] | None:
        """The submission of which nobody has written down what came of it: {"time", "user", "user_id"},
        where, as in `jobs`, and of a task of an array "array": {"name", "comment", "task"}."""
        return read_json(self.submission_file)

    def begin_submission(self, about: dict[str, Any]) -> None:
        """Write down that a job is about to be submitted, so that it is looked for should nobody live to record it."""
        write_json(self.submission_file, about)

    def end_submission(self) -> None:
        """What came of it is written down."""
        self.submission_file.unlink(missing_ok=True)

    def attempts(self) -> list[Attempt]:
        """All attempts, oldest first."""
        if not self.attempts_folder.is_dir():
            return []
        folders = [path for path in self.attempts_folder.iterdir() if path.name.isdigit()]
        return [Attempt(path) for path in sorted(folders, key=lambda path: int(path.name))]

    def give_verdict(self, attempt: Attempt, verdict: str, reason: str, **more: Any) -> None:
        """A command of the user's gives an attempt the verdict that its batch script did not come to give, unless it
        has one."""
        saved = newest_committed_step(self.checkpoints_folder)
        if attempt.give_verdict(verdict, reason, saved_step=saved, **more):
            attempt.tell_verdict(COMMAND)

    def last_metrics(self) -> dict[str, Any]:
        """The newest logged step, or an empty dict."""
        return metrics.last(self.metrics_file)

    def last_step(self) -> dict[str, Any]:
        """How far the run has come: {"step", "time", …}, or an empty dict."""
        return metrics.last_step(self.metrics_file)

    def metrics(self) -> Iterator[dict[str, Any]]:
        """All logged steps in the order of logging."""
        return metrics.logged(self.metrics_file)

    def curve(self) -> list[dict[str, Any]]:
        """Each logged step once, as the newest attempt that did it has it."""
        return metrics.curve(self.metrics_file)

    def cancelled(self) -> dict[str, Any] | None:
        """The user's wish to end the run, if there is one: {"time", "job_id"}."""
        return read_json(self.cancel_file)

    def cancel(self, wish: dict[str, Any]) -> None:
        """Write down that the user ends the run."""
        write_json(self.cancel_file, wish)

    @contextlib.contextmanager
    def lock(self, patience_s: float | None = None) -> Iterator[int]:
        """Only one process at a time changes what a run is (submit, resume). Held by the kernel: a kill frees it,
        unless a child lives on to which the descriptor that this yields was handed.

        Raises BlockingIOError if another has held it for `patience_s` (None: waits for ever), and FileNotFoundError if
        there is no such folder (any more).
        """
        with locked(self.flock_file, patience_s) as descriptor:
            yield descriptor
