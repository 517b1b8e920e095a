"""Run test_emulator.py in this process: `python tests/cuda_on_cpu/selftest.py [options of pytest]`.

It needs a process of its own, since afterwards there is a `cupy` to import, as the project's other tests must not find.
"""

import os
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    os.environ["CUDA_ON_CPU_SELFTEST"] = "1"
    sys.exit(pytest.main([str(Path(__file__).with_name("test_emulator.py")), "-q", *sys.argv[1:]]))
