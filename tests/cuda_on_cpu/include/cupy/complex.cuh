// In place of CuPy's own complex.cuh, which needs a CUDA compiler. shim.h names std::complex; complex kernels may
// not compile.
#pragma once
