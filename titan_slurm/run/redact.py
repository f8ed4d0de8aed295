"""Keeping secrets out of the run directory: whoever may read a run need not know its user's keys."""

import os
import re
from collections.abc import Iterator, Sequence

# TOKENIZERS_PARALLELISM holds no token.
_SECRET_NAME = re.compile(r"KEY|TOKEN(?!IZ)|SECRET|PASSW|WEBHOOK$", re.IGNORECASE)
_CREDENTIALS = re.compile(r"(?<=://)[^/\s'\"]+(?=@)")
# Whoever has one may write there.
_WEBHOOK = re.compile(r"https?://[^\s'\"]*(?:hooks\.slack\.com|webhook\.office\.com|/webhooks?/)[^\s'\"]*")
# What a signed URL gives to whoever has it; not where code has a variable in that place.
_SIGNATURE = re.compile(
    r"(?<=[?&])((?:sig|[\w.-]*(?:signature|token(?!iz)|key|secret|credential|passw)[\w.-]*)=)(?![{$<])[^&\s'\"]+", re.I
)
# Of a script's arguments these are refused: a script for language models has a --pad_token and a --sort_key.
_SECRET_ARGUMENT = re.compile(
    r"secret|passw|passphrase|webhook$|(?:api|access|auth|private|account|service|encryption|ssh|wandb)[_.-]?keys?$"
    r"|(?<!pad)(?<!eos)(?<!bos)(?<!unk)(?<!sep)(?<!cls)(?<!mask)(?<!stop)(?<!image)(?<!audio)(?<!video)(?<!special)"
    r"[_.-]token$|^(?:[a-z]*auth|api|access|hf|hub)?token$",
    re.IGNORECASE,
)
# NAME = "VALUE" anywhere in a line, also in Python with a type, in JSON, and with JSON's backslashes in a notebook.
_QUOTED = re.compile(
    r"""(?P<name>[\w.-]+)(?P<between>(?:\\?["'])?(?:\s*:\s*[\w.\[\]| ]+?)?\s*[=:]\s*)"""
    r"""(?P<open>\\?(?P<quote>["']))(?P<value>[^\r\n]+?)(?P<close>\\?(?P=quote))"""
)
# NAME=VALUE or NAME: VALUE as a line of a patch.
_SETTING = re.compile(
    r"""^(?P<before>[-+ ][ \t]*(?:-[ ]+|export[ ]+|set[ ]+|ENV[ ]+|ARG[ ]+)?"""
    r"""["']?(?P<name>[\w.-]+)["']?[ \t]*[=:][ \t]*)(?P<value>[^\r\n]+)""",
    re.MULTILINE,
)
_NUMBER = re.compile(r"[-+\d._eE]{1,7},?")
# In a file of code a name without quotes around its value is a variable, and `key` is one of the commonest.
_CODE = (".py", ".pyi", ".pyx", ".ipynb", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".rs", ".go", ".js", ".ts")
_WORDS_OF_CODE = frozenset({"key", "keys"})
# Shorter values are words that stand in any text.
_SHORTEST = 8
# And a value that short may still be a word of a recipe's.
_SURELY_SECRET = 16
_REDACTED = "[redacted]"


def is_secret_name(name: str) -> bool:
    """Whether a variable or a setting of that name holds a secret."""
    return _SECRET_NAME.search(name) is not None


def holds_secret(text: str) -> bool:
    """Whether a text surely has a secret in it: a password or a signature in a URL, or what a secret variable holds."""
    users = _CREDENTIALS.findall(text)
    return (
        _WEBHOOK.search(text) is not None
        or _SIGNATURE.search(text) is not None
        or any(":" in user or len(user) >= _SURELY_SECRET for user in users)
        or any(len(value) >= _SURELY_SECRET and value in text for _, value in _secrets())
    )


def redact(text: str) -> str:
    """The text without credentials and signatures in URLs, and the values of the environment's secret variables."""
    text = _SIGNATURE.sub(rf"\1{_REDACTED}", _WEBHOOK.sub(_REDACTED, _CREDENTIALS.sub(_REDACTED, text)))
    for name, value in _secrets():
        if len(value) >= _SHORTEST:
            text = text.replace(value, f"[{name}]")
    return text


def redact_command(command: Sequence[str]) -> list[str]:
    """The words of a command line without secrets: also what NAME=VALUE gives to a name that sounds like one, and the
    word after such a --NAME."""
    words: list[str] = []
    before = ""
    for word in command:
        name, equals, _ = word.partition("=")
        if equals and is_secret_name(name):
            words.append(f"{name}={_REDACTED}")
        elif before.startswith("--") and "=" not in before and is_secret_name(before) and not word.startswith("-"):
            words.append(_REDACTED)
        else:
            words.append(redact(word))
        before = word
    return words


def secret_arguments(arguments: Sequence[str]) -> list[str]:
    """The names of those arguments of a script that surely give it a secret, or the number of one that has no name. The
    path of a key file is none."""
    found = []
    before = ""
    for number, word in enumerate(arguments, 1):
        name, equals, value = word.partition("=")
        if not equals:
            name, value = (before, word) if before.startswith("-") and not word.startswith("-") else ("", word)
        by_name = _SECRET_ARGUMENT.search(name.lstrip("-+")) is not None and not value.startswith(("/", "~"))
        if by_name or holds_secret(word):
            found.append(name or f"argument {number}")
        before = "" if equals else word
    return found


def redact_patch(patch: bytes) -> bytes:
    """A patch of git's without secrets: of a name that sounds like one, what is assigned to it. Nothing else changes,
    not even bytes that are no text."""
    text = redact(patch.decode(errors="surrogateescape"))
    files = re.split(r"^(?=diff --git )", text, flags=re.MULTILINE)
    return "".join(map(_redact_file, files)).encode(errors="surrogateescape")


def _redact_file(patch: str) -> str:
    is_code = patch.partition("\n")[0].rstrip('"').endswith(_CODE)

    def quoted(match: re.Match[str]) -> str:
        if not is_secret_name(match["name"]) or (is_code and match["name"].lower() in _WORDS_OF_CODE):
            return match[0]
        return f"{match['name']}{match['between']}{match['open']}{_REDACTED}{match['close']}"

    def setting(match: re.Match[str]) -> str:
        # Numbers of tokens are no tokens.
        plain = _NUMBER.fullmatch(match["value"]) and not _SECRET_ARGUMENT.search(match["name"])
        if plain or not is_secret_name(match["name"]) or _REDACTED in match["value"]:
            return match[0]
        return f"{match['before']}{_REDACTED}"

    patch = _QUOTED.sub(quoted, patch)
    return patch if is_code else _SETTING.sub(setting, patch)


def _secrets() -> Iterator[tuple[str, str]]:
    for name, value in os.environ.items():
        # The path of a key file is no secret, and stands in front of other paths.
        if is_secret_name(name) and not value.startswith(("/", "~")):
            yield name, value


def plain_variables(prefixes: tuple[str, ...]) -> dict[str, str]:
    """The environment's variables whose names begin so, without secrets, by name."""
    return {
        name: redact(value)
        for name, value in sorted(os.environ.items())
        if name.startswith(prefixes) and not is_secret_name(name)
    }
