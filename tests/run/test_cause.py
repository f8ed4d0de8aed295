"""Which of the errors that ranks report is the cause."""

import pytest

from titan_slurm.run.cause import cause_first, is_consequence

LOST = (
    "RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:39999",
    "RuntimeError: [../gloo/transport/tcp/pair.cc:547] Read error [10.0.0.2]: Connection reset by peer",
    "RuntimeError: [../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation",
    "RuntimeError: Application timeout caused pair closure",
    "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.hpp:94, remote process exited or network error",
    "DistBackendError: [1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d store",
    "torch.distributed.DistNetworkError: failed to recv, got 0 bytes. Connection was likely closed.",
    "torch.distributed.DistNetworkError: The client socket has timed out after 600000ms while trying to connect.",
    "torch.distributed.DistStoreError: wait timeout after 600000ms, keys: /titan_slurm/assets",
    "RuntimeError: Rank 1 reached monitoredBarrier, but received errors: Rank 0 failed to pass monitoredBarrier"
    " in 1800000 ms",
    "RuntimeError: Broken pipe",
)
OWN = (
    "ValueError: loss is not a number",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
    "RuntimeError: CUDA error: an illegal memory access was encountered",
    "DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:1, unhandled cuda error, NCCL version 2.29",
    "DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:1, unhandled system error (ncclSystemError)",
    # Not of a collective: the rank was talking with a data server.
    "ConnectionResetError: [Errno 104] Connection reset by peer",
    "RuntimeError: the data ran out after step 3 of 60",
)


def report(rank: int, line: str, time: float, traceback: str = "") -> dict[str, object]:
    return {"rank": rank, "error": line, "traceback": traceback, "time": time}


@pytest.mark.parametrize("line", LOST)
def test_the_loss_of_a_rank_is_a_consequence(line: str) -> None:
    assert is_consequence(report(0, line, 1.0))


@pytest.mark.parametrize("line", OWN)
def test_what_is_a_ranks_own_is_a_cause(line: str) -> None:
    assert not is_consequence(report(0, line, 1.0))


def test_the_cause_comes_first_also_where_its_clock_is_late() -> None:
    errors = [report(rank, LOST[rank % 3], 10.0 + rank) for rank in range(7)] + [report(7, OWN[0], 12.5)]
    assert [each["rank"] for each in cause_first(errors)] == [7, 0, 1, 2, 3, 4, 5, 6]


def test_of_several_causes_and_of_consequences_alone_the_earliest_is_first() -> None:
    assert [each["rank"] for each in cause_first([report(0, OWN[0], 2.0), report(1, OWN[1], 1.0)])] == [1, 0]
    assert [each["rank"] for each in cause_first([report(0, LOST[0], 2.0), report(1, LOST[5], 1.0)])] == [1, 0]


def chain(first: str, last: str) -> str:
    """The traceback of an exception raised while another was handled."""
    frame = 'Traceback (most recent call last):\n  File "rank.py", line 1, in live\n    self._train(plan)\n'
    between = "\n\nDuring handling of the above exception, another exception occurred:\n\n"
    return f"{frame}{first}{between}{frame}{last}\n"


def test_in_a_chain_of_exceptions_the_first_counts() -> None:
    # Closing what an error has left behind fails, too, where a collective is part of it; and the other way round.
    assert not is_consequence(report(0, LOST[0], 1.0, chain(OWN[0], LOST[0])))
    assert is_consequence(report(0, "AttributeError: 'NoneType'", 1.0, chain(LOST[0], "AttributeError: 'NoneType'")))


def test_a_message_of_several_lines() -> None:
    text = (
        "torch.distributed.DistBackendError: NCCL error in: x\nncclUnhandledCudaError: Cuda failure 'uncorrectable ECC'"
    )
    traceback = f'Traceback (most recent call last):\n  File "rank.py", line 1, in live\n{text}\n'
    assert not is_consequence(report(0, text.splitlines()[0], 1.0, traceback))
