"""Contexts and threads: the context in which the launcher calls the driver, and launches from several threads."""

from __future__ import annotations

import faulthandler
import threading
import time
from collections import Counter

import pytest
import torch

from tests.support.launcher_calls import BUFFERS, fields, image, launch, problem


def in_thread(function):
    """Runs a function in a new thread, where no context is current; its exception is raised here."""
    raised = []

    def run():
        try:
            function()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


# ---- contexts ----


def test_thread_without_a_context(launcher, stub):
    in_thread(lambda: launch(launcher))
    assert stub.launches()[0].device == 0
    stub.clear()
    in_thread(lambda: launch(launcher))
    assert stub.names() == ["cuCtxGetCurrent", "cuCtxPushCurrent_v2", "cuLaunchKernel", "cuCtxPopCurrent_v2"]
    assert len({call.thread for call in stub.calls()}) == 1
    assert stub.launches()[0].device == 0


def test_context_of_another_device(launcher, stub):
    stub.library.stub_set_device_count(2)
    stub.make_current(0)
    for device in (1, 0, 1):
        launch(launcher, device=device)
        assert stub.current_device() == 0
    assert [x.device for x in stub.launches()] == [1, 0, 1]
    assert len(stub.calls("cuCtxPushCurrent_v2")) == 2


def test_primary_context_is_retained_once(launcher, stub):
    stub.library.stub_set_device_count(2)
    for _ in range(2):
        in_thread(lambda: launch(launcher, device=1))
        in_thread(lambda: launch(launcher, "attention_dbias_sum", "float16", device=1))
    assert [call.numbers[0] for call in stub.calls("cuDevicePrimaryCtxRetain")] == [101]


def test_autograd_thread(launcher, stub):
    class Launching(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            launch(launcher)
            return grad

    x = torch.ones(1, requires_grad=True)
    in_thread(Launching.apply(x).backward)
    assert [x.device for x in stub.launches()] == [0]


# ---- threads ----


@pytest.fixture
def watchdog():
    """Ends the process after a minute: where a thread waits with the GIL, nothing else can end the test."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def test_threads_share_modules_and_keep_their_arguments_apart(launcher, stub, watchdog):
    stub.library.stub_set_device_count(2)
    asked = []

    def slow_image(element, capability):
        asked.append(element)
        time.sleep(0.01)
        return image(element, capability)

    launcher.set_image_source(slow_image)
    kernels = [kernel.name for kernel in launcher.KERNELS]
    expected, start = Counter(), threading.Barrier(6)
    threads = []
    for i in range(6):
        p = problem(scale=float(i + 1))
        calls = [(kernels[(i + j) % len(kernels)], launcher.ELEMENTS[j % 3], j % 2) for j in range(60)]
        params = fields(launcher.pack("float32", p, BUFFERS))
        expected.update((kernel, f"image of {element} for (8, 0)", d, params) for kernel, element, d in calls)

        def run(p=p, calls=calls):
            start.wait()
            for kernel, element, device in calls:
                launch(launcher, kernel, element, device, p=p)

        threads.append(threading.Thread(target=run))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter((x.kernel, x.image, x.device, fields(x.params)) for x in stub.launches()) == expected
    assert Counter(asked) == dict.fromkeys(launcher.ELEMENTS, 2)
    assert len(stub.calls("cuDevicePrimaryCtxRetain")) == 2
    loads = Counter((call.data, call.numbers[0]) for call in stub.calls("cuModuleLoadDataEx"))
    assert set(loads.values()) == {1} and len(loads) == 6


@pytest.mark.parametrize("is_loaded", [False, True], ids=["loading", "launching"])
def test_other_threads_run_while_the_driver_waits(launcher, stub, is_loaded):
    if is_loaded:
        launch(launcher)
    stub.library.stub_hold(1)
    thread = threading.Thread(target=launch, args=(launcher,))
    thread.start()
    time.sleep(0.05)
    assert thread.is_alive()
    assert launcher.multiprocessors(0) == 80
    stub.library.stub_hold(0)
    thread.join()
    assert len(stub.launches()) == 1 + is_loaded
