"""A plan and a template → the text of the batch script. A pure function: it needs no Slurm and writes nothing."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import jinja2

from titan_slurm.errors import bad_input
from titan_slurm.recipe import find
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.nodes import excluded
from titan_slurm.run.plan import Plan

_TEMPLATES = {"slurm": "base", "local": "local"}


def template_for(cluster: str) -> find.Found:
    """The template that a cluster's scripts are made from, the user's own before the built-in one."""
    return find.template_file(_TEMPLATES[cluster])


def render(plan: Plan, run: RunDirectory, command: str) -> str:
    """The batch script that runs `command` once per rank. Raises BadInputError for a template that cannot be used."""
    template = template_for(plan.cluster)
    environment = jinja2.Environment(
        loader=_loader(template.path.parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"sh": _sh, "directive": _directive}
    context = {
        "plan": plan,
        "run": str(run.path),
        "name": plan.name,
        "python": sys.executable,
        "command": command,
        "sbatch": sbatch_options(plan, run),
        "srun": [],
        "threads": max(1, (os.cpu_count() or 1) // plan.layout.world_size),
    }
    try:
        return environment.get_template(template.path.name).render(context)
    except jinja2.TemplateSyntaxError as error:
        raise bad_input(f"{error.filename or template.path}:{error.lineno}", str(error.message)) from None
    except jinja2.TemplateNotFound as error:
        raise bad_input(str(template.path), f"there is no template {error.name!r} to extend or include") from None
    except Exception as error:
        # A template is a site's own code: whatever it raises is a mistake in it.
        raise bad_input(_template_line(error, template.path), str(error)) from None


def sbatch_options(plan: Plan, run: RunDirectory) -> dict[str, Any]:
    """Options of sbatch by their long names, in the order of the script. True is an option without a value."""
    slurm, layout = plan.slurm, plan.layout
    options = {
        "job-name": plan.name,
        # By this a job is found whose submission was cut short before it was written down.
        "comment": f"titan-slurm {plan.run_id}",
        "nodes": layout.nodes,
        "ntasks-per-node": layout.tasks_per_node,
        "gpus-per-node": slurm["gpus_per_node"] or None,
        "cpus-per-task": slurm["cpus_per_task"],
        "mem": slurm["mem"],
        "time": slurm["time"],
        "partition": slurm["partition"],
        "account": slurm["account"],
        "qos": slurm["qos"],
        "constraint": slurm["constraint"],
        "reservation": slurm["reservation"],
        "exclusive": slurm["exclusive"] or None,
        "exclude": ",".join(excluded(run)) or None,
        "requeue" if plan.requeue["enabled"] else "no-requeue": True,
        # Only the ranks get it, not this script, which has to act after they have left.
        "signal": f"USR2@{slurm['signal_lead']}",
        # Slurm replaces %j and its like, also where a folder is called so.
        "output": str(run.path / "job.log").replace("%", "%%"),
        # A requeued job must not wipe out what its earlier attempts said.
        "open-mode": "append",
    }
    return {name: value for name, value in options.items() if value is not None}


def _loader(folder: Path) -> jinja2.BaseLoader:
    """Templates beside the chosen one by name, and the built-in ones as `titan_slurm/…` whoever else has that name."""
    built_in = jinja2.FileSystemLoader(find.built_in("templates"))
    return jinja2.ChoiceLoader(
        [jinja2.FileSystemLoader(folder), jinja2.PrefixLoader({"titan_slurm": built_in}), built_in]
    )


def _sh(value: Any) -> str:
    return shlex.quote(_one_line(value))


def _directive(value: Any) -> str:
    """sbatch splits an #SBATCH line into words as a shell does, without expanding anything."""
    return shlex.quote(_one_line(value))


def _one_line(value: Any) -> str:
    text = str(value)
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise ValueError(f"{text!r} has a control character, which a batch script cannot hold")
    return text


def _template_line(error: BaseException, template: Path) -> str:
    """`file:line` in the template where an error arose: jinja2 gives its frames the template's own lines."""
    where, traceback = str(template), error.__traceback__
    while traceback:
        file = traceback.tb_frame.f_code.co_filename
        if file.endswith(".j2"):
            where = f"{file}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return where
