"""The U-Net: its shapes, what reaches what, its whole gradient, and the sizes it refuses."""

import json
import math

import numpy as np
import pytest
import reference
from gradcheck import check_model
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyddpm import UNet, backward, no_grad
from tinyddpm.autograd.tensor import Parameter
from tinyddpm.network.checks import ENCODINGS
from tinyddpm.network.nn import Conv2d
from tinyddpm.network.unet import timestep_encoding

TINY = dict(channels=(4, 8), blocks=1, attention=(False, True), groups=2)


def awake(unet, seed=0):
    """Move the layers that start as zero off it, so that every path through the network counts."""
    rng = np.random.default_rng(seed)
    for p in unet.parameters():
        if not p.data.any():
            p.data = (0.3 * rng.standard_normal(p.shape)).astype(p.dtype)
    return unet


def batch(n=2, size=8, channels=1, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, size, size, channels)).astype(dtype), rng.integers(0, 1000, n)


@settings(max_examples=15)
@given(
    channels=st.lists(st.sampled_from([4, 8, 12]), min_size=1, max_size=3).map(tuple),
    blocks=st.integers(1, 2), seed=st.integers(0, 100), images=st.sampled_from([(1, 1), (3, 3), (3, 6)]),
    heads=st.sampled_from([1, 2]), data=st.data(),
)  # fmt: skip
def test_any_architecture_runs_and_every_parameter_is_reached(channels, blocks, seed, images, heads, data):
    attention = tuple(data.draw(st.booleans()) for _ in channels)
    unet = awake(UNet(*images, channels, blocks, attention, heads, groups=2, rng=seed))
    height, width = 2 ** (len(channels) - 1) * 2, 2 ** (len(channels) - 1) * 3
    x = np.random.default_rng(seed).standard_normal((2, height, width, images[0])).astype(np.float32)
    y = unet(x, np.array([0, 7]))
    assert y.shape == (2, height, width, images[1]) and y.dtype == np.float32
    gradients = backward((y * y).sum())
    assert set(gradients) == set(unet.parameters())
    assert all(g.dtype == np.float32 for g in gradients.values())


@pytest.mark.parametrize(
    ("channels", "blocks", "attention", "heads", "groups", "images"),
    [
        ((4, 8), 1, (False, True), 1, 2, (1, 1)),
        ((8, 8, 8), 2, (True, False, True), 2, 4, (3, 6)),
        ((4, 8, 12), 1, (False, True, False), 4, 4, (2, 2)),
        ((8,), 3, (True,), 2, 1, (1, 1)),
    ],
)
def test_it_is_the_network_of_the_paper(channels, blocks, attention, heads, groups, images):
    """Against the plain one in reference.py, which goes through the layers by name."""
    unet = awake(UNet(*images, channels, blocks, attention, heads, groups).to(dtype="float64"), seed=1)
    for p in unet.parameters():  # every gain and bias counts too
        p.data = p.data + 0.1 * np.random.default_rng(2).standard_normal(p.shape)
    x = np.random.default_rng(3).standard_normal((2, 8, 12, images[0]))
    t = np.array([3, 777])
    expected = reference.unet(unet.state_dict(), x, t, channels, blocks, attention, heads, groups)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(unet(x, t).data, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({"head_channels": 2}, {"head_channels": 2}),  # one to four heads
        ({"middle_attention": False}, {}),
        ({"norm_eps": 0.1}, {"eps": 0.1}),
        ({"downsample_padding": 1}, {"padding": ((1, 1), (1, 1))}),
        ({"classes": 5}, {"labels": np.array([4, 1])}),
        ({"center_input": True}, {}),
        ({"image_size": 8}, {}),
    ],
    ids=lambda options: next(iter(options), ""),
)
def test_its_options(options, plain):
    """Each against the plain network; all but the size change what comes out."""
    shape = dict(channels=(4, 8), blocks=1, attention=(True, True), groups=2)
    unet = awake(UNet(**shape, **options).to(dtype="float64"), seed=1)
    x, t = batch(dtype=np.float64)
    labels = plain.get("labels")
    y = unet(x, t, labels=labels).data
    x = 2 * x - 1 if "center_input" in options else x
    expected = reference.unet(unet.state_dict(), x, t, (4, 8), 1, (True, True), 1, 2, **plain)
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-9)
    without = awake(UNet(**shape).to(dtype="float64"), seed=1).state_dict()
    ignored = reference.unet(without, batch(dtype=np.float64)[0], t, (4, 8), 1, (True, True), 1, 2)
    assert (np.abs(y - ignored).max() > 1e-4) == ("image_size" not in options)


@pytest.mark.parametrize("patch", [2, 3])
def test_patches_are_the_channels_of_a_network_for_smaller_images(patch):
    """Pixel (p i + a, p j + b) is channel p a + b of position (i, j), of each colour the first, then the next."""
    shape = dict(channels=(4, 8), blocks=1, attention=(True, True), groups=2, image_size=(4 * patch, 6 * patch))
    unet = awake(UNet(3, 6, **shape, patch=patch).to(dtype="float64"), seed=1)
    x = np.random.default_rng(3).standard_normal((2, 4 * patch, 6 * patch, 3))
    t, within = np.array([3, 777]), [(a, b) for a in range(patch) for b in range(patch)]
    squares = np.concatenate([x[:, a::patch, b::patch] for a, b in within], axis=3)
    expected = reference.unet(unet.state_dict(), squares, t, (4, 8), 1, (True, True), 1, 2)
    y = unet(x, t).data
    assert y.shape == (2, 4 * patch, 6 * patch, 6) and np.abs(y).max() > 0.1
    np.testing.assert_allclose(np.concatenate([y[:, a::patch, b::patch] for a, b in within], axis=3), expected, 1e-9)


def test_the_gradient_of_the_class_embedding():
    unet = awake(UNet(**TINY, classes=3).to(dtype="float64"))
    x, t = batch(n=3, dtype=np.float64)
    loss = lambda: (unet(x, t, labels=np.array([2, 0, 2])) ** 2).sum()
    check_model(loss, [unet.class_embedding.w], np.random.default_rng(0))
    gradient = backward(loss())[unet.class_embedding.w]
    assert not gradient[1].any() and gradient[0].any() and gradient[2].any()


class TestLabelDropout:
    unet = awake(UNet(**TINY, classes=3, label_dropout=0.3))

    def test_no_label_is_a_vector_of_its_own(self):
        x, t = batch(n=4)
        assert self.unet.class_embedding.w.shape == (4, 16)
        y = [self.unet(x, t, labels=np.full(4, label)).data for label in (0, 1, 2, -1)]
        assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(y) for b in y[:i])
        np.testing.assert_array_equal(self.unet(x, t).data, y[-1])
        mixed = self.unet(x, t, labels=np.array([2, -1, 0, -1])).data
        np.testing.assert_allclose(mixed, [y[2][0], y[3][1], y[0][2], y[3][3]], rtol=1e-4, atol=1e-5)
        plain = awake(UNet(**TINY, classes=4))  # the last of four classes, if one knows it
        plain.load_state_dict(self.unet.state_dict())
        np.testing.assert_array_equal(plain(x, t, labels=np.full(4, 3)).data, y[-1])

    def test_labels_are_dropped_with_its_probability_if_there_is_a_generator(self):
        x, t, labels = np.ones((500, 2, 2, 1), np.float32), np.full(500, 7), np.ones(500, np.uint8)
        told, untold = (self.unet(x, t, labels=np.full(500, label)).data for label in (1, -1))
        np.testing.assert_array_equal(self.unet(x, t, labels=labels).data, told)
        y = self.unet(x, t, labels=labels, rng=np.random.default_rng(0)).data
        is_told, is_untold = (np.isclose(y, z, atol=1e-5).all(axis=(1, 2, 3)) for z in (told, untold))
        assert (is_told ^ is_untold).all() and abs(is_untold.mean() - 0.3) < 0.05
        assert (labels == 1).all()  # the caller's own

    def test_bad_input(self):
        x, t = batch()
        for bad in ([0, 3], [-2, 0]):
            with pytest.raises(ValueError, match="labels: expected 2 integers in -1 ... 2, one for each image, got"):
                self.unet(x, t, labels=np.array(bad))
        with pytest.raises(ValueError, match="label_dropout: 0.1 of what labels[?] Give classes too"):
            UNet(**TINY, label_dropout=0.1)
        for bad in (1.0, -0.1, "a"):
            with pytest.raises(ValueError, match=r"label_dropout: expected a number in \[0, 1\), got"):
                UNet(**TINY, classes=3, label_dropout=bad)


def test_the_size_of_its_images_is_remembered():
    assert UNet(**TINY).config["image_size"] is None
    assert UNet(**TINY, image_size=28).config["image_size"] == (28, 28)
    assert UNet(**TINY, image_size=np.array([28, 30])).config["image_size"] == (28, 30)
    assert UNet(**TINY, image_size=28)(*batch(size=8)).shape == (2, 8, 8, 1)


def test_its_configuration_is_json_whatever_numbers_it_is_given():
    numpy = dict(classes=np.int64(3), head_channels=np.int64(4), norm_eps=np.float32(0.5), image_size=np.int64(8),
                 downsample_padding=np.int64(1), middle_attention=np.True_, center_input=np.False_)  # fmt: skip
    plain = {name: value.item() for name, value in numpy.items()} | {"image_size": [8, 8]}
    config = json.loads(json.dumps(UNet(**TINY, **numpy).config))
    assert {name: config[name] for name in plain} == plain


def test_a_class_begins_as_a_vector_of_variance_1():
    w = UNet(**(TINY | {"channels": (32, 32), "classes": 64})).class_embedding.w.data
    assert w.shape == (64, 128) and abs(w.std() - 1) < 0.02 and abs(w.mean()) < 0.05


def test_the_generator_for_dropout_reaches_every_block():
    unet = UNet(**TINY, dropout=0.5)
    rng, seen = np.random.default_rng(0), []
    blocks = [unet.middle1, unet.middle2, *(block for level in unet.down + unet.up for block in level.res)]
    for block in blocks:
        norm2 = block.norm2
        # the masks are drawn between norm2 and conv2: the generator has moved on since the block before
        block.norm2 = lambda h, silu, norm2=norm2: (
            seen.append(rng.bit_generator.state["state"]["state"]) or norm2(h, silu)
        )
    x, t = batch()
    unet(x, t, rng=rng)
    seen.append(rng.bit_generator.state["state"]["state"])
    assert len(seen) == len(set(seen)) == len(blocks) + 1


def test_it_starts_as_zero_since_its_last_convolution_does():
    x, t = batch()
    assert not UNet(**TINY)(x, t).data.any()


def test_the_layers_that_start_as_zero_are_those_of_ho_et_al():
    zero = [name for name, p in UNet(**TINY).named_parameters().items() if name.endswith(".w") and not p.data.any()]
    assert set(zero) == reference.STARTS_AS_ZERO


def test_number_of_parameters():
    # counted by hand for channels (4, 8), one block, attention below, time embedding of 16:
    def conv(c, o, k=3):
        return k * k * c * o + o

    def res(c, o):
        return 2 * c + conv(c, o) + (16 * o + o) + 2 * o + conv(o, o) + (conv(c, o, 1) if c != o else 0)

    attention = 2 * 8 + 4 * (8 * 8 + 8)
    total = (4 * 16 + 16) + (16 * 16 + 16) + conv(1, 4)
    total += res(4, 4) + conv(4, 4) + res(4, 8) + attention  # down: skips of 4, 4, 4, 8
    total += 2 * res(8, 8) + attention  # middle
    total += res(8 + 8, 8) + res(8 + 4, 8) + 2 * attention + conv(8, 8) + res(8 + 4, 4) + res(4 + 4, 4)  # up
    total += 2 * 4 + conv(4, 1)
    assert UNet(**TINY).size == total


def test_the_parameters_of_the_same_network_in_diffusers():
    assert (
        UNet().size == 3_939_393
    )  # UNet2DModel(block_out_channels=(32, 64, 128), layers_per_block=2, attention at 7x7)


@pytest.mark.slow
def test_the_whole_gradient_in_float64():
    unet = awake(UNet(**TINY, heads=2).to(dtype="float64"))
    x, t = batch(dtype=np.float64)
    image, weights = Parameter(x), np.random.default_rng(3).standard_normal(x.shape)
    rng = np.random.default_rng(4)
    loss = lambda: (unet(image, t) * weights).sum()
    for _ in range(3):
        gradients = check_model(loss, [image, *unet.parameters()], rng, h=1e-6)
    assert {g.dtype for g in gradients.values()} == {np.dtype("float64")}
    for name, p in unet.named_parameters().items():  # and parameter by parameter, so that none hides behind the others
        if not name.endswith("k.b"):
            check_model(loss, [p], rng)
        else:  # a bias of the keys adds the same to all scores of a query, which softmax ignores
            assert abs(backward(loss())[p]).max() < 1e-12


def test_float32_and_float64_agree():
    x, t = batch()
    narrow, wide = awake(UNet(**TINY)), awake(UNet(**TINY)).to(dtype="float64")
    np.testing.assert_allclose(narrow(x, t).data, wide(x.astype(np.float64), t).data, atol=1e-4)


def test_the_timestep_reaches_every_residual_block():
    unet = awake(UNet(**TINY))
    x, _ = batch(n=1)
    blocks = [unet.middle1, unet.middle2, *(block for level in unet.down + unet.up for block in level.res)]
    assert len(blocks) == 8
    for block in blocks:  # with all other paths for t cut
        kept = [(other, other.time.w.data) for other in blocks]
        for other, w in kept:
            other.time.w.data = w if other is block else np.zeros_like(w)
        assert np.abs(unet(x, np.array([3])).data - unet(x, np.array([400])).data).max() > 1e-5
        for other, w in kept:
            other.time.w.data = w


def test_the_timesteps_term_is_the_same_at_every_pixel():
    block = awake(UNet(**TINY)).down[0].res[0]
    block.conv1.w.data = np.zeros_like(block.conv1.w.data)
    seen = []
    block.norm2 = lambda h, silu: seen.append(h.data) or h
    block(np.ones((2, 4, 4, 4), np.float32), np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32), None)
    assert np.ptp(seen[0], axis=(1, 2)).max() == 0 and np.abs(seen[0]).max() > 0


def test_images_do_not_see_each_other():
    unet = awake(UNet(**TINY))
    x, t = batch(n=3)
    together = unet(x, t).data
    for i in range(3):
        np.testing.assert_allclose(unet(x[i : i + 1], t[i : i + 1]).data[0], together[i], atol=1e-5)


def test_every_pixel_sees_every_other_through_the_attention_in_the_middle():
    unet = awake(UNet(**TINY))
    x = Parameter(batch(n=1)[0])
    y = unet(x, np.array([5]))
    assert (backward(y[0, 0, 0, 0].reshape(1).sum())[x] != 0).all()


def test_each_skip_connection_carries_something():
    """Setting what one skip brings to 0 in the first block it enters changes the output: none is left unused."""
    unet = awake(UNet(**TINY))
    x, t = batch(n=1)
    before = unet(x, t).data
    for level, above in zip(unet.up, ([8, 8], [8, 4])):
        for block, c in zip(level.res, above):
            kept, cut = block.shortcut.w.data, block.conv1.w.data
            block.shortcut.w.data, block.conv1.w.data = kept.copy(), cut.copy()
            block.shortcut.w.data[:, :, c:] = 0
            block.conv1.w.data[:, :, c:] = 0
            assert np.abs(unet(x, t).data - before).max() > 1e-4
            block.shortcut.w.data, block.conv1.w.data = kept, cut


def test_downsampling_pads_right_and_bottom_only():
    resize = UNet(**TINY).down[0].resize
    assert isinstance(resize, Conv2d) and resize.stride == 2 and resize.padding == ((0, 1), (0, 1))


def test_attention_has_one_head_unless_asked_for_more():
    x, t = batch()
    default, one, two = (awake(UNet(**TINY, **heads))(x, t).data for heads in ({}, {"heads": 1}, {"heads": 2}))
    np.testing.assert_array_equal(default, one)
    assert (default != two).any()


def test_group_norm_epsilon():
    assert UNet(**TINY).norm_out.eps == 1e-6


def test_the_same_seed_gives_the_same_weights():
    first, again, other = (UNet(**TINY, rng=seed).state_dict() for seed in (1, 1, 2))
    assert all((first[name] == again[name]).all() for name in first)
    assert any((first[name] != other[name]).any() for name in first)
    generator = UNet(**TINY, rng=np.random.default_rng(1)).state_dict()
    assert all((first[name] == generator[name]).all() for name in first)


def test_dropout_acts_only_with_a_generator():
    unet = awake(UNet(**TINY, dropout=0.5))
    x, t = batch()
    plain = unet(x, t).data
    np.testing.assert_array_equal(plain, unet(x, t).data)
    dropped = unet(x, t, rng=np.random.default_rng(0)).data
    np.testing.assert_array_equal(dropped, unet(x, t, rng=np.random.default_rng(0)).data)
    assert (dropped != plain).any()
    unet = awake(UNet(**TINY))
    np.testing.assert_array_equal(unet(x, t, rng=np.random.default_rng(0)).data, unet(x, t).data)


def test_no_grad_gives_the_same_output_and_keeps_no_graph():
    unet = awake(UNet(**TINY))
    x, t = batch()
    with no_grad():
        y = unet(x, t)
    assert y.node is None
    np.testing.assert_array_equal(y.data, unet(x, t).data)


def test_the_encoding_is_the_one_asked_for():
    x, t = np.ones((1, 4, 4, 1), np.float32), np.array([7])
    outputs = [awake(UNet(**TINY, encoding=form))(x, t).data for form in ENCODINGS]
    np.testing.assert_array_equal(outputs[0], awake(UNet(**TINY))(x, t).data)
    assert len({y.tobytes() for y in outputs}) == len(ENCODINGS) == 5
    for form, channels in (("sine", 8), ("ddpm", 7)):
        with pytest.raises(
            ValueError, match=f"form, channels: expected one of ddpm, .* even number, got '{form}', {channels}"
        ):
            timestep_encoding(t, channels, form)
    with pytest.raises(
        ValueError, match="encoding: unknown 'sine'; known: ddpm, ddpm_flipped, improved, .*interleaved"
    ):
        UNet(**TINY, encoding="sine")


def test_timestep_encoding():
    t = np.array([0, 1, 17, 999])
    for form in ("ddpm", "improved"):
        halves = np.split(timestep_encoding(t, 8, form), 2, axis=1)
        np.testing.assert_array_equal(timestep_encoding(t, 8, form + "_flipped"), np.concatenate(halves[::-1], axis=1))
    P = timestep_encoding(t, 8)
    for n, k in enumerate(t):
        for i in range(4):
            w = 10000 ** (-i / 3)
            assert math.isclose(P[n, i], math.sin(k * w), abs_tol=1e-12)
            assert math.isclose(P[n, 4 + i], math.cos(k * w), abs_tol=1e-12)


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"in_channels": 0}, "in_channels: expected an integer >= 1, got 0"),
            ({"out_channels": 1.0}, "out_channels: expected an integer >= 1, got 1.0"),
            ({"blocks": 0}, "blocks: expected an integer >= 1, got 0"),
            ({"heads": -1}, "heads: expected an integer >= 1, got -1"),
            ({"groups": 0}, "groups: expected an integer >= 1, got 0"),
            ({"groups": 3}, r"channels: expected multiples of groups = 3, got \(4, 8\)"),
            ({"channels": ()}, "channels: expected a sequence with an entry for each level, got \\(\\)"),
            ({"channels": 8}, "channels: expected a sequence with an entry for each level, got 8"),
            ({"attention": True}, "attention: expected a sequence with an entry for each level, got True"),
            ({"dropout": "a"}, "dropout: expected a number in"),
            ({"channels": (4, -8)}, "channels: expected multiples of groups"),
            ({"channels": (4, 0)}, r"channels: expected multiples of groups = 2, got \(4, 0\)"),
            ({"channels": (2, 8)}, "channels: the first must be even and at least 4 for the timestep encoding, got 2"),
            ({"attention": (True,)}, r"attention: expected 2 entries, one for each level, got \(True,\)"),
            ({"heads": 3}, "heads: 3 does not divide the 8 channels of a level with attention"),
            ({"dropout": 1.0}, r"dropout: expected a number in \[0, 1\), got 1.0"),
            ({"blocks": True}, "blocks: expected an integer >= 1, got True"),
            ({"classes": 0}, "classes: expected an integer >= 1, got 0"),
            ({"head_channels": 0}, "head_channels: expected an integer >= 1, got 0"),
            ({"head_channels": 3}, "head_channels: 3 does not divide the 8 channels of a level with attention"),
            ({"head_channels": 2, "heads": 2}, "heads, head_channels: expected one of them, got 2 and 2"),
            ({"norm_eps": 0}, "norm_eps: expected a number > 0, got 0"),
            ({"norm_eps": math.inf}, "norm_eps: expected a number > 0, got inf"),
            ({"downsample_padding": 2}, "downsample_padding: expected an integer from 0 to 1, got 2"),
            ({"middle_attention": "yes"}, "middle_attention: expected True or False, got 'yes'"),
            ({"center_input": 1}, "center_input: expected True or False, got 1"),
            ({"image_size": 7}, r"image_size: expected a height and a width that are multiples of 2, .* got \(7, 7\)"),
            ({"image_size": 0}, r"image_size: .* got \(0, 0\)"),
            ({"image_size": (8, 8, 1)}, r"image_size: .* got \(8, 8, 1\)"),
            ({"image_size": "large"}, "image_size: .* got 'large'"),
            ({"patch": 0}, "patch: expected an integer >= 1, got 0"),
            ({"patch": 2.0}, "patch: expected an integer >= 1, got 2.0"),
            (
                {"patch": 3, "image_size": 28},
                r"image_size: .* multiples of 6, .* halves them 1 times after cutting them into squares of 3 x 3, got",
            ),
        ],
    )
    def test_constructor(self, change, message):
        with pytest.raises(ValueError, match=message):
            UNet(**(TINY | change))

    def test_numbers_of_numpy_are_numbers(self):
        unet = UNet(channels=4 * np.array([1, 2]), blocks=np.int64(1), attention=np.array([False, True]), groups=2)
        assert unet.config == UNet(**TINY).config
        assert all(type(c) is int for c in (*unet.config["channels"], unet.config["blocks"]))

    def test_a_level_may_be_as_narrow_as_one_channel(self):
        x, t = batch()
        assert UNet(**(TINY | {"channels": (4, 1), "groups": 1}))(x, t).shape == x.shape

    def test_heads_must_fit_only_where_there_is_attention(self):
        UNet(**(TINY | {"channels": (4, 6), "heads": 3}))
        UNet(**(TINY | {"channels": (4, 8, 6), "heads": 3, "attention": (False, False, False)}))
        with pytest.raises(ValueError, match="heads: 3 does not divide the 4 channels"):
            UNet(**(TINY | {"channels": (4, 6), "heads": 3, "attention": (True, False)}))

    def test_labels(self):
        x, t = batch()
        with pytest.raises(ValueError, match=r"labels: this network knows no classes; make one with UNet\(classes="):
            UNet(**TINY)(x, t, labels=np.array([0, 1]))
        unet = UNet(**TINY, classes=3)
        for bad, what in ((None, "NoneType"), ([0, 1], "list"), (np.array([0.0, 1.0]), "float64")):
            with pytest.raises(TypeError, match=f"labels: expected a NumPy array of integers, .* got {what}"):
                unet(x, t, labels=bad)
        for bad in ([0, 3], [-1, 0], [0], [[0, 1]]):
            with pytest.raises(ValueError, match="labels: expected 2 integers in 0 ... 2, one for each image, got"):
                unet(x, t, labels=np.array(bad))
        assert unet(x, t, labels=np.array([0, 2])).shape == x.shape
        unsigned = unet(x, t, labels=np.array([0, 2], np.uint8))
        np.testing.assert_array_equal(unsigned.data, unet(x, t, labels=np.array([0, 2])).data)

    def test_heads_must_always_fit_the_middle(self):
        with pytest.raises(ValueError, match="heads: 4 does not divide the 6 channels"):
            UNet(**(TINY | {"channels": (4, 6), "heads": 4, "attention": (True, False)}))
        UNet(**(TINY | {"channels": (4, 6), "heads": 4, "attention": (True, False), "middle_attention": False}))

    @pytest.mark.parametrize("size", [(7, 8), (8, 9), (0, 8)])
    def test_sizes_that_do_not_divide(self, size):
        unet = UNet(**TINY)
        message = rf"x: height and width must be multiples of 2, .* halves them 1 times; got {size[0]} x {size[1]}"
        with pytest.raises(ValueError, match=message):
            unet(np.zeros((1, *size, 1), np.float32), np.array([0]))
        with pytest.raises(
            ValueError, match="x: .* multiples of 4, .* after cutting them into squares of 2 x 2; got 8"
        ):
            UNet(**TINY, patch=2)(np.zeros((1, 8, 10, 1), np.float32), np.array([0]))

    @pytest.mark.parametrize("shape", [(8, 8, 1), (1, 8, 8, 2), (0, 8, 8, 1)])
    def test_shapes(self, shape):
        with pytest.raises(ValueError, match=r"x: expected one or more images \(N, H, W, 1\), got shape"):
            UNet(**TINY)(np.zeros(shape, np.float32), np.zeros(shape[0], int))

    def test_dtypes(self):
        x, t = batch()
        with pytest.raises(TypeError, match="x: expected float32, the dtype of the parameters, got float64"):
            UNet(**TINY)(x.astype(np.float64), t)
        with pytest.raises(TypeError, match="x: expected an array or a Tensor, got list"):
            UNet(**TINY)(x.tolist(), t)
        for bad, what in ((t.astype(float), "float64"), (3, "int"), ([1, 2], "list")):
            with pytest.raises(TypeError, match=f"t: expected a NumPy array of integers, got {what}$"):
                UNet(**TINY)(x, bad)

    def test_timesteps(self):
        x, _ = batch()
        for bad in (np.array([1]), np.array([[1, 2]]), np.array([0, -1])):
            with pytest.raises(ValueError, match="t: expected 2 timesteps >= 0"):
                UNet(**TINY)(x, bad)
