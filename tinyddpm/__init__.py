"""tinyddpm: denoising diffusion (Ho, Jain & Abbeel 2020) from NumPy up.

    from tinyddpm import UNet, Diffusion, make_schedule, sample

    unet = UNet(channels=(32, 64, 128))
    diffusion = Diffusion(make_schedule("linear", 1000))
    images = sample(diffusion, unet, shape=(16, 28, 28, 1))

Read autograd, network, diffusion and training; tinyddpm/README.md leads through them. What is in speed computes the
same faster, files and exchange read and write, and `python -m tinyddpm` trains and samples without a line of code.
Besides what is here, diffusion.editing starts from pictures (denoise, sdedit, invert, interpolate, inpaint),
files.pictures makes grids, rows and GIFs of them, and autograd and network.nn have ops and layers for networks of your
own.
"""

from .autograd.backward import backward
from .autograd.tensor import Parameter, Tensor, no_grad
from .diffusion.process import Diffusion
from .diffusion.sample import sample
from .diffusion.schedule import Schedule, make_schedule
from .exchange.diffusers import load_diffusers, save_diffusers
from .exchange.original import load_original
from .files.data import load_digits, load_fashion_mnist, load_mnist
from .files.folder import ImageFolder
from .files.model import load_model, save_model
from .network.unet import UNet
from .training.optim import EMA, Adam
from .training.train import TrainState, train

__version__ = "0.1.0"
__all__ = [
    "EMA", "Adam", "Diffusion", "ImageFolder", "Parameter", "Schedule", "Tensor", "TrainState", "UNet", "backward",
    "load_diffusers", "load_digits", "load_fashion_mnist", "load_mnist", "load_model", "load_original",
    "make_schedule", "no_grad", "sample", "save_diffusers", "save_model", "train",
]  # fmt: skip
