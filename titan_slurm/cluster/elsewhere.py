"""Jobs that cannot be seen from here: where file systems are shared, so are runs, but a process is of one machine and a
job id of one Slurm cluster. Another's job with the same id is none of the run's."""

import socket
from typing import Any

from titan_slurm.cluster import slurm


def elsewhere(job: dict[str, Any]) -> str:
    """Where alone a job, or a submission that was cut short, can be looked for and ended; empty if that is here, or if
    nobody wrote it down, or answers now. `job`: as the run directory keeps it."""
    if job["cluster"] == "local":
        host = job.get("host")
        return f"machine {host}" if host and host != socket.gethostname() else ""
    theirs = job.get("slurm_cluster")
    return f"Slurm cluster {theirs}" if theirs and slurm.is_other_cluster(theirs) else ""
