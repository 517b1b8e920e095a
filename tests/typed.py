"""The public names as a type checker sees them: `mypy tests/typed.py` passes, and so do the calls in an editor.

It is checked, not run. Where a call is wrong on purpose, the checker has to say so, or else that it was told to ignore.
"""

import numpy as np

import tinyddpm as t
from tinyddpm.diffusion.editing import denoise, inpaint, interpolate, invert, sdedit
from tinyddpm.diffusion.schedule import Schedule
from tinyddpm.files.pictures import grid, rows, save_gif

schedule: Schedule = t.make_schedule("cosine", 1000, input_scale=0.5, s=0.008)
diffusion: t.Diffusion = t.Diffusion(schedule, objective="x0", clip=("dynamic", 0.995, 1.5))
unet: t.UNet = t.UNet(3, 6, channels=(32, 64), attention=[False, True], rng=np.random.default_rng(0), image_size=32)
images: np.ndarray
labels: np.ndarray
images, labels = t.load_digits(train=False)
images, labels = t.load_mnist(full=True, cache="folder")
images, labels = t.load_fashion_mnist()
pictures = t.ImageFolder("folder", 32, channels=3)

loss: t.Tensor = diffusion.loss(unet, images, np.random.default_rng(0))
gradients = t.backward(loss)
for p in unet.parameters():
    step: np.ndarray = -1e-3 * gradients[p]
number: float = loss.item()
with t.no_grad():
    y: t.Tensor = unet(images, np.array([3, 7]), labels=labels)
z: t.Tensor = (2 * y + 1).mean(axis=(1, 2), keepdims=True).reshape(-1, 3)

for state in t.train(unet, diffusion, images, steps=10, workers=None, labels=labels, resume="run.safetensors"):
    metrics: dict[str, float] = state.metrics()
    finished: bool = state.last
    state.save("run.safetensors")
drawn: np.ndarray = t.sample(diffusion, unet, (4, 28, 28, 1), "ddim", [999, 500, 0], rng=None, labels=labels, eta=0.5)
grid(drawn, columns=2).save("digits.png")
rows({"drawn": drawn, "real": images}).save("rows.png")
save_gif("digits.gif", [grid(drawn)])
t.save_model("model.safetensors", state.ema.model, diffusion, dtype="float16")
unet, diffusion = t.load_model()
unet, diffusion = t.load_diffusers("folder", variant="fp16")
t.save_diffusers("folder", unet, diffusion)
bits: float = diffusion.bits_per_dim(unet, images, labels=labels).total
clean: np.ndarray = denoise(diffusion, unet, images, sigma=0.5)
other: np.ndarray = sdedit(diffusion, unet, images, strength=0.5, guidance=2.0, labels=labels)
noise: np.ndarray = invert(diffusion, unet, images, steps=20)
between: np.ndarray = interpolate(diffusion, unet, images[:1], images[1:2], count=8)
whole: np.ndarray = inpaint(diffusion, unet, images, np.zeros((28, 28), bool))

t.make_schedule(1000)  # type: ignore[arg-type]
t.Diffusion(1000)  # type: ignore[arg-type]
t.UNet(channels=32)  # type: ignore[arg-type]
t.sample(diffusion, unet, 4)  # type: ignore[arg-type]
t.backward(images)  # type: ignore[arg-type]
