"""examples/measure/figures.py: what it draws is read off the model and the schedules themselves."""

import numpy as np
import pytest
from PIL import Image

from tinyddpm import UNet, load_model, make_schedule, no_grad, sample
from tinyddpm.autograd.tensor import as_array
from tinyddpm.network.nn import Conv2d
from tinyddpm.network.unet import AttentionBlock, ResBlock


@pytest.fixture(scope="module")
def figures(script):
    return script.loaded("figures")


def test_the_layers_of_a_u_net_and_where_its_skips_lead(figures):
    unet = UNet(2, 2, channels=(8, 16), blocks=1, attention=(False, True))
    layers, links = figures.layers_of(unet, (12, 8))
    R, A, C = ResBlock, AttentionBlock, Conv2d
    full, half = (12, 8), (6, 4)
    assert layers == [
        (C, (*full, 8)), (R, (*full, 8)), (C, (*half, 8)),
        (R, (*half, 16)), (A, (*half, 16)),
        (R, (*half, 16)), (A, (*half, 16)), (R, (*half, 16)),
        (R, (*half, 16)), (A, (*half, 16)), (R, (*half, 16)), (A, (*half, 16)), (C, (*full, 16)),
        (R, (*full, 8)), (R, (*full, 8)), (C, (*full, 2)),
    ]  # fmt: skip
    assert links == [(4, 8), (2, 10), (1, 13), (0, 14)]  # each block on the way up joins what its mirror left
    assert Conv2d.__call__.__qualname__ == "Conv2d.__call__"  # nobody watches any more


def test_attention_is_what_the_block_does(figures):
    """The weights that it notes down, applied to the values, are what the block adds."""
    unet, _ = load_model()
    block = unet.up[0].attention[-1]
    watched, x = figures.Watched(block), np.random.default_rng(0).standard_normal((2, 7, 7, 64), np.float32)
    with no_grad():
        y = as_array(watched(x))
        h = as_array(block.norm(x)).reshape(2, 49, 64)
        np.testing.assert_allclose(watched.p.sum(axis=-1), 1, atol=1e-5)
        attended = block.attention.out(watched.p[:, 0] @ as_array(block.attention.v(h)))
    np.testing.assert_allclose(y, x + as_array(attended).reshape(x.shape), atol=1e-4)


class TestDrawn:
    @pytest.fixture(autouse=True)
    def matplotlib(self):
        pytest.importorskip("matplotlib")

    def test_schedules(self, figures):
        figure = figures.schedules()
        for column, b in enumerate((1, 0.5)):
            share, log_snr = figure.axes[column].lines, figure.axes[2 + column].lines
            assert [line.get_label() for line in share] == list(figures.SCHEDULES)
            for name, one, other in zip(figures.SCHEDULES, share, log_snr):
                s = make_schedule(name, 1000)
                left = b**2 * s.alpha_bar / (b**2 * s.alpha_bar + 1 - s.alpha_bar)
                np.testing.assert_allclose(one.get_ydata(), left, atol=1e-9)
                np.testing.assert_allclose(other.get_ydata(), s.log_snr + 2 * np.log(b), atol=1e-9)

    def test_noising(self, figures, digits, monkeypatch):
        """Under the first of the schedules, and the last, to be drawn sooner."""
        monkeypatch.setitem(figures.noising.__globals__, "SCHEDULES", names := figures.SCHEDULES[::5])
        figure = figures.noising()
        assert len(figure.axes) == 3 * 11
        three, eps = digits()[0][3000, :, :, 0], np.random.default_rng(0).standard_normal((28, 28), np.float32)
        for row, (name, b) in enumerate([(name, 1) for name in names] + [("cosine", 0.5)]):
            bar = make_schedule(name, 1000).alpha_bar
            shown = [axes.images[0].get_array() for axes in figure.axes[11 * row : 11 * row + 11]]
            np.testing.assert_array_equal(shown[0], three)
            for t, x in zip(range(99, 1000, 100), shown[1:]):
                np.testing.assert_allclose(x, np.sqrt(bar[t]) * three + np.sqrt(1 - bar[t]) / b * eps, atol=1e-5)

    def test_encoding(self, figures):
        P = figures.encoding().axes[0].images[0].get_array()
        k, i = np.arange(200)[:, None], np.arange(32)
        np.testing.assert_allclose(P[:, ::2], np.sin(k / 10000 ** (i / 32)), atol=1e-9)
        np.testing.assert_allclose(P[:, 1::2], np.cos(k / 10000 ** (i / 32)), atol=1e-9)

    def test_unet(self, figures):
        axes = figures.unet().axes[0]
        texts = [text.get_text() for text in axes.texts]
        assert {"28 x 28", "14 x 14", "7 x 7"} <= set(texts)
        channels = [int(text) for text in texts if text.isdecimal()]
        assert channels == [shape[2] for _, shape in figures.layers_of(UNet(), (28, 28))[0]]

    def test_attention(self, figures):
        figure = figures.attention()
        assert len(figure.axes) == 18 + 1  # and what the colours mean
        for axes in figure.axes[:18]:
            np.testing.assert_allclose(axes.images[1].get_array().sum(), 1, atol=1e-4)

    @pytest.mark.slow
    def test_losses(self, figures, digits):
        noise, image = (axes.lines[0] for axes in figures.losses().axes)
        unet, diffusion = load_model()
        images, labels = (part[::20] for part in digits(train=False))
        t = np.full(100, noise.get_xdata()[-5] - 1)
        eps = figures.normal(images.shape, int(t[0]))
        loss = diffusion.loss_at(lambda x, t: unet(x, t, labels=labels), images, t, eps).item()
        np.testing.assert_allclose(noise.get_ydata()[-5], loss, rtol=1e-4)
        bar = diffusion.schedule.alpha_bar[t[0]]
        assert 0 < image.get_ydata()[-5] <= loss * (1 - bar) / bar  # for it is clipped

    @pytest.mark.slow
    def test_trajectory(self, figures):
        shown = [axes.images[0].get_array() for axes in figures.trajectory().axes]
        unet, diffusion = load_model()
        settings, guesses = {"steps": 100, "labels": np.array([3, 8]), "guidance": 1.5, "trajectory": True}, []
        keep = lambda t, x, x0: guesses.append(x0[..., 0])
        path = sample(diffusion, unet, (2, 28, 28, 1), callback=keep, **settings)[..., 0]
        for i in range(2):
            np.testing.assert_allclose(shown[20 * i], path[0, i], atol=1e-5)  # x_T
            np.testing.assert_allclose(shown[20 * i + 9], path[-2, i], atol=1e-5)  # what the last step began with
            np.testing.assert_allclose(shown[20 * i + 10], guesses[0][i], atol=1e-5)  # and what was expected then
            np.testing.assert_allclose(shown[20 * i + 19], path[-1, i], atol=1e-5)  # its image is the last x_0

    @pytest.mark.slow
    def test_several_by_one_command(self, figures, tmp_path, example):
        some = ["schedules", "noising", "encoding", "unet", "samplers"]
        example("figures", f"--out={tmp_path}", "--only", *some)
        assert {path.stem for path in tmp_path.iterdir()} == set(some) < set(figures.FIGURES)
        for path in tmp_path.iterdir():
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            assert (pixels[0, 0] == 255).all() and 800 < picture.width < 1300, path  # on white, as wide as a page
            assert (pixels.reshape(-1, 3) != 255).any(axis=1).mean() > 0.02, path
