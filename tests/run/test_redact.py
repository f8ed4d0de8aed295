"""What of a text is a secret, and what only looks like one."""

import pytest

from titan_slurm.run.redact import holds_secret, plain_variables, redact, redact_command

KEY = "0123456789abcdef0123"


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "my_secret", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY"])
def test_what_a_secret_variable_holds_is_taken_out(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, KEY)
    assert redact(f"login({KEY!r})") == f"login('[{name}]')"
    assert holds_secret(f"x{KEY}y")
    assert name not in plain_variables((name[:3],))


def test_other_variables_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "a long enough value")
    monkeypatch.setenv("SSH_KEY", "/home/ada/.ssh")
    monkeypatch.setenv("SORT_KEY", "name")
    text = "a long enough value of /home/ada/.ssh/config by name"
    assert redact(text) == text
    assert not holds_secret(text)
    assert plain_variables(("TOKENIZERS_",)) == {"TOKENIZERS_PARALLELISM": "a long enough value"}


@pytest.mark.parametrize(
    ("url", "left"),
    [
        ("https://ada:pass@host.org/x", "https://[redacted]@host.org/x"),
        ("https://ada:p@ss@host.org/x", "https://[redacted]@host.org/x"),
        (f"https://{KEY}@host.org", "https://[redacted]@host.org"),
    ],
)
def test_credentials_in_an_address_are_taken_out(url: str, left: str) -> None:
    assert redact(f"remote = {url}") == f"remote = {left}"
    assert holds_secret(url)


@pytest.mark.parametrize(
    "text", ["https://host.org/a@b", "git@github.com:ada/x.git", "hf://datasets/ada/x@main", "a@b"]
)
def test_an_address_without_credentials_stays(text: str) -> None:
    assert redact(text) == text
    assert not holds_secret(text)


def test_a_command_line_keeps_what_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", KEY)
    command = ["submit", "x", "--set", "data.tokenizer=/a/b", "--set", "x.api_key=1", f"--set=y={KEY}"]
    left = ["submit", "x", "--set", "data.tokenizer=/a/b", "--set", "x.api_key=[redacted]", "--set=y=[MY_TOKEN]"]
    assert redact_command(command) == left
