import os
import signal
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest
import torch
from torch import Tensor

from selfkd.data import loader
from selfkd.data.loader import kept_processes, read_stream
from selfkd.data.stream import Stream

CPU = torch.device("cpu")


class Numbers:
    """A stream whose images are their number and the process that reads them."""

    kept = rows = None

    def __getitem__(self, i: int) -> Tensor:
        if i == 13:
            raise ValueError("no image")
        return torch.tensor([i, os.getpid()])


def read(numbers: Numbers, *chunks: list[int], workers: int = 2) -> Iterator[Tensor]:
    return read_stream(numbers, [torch.tensor(chunk) for chunk in chunks], workers, CPU)


def processes(*passes: Iterator[Tensor]) -> set[int]:
    return {int(pid) for one in passes for batch in one for pid in batch[:, 1]}


def gone(pids: set[int]) -> bool:
    found = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return not psutil.wait_procs(found, timeout=120)[1]


def test_processes_go_on_from_pass_to_pass():
    numbers = Numbers()
    with kept_processes():
        first = processes(read(numbers, [0, 1], [2], [3, 4]))
        assert len(first) == 2
        assert processes(read(numbers, [5], [6]), read(numbers, [7], [8])) == first
        other = processes(read(Numbers(), [1], [2]))
        assert not other & first
    assert gone(first | other)


def test_each_pass_has_its_own_order():
    numbers = Numbers()
    with kept_processes():
        for chunks in ([[3, 1], [2]], [[0], [5, 4], [1], [7]], [[9]]):
            found = [batch[:, 0].tolist() for batch in read(numbers, *chunks)]
            assert found == chunks
        assert list(read(numbers)) == []


def test_pass_that_is_left_early():
    numbers = Numbers()
    with kept_processes():
        first = read(numbers, *([i] for i in range(10)))
        next(first)
        first.close()
        assert [batch[:, 0].tolist() for batch in read(numbers, [4], [2, 3])] == [[4], [2, 3]]


def test_two_passes_at_once():
    numbers = Numbers()
    with kept_processes():
        one, other = read(numbers, [0], [1]), read(numbers, [2], [3])
        both = [batch[0, 0].item() for pair in zip(one, other, strict=True) for batch in pair]
    assert both == [0, 2, 1, 3]


def test_error_of_an_image_is_raised_and_the_next_pass_read():
    numbers = Numbers()
    with kept_processes():
        with pytest.raises(ValueError, match="no image"):
            list(read(numbers, [1], [13], [2]))
        assert [batch[0, 0].item() for batch in read(numbers, [4], [5])] == [4, 5]


def test_killed_process_ends_the_pass_and_no_later_one():
    numbers = Numbers()
    with kept_processes():
        for pid in processes(read(numbers, [1], [2])):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="worker"):
            list(read(numbers, *([i] for i in range(10))))
        assert [batch[0, 0].item() for batch in read(numbers, [4], [5])] == [4, 5]


def test_without_the_context_processes_end_with_their_pass():
    numbers = Numbers()
    first = processes(read(numbers, [0], [1]))
    assert gone(first)
    assert not first & processes(read(numbers, [0], [1]))


def test_no_process_where_none_is_wanted():
    with kept_processes():
        assert processes(read(Numbers(), [0], [1], workers=0)) == {os.getpid()}


@pytest.mark.parametrize("small", [0, 2**20], ids=["read ahead", "at once"])
def test_decoded_images_are_read_from_their_file(monkeypatch, small):
    monkeypatch.setattr(loader, "_SMALL", small)
    images = torch.arange(30, dtype=torch.uint8).reshape(10, 3, 1, 1)
    stream = Stream(None, torch.arange(4), 1, "RGB")  # type: ignore[arg-type]
    stream = replace(stream, kept=images, rows=torch.tensor([9, 2, 5, 0]))
    chunks = [torch.tensor(chunk) for chunk in ([1], [0, 2], [3], [3], [1])]
    found = list(read_stream(stream, chunks, 2, CPU))
    for batch, chunk in zip(found, chunks, strict=True):
        assert batch.equal(images[stream.rows[chunk]])
    first = read_stream(stream, chunks, 2, CPU)
    next(first)
    first.close()
    assert not list(read_stream(stream, [], 2, CPU))
