"""What is made of what the nodes of a job say of themselves, and of what their GPUs' driver says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from titan_slurm.run.attempt import new_attempt
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.finding import FAIL, OK, Finding, together
from titan_slurm.run.gpus import look_at_gpus
from titan_slurm.run.preflight import Answers, bad_nodes, judge, preflight

DATA = Path(__file__).resolve().parents[1] / "data"
NODES = ["n1", "n2", "n3"]
FakeCommand = Callable[[str, str], Callable[[], list[str]]]


def answers(*lines: tuple[str, str, Any], ended: tuple[str, ...] = ("n1", "n2", "n3")) -> Answers:
    """Of nodes that are all there: what else they say, as srun prints it."""
    said = Answers()
    for number, node in enumerate(NODES):
        said.add(f"{number}: " + json.dumps({"node": node, "here": [[node], 1]}) + "\n")
    for node, kind, value in (*lines, *((node, "end", True) for node in ended)):
        said.add(f" {NODES.index(node)}: " + json.dumps({"node": node, kind: value}) + "\n")
    return said


def wrong(findings: list[Finding]) -> list[str]:
    """The lines of what is not ok."""
    return [str(each) for each in findings if each.level != OK]


def calls(**seen: dict[str, float | str]) -> list[tuple[str, str, Any]]:
    """What nodes say of those that they called."""
    return [(node, "called", [other, answer]) for node, others in seen.items() for other, answer in others.items()]


def test_nodes_that_are_well() -> None:
    facts = [(node, "facts", {"torch": "2.14.1"}) for node in NODES]
    findings = judge(NODES, answers(*facts, *calls(n1={"n2": 0.01, "n3": 0.0}, n2={"n1": 0.0}, n3={"n1": 0.002})))
    assert wrong(findings) == []
    assert [each.what for each in findings if each.name == "versions"] == ["torch 2.14.1 on all nodes"]
    assert bad_nodes(NODES, findings) == {}


def test_a_node_that_falls_silent_is_bad_and_srun_says_why() -> None:
    said = answers(ended=("n1", "n3"))
    said.add("srun: error: n2: task 1: Killed\n")
    assert said.gone == {"n2"}
    [line] = wrong(judge(NODES, said))
    assert line.startswith(
        "FAIL n2 answer: fell silent while it was looked at; srun says: srun: error: n2: task 1: Killed"
    )
    assert list(bad_nodes(NODES, judge(NODES, said))) == ["n2"]


def test_what_is_wrong_everywhere_is_the_fault_of_no_node() -> None:
    small = Finding("shared memory", "/dev/shm has 0.1 GiB", "mount it larger").to_dict()
    said = answers(*((node, "finding", small) for node in NODES))
    findings = judge(NODES, said)
    assert wrong(findings) == ["FAIL n1,n2,n3 shared memory: /dev/shm has 0.1 GiB — mount it larger"]
    assert bad_nodes(NODES, findings) == {}
    # But for the GPUs of a single one.
    lost = Finding("GPUs", "7 of 8 GPUs are here", "drain the node").to_dict()
    findings = judge(["n1"], answers(("n1", "finding", lost)))
    assert bad_nodes(["n1"], findings) == {"n1": "GPUs: 7 of 8 GPUs are here"}


TIMED_OUT = "cannot connect to n2: timed out"


@pytest.mark.parametrize(
    ("seen", "node", "said"),
    [
        ({"n1": {"n2": TIMED_OUT}, "n3": {"n1": 0.0, "n2": TIMED_OUT}}, "n2", f"n1 {TIMED_OUT}; 2 such lines"),
        ({"n2": {"n1": "not known", "n3": "not known"}, "n3": {"n1": 0.0}}, "n2", "not known; 2 such lines"),
        ({"n1": {"n2": TIMED_OUT}}, "n2", f"n1 {TIMED_OUT}"),
    ],
    ids=["nobody_gets_in", "gets_nowhere", "one_line"],
)
def test_the_node_with_most_broken_lines_is_the_one(seen: dict[str, Any], node: str, said: str) -> None:
    findings = judge(NODES, answers(*calls(**seen)))
    [found] = [each for each in findings if each.level == FAIL]
    assert (found.name, found.what, found.nodes) == ("network", said, (node,))
    assert list(bad_nodes(NODES, findings)) == [node]


def test_clocks_are_held_against_the_one_in_the_middle() -> None:
    # n1's own is the one that is off: it is behind the two that call it.
    findings = judge(NODES, answers(*calls(n2={"n1": -3.5}, n3={"n1": -3.4})))
    [line] = wrong(findings)
    assert line.startswith("warn n1 clock: 3.4 s behind the others (1 s may be) — ")
    assert bad_nodes(NODES, findings) == {}


def test_another_driver_is_a_warning_and_another_torch_is_not() -> None:
    facts = [(node, "facts", {"torch": "2.14.1", "GPU driver": "580"}) for node in NODES[:2]]
    findings = judge(NODES, answers(*facts, ("n3", "facts", {"torch": "2.14.0", "GPU driver": "570"})))
    lines = wrong(findings)
    assert lines[0].startswith("FAIL n3 versions: torch 2.14.0, and 2.14.1 on 2 other nodes — ")
    assert lines[1].startswith("warn n3 versions: GPU driver 570, and 580 on 2 other nodes — ")


def test_many_nodes_fit_in_a_line() -> None:
    [one] = together(Finding("GPUs", "8 of 8 GPUs are here", nodes=(f"n{number}",)) for number in range(100))
    assert len(one.nodes) == 100
    assert str(one).endswith("n15 and 84 more GPUs: 8 of 8 GPUs are here")


def test_a_job_that_is_preempted_meanwhile_does_not_train(
    make_run: Callable[..., RunDirectory], fake_command: FakeCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    nobody_answers = ["bash", "-c", "exit 1"]
    for number, (line, expected) in enumerate((("scontrol_preempted", False), ("scontrol_running", True)), start=1):
        fake_command("scontrol", f"cat {DATA}/{line}.txt")
        attempt = new_attempt(run.attempts_folder)
        assert attempt.number == number
        # What befalls all nodes alike is for the ranks to tell.
        assert preflight(attempt, nobody_answers) == expected


REMAPPED = """\
case "$1" in
  --query-remapped*) printf '00000000:1%s:00.0, %s, %s\\n' 0 No No 1 Yes No 2 No Yes ;;
  *) printf '%s, NVIDIA H100 80GB HBM3, 580.1, [N/A], [N/A], Not Active, Not Active\\n' 0 1 2 ;;
esac
"""


def test_gpus_with_rows_of_memory_to_replace(fake_command: FakeCommand) -> None:
    asked = fake_command("nvidia-smi", REMAPPED)
    lines = wrong(list(look_at_gpus(3, "h100")))
    assert [line.partition(" — ")[0] for line in lines] == [
        "warn GPU health: GPU at 00000000:11:00.0: memory rows are to be replaced at its next reset",
        "FAIL GPU health: GPU at 00000000:12:00.0: no spare memory rows are left",
    ]
    assert all(call.endswith("--format=csv,noheader,nounits") for call in asked())


def test_gpus_of_another_kind_and_none_that_answer(fake_command: FakeCommand) -> None:
    fake_command("nvidia-smi", REMAPPED.replace("1 Yes No 2 No Yes", "1 No No 2 No No"))
    [line] = wrong(list(look_at_gpus(3, "a100")))
    assert line.startswith("warn GPU type: NVIDIA H100 80GB HBM3, where a100 is asked for — ")
    fake_command("nvidia-smi", "echo 'Unable to determine the device handle for GPU0: Unknown Error' >&2; exit 15")
    [line] = wrong(list(look_at_gpus(3, None)))
    assert line.startswith(
        "FAIL GPUs: nvidia-smi says: Unable to determine the device handle for GPU0: Unknown Error — "
    )
