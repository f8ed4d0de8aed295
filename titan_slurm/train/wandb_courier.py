"""What the rank that knows the loss has to do with wandb: it starts a process of its own for it, and in the end gives
that process some seconds to finish. What the process does is said in `titan_slurm.train.wandb_sender`.

Nothing here waits for wandb, nor for a network, before the training has ended. Nothing of wandb is imported.
"""

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time

from titan_slurm.run.attempt import Attempt
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.plan import Plan
from titan_slurm.run.wandb_key import wandb_key

ONLINE, OFFLINE, DISABLED = "online", "offline", "disabled"
# What the rank says last, with the seconds that are left.
FINISHED, STOPPED = "finished", "stopped"

# A run that is over holds its nodes no longer than that for the last steps to arrive; `wandb sync` can send them too.
# Offline nothing is waited for but this machine, and a short run is over before wandb has started.
_FINISHED_S = {ONLINE: 10.0, OFFLINE: 60.0}
_STOPPED_S = 5.0
# SIGTERM goes to every process of a Slurm step, and ends wandb's; what that has not sent is to be sent before the stop.
# Later failures are those of a network, say, which takes its time to come back.
_AGAIN_AFTER_S = (0.0, 30.0, 120.0, 600.0)
# What has gone well for so long fails for another reason.
_LONG_S = 300.0


def disabled_by_recipe(plan: Plan) -> bool:
    """Whether the run is nobody's business at wandb, wherever it is."""
    return not plan.torchtitan["metrics.enable_wandb"] or plan.wandb["mode"] == DISABLED


def mode(plan: Plan) -> str:
    """How the run is logged to wandb: online, offline or disabled."""
    if disabled_by_recipe(plan):
        return DISABLED
    asked = plan.wandb["mode"]
    if asked == "auto":
        # A batch job cannot ask for a key.
        asked = os.environ.get("WANDB_MODE") or (ONLINE if wandb_key() else OFFLINE)
    return {"dryrun": OFFLINE}.get(asked, asked if asked in (ONLINE, OFFLINE) else DISABLED)


class Courier:
    """Keeps the process going that sends the run's metrics to wandb."""

    def __init__(self, run: RunDirectory, attempt: Attempt, mode: str) -> None:
        self._run = run
        self._attempt = attempt
        self._mode = mode
        self._command = [sys.executable, "-m", "titan_slurm.train.wandb_sender", "follow"]
        self._command += [str(run.path), mode, str(os.getpid())]
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._last_word = b""
        self._over = threading.Event()
        self._too_late = False
        self._all_sent = False
        self._thread = threading.Thread(target=self._keep_going, name="wandb-courier", daemon=True)
        self._thread.start()

    def finish(self, *, stopped: bool, seconds_left: float | None) -> None:
        """The training has ended: wait for the last steps to be sent, for some seconds at most."""
        bound = _STOPPED_S if stopped else _FINISHED_S[self._mode]
        if seconds_left is not None:
            bound = max(0.0, min(bound, seconds_left))
        with self._lock:
            # A little less, so that it can leave by itself.
            self._last_word = f"{STOPPED if stopped else FINISHED} {bound * 0.9}\n".encode()
            self._say_last_word()
        self._over.set()
        self._thread.join(bound)
        with self._lock:
            self._too_late = True
            if self._process and self._process.poll() is None:
                self._process.kill()
        if not self._all_sent:
            logging.getLogger().warning(
                f"wandb has not got every step by now ({self._attempt.wandb_log_file} may say why). Nothing is lost: "
                f"{self._run.metrics_file} has them, and the next attempt sends them, or "
                f"`titan-slurm wandb sync {self._run.name}`."
            )

    def _keep_going(self) -> None:
        failures = 0
        while not self._too_late:
            began = time.monotonic()
            self._all_sent = self._send()
            if self._all_sent:
                return
            lived = time.monotonic() - began
            failures = 1 if lived > _LONG_S else failures + 1
            after = _AGAIN_AFTER_S[min(failures, len(_AGAIN_AFTER_S)) - 1]
            if not self._over.is_set():
                logging.getLogger().warning(
                    f"What sends the run to wandb has ended and is started again (in {after:.0f} s); see "
                    f"{self._attempt.wandb_log_file}. The training goes on."
                )
            if after and self._over.wait(after):
                return

    def _send(self) -> bool:
        """Start the process and wait for its end. Returns whether it has sent everything."""
        try:
            with self._attempt.wandb_log_file.open("ab") as log, self._lock:
                if self._too_late:
                    return False
                # The signals that are blocked here are blocked there. It has no session of its own: whoever ends a
                # local job ends its process group.
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
                )
                self._say_last_word()
        except OSError:
            # A full disk, or no more processes.
            return False
        return self._process.wait() == 0

    def _say_last_word(self) -> None:
        process = self._process
        if self._last_word and process and process.stdin and not process.stdin.closed:
            with contextlib.suppress(OSError):
                process.stdin.write(self._last_word)
                process.stdin.close()
