"""What cron does not give a program and a login does, and the lines of a crontab that make up for it."""

import contextlib
import os
import pwd
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from titan_slurm.errors import bad_input
from titan_slurm.recipe.resolve import CONFIG_PATH_VARIABLE, ENVIRONMENT
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.find import RUNS_VARIABLE
from titan_slurm.run.plan import Plan
from titan_slurm.run.redact import is_secret_name

# Where sites put Slurm's commands, whose login scripts cron does not read.
_SLURM_FOLDERS = (
    "/usr/bin",
    "/usr/local/bin",
    "/opt/slurm/bin",
    "/opt/slurm/current/bin",
    "/usr/local/slurm/bin",
    "/usr/slurm/bin",
    "/cm/shared/apps/slurm/current/bin",
)
_BARE_PATH = "/usr/bin:/bin"
# Where the jobs' metrics go. sbatch hands these on to them.
_WANDB = ("WANDB_MODE", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_PROJECT")
# Of these a login's profile says nothing in a crontab, and no crontab is a place for them.
_KEYS = ("WANDB_API_KEY", "HF_TOKEN", "TITAN_SLURM_WEBHOOK")


def complete_environment() -> None:
    """Give this process, and the jobs that it submits, what a login would: HOME, USER, and Slurm's commands on the
    PATH. In a job of Slurm's, as those of scrontab are, its variables would be taken for those of the job to come."""
    with contextlib.suppress(KeyError):
        account = pwd.getpwuid(os.getuid())
        os.environ.setdefault("HOME", account.pw_dir)
        os.environ.setdefault("USER", account.pw_name)
    path = os.environ.setdefault("PATH", _BARE_PATH)
    if shutil.which("sbatch") is None:
        folder = next((folder for folder in _SLURM_FOLDERS if os.access(f"{folder}/sbatch", os.X_OK)), None)
        if folder:
            os.environ["PATH"] = f"{path}:{folder}"
    if "SLURM_JOB_ID" in os.environ:
        for name in [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]:
            del os.environ[name]


def check_slurm() -> None:
    """Raises BadInputError where Slurm's commands are not to be found."""
    if shutil.which("sbatch") is None:
        where = f"neither on the PATH ({os.environ['PATH']}) nor in {', '.join(_SLURM_FOLDERS)}"
        hint = "the line that `titan-slurm ensure --print-cron` writes on a login node names its folder"
        raise bad_input("", f"there is no sbatch, {where}", hint)


def crontab(run: RunDirectory, plan: Plan, words: Sequence[str]) -> str:
    """Lines for crontab and for scrontab alike: what the one takes for options is a comment to the other. `words`: the
    arguments of `ensure`. Raises BadInputError for what no crontab can hold."""
    settings = [f"{variable}={_quoted(value)}" for variable, value in _variables(os.environ).items()]
    command = [*_program(), "ensure", *words, "--quiet"]
    line = " ".join(["cd", _quoted(str(Path.cwd())), "&&", *settings, *map(_quoted, command)])
    options = {
        "job-name": f"ensure-{run.name}",
        "time": "00:15:00",
        "ntasks": "1",
        "account": plan.slurm["account"],
        "output": str(run.path.with_name(f".{run.name}.ensure.log")).replace("%", "%%"),
        "open-mode": "append",
    }
    keys = [key for key in _KEYS if key in os.environ]
    return "\n".join(
        [
            f"# Makes sure of run {run.name} every ten minutes: for `crontab -e`, or `scrontab -e` where there is one.",
            *([f"# Not here, and jobs need them: {', '.join(keys)}. Keep such keys in files."] if keys else []),
            *(f"#SCRON --{option}={shlex.quote(value)}" for option, value in options.items() if value),
            f"*/10 * * * * {line}",
        ]
    )


def _program() -> list[str]:
    """This very program, by a path that needs no PATH."""
    script = Path(sys.executable).with_name("titan-slurm")
    return [str(script)] if script.exists() else [sys.executable, "-P", "-m", "titan_slurm"]


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What of the environment decides what is submitted and where, without secrets."""
    named = {"SLURM_CONF", "XDG_CONFIG_HOME", CONFIG_PATH_VARIABLE, *ENVIRONMENT, *_WANDB}
    found = {
        name: value
        for name, value in sorted(environment.items())
        if (name in named or name.startswith("TITAN_SLURM_")) and name != RUNS_VARIABLE and not is_secret_name(name)
    }
    sbatch = shutil.which("sbatch")
    folder = str(Path(sbatch).absolute().parent) if sbatch else "/usr/bin"
    return found if folder in ("/usr/bin", "/bin") else {"PATH": f"{folder}:{_BARE_PATH}"} | found


def _quoted(word: str) -> str:
    """A word for the shell. To cron a percent sign is the end of the line unless there is a backslash before it, which
    the shell takes away where cron has not."""
    if "\n" in word:
        raise bad_input("--print-cron", f"{word!r} has a line break, which no crontab can hold")
    return "\\%".join(shlex.quote(part) if part or "%" not in word else "" for part in word.split("%"))
