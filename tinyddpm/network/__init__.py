"""The network: layers with parameters (nn.py), and the U-Net of Ho et al. 2020 made of them (unet.py).

checks.py says what a U-Net is made of and called with, and refuses the rest. Next room: diffusion, which takes any
callable for a network and so knows nothing of this one.
"""
