"""Figures of how diffusion works, into runs/figures, all by one command: `python examples/measure/figures.py`

It takes a minute and needs matplotlib (`pip install -e '.[plots]'`). What is about a trained network is drawn from the
model that comes along. `--only schedules unet` draws some; `--help` says what there is.
"""

import contextlib
import math
import pathlib
from unittest import mock

import numpy as np

from tinyddpm import Diffusion, UNet, cli, load_digits, load_model, make_schedule, no_grad, sample
from tinyddpm.autograd.functional import concat, softmax_rows
from tinyddpm.autograd.tensor import as_array
from tinyddpm.network.nn import Conv2d
from tinyddpm.network.unet import AttentionBlock, ResBlock, timestep_encoding
from tinyddpm.speed.workers import worker_threads

SCHEDULES = ("linear", "quadratic", "cosine", "cosine_logsnr", "sigmoid", "sigmoid_logsnr")
COLORS = (
    "#000000",
    "#E69F00",
    "#0072B2",
    "#56B4E9",
    "#D55E00",
    "#CC79A7",
)  # Okabe & Ito 2008: all eyes tell them apart
DASHES = ("-", (0, (6, 2)), (0, (3, 1)), (0, (1, 1)), (0, (6, 1, 1, 1)), (0, (3, 3)))

# --------------------------------------------------------------------------------------------------- how to draw


def new_figure(width, height):
    """An empty page, white, so that it can be read on a dark one."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def show(axes, image, name="", title="", **how):
    """Draw an image (H, W, 1) in [-1, 1], or a map (H, W), without ticks."""
    axes.imshow(image.squeeze(), **({"cmap": "gray", "vmin": -1, "vmax": 1} | how))
    axes.set(xticks=[], yticks=[])
    axes.set_ylabel(name, rotation=0, ha="right", va="center")
    axes.set_title(title, fontsize=10)


def strips(rows, titles, size=0.8):
    """A figure with a row of images for each name, under titles."""
    figure = new_figure(1.5 + size * len(titles), 0.3 + size * len(rows))
    for row, (axes, (name, images)) in enumerate(
        zip(figure.subplots(len(rows), len(titles), squeeze=False), rows.items())
    ):
        for column, (cell, image) in enumerate(zip(axes, images)):
            show(cell, image, "" if column else name, "" if row else titles[column])
    return figure


def digit(label):
    """The first digit of this class in the bundled ones: (1, 28, 28, 1)."""
    images, labels = load_digits()
    return images[np.searchsorted(labels, [label])]


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# --------------------------------------------------------------------------------------- forward: an image into noise


def schedules():
    """What is left of the image at each step, for images that count full (b = 1) and half."""
    figure = new_figure(9, 6)
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for column, b in zip(axes.T, (1, 0.5)):
        for name, color, dashes in zip(SCHEDULES, COLORS, DASHES):
            s = make_schedule(name, 1000, input_scale=b)
            share = s.snr / (1 + s.snr)  # alpha_bar if b is 1
            for cell, values in zip(column, (share, s.log_snr)):
                cell.plot(values, linestyle=dashes, color=color, label=name, linewidth=1.6)
                cell.grid(alpha=0.3)
        column[0].set_title(f"b = {b:g}")
        column[1].set(xlabel="t", ylim=(-16, 16))
    axes[0, 0].set_ylabel("share of the image in the variance of $x_t$\n($\\bar\\alpha_t$ if b = 1)")
    axes[1, 0].set_ylabel("log-SNR, $\\ln\\ b^2 \\bar\\alpha_t / (1 - \\bar\\alpha_t)$")
    axes[0, 1].legend()
    return figure


def noising():
    """A digit on its way into noise, x_t / b, under each schedule, all with the same noise."""
    ts, rows = np.arange(99, 1000, 100), {}
    x0 = digit(3).repeat(len(ts), axis=0)
    eps = normal((1, 28, 28, 1)).repeat(len(ts), axis=0)
    for name, b in [(name, 1) for name in SCHEDULES] + [("cosine", 0.5)]:
        diffusion = Diffusion(make_schedule(name, 1000, input_scale=b))
        rows[name if b == 1 else f"{name}, b = {b}"] = [x0[0], *diffusion.q_sample(x0, ts, eps) / b]
    return strips(rows, ["$x_0$", *(f"t = {t}" for t in ts)])


# ------------------------------------------------------------------------------------------------------- the network


def encoding():
    """What the network is told of a timestep: waves, short ones and long ones, each in a channel of its own."""
    figure = new_figure(9, 4)
    titles = {
        "interleaved": "sine and cosine in turn\n(Vaswani et al. 2017)",
        "ddpm": "sines, then cosines\n(Ho et al. 2020's code)",
    }
    for axes, form in zip(figure.subplots(1, 2, sharey=True), titles):
        P = timestep_encoding(np.arange(200), 64, form)
        picture = axes.imshow(P, cmap="PuOr", vmin=-1, vmax=1, aspect="auto", interpolation="none")
        axes.set(xlabel="channel", title=titles[form])
    figure.axes[0].set_ylabel("timestep t")
    figure.colorbar(picture, ax=figure.axes, label="P(t, channel)")
    return figure


def layers_of(unet, size):
    """Call a U-Net and watch. Return a list of (kind, shape (H, W, C) of what it returned) for each of its layers, in
    order, where a residual block or attention is one; and pairs of places in it, (from, to), of what was laid aside and
    taken up again."""
    layers, outputs, links, inside = [], [], [], []

    def watched(kind):
        call = kind.__call__

        def watch(layer, *inputs):
            inside.append(layer)
            y = call(layer, *inputs)
            inside.pop()
            if not inside:
                layers.append((kind, y.shape[1:]))
                outputs.append(y)
            return y

        return mock.patch.object(kind, "__call__", watch)

    def watched_concat(h, skip):
        links.append((next(i for i, y in enumerate(outputs) if y is skip), len(layers)))
        return concat(h, skip)

    with no_grad(), contextlib.ExitStack() as watching:
        for kind in (Conv2d, ResBlock, AttentionBlock):
            watching.enter_context(watched(kind))
        watching.enter_context(mock.patch("tinyddpm.network.unet.concat", watched_concat))
        unet(np.zeros((1, *size, unet.config["in_channels"]), unet.dtype), np.array([0]))
    return layers, links


def unet():
    """The default U-Net, as seen when it is called: what each layer returns, and what is laid aside for later."""
    from matplotlib.patches import Patch, Rectangle

    layers, links = layers_of(UNet(), (28, 28))
    looks = {Conv2d: ("convolution", "#E69F00"), ResBlock: ("residual block", "#56B4E9"),
             AttentionBlock: ("attention", "#CC79A7")}  # fmt: skip
    figure = new_figure(11, 4.5)
    axes = figure.subplots()
    sizes = sorted({shape[0] for _, shape in layers}, reverse=True)
    place = {i: (i, -2.4 * sizes.index(shape[0])) for i, (_, shape) in enumerate(layers)}
    half = {i: 0.3 + 0.5 * shape[0] / sizes[0] for i, (_, shape) in enumerate(layers)}
    for i, (kind, (_, _, C)) in enumerate(layers):
        x, y = place[i]
        axes.add_patch(Rectangle((x - 0.4, y - half[i]), 0.8, 2 * half[i], color=looks[kind][1]))
        axes.text(x, y, C, ha="center", va="center", fontsize=9)
        if i:
            axes.annotate(
                "",
                (x - 0.4, y),
                (place[i - 1][0] + 0.4, place[i - 1][1]),
                arrowprops={"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0},
            )
    for i, j in links:
        (x, y), (end, _) = place[i], place[j]
        how = {
            "arrowstyle": "->",
            "connectionstyle": f"arc3,rad={-1.2 / (end - x) ** 0.9}",
            "color": "0.5",
            "linewidth": 0.8,
        }
        axes.annotate("", (end, y + half[j]), (x, y + half[i]), arrowprops=how)
    for size in sizes:
        axes.text(-1, -2.4 * sizes.index(size), f"{size} x {size}", ha="right", va="center")
    axes.set(xlim=(-3, len(layers)), ylim=(-2.4 * len(sizes) + 1, 3))
    axes.legend(handles=[Patch(color=color, label=name) for name, color in looks.values()], loc="lower right")
    axes.set_title("what each layer returns: channels, at this height and width; grey: laid aside and taken up again")
    axes.axis("off")
    return figure


class Watched:
    """An attention block that notes down what each position gives each other: p (N, heads, H W, H W)."""

    def __init__(self, block):
        self.block = block

    def __call__(self, x):
        N, H, W, C = x.shape
        attention = self.block.attention
        h = self.block.norm(x).reshape(N, H * W, C)
        q, k = (
            as_array(layer(h)).reshape(N, H * W, attention.heads, -1).swapaxes(1, 2)
            for layer in (attention.q, attention.k)
        )
        self.p = softmax_rows(q @ k.swapaxes(2, 3) / math.sqrt(q.shape[-1]))
        return self.block(x)


def attention():
    """Where the trained network looks: what the marked square takes from each, in the last attention on the way up."""
    from matplotlib.patches import Rectangle

    net, diffusion = load_model()
    net.up[0].attention[-1] = watched = Watched(net.up[0].attention[-1])
    x0, ts, squares = digit(3), (20, 100, 300), ((1, 3), (2, 4), (3, 3), (4, 4), (5, 2), (0, 0))
    figure = new_figure(1.5 + 1.3 * len(squares), 0.4 + 1.3 * len(ts))
    for axes, t in zip(figure.subplots(len(ts), len(squares)), ts):
        x = diffusion.q_sample(x0, np.array([t]), normal(x0.shape))
        with no_grad():
            net(x, np.array([t]), labels=np.array([3]))
        for cell, (i, j) in zip(axes, squares):
            show(cell, x[0], f"t = {t}" if cell is axes[0] else "")
            p = watched.p[0].mean(axis=0)[7 * i + j].reshape(7, 7)
            seen = cell.imshow(p, cmap="cividis", alpha=0.6, extent=(-0.5, 27.5, 27.5, -0.5), vmin=0, vmax=0.5)
            cell.add_patch(Rectangle((4 * j - 0.5, 4 * i - 0.5), 4, 4, fill=False, edgecolor="#D55E00", linewidth=2))
    figure.colorbar(seen, ax=figure.axes, label="share of the attention of the marked square", extend="max")
    return figure


def losses():
    """How wrong the trained network is at each timestep: about the noise, and about the image that this implies."""
    net, diffusion = load_model()
    images, labels = (part[::20] for part in load_digits(train=False))  # held out: 10 of each
    ts = np.unique(np.geomspace(1, 1000, 30).round().astype(int)) - 1

    def errors_at(step):
        t, eps = np.full(len(images), step), normal(images.shape, step)
        x_t = diffusion.q_sample(images, t, eps)
        with no_grad():
            prediction = as_array(net(x_t, t, labels=labels))
        x0 = diffusion.predict_x0(x_t, t, prediction).clip(-1, 1)
        return ((prediction - eps) ** 2).mean(), ((x0 - images) ** 2).mean()

    with worker_threads(None) as run:
        errors = np.array(list(run(errors_at, ts.tolist()))).T
    figure = new_figure(9, 3.5)
    for axes, error, what in zip(figure.subplots(1, 2), errors, ("$\\epsilon$ (the simple loss)", "$x_0$")):
        axes.plot(ts + 1, error, color=COLORS[2])
        axes.set(xscale="log", yscale="log", xlabel="t + 1", ylabel="mean squared error", title=f"predicted {what}")
        axes.grid(alpha=0.3)
    return figure


# -------------------------------------------------------------------------------------- reverse: noise into images


def trajectory():
    """The way back: x_t, and below it the image that the network expects when it sees that."""
    net, diffusion = load_model()
    labels, expected, ts = np.array([3, 8]), [], []

    def keep(t, x, x0):
        ts.append(t)
        expected.append(x0)

    settings = {"labels": labels, "guidance": 1.5, "callback": keep}
    seen = sample(diffusion, net, (2, 28, 28, 1), steps=100, trajectory=True, **settings)  # x_t, for each of ts first
    chosen, rows = np.linspace(0, 99, 10).round().astype(int), {}
    for i, label in enumerate(labels):
        rows[f"{label}: $x_t$"] = [seen[step][i] for step in chosen]
        rows[f"{label}: $\\hat x_0$"] = [expected[step][i] for step in chosen]
    return strips(rows, [f"t = {ts[step]}" for step in chosen])


def samplers():
    """The same digits by each sampler, in more and more steps, all from the same noise."""
    net, diffusion = load_model()
    labels, counts = np.array([2, 3, 5, 8]), (3, 5, 10, 20, 50)
    methods = {"ddpm": {}, "ddim": {}, "ddim, eta = 0.5": {"method": "ddim", "eta": 0.5}, "dpm++": {}}
    figure = new_figure(10.5, 2.4)
    for row, (axes, (name, settings)) in enumerate(zip(figure.subplots(len(methods), len(counts)), methods.items())):
        for column, (cell, steps) in enumerate(zip(axes, counts)):
            settings = {"method": name, "labels": labels, "guidance": 1.5} | settings
            digits = sample(diffusion, net, (len(labels), 28, 28, 1), steps=steps, **settings)
            show(cell, np.concatenate(list(digits), axis=1), "" if column else name, "" if row else f"{steps} steps")
    return figure


FIGURES = {
    figure.__name__: figure for figure in (schedules, noising, encoding, unet, attention, losses, trajectory, samplers)
}


def main():
    about = "\n".join(f"    {name:12}{figure.__doc__}" for name, figure in FIGURES.items())
    parser = cli.Options(f"{__doc__}\n{about}")
    add = parser.add
    add("--only", nargs="+", default=list(FIGURES), choices=FIGURES, metavar="FIGURE", help="some of them [all]")
    add("--out", type=cli.any_path, default=pathlib.Path("runs/figures"), help="folder for the pictures [%(default)s]")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        FIGURES[name]().savefig(args.out / f"{name}.png", dpi=110)
        print(args.out / f"{name}.png", flush=True)


if __name__ == "__main__":
    cli.run(main, needs="matplotlib, pip install -e '.[plots]'")
