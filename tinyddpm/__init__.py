"""tinyddpm: denoising diffusion (Ho, Jain & Abbeel 2020) from NumPy up.

    from tinyddpm import UNet, Diffusion, make_schedule, sample

    unet = UNet(channels=(32, 64, 128))
    diffusion = Diffusion(make_schedule("linear", 1000))
    images = sample(diffusion, unet, shape=(16, 28, 28, 1))

Besides what is here, tinyddpm.editing starts from pictures (denoise, sdedit, invert, interpolate, inpaint),
tinyddpm.image makes grids, rows and GIFs of them, and tinyddpm.functional, conv, fused and nn have ops and layers for
networks of your own. README.md says in which order to read it all.
"""

from .checkpoint import load_model, save_model
from .data import load_digits, load_fashion_mnist, load_mnist
from .diffusion import Diffusion
from .exchange import load_diffusers, load_original, save_diffusers
from .folder import ImageFolder
from .optim import EMA, Adam
from .sample import sample
from .schedule import Schedule, make_schedule
from .tensor import Parameter, Tensor, backward, no_grad
from .train import TrainState, train
from .unet import UNet

__version__ = "0.1.0"
__all__ = [
    "EMA", "Adam", "Diffusion", "ImageFolder", "Parameter", "Schedule", "Tensor", "TrainState", "UNet", "backward",
    "load_diffusers", "load_digits", "load_fashion_mnist", "load_mnist", "load_model", "load_original",
    "make_schedule", "no_grad", "sample", "save_diffusers", "save_model", "train",
]  # fmt: skip
