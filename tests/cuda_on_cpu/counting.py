"""What the imitated devices have been asked to do."""

from collections import Counter
from collections.abc import Callable


class Counts:
    """Counters since the start or the last `reset`, of both devices together and of all threads.

    `copies` and `copied_bytes` have keys such as "host to device"; "between devices" is the one from one device to the
    other. `memset` counts memsets.

    `synchronisations` counts calls that make the host wait for the device: deviceSynchronize, streamSynchronize,
    eventSynchronize and free. A memcpyAsync into memory that is not pinned waits too, but CuPy follows it by a
    streamSynchronize: counted once. Asking (eventQuery), malloc and hostAlloc are not counted, nor is memset, which the
    host doesn't wait for.

    `in_use` and `peak_in_use` are the bytes that CuPy's pool of the current device has handed out (to arrays, rounded
    up to 512 each), and the most that it had.
    """

    of_the_emulator = False  # that computes; set when it is installed

    def __init__(self) -> None:
        self.pool_in_use: Callable[[], int] = lambda: 0  # set once CuPy is there
        self.calls_of_libraries: Callable[[], Counter[str]] = Counter  # since the process began; set with the libraries
        self.reset()

    def reset(self) -> None:
        """Set the counters to zero and the peak to what is handed out now."""
        self.kernel_launches: Counter[str] = Counter()
        self.calls_of_libraries_before = self.calls_of_libraries()
        self.copies: Counter[str] = Counter()
        self.copied_bytes: Counter[str] = Counter()
        self.synchronisations: Counter[str] = Counter()
        self.memset = 0
        self.peak_in_use = self.in_use

    @property
    def launches(self) -> "Counter[str]":
        """Launches by the name of the kernel or of the function of cuBLAS, as a copy."""
        return self.kernel_launches + self.calls_of_libraries() - self.calls_of_libraries_before

    @property
    def in_use(self) -> int:
        return self.pool_in_use()


counts = Counts()
