"""The CPU kernels among threads and processes: forks, workers, several callers, their number, and Python's lock."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import multiprocessing
from torch.utils.data import DataLoader

import fastattn
from fastattn import _cpu
from tests.support.cpu_runs import in_threads
from tests.support.cpu_workers import Attended, attend, gradients, model, train

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # is multi-threaded, and forks
TASKS = Path("/proc/self/task")
SECONDS = 5


@pytest.fixture(params=["OpenMP", "pool"])
def threading_of(request: pytest.FixtureRequest) -> Iterator[str]:
    """Threads of either kind."""
    _cpu.use_pool(request.param == "pool")
    assert _cpu.threading() == request.param
    try:
        yield request.param
    finally:
        _cpu.use_pool(False)


def is_right(seed: int, expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(attend(seed), expected, strict=True))


# ---- forks ----


def in_a_fork(check: Callable[[], bool]) -> bool:
    """Whether the check holds in a forked child, within seconds."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        try:
            holds = check()
        finally:
            os._exit(0 if "holds" in locals() and holds else 1)
    return os.waitpid(child, 0)[1] == 0


def test_a_fork_that_hangs_or_is_wrong_is_noticed() -> None:
    assert in_a_fork(lambda: True)
    assert not in_a_fork(lambda: False)
    assert not in_a_fork(lambda: signal.raise_signal(signal.SIGALRM) is None)


def test_a_fork_after_use(threading_of: str) -> None:
    """The child has threads of its own, and so has its child."""
    with in_threads(3):
        expected = attend(0)

        def check() -> bool:
            return _cpu.threading() == "pool" and is_right(0, expected) and is_right(0, expected)

        assert in_a_fork(lambda: check() and in_a_fork(check))
        assert in_a_fork(lambda: in_a_fork(check))  # the first child never calls
        assert _cpu.threading() == threading_of and is_right(0, expected)


def test_a_fork_during_a_call(threading_of: str) -> None:
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            attend(1)

    with in_threads(2):
        expected = attend(0)
        worker = threading.Thread(target=work)
        worker.start()
        try:
            for _ in range(10):
                assert in_a_fork(lambda: is_right(0, expected))
        finally:
            stop.set()
            worker.join()
        assert is_right(0, expected)


@pytest.mark.long
def test_workers_of_a_data_loader(threading_of: str) -> None:
    with in_threads(2):
        expected = [torch.stack(attend(i)) for i in range(6)]
        loader = DataLoader(Attended(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=20)
        for x, y in zip(loader, expected, strict=True):
            assert torch.equal(x, y)


# ---- several callers ----


def test_several_python_threads_at_once(threading_of: str) -> None:
    with in_threads(2):
        expected = [attend(i) for i in range(4)]

        def work(i: int) -> bool:
            torch.set_num_threads(2)  # each thread has OpenMP's setting of its own
            return all(is_right(i, expected[i]) for _ in range(10))

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))


@pytest.mark.long
def test_processes_that_train_together(tmp_path: Path) -> None:
    x = torch.randn(4, 40, 32)
    expected = gradients(model(), x)
    multiprocessing.spawn(train, (2, x, str(tmp_path)), nprocs=2)
    for rank in range(2):
        for a, b in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# ---- the number of threads ----


def nanoseconds() -> dict[str, int]:
    """How long each thread of this process has run."""
    return {task.name: int((task / "schedstat").read_text().split()[0]) for task in TASKS.iterdir()}


def working(call: Callable[[], object]) -> int:
    """How many threads do a part of the work, which takes many of the scheduler's ticks: it counts in these."""
    before = nanoseconds()
    call()
    spent = [time - before.get(task, 0) for task, time in nanoseconds().items()]
    return sum(x > sum(spent) / 100 for x in spent)


@pytest.mark.skipif(not (TASKS / str(os.getpid()) / "schedstat").exists(), reason="needs Linux's /proc with schedstat")
@pytest.mark.parametrize("count", [1, 2, 3])
def test_as_many_threads_as_torch_has(count: int, threading_of: str) -> None:
    q, k, v = (torch.randn(2, 8, 1000, 64) for _ in range(3))

    def call() -> None:
        with torch.no_grad(), fastattn.use_backend("cpu"):
            for _ in range(3):
                fastattn.scaled_dot_product_attention(q, k, v)

    with in_threads(count):
        attend(0)
        assert working(call) == count


@pytest.mark.skipif(not (TASKS / str(os.getpid()) / "schedstat").exists(), reason="needs Linux's /proc with schedstat")
def test_a_small_call_stays_in_its_thread(threading_of: str) -> None:
    q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
    with in_threads(3), torch.no_grad(), fastattn.use_backend("cpu"):
        assert working(lambda: [fastattn.scaled_dot_product_attention(q, k, v) for _ in range(10_000)]) == 1


# ---- Python's lock ----


def test_other_python_threads_run_during_a_call() -> None:
    q, k, v = (torch.randn(1, 1, 4000, 64) for _ in range(3))
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(1e-3)

    other = threading.Thread(target=tick)
    other.start()
    try:
        with in_threads(1), torch.no_grad(), fastattn.use_backend("cpu"):
            fastattn.scaled_dot_product_attention(q, k, v)
            before = ticks[0]
            begun = time.perf_counter()
            fastattn.scaled_dot_product_attention(q, k, v)
            seconds, during = time.perf_counter() - begun, ticks[0] - before
    finally:
        stop.set()
        other.join()
    assert during > 200 * seconds / 4, f"{during} ticks in {seconds:.3f} s"
