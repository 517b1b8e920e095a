"""Training: algorithm 1 of Ho et al. 2020.

loop.py is the loop. It needs batches.py (which images a step sees, and the random numbers for them) and optim.py (Adam,
clipping, the learning rate, the moving average). train.py is what users call: `train` checks its arguments, goes on
from checkpoints and keeps time.
"""
