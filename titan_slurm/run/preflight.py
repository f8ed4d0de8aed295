"""All nodes of a job looked at before its ranks start, from its first node: `look` runs on each, by srun; what they say
is put together here, and bad nodes end the attempt before it trains. Standard library only.
"""

import contextlib
import json
import queue
import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low
from typing import Any

from titan_slurm.run import job
from titan_slurm.run.attempt import Attempt
from titan_slurm.run.files import read_json, write_json
from titan_slurm.run.finding import FAIL, OK, Finding, together
from titan_slurm.run.folder import locked
from titan_slurm.run.look import LOCK, LONGEST_S, START_S, look_folder

# From the closing of the doors to the last process's end.
_CLOSE_S = 30.0
# Which node's clock is right nobody can say; logs and the order of errors are told by them.
CLOCK_TOLERANCE_S = 1.0
# For these a node is to blame also where it is alone.
_ITS_OWN = frozenset({"GPUs", "GPU health"})
# Where they are not the same, the run can do all the same.
_MAY_DIFFER = frozenset({"GPU driver", "C library"})


@dataclass
class Answers:
    """What the nodes have said."""

    here: dict[str, tuple[list[str], int]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    called: dict[str, dict[str, float | str]] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    """Those that srun has seen end before they were through."""
    other: list[str] = field(default_factory=list)
    """Lines that are none of theirs: srun's, and errors."""

    def add(self, line: str) -> None:
        """Take in a line, as srun --label prints it."""
        text = re.sub(r"^\s*\d+: ", "", line.rstrip("\n"))
        try:
            values = json.loads(text)
            node = values["node"]
        except (ValueError, TypeError, KeyError):
            self._add_other(text)
            return
        match values:
            case {"here": [names, port]}:
                self.here[node] = (names, port)
            case {"finding": dict(finding)}:
                # A node without this run's code may have another version's.
                with contextlib.suppress(KeyError):
                    self.findings.append(Finding.from_dict(finding | {"nodes": [node]}))
            case {"facts": facts}:
                self.facts[node] = facts
            case {"called": [other, answer]}:
                self.called.setdefault(node, {})[other] = answer
            case {"end": _}:
                self.ended.add(node)

    def _add_other(self, text: str) -> None:
        if text.strip():
            self.other.append(text)
        if found := re.match(r"srun: error: (?:Task launch for \S+ failed on node )?([\w.-]+): ", text):
            self.gone.add(found[1])


def preflight(attempt: Attempt, command: Sequence[str]) -> bool:
    """Look at the nodes by `command`, which runs `look` on each. Prints what is not right, and writes all into the
    attempt's `preflight.json`. Returns whether the ranks may start."""
    begun = time.monotonic()
    folder = look_folder(attempt)
    folder.mkdir()
    with locked(folder / LOCK):
        answers = _ask(command)
    if not answers.ended and (facts := job.ask()) and (facts.state != "RUNNING" or facts.preempt_time):
        # A signal to the job ends whatever runs in it, these too. `end` finds out what it was.
        print("preflight: the job is asked to leave", flush=True)
        return False
    nodes = job.own_nodes() or sorted(answers.here)
    findings = judge(nodes, answers)
    bad = bad_nodes(nodes, findings)
    for each in findings:
        if each.level != OK:
            print(f"preflight: {each}", flush=True)
    seconds = time.monotonic() - begun
    print(f"preflight: {len(nodes)} nodes looked at in {seconds:.1f} s; {len(bad)} are bad", flush=True)
    value = {"findings": [each.to_dict() for each in findings], "nodes": nodes, "bad": bad, "seconds": seconds}
    write_json(attempt.path / "preflight.json", value)
    return not bad


def result(attempt: Attempt) -> dict[str, Any]:
    """What `preflight` found: {"findings", "nodes", "bad": {node: why}, "seconds"}; empty where it has not run."""
    return read_json(attempt.path / "preflight.json") or {}


def _ask(command: Sequence[str]) -> Answers:
    """Run `command`, hand all nodes each other's addresses, and listen until all have ended or none has more time."""
    answers = Answers()
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        answers.other.append(f"{command[0]}: {error.strerror}")
        return answers
    assert process.stdin and process.stdout
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_listen, args=(process.stdout, lines), daemon=True).start()
    count = len(job.own_nodes()) or 1
    try:
        _read(lines, answers, START_S, lambda: len(answers.here.keys() | answers.gone) >= count)
        everyone = [[node, *where] for node, where in sorted(answers.here.items())]
        # If srun has ended, what it said is read all the same.
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(everyone), file=process.stdin, flush=True)
        _read(lines, answers, LONGEST_S, lambda: answers.here.keys() <= answers.ended | answers.gone)
        # They stay to be called until nobody has more to say.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        _read(lines, answers, _CLOSE_S, lambda: False)
    finally:
        process.terminate()
        try:
            process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            process.kill()
    return answers


def _listen(stream: Iterable[str], lines: "queue.Queue[str | None]") -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _read(lines: "queue.Queue[str | None]", answers: Answers, patience_s: float, is_enough: Callable[[], bool]) -> None:
    """Take in lines until it is enough, nobody says more, or the time is over."""
    deadline = time.monotonic() + patience_s
    while not is_enough():
        try:
            line = lines.get(timeout=max(deadline - time.monotonic(), 0))
        except queue.Empty:
            return
        if line is None:
            # For whoever reads on.
            lines.put(None)
            return
        answers.add(line)


def judge(nodes: Sequence[str], answers: Answers) -> list[Finding]:
    """What the nodes found, and what they have found together."""
    findings = list(answers.findings)
    findings += _answer_findings(nodes, answers)
    findings += _facts_findings(answers.facts)
    findings += _call_findings(answers.called)
    findings += _clock_findings(answers)
    order = {node: number for number, node in enumerate(nodes)}
    findings.sort(key=lambda each: [order.get(node, 0) for node in each.nodes])
    # What is wrong first.
    return sorted(together(findings), key=lambda each: (each.level != FAIL, each.level == OK))


def _answer_findings(nodes: Sequence[str], answers: Answers) -> Iterator[Finding]:
    silent = [node for node in nodes if node not in answers.ended]
    said = [line for line in answers.other if not silent or any(f"{node}:" in line for node in silent)]
    said = said or answers.other
    for node in silent:
        last = f"; srun says: {' / '.join(said[-3:])}"[:400] if said else ""
        what = "fell silent while it was looked at" if node in answers.here else "did not start to look at itself"
        advice = "see whether the node is up, and whether it has the Python, the modules and the image of the job"
        yield Finding("answer", what + last, advice, nodes=(node,))


def _facts_findings(facts: Mapping[str, Mapping[str, str]]) -> Iterator[Finding]:
    """What is not the same on all nodes. Most of them are right."""
    for name in dict.fromkeys(name for each in facts.values() for name in each):
        values = {node: each.get(name, "none") for node, each in facts.items()}
        usual, _ = Counter(values.values()).most_common(1)[0]
        others = {node: value for node, value in values.items() if value != usual}
        if not others:
            yield Finding("versions", f"{name} {usual} on all nodes")
        for node, value in others.items():
            what = f"{name} {value}, and {usual} on {len(values) - len(others)} other nodes"
            advice = "install the same one on all nodes, or leave these out by [slurm.sbatch] exclude"
            yield Finding("versions", what, advice, is_warning=name in _MAY_DIFFER, nodes=(node,))


def _call_findings(called: Mapping[str, Mapping[str, float | str]]) -> Iterator[Finding]:
    """Who cannot be reached. A line between two nodes names both, so the node with most broken lines comes first, and
    explains all of its lines."""
    broken = {
        (node, other): why for node, answers in called.items() for other, why in answers.items() if isinstance(why, str)
    }
    if called and not broken and len(called) > 1:
        yield Finding("network", "all nodes find each other by name and take connections")
    while broken:
        counted = Counter(each for pair in broken for each in set(pair))
        most = max(counted.values())
        # Of two, it is the one that was called.
        worst = next((other for _, other in broken if counted[other] == most), None) or next(
            node for node, _ in broken if counted[node] == most
        )
        of_it = {pair: why for pair, why in broken.items() if worst in pair}
        (caller, other), why = next(iter(of_it.items()))
        what = f"{caller} {why}" if other == worst else why
        advice = "names in the DNS or /etc/hosts, [network] interface, and no firewall between nodes"
        what += f"; {len(of_it)} such lines" if len(of_it) > 1 else ""
        yield Finding("network", what, advice, nodes=(worst,))
        broken = {pair: why for pair, why in broken.items() if worst not in pair}


def _clock_findings(answers: Answers) -> Iterator[Finding]:
    """Clocks against the one in the middle, by those who called the first node."""
    first = min(answers.here, default="")
    ahead = {first: 0.0} if first else {}
    for node, calls in answers.called.items():
        if isinstance(offset := calls.get(first), float):
            ahead[node] = -offset
    if len(ahead) < 2:
        return
    middle = median_low(ahead.values())
    off = {node: value - middle for node, value in ahead.items() if abs(value - middle) > CLOCK_TOLERANCE_S}
    if not off:
        yield Finding("clock", f"all within {CLOCK_TOLERANCE_S:g} s of each other")
    for node, value in off.items():
        what = f"{abs(value):.1f} s {'ahead of' if value > 0 else 'behind'} the others ({CLOCK_TOLERANCE_S:g} s may be)"
        yield Finding("clock", what, "have chrony or ntpd run on the node", is_warning=True, nodes=(node,))


def bad_nodes(nodes: Sequence[str], findings: Iterable[Finding]) -> dict[str, str]:
    """The nodes on which a run would fail, and why. What is wrong on all nodes is the fault of none; of a single node,
    only what other nodes would not have is."""
    bad: dict[str, str] = {}
    failed: dict[str, set[str]] = {}
    for each in findings:
        if each.level == FAIL:
            failed.setdefault(each.name, set()).update(each.nodes)
    for each in findings:
        if each.level != FAIL:
            continue
        everywhere = failed[each.name] >= set(nodes)
        if not everywhere or (len(nodes) == 1 and each.name in _ITS_OWN):
            for node in each.nodes:
                bad.setdefault(node, f"{each.name}: {each.what}")
    return bad
