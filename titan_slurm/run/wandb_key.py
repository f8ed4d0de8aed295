"""Where wandb's server would know the user by. Imports nothing of wandb: a login node asks, and a rank."""

import contextlib
import netrc
import os
import re
from pathlib import Path


def wandb_key() -> str:
    """Where a key for wandb's server is, for people; empty if there is none. Looked for where wandb does: environment,
    then the netrc file, by the server's name without its port."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "a key is in the environment"
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        file = os.environ.get("NETRC") or Path.home() / ".netrc"
        host = re.sub(r"^https?://|[:/].*$", "", os.environ.get("WANDB_BASE_URL", "api.wandb.ai"))
        if netrc.netrc(str(file)).authenticators(host):
            return f"a key for {host} is in {file}"
    return ""
