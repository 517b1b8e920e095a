"""Automatic differentiation: arrays that remember how they were made, and the chain rule back through that.

Read tensor.py (a tensor, and an op with its derivative beside it), backward.py (the chain rule), then the ops that
diffusion needs: functional.py, conv.py and fused.py. Next room: network.
"""
