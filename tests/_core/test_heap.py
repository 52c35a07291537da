"""Freed memory goes back to the system between the passes of a check, if passes are long."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch
from torch import nn

from tracer._core import heap
from tracer.data.named_tasks import make_task
from tracer.gradients import GradientEngine, isolated, verification

FRAGMENTED = """
import ctypes
from pathlib import Path
from tracer._core.heap import return_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
resident = lambda: 4096 * int(Path("/proc/self/statm").read_text().split()[1])
blocks = [libc.malloc(1 << 16) for _ in range(4000)]
for block in blocks:
    ctypes.memset(block, 1, 1 << 16)
full = resident()
for block in blocks[:-1]:  # the last one keeps the heap from shrinking by itself
    libc.free(block)
before = resident()
return_freed_memory()
print(full - before, full - resident())
"""


class Free:
    """A sink of gradients that forgets them."""

    def begin(self):
        pass

    def take(self, start, stop, gradients):
        pass


@pytest.mark.skipif(heap._trim() is None, reason="the C library keeps what it keeps")
def test_memory_between_blocks_in_use_is_returned():
    kept, returned = map(int, subprocess.check_output([sys.executable, "-c", FRAGMENTED], text=True).split())
    assert returned > 200 << 20 > kept


@pytest.mark.parametrize(("seconds", "wanted"), [(0.0, "forward room backward room forward backward"), (60.0, None)])
def test_passes_of_a_long_check_make_room_for_one_another(monkeypatch, seconds, wanted):
    events = []
    monkeypatch.setattr(verification, "LONG_SECONDS", seconds)
    monkeypatch.setattr(verification, "return_freed_memory", lambda: events.append("room"))
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    model[0].register_forward_hook(lambda *given: events.append("forward"))
    model[1].register_full_backward_pre_hook(lambda *given: events.append("backward"))
    names = [name for name, _ in model.named_parameters()]
    engine = GradientEngine(model, make_task("image_classification"), names, for_sums=True)
    with isolated(model, names, torch.device("cpu")):
        engine.compute((torch.randn(5, 4), torch.arange(5) % 3), 5, Free())
    assert " ".join(events) == wanted or ("room" not in events and wanted is None)


def test_a_system_without_the_call_keeps_its_memory(monkeypatch):
    heap._trim.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    heap.return_freed_memory()
    heap._trim.cache_clear()
