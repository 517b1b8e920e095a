"""Faster ways to what the other rooms compute. To learn how diffusion works, nothing in here need be read.

cpu.py and cuda.py hold the twins of functions that are `paired` (see backend.py), for NumPy and CuPy; winograd.py,
group_norm.py and kernels/ are parts of these. shards.py and micro_batches.py share the work of sampling and training
out among workers.py, threads and processes, and ranks.py, the processes of an MPI job.
"""
