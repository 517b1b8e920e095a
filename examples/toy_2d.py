"""All of diffusion in half a minute: a tiny network turns noise into a swiss roll. `python examples/toy_2d.py`"""

import pathlib

import numpy as np
from PIL import Image, ImageDraw

from tinyddpm import Diffusion, cli, make_schedule, sample, train
from tinyddpm.autograd.functional import silu
from tinyddpm.bar import progress_bar
from tinyddpm.files.pictures import grid, save_gif
from tinyddpm.network.nn import Linear, Module
from tinyddpm.network.unet import timestep_encoding

T, SIZE, REACH = 100, 240, 1.25  # steps of diffusion; of a picture: its pixels, the largest coordinate in it
DATA = {  # u, from 0 to 1, says how far along the points x + iy are; and how far they stray from there
    "roll": (lambda u: 0.95 / 5.5 * (s := np.sqrt(2.25 + 28 * u)) * np.exp(1j * np.pi * s), 0.01),
    "moons": (lambda u: 0.6 * (np.exp(2j * np.pi * u) + np.sign(u - 0.5) * (0.5 + 0.25j)), 0.02),
    "gaussians": (lambda u: 0.8 * np.exp(0.25j * np.pi * np.floor(8 * u)), 0.05),
}


def draw_data(name, n, rng):
    """Return n points, to the package images of one pixel and two channels (n, 1, 1, 2), and the u of each (n,)."""
    (curve, spread), u = DATA[name], rng.random(n)
    z = curve(u) + spread * rng.standard_normal((n, 2)) @ [1, 1j]
    return z.astype(np.complex64).view(np.float32).reshape(n, 1, 1, 2), u


class MLP(Module):
    """eps_theta(x_t, t). It is shown x, y and t as 16 waves each, long and short, to see what is fine as well."""

    def __init__(self, rng, width=64, layers=4):
        self.first, self.last = Linear(3 * 16, width, rng), Linear(width, 2, rng, scale=0.0)
        self.hidden = [Linear(width, width, rng) for _ in range(layers)]

    def __call__(self, x, t):
        seen = np.concatenate([15 * x.reshape(-1, 2), t[:, None]], axis=1)  # 15: the shortest wave is 0.4 long
        h = self.first(timestep_encoding(seen.ravel(), 16).reshape(len(x), -1).astype(x.dtype))
        for layer in self.hidden:
            h = h + silu(layer(h))
        return self.last(h).reshape(x.shape)


def picture(points, u, caption):
    """Points as lights that add up, as on film, each of the hue of its u: an image (SIZE, SIZE, 3) in [-1, 1]."""
    at = ((points.reshape(-1, 1, 2) * [1, -1] / REACH + 1) * SIZE / 2).clip(3, SIZE - 4)
    pixels = np.floor(at).astype(int) + np.mgrid[-3:4, -3:4].reshape(2, -1).T  # (n, 49, 2), those around each point
    light, where = 0.5 * np.exp(-((pixels + 0.5 - at) ** 2).sum(axis=2) / 1.6), (pixels @ [1, SIZE]).ravel()
    hues = 0.55 + 0.45 * np.cos(2 * np.pi * (0.8 * u[:, None] - [0, 1 / 3, 2 / 3]))
    total = np.stack([np.bincount(where, (light * hue[:, None]).ravel(), SIZE**2) for hue in hues.T], axis=1)
    image = Image.fromarray((255 - 255 * np.exp(-total - [0.03, 0.04, 0.08])).astype(np.uint8).reshape(SIZE, SIZE, 3))
    ImageDraw.Draw(image).text((8, SIZE - 18), caption, fill=(200, 200, 210))
    return np.asarray(image) / 127.5 - 1


def main(data, steps, points, workers, seed, out):
    out.mkdir(parents=True, exist_ok=True)
    rng, b = np.random.default_rng(seed), 3  # b: noise would hide a roll a third of the size too soon
    (x0, u), (fresh, u_fresh) = draw_data(data, 5000, rng), draw_data(data, points, rng)
    diffusion = Diffusion(make_schedule("cosine", T, input_scale=b))
    settings = dict(micro_batch=128, lr=8e-3, decay_steps=steps // 2, workers=workers, seed=seed)
    *_, state = progress_bar(train(MLP(rng), diffusion, x0, steps, 256, **settings), "training", steps, unit="step")
    reverse = sample(diffusion, state.ema.model, (points, 1, 1, 2), rng=seed, workers=workers, trajectory=True)
    forward = [b * fresh]
    for t in range(T):
        forward.append(diffusion.q_step(forward[-1], np.full(points, t), rng.standard_normal(fresh.shape, np.float32)))

    apart = lambda p, q: ((p.reshape(-1, 1, 2) - q.reshape(-1, 2)) ** 2).sum(axis=2) ** 0.5  # each from each
    away, least = apart(reverse[-1], x0), apart(fresh, x0)  # fresh data are what a perfect model would generate
    print(f"from a generated point to the data: {away.min(1).mean():.4f} (from fresh data: {least.min(1).mean():.4f})")
    print(f"from the data to a generated point: {away.min(0).mean():.4f} (to fresh data: {least.min(0).mean():.4f})")

    ends = u[away.argmin(1)]  # so that a generated point has the hue of where it ends
    noising = lambda t: picture(forward[t] / b, u_fresh, f"forward  t = {t}")
    denoising = lambda t: picture(reverse[T - t], ends, f"reverse  t = {t}")
    ts = [0, 10, 20, 40, 60, 100]
    grid(np.stack([noising(t) for t in ts] + [denoising(t) for t in ts[::-1]]), 6, scale=1).save(out / "toy.png")
    frames = [grid(np.stack([noising(t), denoising(T - t)]), scale=1) for t in range(0, T + 1, 2)]
    save_gif(out / "toy.gif", frames, hold=2.5)
    print(f"toy.gif and toy.png are in {out}")


if __name__ == "__main__":
    options = cli.Options(__doc__)
    add = options.add
    add("--data", default="roll", choices=DATA, help="what to learn [%(default)s]")
    add("--steps", type=int, default=2500, least=1, help="of training [%(default)s]")
    add("--points", type=int, default=2000, least=1, help="how many to generate [%(default)s]")
    add("--workers", type=int, default=1, least=1, help="so small a network is fastest with one [%(default)s]")
    add("--seed", type=int, default=0, least=0, help="the same seed gives the same pictures [%(default)s]")
    add("--out", type=cli.any_path, default=pathlib.Path("runs/toy"), help="folder for the results [%(default)s]")
    cli.run(lambda: main(**vars(options.parse_args())))
