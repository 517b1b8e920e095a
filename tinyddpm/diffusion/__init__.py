"""Diffusion: how noise is added to images, what a network has to learn to take it away, and how it then makes images.

Read schedule.py (how much noise at each step), process.py (the forward process, its posterior, the simple loss) and
sample.py (the way back). Then, as you like, losses.py and bound.py (other losses, the variational bound, bits per
dimension), clipping.py (how a predicted image is kept where images are) and editing.py (what starts from pictures).
checks.py refuses what does not fit, evaluation.py calls the network without gradients. Next room: training.
"""
