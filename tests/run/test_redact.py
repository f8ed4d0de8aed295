"""What of a text is a secret, and what only looks like one."""

import pytest

from titan_slurm.run.redact import holds_secret, plain_variables, redact, redact_command, redact_patch, secret_arguments

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
        ("https://host.org/x?sv=1&sig=a%3Db&y=2", "https://host.org/x?sv=1&sig=[redacted]&y=2"),
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


def test_a_command_line_loses_what_follows_a_secret_name() -> None:
    command = ["submit", "x", "--", "--hf_token", "hf_abc", "--api_key=1", "--use_key", "--lr", "3"]
    left = ["submit", "x", "--", "--hf_token", "[redacted]", "--api_key=[redacted]", "--use_key", "--lr", "3"]
    assert redact_command(command) == left


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--hf_token", "hf_abc", "--api-key=1", "db_password=x"], ["--hf_token", "--api-key", "db_password"]),
        (["--token", "x", "--authtoken", "y"], ["--token", "--authtoken"]),
        (["https://ada:pass@host"], ["argument 1"]),
        (["--pad_token", "<pad>", "--max_tokens", "512", "--sort_key", "name", "--token", "--lr", "1"], []),
        (["--private_key", "/home/ada/.ssh/id", "--tokenizer=gpt2", "--no_token_type"], []),
    ],
)
def test_arguments_that_surely_are_secrets(arguments: list[str], names: list[str]) -> None:
    assert secret_arguments(arguments) == names


@pytest.mark.parametrize(
    ("file", "line", "left"),
    [
        ("conf.yml", "+  api_key: sk-abc def\r", "+  api_key: [redacted]\r"),
        ("run.sh", "-export HF_TOKEN='a b'", "-export HF_TOKEN='[redacted]'"),
        ("conf.ini", " DB_PASSWORD=123456", " DB_PASSWORD=[redacted]"),
        ("a.json", '+{"api_key": "abc", "x": "y"}', '+{"api_key": "[redacted]", "x": "y"}'),
        ("a.toml", "+max_tokens = 4096", "+max_tokens = 4096"),
        ("a.py", '+login(token="hf_abc")', '+login(token="[redacted]")'),
        ("a.py", "+API_KEY: str = 'abc'", "+API_KEY: str = '[redacted]'"),
        ("a.py", '+    tokens = batch[key] if key == "a" else sorted(x, key="b")', None),
        ("a.py", "+token = os.environ['HF_TOKEN']", None),
        ("a.ipynb", '+    "API_KEY = \\"abc\\"\\n",', '+    "API_KEY = \\"[redacted]\\"\\n",'),
    ],
)
def test_a_patch_loses_what_is_given_to_a_secret_name(file: str, line: str, left: str | None) -> None:
    head = f"diff --git a/{file} b/{file}\n--- a/{file}\n+++ b/{file}\n@@ -1 +1 @@\n"
    end = "\n+\udcff\n"
    patch, expected = (
        f"{head}{text}{end}".encode(errors="surrogateescape") for text in (line, line if left is None else left)
    )
    assert redact_patch(patch) == expected


def test_a_command_line_keeps_what_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", KEY)
    command = ["submit", "x", "--set", "data.tokenizer=/a/b", "--set", "x.api_key=1", f"--set=y={KEY}"]
    left = ["submit", "x", "--set", "data.tokenizer=/a/b", "--set", "x.api_key=[redacted]", "--set=y=[MY_TOKEN]"]
    assert redact_command(command) == left
