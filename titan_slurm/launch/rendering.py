"""Templates by Jinja: where they find each other, their filters, and what is wrong with one as BadInputError that names
its file and line. Knows nothing of a plan."""

import contextlib
import functools
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes

from titan_slurm.errors import BadInputError, bad_input
from titan_slurm.recipe import find

_NO_CONTAINER = "this template is for a cluster profile with a [container]"
_BUILT_IN = 'to extend the built-in one, write {% extends "titan_slurm/base.sbatch.j2" %}'


def render(template: find.Found, context: Mapping[str, Any]) -> str:
    """What a template makes of these names. Raises BadInputError for one that cannot be used, or makes nothing."""
    with _mistakes(template):
        text = _environment(template).get_template(template.path.name).render(context)
    if not text.strip():
        raise bad_input(f"{template.path}:1", "the template makes an empty script", _BUILT_IN)
    return text


def source(template: find.Found) -> str:
    """A template's own text. Raises BadInputError if it is none."""
    with _mistakes(template):
        return _source(_environment(template), template.path.name)[0]


def names_in(template: find.Found) -> set[str]:
    """The names that a template uses, apart from those in the base one, which has a place for everything. What it
    extends or includes and is not there is left to `render` to tell. Raises BadInputError for what is no template."""
    environment = _environment(template)
    base = (find.built_in("templates") / "base.sbatch.j2").resolve()
    names: set[str] = set()
    waiting, seen = [template.path.name], {base}
    while waiting:
        name = waiting.pop()
        with _mistakes(template), contextlib.suppress(jinja2.TemplateNotFound):
            text, file = _source(environment, name)
            if file.resolve() in seen:
                continue
            seen.add(file.resolve())
            tree = environment.parse(text, name, str(file))
            names |= _undeclared(tree, file)
            waiting += [each for each in jinja2.meta.find_referenced_templates(tree) if each]
    return names


def _undeclared(tree: jinja2.nodes.Template, file: Path) -> set[str]:
    try:
        return jinja2.meta.find_undeclared_variables(tree)
    except jinja2.TemplateAssertionError as error:
        # Of an unknown filter it says the line, but not the file.
        error.filename = str(file)
        raise


# A template is read once, however many scripts are made from it; when its file changes, jinja2 reads it again.
@functools.cache
def _environment(template: find.Found) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=_loader(template.path.parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"sh": _sh, "directive": _directive}
    return environment


def _loader(folder: Path) -> jinja2.BaseLoader:
    """Templates beside the chosen one by name, and the built-in ones as `titan_slurm/…` whoever else has that name."""
    built_in = _Folder(find.built_in("templates"))
    return jinja2.ChoiceLoader([_Folder(folder), jinja2.PrefixLoader({"titan_slurm": built_in}), built_in])


class _Folder(jinja2.FileSystemLoader):
    """The templates in a folder. Of one that is not UTF-8 it says which, and in which line."""

    def get_source(self, environment: jinja2.Environment, template: str) -> tuple[str, str, Any]:
        try:
            return super().get_source(environment, template)
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            file = str(Path(self.searchpath[0], template))
            raise jinja2.TemplateSyntaxError("is not UTF-8 text", line, template, file) from None


def _source(environment: jinja2.Environment, name: str) -> tuple[str, Path]:
    """A template's text and file."""
    assert environment.loader is not None
    text, file, _ = environment.loader.get_source(environment, name)
    return text, Path(file or name)


@contextlib.contextmanager
def _mistakes(template: find.Found) -> Iterator[None]:
    """Around whatever reads or runs a template."""
    try:
        yield
    except BadInputError:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise bad_input(f"{error.filename or template.path}:{error.lineno}", str(error.message)) from None
    except jinja2.TemplateNotFound as error:
        what = f"there is no template {error.name!r} to extend or include"
        raise bad_input(_line(error, template.path), what) from None
    except RecursionError as error:
        raise bad_input(_line(error, template.path), "the template extends or includes itself", _BUILT_IN) from None
    except Exception as error:
        # A template is a site's own code: whatever it raises is a mistake in it.
        hint = _NO_CONTAINER if str(error) == "'container' is undefined" else ""
        raise bad_input(_line(error, template.path), str(error), hint) from None


def _line(error: BaseException, template: Path) -> str:
    """`file:line` in the template where an error arose: jinja2 gives its frames the template's own lines."""
    where, traceback = str(template), error.__traceback__
    while traceback:
        file = traceback.tb_frame.f_code.co_filename
        if file.endswith(".j2"):
            where = f"{file}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return where


def _sh(value: Any) -> str:
    return shlex.quote(_one_line(value))


def _directive(value: Any) -> str:
    """sbatch splits an #SBATCH line into words as a shell does, without expanding anything. A backslash is an escape to
    it between single quotes too."""
    return shlex.quote(_one_line(value)).replace("\\", "\\\\")


def _one_line(value: Any) -> str:
    text = str(value)
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise ValueError(f"{text!r} has a control character, which a batch script cannot hold")
    return text
