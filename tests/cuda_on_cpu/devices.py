"""The functions of CUDA's runtime and driver that CuPy calls, for two devices whose memory is the host's."""

import bisect
import ctypes
import itertools
import threading

from . import kernels
from .counting import Counts

DEVICES = 2
MEMORY = 80 << 30
PROPERTIES = {
    "name": b"CUDA on CPU",
    "totalGlobalMem": MEMORY,
    "sharedMemPerBlock": 49152,
    "regsPerBlock": 65536,
    "warpSize": 32,
    "maxThreadsPerBlock": 1024,
    "maxThreadsDim": (1024, 1024, 64),
    "maxGridSize": (2147483647, 65535, 65535),
    "multiProcessorCount": 132,
    "major": 9,
    "minor": 0,
    "maxThreadsPerMultiProcessor": 2048,
    "sharedMemPerMultiprocessor": 233472,
    "sharedMemPerBlockOptin": 232448,
    "l2CacheSize": 52428800,
}
ATTRIBUTES = {75: 9, 76: 0, 1: 1024, 16: 132, 10: 32, 97: 232448, 8: 49152, 81: 233472, 39: 2048}  # cudaDevAttr numbers
INVALID_VALUE, OUT_OF_MEMORY, INVALID_DEVICE, PEER_ACCESS_UNSUPPORTED = 1, 2, 101, 217  # cudaError_t
DRIVER_ERRORS = {1: "CUDA_ERROR_INVALID_VALUE: invalid argument", 500: "CUDA_ERROR_NOT_FOUND: named symbol not found"}
COPY_KINDS = ("host to host", "host to device", "device to host", "device to device")  # by cudaMemcpyKind; 4: find out
DEFAULT_STREAMS = (0, 1, 2)  # default, legacy, per thread: of whichever device is current

_libc = ctypes.CDLL(None)
_libc.calloc.restype = ctypes.c_void_p
_libc.calloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]


class Devices:
    """Each public method is the function of that name, with the arguments that CuPy gives it."""

    def __init__(self, counts: Counts, runtime, driver, numbers: bool) -> None:
        self._counts = counts
        self._runtime_error = runtime.CUDARuntimeError
        self._driver_error_type = driver.CUDADriverError
        self._pointer_attributes = runtime.PointerAttributes
        self._version = driver.get_build_version() // 1000 * 1000
        self._numbers = numbers
        self._thread = threading.local()  # .device: the current one
        self._handles = itertools.count(0x1000)
        self._starts: list[int] = []  # of what is allocated, in order
        self._blocks: dict[int, tuple[int, int]] = {}  # by start: size and device
        self._pinned: set[int] = set()
        self._stream_devices: dict[int, int] = {}
        self._images: dict[int, kernels.Image] = {}
        self._functions: dict[int, kernels.Function] = {}

    # ---- devices ----

    def getDevice(self):
        return getattr(self._thread, "device", 0)

    def setDevice(self, device):
        self._check_device(device)
        self._thread.device = device

    def _check_device(self, device):
        if not 0 <= device < DEVICES:
            raise self._runtime_error(INVALID_DEVICE)

    def getDeviceCount(self):
        return DEVICES

    def _ensure_context(self):
        pass

    def deviceGetAttribute(self, attribute, device):
        self._check_device(device)
        return ATTRIBUTES.get(attribute, 0)

    def getDeviceProperties(self, device):
        self._check_device(device)
        return dict(PROPERTIES)

    def deviceGetPCIBusId(self, device):
        self._check_device(device)
        return f"0000:{device:02x}:00.0"

    def deviceCanAccessPeer(self, device, peer):
        return 0

    def deviceEnablePeerAccess(self, peer):
        raise self._runtime_error(PEER_ACCESS_UNSUPPORTED)

    _deviceEnsurePeerAccess = deviceEnablePeerAccess

    def deviceSynchronize(self):
        self._counts.synchronisations["deviceSynchronize"] += 1

    def driverGetVersion(self):
        return self._version

    def ctxGetCurrent(self):
        return self.getDevice() + 1

    def ctxGetDevice(self):
        return self.getDevice()

    def profilerStart(self):
        pass

    def profilerStop(self):
        pass

    # ---- memory ----

    def _allocate(self, size):
        address = _libc.calloc(max(size, 1), 1)
        if not address:
            raise self._runtime_error(OUT_OF_MEMORY)
        if self._numbers:
            ctypes.memset(address, 0xFF, size)  # NaN as a float: nobody may rely on what fresh memory holds
        return address  # on the null device zeros, which cost nothing until they are touched

    def malloc(self, size):
        used = sum(block_size for block_size, device in self._blocks.values() if device == self.getDevice())
        if used + size > MEMORY:
            raise self._runtime_error(OUT_OF_MEMORY)
        address = self._allocate(size)
        bisect.insort(self._starts, address)
        self._blocks[address] = (size, self.getDevice())
        self._counts.allocated(size)
        return address

    def mallocAsync(self, size, stream):
        return self.malloc(size)

    def free(self, address):
        self._counts.synchronisations["free"] += 1
        self._release(address)

    def freeAsync(self, address, stream):
        self._release(address)

    def _release(self, address):
        if not address:
            return
        if address not in self._blocks:
            raise self._runtime_error(INVALID_VALUE)
        size, _ = self._blocks.pop(address)
        self._starts.remove(address)
        self._counts.allocated(-size)
        _libc.free(address)

    def hostAlloc(self, size, flags):
        address = self._allocate(size)
        self._pinned.add(address)
        return address

    def freeHost(self, address):
        self._counts.synchronisations["freeHost"] += 1
        self._pinned.remove(address)
        _libc.free(address)

    def memGetInfo(self):
        used = sum(size for size, device in self._blocks.values() if device == self.getDevice())
        return MEMORY - used, MEMORY

    def _device_of(self, address):
        """Return the device whose memory `address` is in, None where it is in no device's."""
        index = bisect.bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        start = self._starts[index]
        size, device = self._blocks[start]
        return device if address < start + max(size, 1) else None

    def pointerGetAttributes(self, address):
        device = self._device_of(address)
        if device is None:
            return self._pointer_attributes(-2, 0, 0, 0)  # as CUDA has it for memory that it does not know
        return self._pointer_attributes(device, address, 0, 2)

    def pointerGetMemoryType(self, address):
        return 0 if self._device_of(address) is None else 2

    def _copy(self, to, source, size, kind):
        devices = self._device_of(source), self._device_of(to)
        if kind == 4:
            kind = 2 * (devices[0] is not None) + (devices[1] is not None)
        across = kind == 3 and devices[0] != devices[1]
        self._counts.copied("between devices" if across else COPY_KINDS[kind], size)
        ctypes.memmove(to, source, size)
        return kind

    def memcpy(self, to, source, size, kind):
        if self._copy(to, source, size, kind) != 3:
            self._counts.synchronisations["memcpy"] += 1

    def memcpyAsync(self, to, source, size, kind, stream):
        self._copy(to, source, size, kind)

    def memcpyPeer(self, to, to_device, source, source_device, size):
        self._copy(to, source, size, 3)

    def memcpyPeerAsync(self, to, to_device, source, source_device, size, stream):
        self._copy(to, source, size, 3)

    def memset(self, address, value, size):
        self._counts.memset += 1
        ctypes.memset(address, value & 255, size)

    def memsetAsync(self, address, value, size, stream):
        self.memset(address, value, size)

    # ---- streams and events: all is done at once, so there is nothing to wait for ----

    def _new_stream(self):
        handle = next(self._handles)
        self._stream_devices[handle] = self.getDevice()
        return handle

    def streamCreate(self):
        return self._new_stream()

    def streamCreateWithFlags(self, flags):
        return self._new_stream()

    def streamCreateWithPriority(self, flags, priority):
        return self._new_stream()

    def streamDestroy(self, stream):
        del self._stream_devices[stream]

    def streamSynchronize(self, stream):
        self._counts.synchronisations["streamSynchronize"] += 1

    def streamQuery(self, stream):
        pass

    def streamWaitEvent(self, stream, event, flags=0):
        pass

    def streamIsCapturing(self, stream):
        return 0

    def streamGetCtx(self, stream):
        return self._stream_devices.get(stream, self.getDevice()) + 1

    def eventCreate(self):
        return next(self._handles)

    def eventCreateWithFlags(self, flags):
        return next(self._handles)

    def eventDestroy(self, event):
        pass

    def eventRecord(self, event, stream):
        pass

    def eventQuery(self, event):
        pass

    def eventSynchronize(self, event):
        self._counts.synchronisations["eventSynchronize"] += 1

    def eventElapsedTime(self, start, end):
        return 0.001

    # ---- kernels ----

    def _driver_error(self, status):
        """Return a CUDADriverError, without its constructor, which asks the driver for the text."""
        error = self._driver_error_type.__new__(self._driver_error_type)
        error.status = status
        error.args = (DRIVER_ERRORS[status],)
        return error

    def moduleLoadData(self, image):
        handle = next(self._handles)
        self._images[handle] = kernels.load(image)
        return handle

    def moduleUnload(self, module):
        del self._images[module]

    def moduleGetFunction(self, module, name):
        image = self._images[module]
        if name not in image.pointers:
            raise self._driver_error(500)
        handle = next(self._handles)
        self._functions[handle] = kernels.get_function(image, name, self.getDevice())
        return handle

    def funcGetAttribute(self, attribute, function):
        return 64

    def funcSetAttribute(self, function, attribute, value):
        pass

    def occupancyMaxActiveBlocksPerMultiprocessor(self, function, block_size, shared_bytes):
        return 2048 // block_size

    def occupancyMaxPotentialBlockSize(self, function, shared_bytes, limit):
        return 132, 256

    def launchKernel(self, function, gx, gy, gz, bx, by, bz, shared_bytes, stream, arguments, extra):
        kernel = self._functions[function]
        sizes = (gx, gy, gz, bx, by, bz)
        if 0 in sizes or bx * by * bz > 1024 or bz > 64 or max(gy, gz) > 65535 or gx > 2147483647:
            raise self._driver_error(1)
        if extra:
            raise NotImplementedError("cuda_on_cpu takes a kernel's arguments one by one, not in a buffer")
        self._check_devices(kernel, stream, arguments)
        self._counts.kernel_launches[kernel.name] += 1
        if kernel.call is not None and kernel.call((ctypes.c_uint * 6)(*sizes), arguments):
            raise RuntimeError(f"{kernel.name}: the threads of a block wait for each other at different barriers")

    def launchCooperativeKernel(self, function, gx, gy, gz, bx, by, bz, shared_bytes, stream, arguments):
        raise NotImplementedError("cuda_on_cpu does not imitate launchCooperativeKernel")

    def _check_devices(self, kernel, stream, arguments):
        """Raise RuntimeError where a kernel, its stream or an array given by its address is another device's."""
        device = self.getDevice()
        if kernel.device != device:
            raise RuntimeError(f"{kernel.name} was loaded on device {kernel.device}, but device {device} is current")
        if stream not in DEFAULT_STREAMS and self._stream_devices[stream] != device:
            raise RuntimeError(f"{kernel.name} on a stream of another device than the current one, {device}")
        for index in kernel.pointers:
            slot = ctypes.c_void_p.from_address(arguments + 8 * index).value
            address = ctypes.c_void_p.from_address(slot).value
            owner = self._device_of(address) if address else None
            if owner not in (None, device):
                raise RuntimeError(
                    f"{kernel.name}: argument {index} is on device {owner}, but device {device} is current"
                )

    def _handlers(self):
        """Return the functions by their names."""
        extra = ("_ensure_context", "_deviceEnsurePeerAccess")
        return {name: getattr(self, name) for name in dir(self) if not name.startswith("_") or name in extra}
