"""The functions of CUDA's runtime and driver that CuPy calls, for two devices whose memory is the host's."""

import bisect
import ctypes
import itertools
import threading

from . import kernels
from .counting import Counts

DEVICES = 2
PROPERTIES = {"name": b"CUDA on CPU", "totalGlobalMem": 80 << 30, "major": 9, "minor": 0, "warpSize": 32}
ATTRIBUTES = {75: 9, 76: 0}  # by cudaDevAttr: the same major and minor
OUT_OF_MEMORY, INVALID_DEVICE = 2, 101  # cudaError_t
DRIVER_ERRORS = {1: "CUDA_ERROR_INVALID_VALUE: invalid argument", 500: "CUDA_ERROR_NOT_FOUND: named symbol not found"}
COPY_KINDS = ("host to host", "host to device", "device to host", "device to device")  # by cudaMemcpyKind; 4: find out
# What is always answered. All is done at once, so that nothing is ever under way; an event is any number
ANSWERS = {
    "getDeviceCount": DEVICES, "getDeviceProperties": PROPERTIES, "deviceCanAccessPeer": 0, "streamIsCapturing": 0,
    "eventCreateWithFlags": 1, "eventDestroy": 0, "eventElapsedTime": 0.001, "eventQuery": 0, "eventRecord": 0,
    "_ensure_context": 0,
}  # fmt: skip
WAITS = ("deviceSynchronize", "eventSynchronize", "streamSynchronize")

_libc = ctypes.CDLL(None)
_libc.calloc.restype = ctypes.c_void_p
_libc.calloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]


class Devices:
    """Each public method is the function of that name, with the arguments that CuPy gives it; `handlers` has them all,
    with those of ANSWERS and WAITS."""

    def __init__(self, counts: Counts, runtime, driver, numbers: bool) -> None:
        self._counts, self._numbers = counts, numbers
        self._runtime_error, self._driver_error_type = runtime.CUDARuntimeError, driver.CUDADriverError
        self._version = driver.get_build_version() // 1000 * 1000
        self._thread = threading.local()  # .device: the current one
        self._handles = itertools.count(0x1000)
        self._starts: list[int] = []  # of what is allocated, in order
        self._blocks: dict[int, tuple[int, int]] = {}  # by start: size and device
        self._images: dict[int, dict[str, kernels.Kernel]] = {}
        self._functions: dict[int, tuple[kernels.Kernel, int]] = {}  # and the device that it is for

    # ---- devices ----

    def getDevice(self):
        return getattr(self._thread, "device", 0)

    def setDevice(self, device):
        if not 0 <= device < DEVICES:
            raise self._runtime_error(INVALID_DEVICE)
        self._thread.device = device

    def deviceGetAttribute(self, attribute, device):
        return ATTRIBUTES[attribute]

    def driverGetVersion(self):
        return self._version

    # ---- memory ----

    def _allocate(self, size):
        address = _libc.calloc(max(size, 1), 1)
        if not address:
            raise self._runtime_error(OUT_OF_MEMORY)
        if self._numbers:
            ctypes.memset(address, 0xFF, size)  # NaN as a float: nobody may rely on what fresh memory holds
        return address  # on the null device zeros, which cost nothing until they are touched

    def malloc(self, size):
        address = self._allocate(size)
        bisect.insort(self._starts, address)
        self._blocks[address] = (size, self.getDevice())
        return address

    def free(self, address):
        self._counts.synchronisations["free"] += 1
        if address:
            del self._blocks[address]
            self._starts.remove(address)
            _libc.free(address)

    def hostAlloc(self, size, flags):
        return self._allocate(size)

    def freeHost(self, address):
        _libc.free(address)

    def _device_of(self, address):
        """Return the device whose memory `address` is in, None where it is in no device's."""
        index = bisect.bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        start = self._starts[index]
        size, device = self._blocks[start]
        return device if address < start + max(size, 1) else None

    def pointerGetMemoryType(self, address):
        return 0 if self._device_of(address) is None else 2

    def memcpyAsync(self, to, source, size, kind, stream):
        devices = self._device_of(source), self._device_of(to)
        if kind == 4:
            kind = 2 * (devices[0] is not None) + (devices[1] is not None)
        name = "between devices" if kind == 3 and devices[0] != devices[1] else COPY_KINDS[kind]
        self._counts.copies[name] += 1
        self._counts.copied_bytes[name] += size
        ctypes.memmove(to, source, size)

    def memsetAsync(self, address, value, size, stream):
        self._counts.memset += 1
        ctypes.memset(address, value & 255, size)

    # ---- kernels ----

    def _driver_error(self, status):
        """Return a CUDADriverError, without its constructor, which asks the driver for the text."""
        error = self._driver_error_type.__new__(self._driver_error_type)
        error.status, error.args = status, (DRIVER_ERRORS[status],)
        return error

    def moduleLoadData(self, image):
        handle = next(self._handles)
        self._images[handle] = kernels.load(image)
        return handle

    def moduleUnload(self, module):
        del self._images[module]

    def moduleGetFunction(self, module, name):
        if name not in self._images[module]:
            raise self._driver_error(500)
        handle = next(self._handles)
        self._functions[handle] = self._images[module][name], self.getDevice()
        return handle

    def launchKernel(self, function, gx, gy, gz, bx, by, bz, shared_bytes, stream, arguments, extra):
        (kernel, device), sizes = self._functions[function], (gx, gy, gz, bx, by, bz)
        if 0 in sizes or bx * by * bz > 1024 or bz > 64 or max(gy, gz) > 65535 or gx > 2147483647:
            raise self._driver_error(1)
        if extra:
            raise NotImplementedError("cuda_on_cpu takes a kernel's arguments one by one, not in a buffer")
        if device != self.getDevice():
            raise RuntimeError(f"{kernel.name} was loaded on device {device}, which is not the current one")
        slots = {i: ctypes.c_void_p.from_address(arguments + 8 * i).value for i in kernel.pointers}
        addresses = {i: ctypes.c_void_p.from_address(slot).value for i, slot in slots.items()}
        self._check_devices(kernel.name, {i: address for i, address in addresses.items() if address})
        self._counts.kernel_launches[kernel.name] += 1
        if kernel.call is not None and kernel.call((ctypes.c_uint * 6)(*sizes), ctypes.c_void_p(arguments)):
            raise RuntimeError(f"{kernel.name}: the threads of a block wait for each other at different barriers")

    def _check_devices(self, name, addresses):
        """Raise RuntimeError where an array given by its address is another device's than the current one's."""
        device = self.getDevice()
        for index, address in addresses.items():
            owner = self._device_of(address)
            if owner not in (None, device):
                raise RuntimeError(f"{name}: argument {index} is on device {owner}, but device {device} is current")

    def checked(self, function):
        """A function of cuBLAS that is given addresses among other numbers, none of which is as large."""

        def call(*arguments):
            self._check_devices(function.__name__, dict(enumerate(arguments)))
            return function(*arguments)

        return call

    # ---- all of them ----

    def _wait(self, name):
        self._counts.synchronisations[name] += 1
        return 0

    def handlers(self):
        """Return the functions by their names."""
        public = [name for name in vars(Devices) if not name.startswith("_") and name not in ("checked", "handlers")]
        waits = {name: lambda *arguments, name=name: self._wait(name) for name in WAITS}
        answers = {name: lambda *arguments, result=result: result for name, result in ANSWERS.items()}
        return {name: getattr(self, name) for name in public} | waits | answers
