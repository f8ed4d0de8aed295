"""Telling people that a run has ended: by a webhook in Slack's form, and by a command of the site's. The batch script
does it, once for each ending, and whatever becomes of it changes nothing else. Mail is Slurm's own affair.

The webhook's URL is a secret: it is read when it is needed, from the environment or from a file that only its owner
can read, and stands neither in the run directory nor in any command line.
"""

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from titan_slurm.run import events, job, verdict
from titan_slurm.run.attempt import Attempt, host
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.events import EventLog
from titan_slurm.run.files import write_json_once
from titan_slurm.run.redact import redact

WEBHOOK_VARIABLE = "TITAN_SLURM_WEBHOOK"
# The nodes of the job are held meanwhile.
_PATIENCE_S = 5.0


def tell(run: RunDirectory, attempt: Attempt) -> None:
    """Tell of the run's end if it has ended with this attempt, and not by its user's wish. Takes at most some seconds,
    and raises nothing."""
    with _nothing_raised():
        found = attempt.verdict()
        if found is None or found.get("again") or found["verdict"] == verdict.CANCELLED or not _is_asked_for(run):
            return
        # Before it is sent: better once too few than once too often.
        if write_json_once(attempt.path / "notified.json", {"verdict": found["verdict"], "time": found["time"]}):
            sent = _send(run, _text(run, attempt, found), found["verdict"])
            attempt.events(events.BATCH_SCRIPT).add(events.NOTIFIED, **sent)


def tell_of_failed_set_up(run: RunDirectory, what: str) -> None:
    """The same for a job that ends before an attempt could begin, because `what` failed."""
    with _nothing_raised():
        where = f"job {job.own_id() or '-'} on {host()}, {run.path}"
        text = redact(f"run {run.name} has failed: before its attempt began, {what} failed ({where})")
        if _is_asked_for(run):
            EventLog(run.events_file, events.BATCH_SCRIPT).add(events.NOTIFIED, **_send(run, text, verdict.CRASHED))


@contextlib.contextmanager
def _nothing_raised() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        print(f"nobody was told of the run's end: {type(error).__name__}", file=sys.stderr)


def _asked(run: RunDirectory) -> dict[str, Any]:
    return dict(((run.plan().profile or {}).get("given") or {}).get("notify", {}))


def _is_asked_for(run: RunDirectory) -> bool:
    settings = _asked(run)
    return bool(WEBHOOK_VARIABLE in os.environ or settings.get("webhook_file") or settings.get("command"))


def _send(run: RunDirectory, text: str, word: str) -> dict[str, Any]:
    """What became of each way, by its name."""
    settings = _asked(run)
    sent: dict[str, Any] = {}
    if WEBHOOK_VARIABLE in os.environ or settings.get("webhook_file"):
        sent["webhook"] = _by_webhook(settings.get("webhook_file"), text)
    if command := settings.get("command"):
        sent["command"] = _by_command(command, text, run, word)
    return sent


def webhook_problem(file: Path) -> str:
    """What is wrong with a file that holds a webhook's URL; empty if nothing is."""
    try:
        mode = file.stat().st_mode
        url = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        return f"{file} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}"
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        return f"{file} can be read by others (chmod 600)"
    return "" if _is_url(url) else f"{file} does not hold one URL that begins with https://"


def _text(run: RunDirectory, attempt: Attempt, found: dict[str, Any]) -> str:
    facts = attempt.facts()
    how = "has completed" if found["verdict"] == verdict.COMPLETED else f"has failed ({found['verdict']})"
    why = "; ".join(text for text in (found["reason"], found.get("why")) if text)
    where = f"job {facts.get('job_id') or '-'} on {facts.get('nodes', '-')}, attempt {attempt.number}, {run.path}"
    return redact(f"run {run.name} {how}: {why} ({where})")


def _by_webhook(file: str | None, text: str) -> str:
    """What became of it, without the URL."""
    url = os.environ.get(WEBHOOK_VARIABLE, "").strip()
    if not url and file:
        if problem := webhook_problem(Path(file)):
            return problem
        url = Path(file).read_text(encoding="utf-8").strip()
    if not _is_url(url):
        return f"{WEBHOOK_VARIABLE} is not one URL that begins with https://"
    outcome = [f"no answer within {_PATIENCE_S:g} s"]
    # Names are looked up without a time-out, and one that sends a byte now and then would never run into one.
    sender = threading.Thread(target=lambda: outcome.insert(0, _post(url, text)), daemon=True)
    sender.start()
    sender.join(_PATIENCE_S)
    return outcome[0]


def _is_url(text: str) -> bool:
    return text.startswith(("https://", "http://")) and text.isprintable() and " " not in text


def _post(url: str, text: str) -> str:
    import urllib.error
    import urllib.request

    # What Slack takes for markup.
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    body, kind = json.dumps({"text": text}).encode(), {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, kind), timeout=_PATIENCE_S):
            return "sent"
    except urllib.error.HTTPError as error:
        return f"refused with HTTP {error.code}"
    except Exception as error:
        # Its message may have the URL in it.
        cause = getattr(error, "reason", error)
        return (isinstance(cause, OSError) and cause.strerror) or type(cause).__name__


def _by_command(command: Sequence[str], text: str, run: RunDirectory, word: str) -> str:
    environment = os.environ | {"TITAN_SLURM_RUN": str(run.path), "TITAN_SLURM_VERDICT": word}
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, text=True, start_new_session=True)
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    try:
        process.communicate(text + "\n", timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"not done within {_PATIENCE_S:g} s"
    return "sent" if process.returncode == 0 else f"left with exit code {process.returncode}"
