"""The nodes of a site looked at by a job that is submitted as a run is: the same script, modules, environment and
container. Its preflight looks at each node, and its ranks measure how fast they reduce together."""

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from titan_slurm.cluster import slurm
from titan_slurm.cluster.profile import Profile
from titan_slurm.cluster.state import ALIVE_IN_SLURM, QUEUED_IN_SLURM
from titan_slurm.errors import BadInputError
from titan_slurm.launch.submit import Prepared, submit
from titan_slurm.run.attempt import Attempt
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import read_json
from titan_slurm.run.finding import FAIL, OK, Finding
from titan_slurm.run.look import look_folder
from titan_slurm.run.preflight import CLOCK_TOLERANCE_S, result

RECIPE = "llama3_debug"
_MINUTES = 15
_ASK_SLURM_S = 3.0
_TURN_S = 0.2
# What a node has written, a network file system may show here only then.
_SHOWN_S = 30.0


def settings(nodes: int, profile: Profile | None) -> list[str]:
    """What the recipe is to say, so that a job has a rank for each GPU of so many nodes, or for each node."""
    gpus = (profile.settings.nodes.gpus or 0) if profile else 0
    tasks = gpus or 1
    return [
        f"slurm.gpus_per_node={gpus}",
        f"slurm.tasks_per_node={tasks}",
        f"training.global_batch_size={4 * nodes * tasks}",
        f"slurm.time={_MINUTES}",
        "slurm.preflight=true",
        "requeue.enabled=false",
        "wandb.enabled=false",
    ]


def on_nodes(prepared: Prepared, wait_s: float) -> Iterator[Finding]:
    """Submit the job, wait until it has ended, and say what it found. It is cancelled where it has not started after
    `wait_s` seconds, or where the caller gives up. Its folder is left where something failed."""
    plan = dataclasses.replace(prepared.plan, life="titan_slurm.train.bandwidth")
    run, begun = prepared.run, time.time()
    try:
        job = submit(dataclasses.replace(prepared, plan=plan))
    except BadInputError as error:
        for problem in error.problems:
            yield Finding("job", str(problem), "name another partition, account or limit in the profile")
        return
    watch = _Watch(run, job["job_id"], begun)
    try:
        failure = watch.to_the_end(wait_s)
    finally:
        if not watch.has_ended:
            slurm.scancel([job["job_id"]])
    findings = [*([failure] if failure else []), *_findings(run, watch)]
    yield from findings
    if all(each.level != FAIL for each in findings):
        watch.until_gone()
        shutil.rmtree(run.path, ignore_errors=True)
    else:
        yield Finding("job", f"what job {job['job_id']} left is in {run.path}")


class _Watch:
    """A job from its submission to its end, as it looks from here."""

    def __init__(self, run: RunDirectory, job_id: str, submitted: float) -> None:
        self.run, self.job_id, self.submitted = run, job_id, submitted
        self.begun: float | None = None
        """When its attempt was first seen here."""
        self.has_ended = False
        self.state, self.nodes = "PENDING", ""

    def to_the_end(self, wait_s: float) -> Finding | None:
        """Wait. Returns what is wrong if the job did not come to its own end."""
        start_by, end_by, ask_next = time.monotonic() + wait_s, math.inf, 0.0
        while not self._see():
            now = time.monotonic()
            if now >= ask_next:
                ask_next = now + _ASK_SLURM_S
                reason = self._ask()
                if self.has_ended:
                    return self._wait_for_word()
                if self.state not in QUEUED_IN_SLURM:
                    # Slurm ends it at its time limit.
                    end_by = min(end_by, now + (_MINUTES + 2) * 60)
                elif now > start_by:
                    advice = "wait longer (--wait), look at fewer nodes (--nodes), or name another partition"
                    return Finding("job", f"has not started within {wait_s:g} s: {reason}", advice)
            if now > end_by:
                return Finding("job", f"is still {self.state} on {self.nodes}", "it was cancelled; look at its log")
            time.sleep(_TURN_S)
        self.has_ended = True
        return None

    def until_gone(self) -> None:
        """Wait until the batch script, which had its last word, no longer writes."""
        give_up = time.monotonic() + _SHOWN_S
        while time.monotonic() < give_up:
            known = slurm.jobs([self.job_id]) or {}
            if self.job_id not in known or known[self.job_id].state not in ALIVE_IN_SLURM:
                return
            time.sleep(_TURN_S)

    def attempt(self) -> Attempt | None:
        """The only one."""
        return next(iter(self.run.attempts()), None)

    def _see(self) -> bool:
        """Whether the attempt has its verdict, by what is seen here."""
        attempt = self.attempt()
        if attempt and self.begun is None:
            self.begun = time.time()
        return bool(attempt and attempt.verdict())

    def _ask(self) -> str:
        """What Slurm says of the job; why it waits, if it does. A controller that does not answer says nothing."""
        known = slurm.jobs([self.job_id])
        if known is None:
            return "Slurm does not answer"
        found = known.get(self.job_id)
        if found is not None:
            self.state, self.nodes = found.state, found.nodes or self.nodes
        self.has_ended = found is None or found.state not in ALIVE_IN_SLURM
        return found.reason if found else ""

    def _wait_for_word(self) -> Finding | None:
        """The job has ended: what it wrote last may take some time to be seen."""
        give_up = time.monotonic() + _SHOWN_S
        log = self.run.path / "job.log"
        while time.monotonic() < give_up:
            if self._see():
                return None
            if self.attempt() is None and (log.exists() or _could_not_open_log(self.job_id)):
                break
            time.sleep(_TURN_S)
        what = f"ended as {self.state}" + (f" on {self.nodes}" if self.nodes else "")
        if not log.exists():
            advice = "the folder of runs must be on a file system that all nodes share: --runs-dir, and [paths] shared"
            return Finding("job", f"{what}, and nothing that it wrote is seen in {self.run.path}", advice)
        said = " / ".join(log.read_text(errors="replace").split("\n")[-6:]).strip(" /")[-400:]
        return Finding("job", f"{what}; it said: {said or 'nothing'}", "mend the environment of the profile")


def _could_not_open_log(job_id: str) -> bool:
    """Whether Slurm says that the job's first node had no such folder: slurmd leaves it with signal 53 then."""
    return "ExitCode=0:53" in (slurm.ask("scontrol", "show", "job", "--oneliner", job_id) or "")


def _findings(run: RunDirectory, watch: _Watch) -> Iterator[Finding]:
    attempt = watch.attempt()
    if attempt is None:
        return
    yield from _clock_findings(attempt, watch)
    looked = result(attempt)
    found = [Finding.from_dict(each) for each in looked.get("findings", [])]
    yield from sorted(found, key=lambda each: each.level == OK)
    yield from _seen_findings(attempt, looked, found)
    measured = read_json(attempt.path / "bandwidth.json")
    if measured:
        yield from _bandwidth_findings(measured)
    elif looked.get("bad"):
        yield Finding("all-reduce", "not measured: the ranks were not started on these nodes", "mend the nodes", True)
    elif looked:
        errors = attempt.errors()
        about = f"rank {errors[0]['rank']} on {errors[0]['host']}: {errors[0]['error']}" if errors else _last_words(run)
        yield Finding("all-reduce", f"failed: {about}", "see the ranks' logs, and NCCL_DEBUG=INFO in [environment]")


def _last_words(run: RunDirectory) -> str:
    with contextlib.suppress(OSError):
        lines = (run.path / "job.log").read_text(errors="replace").splitlines()
        return " / ".join(lines[-3:])[-300:]
    return "without a word"


def _clock_findings(attempt: Attempt, watch: _Watch) -> Iterator[Finding]:
    """The first node's clock against the one here: its attempt began after the job was submitted, and before that was
    seen."""
    began, node = attempt.facts().get("started"), attempt.facts().get("host", "")
    if began is None or watch.begun is None:
        return
    off = began - watch.begun if began > watch.begun else min(began - watch.submitted, 0)
    if abs(off) > CLOCK_TOLERANCE_S:
        what = f"{abs(off):.1f} s {'ahead of' if off > 0 else 'behind'} the one here"
        yield Finding("clock", what, "have chrony or ntpd run on both", is_warning=True, nodes=(node,))


def _seen_findings(attempt: Attempt, looked: dict[str, Any], found: list[Finding]) -> Iterator[Finding]:
    """What the nodes say they wrote into the run must be seen here."""
    name = "shared folder"
    wrote = {node for each in found if each.name == name and each.level == OK for node in each.nodes}
    give_up = time.monotonic() + _SHOWN_S
    unseen = _not_in(look_folder(attempt), wrote)
    while unseen and time.monotonic() < give_up:
        time.sleep(_TURN_S)
        unseen = _not_in(look_folder(attempt), wrote)
    seen_nodes = tuple(node for node in looked.get("nodes", []) if node in wrote and node not in unseen)
    if seen_nodes:
        yield Finding(name, "files made there are seen here, and those made here there", nodes=seen_nodes)
    for node in sorted(unseen):
        advice = "the folder of runs must be on a file system that all nodes share: --runs-dir, and [paths] shared"
        yield Finding(name, "a file made there is not seen here", advice, nodes=(node,))


def _not_in(folder: Path, names: set[str]) -> set[str]:
    # Listing the folder makes an NFS client look again.
    return names - ({path.stem for path in folder.iterdir()} if folder.is_dir() else set())


def _bandwidth_findings(measured: dict[str, Any]) -> Iterator[Finding]:
    for row in measured["rows"]:
        speed = row["bus_bytes_per_second"] / 1e9
        nodes = f"{row['nodes']} {'node' if row['nodes'] == 1 else 'nodes'}, {row['ranks']} ranks"
        what = f"{speed:.3g} GB/s on {nodes} ({measured['backend']}, {measured['bytes'] / 2**20:g} MiB; busbw)"
        yield Finding("all-reduce", what)
    if not measured["rows"]:
        yield Finding("all-reduce", "a single rank has nobody to reduce with")
