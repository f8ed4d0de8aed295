"""Going on with a run under a new plan: what may differ from the plan before, and what would be ignored in silence."""

import dataclasses
from typing import Any

from titan_slurm.cluster.state import NO_ANSWER, RunStatus, status
from titan_slurm.errors import BadInputError, Problem, bad_input
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.plan import Plan

# Paths of torchtitan's configuration that may change between two attempts without changing what is trained.
_MAY_CHANGE = (
    "training.steps",
    "training.gc_",
    "training.disable_cuda_graphs",
    "training.enable_cpu_offload",
    "lr_scheduler.total_steps",
    "metrics.",
    "checkpoint.interval",
    "checkpoint.keep_latest_k",
    "checkpoint.async_mode",
    "checkpoint.enable_first_step_checkpoint",
    "checkpoint.initial_load",
    "parallelism.",
    "activation_checkpoint.",
    "compile.",
    "comm.",
    "profiler.",
    "validator.",
    "debug.print_config",
)
# And where the place in the data is one number of samples: how many are drawn at once, by whom, and how.
_MAY_CHANGE_IF_MAP_STYLE = (
    "training.local_batch_size",
    "dataloader.num_workers",
    "dataloader.persistent_workers",
    "dataloader.prefetch_factor",
    "dataloader.pin_memory",
)
_SCHEDULE_END = "lr_scheduler.total_steps"


def plan_to_go_on(run: RunDirectory, plan: Plan) -> tuple[Plan, list[str]]:
    """The new plan as a continuation of the run's own, and what the user should know of it.

    Raises BadInputError if there is no such run, or if the new plan would train something else.
    """
    if not run.exists():
        raise bad_input("--resume", f"there is no run {run.name} in {run.path.parent}")
    before = run.plan()
    problems = [
        Problem(
            "--resume", f"{what} was {old!r} in this run and is now {new!r}", "start a new run, or leave it as it was"
        )
        for what, old, new in _differences(before, plan)
    ]
    if problems:
        raise BadInputError(problems)
    notes = []
    if before.torchtitan[_SCHEDULE_END] != plan.torchtitan[_SCHEDULE_END]:
        old, new = before.torchtitan[_SCHEDULE_END], plan.torchtitan[_SCHEDULE_END]
        notes.append(
            f"the learning-rate schedule now ends at step {new} instead of {old}: the rate jumps where the run goes on "
            f"(--set lr_schedule.total_steps={old} keeps the old schedule)"
        )
    # The id is the wandb curve's and the checkpoint folder is where the run's past lies.
    return dataclasses.replace(plan, run_id=before.run_id), notes


def resume(run: RunDirectory) -> dict[str, Any]:
    """Submit the next job of a run by the plan and the script that it has. Returns the job's record.

    Raises BadInputError if the run is in the scheduler's hands, or may be, if it has nothing left to do, and if the
    scheduler refuses.
    """
    from titan_slurm.cluster import lost
    from titan_slurm.launch.submit import NoAnswerError, submit_job

    try:
        with run.lock() as held:
            now = status(run) if lost.settle(run) else None
            if now is None or now.reason == NO_ANSWER:
                raise NoAnswerError(f"run {run.name} may have a job", may_have_job=True)
            check_resumable(run, now, run.plan(), "")
            run.cancel_file.unlink(missing_ok=True)
            return submit_job(run.plan(), run, held, resumed=True)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and run.exists():
            raise
        why = f"cannot write {error.filename}: {error.strerror}" if run.exists() else "it has been removed"
        raise bad_input("", f"run {run.name} cannot go on: {why}") from None


def check_resumable(run: RunDirectory, now: RunStatus, plan: Plan, where: str = "--resume") -> None:
    """Raises BadInputError if the run is in the scheduler's hands, or has nothing left to do."""
    if now.is_active:
        hint = f"titan-slurm cancel {run.name}"
        raise bad_input(where, f"run {run.name} is {now.state} as job {now.job_id}; end that first", hint)
    to_export = plan.export_to_hf and not (run.export_folder / f"step-{plan.max_steps}").is_dir()
    if to_export and plan.max_steps == run.plan().max_steps:
        return
    if now.state == "completed" and plan.max_steps <= run.plan().max_steps:
        hint = f"--set training.max_steps={2 * plan.max_steps}"
        if not where:
            hint = f"titan-slurm submit RECIPE --resume --name {run.name} {hint}"
        raise bad_input(where, f"run {run.name} has done all of its {run.plan().max_steps} steps", hint)


def _differences(before: Plan, after: Plan) -> list[tuple[str, Any, Any]]:
    """What is not the same and would change the training, or be ignored by it, or break its resuming."""
    pairs: dict[str, tuple[Any, Any]] = {
        "the model": (before.model, after.model),
        "the data": (before.data, after.data),
        "the optimizer": (before.optimizer, after.optimizer),
        "float8": (before.float8, after.float8),
        "what trains": (before.life, after.life),
    }
    may_change = _MAY_CHANGE + (_MAY_CHANGE_IF_MAP_STYLE if before.data["map_style"] else ())
    if not before.data["map_style"]:
        what = f"the data-parallel degree, to which the place in {before.data['dataset']!r} is tied,"
        pairs[what] = (before.layout.data_parallel, after.layout.data_parallel)
    for path in sorted(before.torchtitan.keys() | after.torchtitan.keys()):
        if not path.startswith(may_change):
            pairs[path] = (before.torchtitan.get(path), after.torchtitan.get(path))
    return [(what, old, new) for what, (old, new) in pairs.items() if old != new]
