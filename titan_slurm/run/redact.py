"""Keeping secrets out of the run directory: whoever may read a run need not know its user's keys."""

import os
import re
from collections.abc import Iterator, Sequence

# TOKENIZERS_PARALLELISM holds no token.
_SECRET_NAME = re.compile(r"KEY|TOKEN(?!IZ)|SECRET|PASSW|WEBHOOK$", re.IGNORECASE)
_CREDENTIALS = re.compile(r"(?<=://)[^/\s'\"]+(?=@)")
# Whoever has one may write there.
_WEBHOOK = re.compile(r"https?://[^\s'\"]*(?:hooks\.slack\.com|webhook\.office\.com|/webhooks?/)[^\s'\"]*")
# Shorter values are words that stand in any text.
_SHORTEST = 8
# And a value that short may still be a word of a recipe's.
_SURELY_SECRET = 16
_REDACTED = "[redacted]"


def is_secret_name(name: str) -> bool:
    """Whether a variable or a setting of that name holds a secret."""
    return _SECRET_NAME.search(name) is not None


def holds_secret(text: str) -> bool:
    """Whether a text surely has a secret in it: a password in a URL, or what a secret variable holds."""
    users = _CREDENTIALS.findall(text)
    return (
        _WEBHOOK.search(text) is not None
        or any(":" in user or len(user) >= _SURELY_SECRET for user in users)
        or any(len(value) >= _SURELY_SECRET and value in text for _, value in _secrets())
    )


def redact(text: str) -> str:
    """The text without credentials in URLs, and without the values of secret variables of the environment."""
    text = _WEBHOOK.sub(_REDACTED, _CREDENTIALS.sub(_REDACTED, text))
    for name, value in _secrets():
        if len(value) >= _SHORTEST:
            text = text.replace(value, f"[{name}]")
    return text


def redact_command(command: Sequence[str]) -> list[str]:
    """The words of a command line without secrets: also what NAME=VALUE gives to a name that sounds like one."""
    words = []
    for word in command:
        name, equals, _ = word.partition("=")
        words.append(f"{name}={_REDACTED}" if equals and is_secret_name(name) else redact(word))
    return words


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
