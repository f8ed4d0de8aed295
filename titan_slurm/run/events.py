"""What happened to a run, and when: `events.jsonl`, one line each, appended and never changed.

There is one writer at a time, so that lines never mix: whoever submits, until the job is submitted; the batch script,
before its ranks start and after they have left; rank 0 between the two; and a command of the user's that finds out that
the job is gone, or ends it.

Every line has `time` (seconds since 1970), `event`, `by` (whose clock that is: "submit", "batch script", "rank 0" or
"command"), `attempt` (null before the first start of a submission) and, where it belongs to one, `step`. Beside these:

    event               by            more
    queued              submit        resumed: whether the run goes on with earlier work
    refused             submit        the scheduler did not take the job
    started             batch script  job_id, nodes, restart_count
    rank_started        rank 0        the first line of the rank's own code
    imports_done        rank 0
    rendezvous          rank 0        all ranks have met
    data_ready          rank 0        the built-in or own text is tokenized
    model_built         rank 0        with optimizer and data loader
    checkpoint_loaded   rank 0        seconds; step 0 where there was none
    first_step          rank 0        the end of the attempt's first step, which compiles
    save_begin          rank 0        waited: seconds, for an earlier save; training stands still from before that on
    save_staged         rank 0        seconds since then, seconds_blocked: of these while training stood still; what
                                      follows goes on in the background
    save_committed      rank 0        bytes, seconds (of writing), seconds_blocked
    save_failed         rank 0        error
    validated           rank 0        seconds
    stop_asked          rank 0        signal
    stopped             rank 0        signal, saved, why
    finished            rank 0        the run's last step is done and saved
    verdict             batch script  verdict, reason, again, delay_s, why, saved_step; late: whether it was found out
                        or command    later, by the next attempt or by whoever looked at the run, so that its time is
                                      not the end of this one
    notified            batch script  webhook, command: "sent" or why not, of those who are told of the run's end

From `queued`, or the `verdict` before, to `started` a run waits for its nodes; from there to `first_step` it starts up;
steps that the metrics have twice are repeated work, and those above `saved_step` at the end of an attempt are lost.
"""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_slurm.run.files import append_json_line

EVENTS_FILE = "events.jsonl"

SUBMIT, BATCH_SCRIPT, RANK_0, COMMAND = "submit", "batch script", "rank 0", "command"

QUEUED = "queued"
REFUSED = "refused"
STARTED = "started"
RANK_STARTED = "rank_started"
IMPORTS_DONE = "imports_done"
RENDEZVOUS = "rendezvous"
DATA_READY = "data_ready"
MODEL_BUILT = "model_built"
CHECKPOINT_LOADED = "checkpoint_loaded"
FIRST_STEP = "first_step"
SAVE_BEGIN = "save_begin"
SAVE_STAGED = "save_staged"
SAVE_COMMITTED = "save_committed"
SAVE_FAILED = "save_failed"
VALIDATED = "validated"
STOP_ASKED = "stop_asked"
STOPPED = "stopped"
FINISHED = "finished"
VERDICT = "verdict"
NOTIFIED = "notified"


@dataclass(frozen=True)
class EventLog:
    """The events of one attempt, or of a submission, as one writer sees them; `path` None: this process is not the one
    that writes."""

    path: Path | None
    by: str
    attempt: int | None = None

    def add(self, event: str, *, step: int | None = None, **more: Any) -> None:
        """Write down that it happens now. A disk that is full does not end a training."""
        if self.path is None:
            return
        line = {"time": time.time(), "event": event, "by": self.by, "attempt": self.attempt}
        with contextlib.suppress(OSError):
            append_json_line(self.path, line | ({} if step is None else {"step": step}) | more)


NO_EVENTS = EventLog(None, "")
