"""cuda.bindings.runtime without a GPU: device memory is host memory, and the stream does nothing until the host waits.

Strict on purpose. Fresh memory holds NaN; addresses must lie in one live allocation of the right kind; guards around
every allocation are checked at each wait; page-locked memory is read when a copy runs, not when it is queued.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from types import SimpleNamespace

import numpy as np
from cuda.bindings import runtime as real

OK = real.cudaError_t.cudaSuccess
GUARD, PATTERN, GARBAGE = 512, 0xA5, 0xFF


class Block:
    """An allocation with guards before and behind it, aligned to 256 bytes."""

    def __init__(self, nbytes):
        self.nbytes = nbytes
        self._whole = np.full(nbytes + 2 * GUARD + 256, PATTERN, np.uint8)
        self._start = GUARD + -(self._whole.ctypes.data + GUARD) % 256
        self.address = self._whole.ctypes.data + self._start
        self._whole[self._start : self._start + nbytes] = GARBAGE

    def check(self):
        before, behind = self._whole[: self._start], self._whole[self._start + self.nbytes :]
        assert (before == PATTERN).all() and (behind == PATTERN).all(), "memory beyond an allocation was written"


class FakeCuda:
    """One device; functions return (error, results...) as cuda-python's do."""

    def __init__(self, capability=(8, 9), memory=1 << 32):
        self.capability, self.total = capability, memory
        self.device, self.host, self.queue, self.freed = {}, {}, [], []
        self.captured = None  # what a capture in progress has recorded
        self.capture_error = OK
        self.count = Counter()

    def __getattr__(self, name):
        value = getattr(real, name)  # enumerations and constants
        assert isinstance(value, type | int), f"{name} is not faked"
        return value

    def find(self, address, nbytes, blocks):
        """The block that holds a range; an error of the test where none does."""
        for block in blocks.values():
            if block.address <= address and address + nbytes <= block.address + block.nbytes:
                return block
        raise AssertionError(f"{nbytes} bytes at {address:#x} are outside of every allocation")

    def submit(self, work):
        """Queue, or record, a piece of work for the stream."""
        (self.queue if self.captured is None else self.captured).append(work)

    def _drain(self):
        work, self.queue = self.queue, []
        for step in work:
            step()
        for block in (*self.device.values(), *self.host.values()):
            block.check()

    # The runtime API, by its own names from here on.

    def cudaGetDeviceCount(self):
        return OK, 1

    def cudaDriverGetVersion(self):
        return OK, 13000

    def cudaRuntimeGetVersion(self):
        return OK, 13050

    def cudaSetDevice(self, device):
        assert device == 0
        return (OK,)

    def cudaGetDeviceProperties(self, device):
        return OK, SimpleNamespace(name=b"Fake GPU\0\0", major=self.capability[0], minor=self.capability[1])

    def cudaGetErrorName(self, error):
        return OK, error.name.encode()

    def cudaGetErrorString(self, error):
        return OK, b"as the test asked for"

    def cudaMemGetInfo(self):
        return OK, self.total - sum(block.nbytes for block in self.device.values()), self.total

    def cudaMalloc(self, size):
        assert self.captured is None, "memory must not be allocated while a stream is captured"
        if size > self.cudaMemGetInfo()[1]:
            return real.cudaError_t.cudaErrorMemoryAllocation, None
        self.count["cudaMalloc"] += 1
        block = Block(size)
        self.device[block.address] = block
        return OK, block.address

    def cudaFree(self, devPtr):
        self.count["frees of memory in use"] += bool(self.queue)
        self._drain()
        block = self.device.pop(devPtr)
        ctypes.memset(block.address, GARBAGE, block.nbytes)
        self.freed.append(block)  # kept, so that a stale address reads NaN instead of ending the process
        return (OK,)

    def cudaHostAlloc(self, size, flags):
        assert self.captured is None
        block = Block(size)
        self.host[block.address] = block
        return OK, block.address

    def cudaFreeHost(self, ptr):
        self._drain()
        self.freed.append(self.host.pop(ptr))
        return (OK,)

    def cudaMemsetAsync(self, devPtr, value, count, stream):
        self.find(devPtr, count, self.device)
        self.submit(lambda: ctypes.memset(devPtr, value, count))
        return (OK,)

    def cudaMemcpyAsync(self, dst, src, count, kind, stream):
        assert self.captured is None, "copies are no part of a captured step"
        self.count["copies in" if kind == real.cudaMemcpyKind.cudaMemcpyHostToDevice else "copies out"] += 1
        if kind == real.cudaMemcpyKind.cudaMemcpyHostToDevice:
            self.find(dst, count, self.device)
            self.find(src, count, self.host)
        else:
            assert kind == real.cudaMemcpyKind.cudaMemcpyDeviceToHost
            self.find(src, count, self.device)
        self.submit(lambda: ctypes.memmove(dst, src, count))
        return (OK,)

    def cudaMemcpy2DAsync(self, dst, dpitch, src, spitch, width, height, kind, stream):
        assert self.captured is None and kind == real.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        assert 0 < width <= min(dpitch, spitch)
        self.count["copies within"] += 1
        self.find(dst, dpitch * (height - 1) + width, self.device)
        self.find(src, spitch * (height - 1) + width, self.device)
        for row in range(height):
            self.submit(lambda to=dst + row * dpitch, at=src + row * spitch: ctypes.memmove(to, at, width))
        return (OK,)

    def cudaStreamCreateWithFlags(self, flags):
        return OK, 77

    def cudaStreamSynchronize(self, stream):
        assert self.captured is None, "a captured stream cannot be waited for"
        self.count["waits"] += 1
        self._drain()
        return (OK,)

    def cudaEventCreateWithFlags(self, flags):
        return OK, SimpleNamespace(at=None)

    def cudaEventRecord(self, event, stream):
        def record():
            self.count["clock"] += 1
            event.at = self.count["clock"]

        self.submit(record)
        return (OK,)

    def cudaEventSynchronize(self, event):
        self._drain()
        return (OK,)

    def cudaEventElapsedTime(self, start, end):
        return OK, float(end.at - start.at)

    def cudaEventDestroy(self, event):
        return (OK,)

    def cudaStreamBeginCapture(self, stream, mode):
        assert self.captured is None
        self.captured = []
        return (OK,)

    def cudaStreamEndCapture(self, stream):
        recorded, self.captured = self.captured, None
        return (OK, recorded) if self.capture_error == OK else (self.capture_error, None)

    def cudaGraphInstantiate(self, graph, flags):
        self.count["graphs"] += 1
        return OK, list(graph)

    def cudaGraphLaunch(self, graphExec, stream):
        self.count["replays"] += 1
        self.queue.extend(graphExec)
        return (OK,)

    def cudaGraphExecDestroy(self, graphExec):
        return (OK,)

    def cudaGraphDestroy(self, graph):
        return (OK,)
