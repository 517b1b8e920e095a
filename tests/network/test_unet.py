"""The U-Net: what reaches what, its options, and what it refuses. That it computes what it should: test_layers.py."""

import json
import math

import numpy as np
import pytest
import reference
from gradcheck import check_model
from ops import NUMPY

from tinyddpm import UNet, backward, no_grad
from tinyddpm.autograd.tensor import Parameter
from tinyddpm.network.checks import ENCODINGS
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


@pytest.mark.parametrize(
    "option",
    [
        {"heads": 2}, {"head_channels": 2}, {"middle_attention": False}, {"norm_eps": 0.1}, {"downsample_padding": 1},
        {"classes": 5}, {"center_input": True}, {"patch": 2}, {"image_size": 8},
    ],
    ids=lambda option: next(iter(option)),
)  # fmt: skip
def test_each_option_but_the_size_changes_what_comes_out_and_as_it_says(option):
    shape = TINY | {"attention": (True, True)}
    unet = awake(UNet(**shape, **option).to(dtype="float64"), seed=1)
    x, t = batch(dtype=np.float64)
    labels = np.array([4, 1]) if "classes" in option else None
    y, known = unet(x, t, labels=labels).data, {k: v for k, v in option.items() if k not in ("classes", "image_size")}
    expected = reference.unet(NUMPY, unet.state_dict(), x, t, None, labels, **shape, **known)
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-9)
    without = awake(UNet(**shape).to(dtype="float64"), seed=1)(x, t).data
    assert (np.abs(y - without).max() > 1e-4) == ("image_size" not in option)


def test_the_gradient_of_the_class_embedding():
    unet = awake(UNet(**TINY, classes=3).to(dtype="float64"))
    x, t = batch(n=3, dtype=np.float64)
    loss = lambda: (unet(x, t, labels=np.array([2, 0, 2])) ** 2).sum()
    gradient = check_model(loss, [unet.class_embedding.w], np.random.default_rng(0))[unet.class_embedding.w]
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
        with no_grad():
            told, untold = (self.unet(x, t, labels=np.full(500, label)).data for label in (1, -1))
            np.testing.assert_array_equal(self.unet(x, t, labels=labels).data, told)
            y = self.unet(x, t, labels=labels, rng=np.random.default_rng(0)).data
        is_told, is_untold = (np.isclose(y, z, atol=1e-5).all(axis=(1, 2, 3)) for z in (told, untold))
        assert (is_told ^ is_untold).all() and abs(is_untold.mean() - 0.3) < 0.05
        assert (labels == 1).all()  # the caller's own


def test_its_configuration_is_json_whatever_numbers_it_is_given():
    numpy = dict(classes=np.int64(3), head_channels=np.int64(4), norm_eps=np.float32(0.5), image_size=np.int64(8),
                 downsample_padding=np.int64(1), middle_attention=np.True_, center_input=np.False_)  # fmt: skip
    plain = {name: value.item() for name, value in numpy.items()} | {"image_size": [8, 8]}
    config = json.loads(json.dumps(UNet(**TINY, **numpy).config))
    assert {name: config[name] for name in plain} == plain
    unet = UNet(channels=4 * np.array([1, 2]), blocks=np.int64(1), attention=np.array([False, True]), groups=2)
    assert json.dumps(unet.config) == json.dumps(UNet(**TINY).config) and unet.config["image_size"] is None
    assert UNet(**TINY, image_size=np.array([28, 30])).config["image_size"] == (28, 30)


def test_a_class_begins_as_a_vector_of_variance_1():
    w = UNet(**(TINY | {"channels": (32, 32), "classes": 64})).class_embedding.w.data
    assert w.shape == (64, 128) and abs(w.std() - 1) < 0.02 and abs(w.mean()) < 0.05


def test_the_layers_that_start_as_zero_are_those_of_ho_et_al_so_it_starts_as_zero():
    unet = UNet(**TINY)
    zero = [name for name, p in unet.named_parameters().items() if name.endswith(".w") and not p.data.any()]
    assert set(zero) == reference.STARTS_AS_ZERO and not unet(*batch()).data.any()


def test_the_parameters_of_the_same_network_in_diffusers():
    # UNet2DModel(block_out_channels=(32, 64, 128), layers_per_block=2, attention at 7x7)
    assert UNet().size == 3_939_393


@pytest.mark.slow
def test_the_whole_gradient_in_float64():
    unet = awake(UNet(**TINY, heads=2).to(dtype="float64"))
    x, t = batch(dtype=np.float64)
    image, weights, rng = Parameter(x), np.random.default_rng(3).standard_normal(x.shape), np.random.default_rng(4)
    loss = lambda: (unet(image, t) * weights).sum()
    for _ in range(3):
        check_model(loss, [image, *unet.parameters()], rng, h=1e-6)
    for name, p in unet.named_parameters().items():  # and parameter by parameter, so that none hides behind the others
        if not name.endswith("k.b"):
            check_model(loss, [p], rng)
        else:  # a bias of the keys adds the same to all scores of a query, which softmax ignores
            assert abs(backward(loss())[p]).max() < 1e-12


def test_the_timestep_reaches_every_residual_block():
    unet = awake(UNet(**TINY))
    x, _ = batch(n=1)
    blocks = [unet.middle1, unet.middle2, *(block for level in unet.down + unet.up for block in level.res)]
    assert len(blocks) == 8
    kept = [block.time.w.data for block in blocks]
    for block in blocks:  # with all other paths for t cut
        for other, w in zip(blocks, kept):
            other.time.w.data = w if other is block else np.zeros_like(w)
        assert np.abs(unet(x, np.array([3])).data - unet(x, np.array([400])).data).max() > 1e-5


def test_images_do_not_see_each_other():
    unet, (x, t) = awake(UNet(**TINY)), batch(n=3)
    together = unet(x, t).data
    for i in range(3):
        np.testing.assert_allclose(unet(x[i : i + 1], t[i : i + 1]).data[0], together[i], atol=1e-5)


def test_every_pixel_sees_every_other_through_the_attention_in_the_middle():
    x = Parameter(batch(n=1)[0])
    y = awake(UNet(**TINY))(x, np.array([5]))
    assert (backward(y[0, 0, 0, 0].reshape(1).sum())[x] != 0).all()


def test_each_skip_connection_carries_something():
    """Setting what one skip brings to 0 in the first block it enters changes the output: none is left unused."""
    unet, (x, t) = awake(UNet(**TINY)), batch(n=1)
    before = unet(x, t).data
    for level, above in zip(unet.up, ([8, 8], [8, 4])):
        for block, c in zip(level.res, above):
            layers = block.shortcut, block.conv1
            kept = [layer.w.data for layer in layers]
            for layer in layers:
                layer.w.data = np.where(np.arange(layer.w.shape[2])[:, None] < c, layer.w.data, 0)
            assert np.abs(unet(x, t).data - before).max() > 1e-4
            for layer, w in zip(layers, kept):
                layer.w.data = w


def test_attention_has_one_head_and_group_norms_their_epsilon_unless_asked_for_more():
    default, asked = (awake(UNet(**TINY, **more))(*batch()).data for more in ({}, {"heads": 1, "norm_eps": 1e-6}))
    np.testing.assert_array_equal(default, asked)


def test_the_same_seed_gives_the_same_weights():
    first, again, other = (UNet(**TINY, rng=seed).state_dict() for seed in (1, np.random.default_rng(1), 2))
    assert all((first[name] == again[name]).all() for name in first)
    assert any((first[name] != other[name]).any() for name in first)


def test_dropout_acts_only_with_a_generator():
    unet, (x, t) = awake(UNet(**TINY, dropout=0.5)), batch()
    plain, dropped, again = (unet(x, t, rng=r and np.random.default_rng(r)).data for r in (None, 1, 1))
    np.testing.assert_array_equal(plain, unet(x, t).data)
    np.testing.assert_array_equal(dropped, again)
    assert (dropped != plain).any()
    unet = awake(UNet(**TINY))
    np.testing.assert_array_equal(unet(x, t, rng=np.random.default_rng(0)).data, plain)


def test_the_generator_for_dropout_reaches_every_block():
    unet, rng, seen = UNet(**TINY, dropout=0.5), np.random.default_rng(0), []
    state = lambda: rng.bit_generator.state["state"]["state"]
    blocks = [unet.middle1, unet.middle2, *(block for level in unet.down + unet.up for block in level.res)]
    for block in blocks:
        # the masks are drawn between norm2 and conv2: the generator has moved on since the block before
        block.norm2 = lambda h, silu, norm2=block.norm2: seen.append(state()) or norm2(h, silu)
    unet(*batch(), rng=rng)
    assert len({*seen, state()}) == len(seen) + 1 == len(blocks) + 1


def test_no_grad_gives_the_same_output_and_keeps_no_graph():
    unet, (x, t) = awake(UNet(**TINY)), batch()
    with no_grad():
        y = unet(x, t)
    assert y.node is None
    np.testing.assert_array_equal(y.data, unet(x, t).data)


def test_the_encoding_is_the_one_asked_for():
    x, t = np.ones((1, 4, 4, 1), np.float32), np.array([7])
    outputs = [awake(UNet(**TINY, encoding=form))(x, t).data for form in ENCODINGS]
    np.testing.assert_array_equal(outputs[0], awake(UNet(**TINY))(x, t).data)
    assert len({y.tobytes() for y in outputs}) == len(ENCODINGS) == 5


def test_timestep_encoding():
    t = np.array([0, 1, 17, 999])
    for form in ("ddpm", "improved"):
        halves = np.split(timestep_encoding(t, 8, form), 2, axis=1)
        np.testing.assert_array_equal(timestep_encoding(t, 8, form + "_flipped"), np.concatenate(halves[::-1], axis=1))
    angles = t[:, None] * 10000 ** -(np.arange(4) / 3)
    np.testing.assert_allclose(timestep_encoding(t, 8), np.hstack([np.sin(angles), np.cos(angles)]), atol=1e-12)


def test_a_level_may_be_as_narrow_as_one_channel():
    x, t = batch()
    assert UNet(**(TINY | {"channels": (4, 1), "groups": 1}))(x, t).shape == x.shape


def test_heads_must_fit_only_where_there_is_attention_and_sizes_only_what_is_halved():
    UNet(**(TINY | {"channels": (4, 6), "heads": 3}))
    UNet(**(TINY | {"channels": (4, 8, 6), "heads": 3, "attention": (False, False, False)}))
    UNet(**(TINY | {"channels": (4, 6), "heads": 4, "attention": (True, False), "middle_attention": False}))
    assert UNet(**TINY, image_size=28)(*batch(size=8)).shape == (2, 8, 8, 1)  # another size than it is for


MANY = "expected an integer >= 1, got"
SEQUENCE = "expected a sequence with an entry for each level, got"
REFUSED_SETTINGS = [
    ({"in_channels": 0}, f"in_channels: {MANY} 0"),
    ({"out_channels": 1.0}, f"out_channels: {MANY} 1.0"),
    ({"blocks": 0}, f"blocks: {MANY} 0"),
    ({"blocks": True}, f"blocks: {MANY} True"),
    ({"heads": -1}, f"heads: {MANY} -1"),
    ({"groups": 0}, f"groups: {MANY} 0"),
    ({"classes": 0}, f"classes: {MANY} 0"),
    ({"head_channels": 0}, f"head_channels: {MANY} 0"),
    ({"patch": 0}, f"patch: {MANY} 0"),
    ({"patch": 2.0}, f"patch: {MANY} 2.0"),
    ({"groups": 3}, r"channels: expected multiples of groups = 3, got \(4, 8\)"),
    ({"channels": ()}, rf"channels: {SEQUENCE} \(\)"),
    ({"channels": 8}, f"channels: {SEQUENCE} 8"),
    ({"channels": (4, -8)}, "channels: expected multiples of groups"),
    ({"channels": (4, 0)}, r"channels: expected multiples of groups = 2, got \(4, 0\)"),
    ({"channels": (2, 8)}, "channels: the first must be even and at least 4 for the timestep encoding, got 2"),
    ({"attention": True}, f"attention: {SEQUENCE} True"),
    ({"attention": (True,)}, r"attention: expected 2 entries, one for each level, got \(True,\)"),
    ({"heads": 3}, "heads: 3 does not divide the 8 channels of a level with attention"),
    ({"channels": (4, 6), "heads": 3, "attention": (True, False)}, "heads: 3 does not divide the 4 channels"),
    ({"channels": (4, 6), "heads": 4, "attention": (True, False)}, "heads: 4 does not divide the 6 channels"),
    ({"head_channels": 3}, "head_channels: 3 does not divide the 8 channels of a level with attention"),
    ({"head_channels": 2, "heads": 2}, "heads, head_channels: expected one of them, got 2 and 2"),
    ({"dropout": 1.0}, r"dropout: expected a number in \[0, 1\), got 1.0"),
    ({"dropout": "a"}, "dropout: expected a number in"),
    ({"label_dropout": 0.1}, "label_dropout: 0.1 of what labels[?] Give classes too"),
    *(({"classes": 3, "label_dropout": p}, r"label_dropout: expected a number in \[0, 1\), got") for p in (1.0, -0.1, "a")),
    ({"norm_eps": 0}, "norm_eps: expected a number > 0, got 0"),
    ({"norm_eps": math.inf}, "norm_eps: expected a number > 0, got inf"),
    ({"downsample_padding": 2}, "downsample_padding: expected an integer from 0 to 1, got 2"),
    ({"middle_attention": "yes"}, "middle_attention: expected True or False, got 'yes'"),
    ({"center_input": 1}, "center_input: expected True or False, got 1"),
    ({"encoding": "sine"}, "encoding: unknown 'sine'; known: ddpm, ddpm_flipped, improved, .*interleaved"),
    ({"image_size": 7}, r"image_size: expected a height and a width that are multiples of 2, .* got \(7, 7\)"),
    ({"image_size": 0}, r"image_size: .* got \(0, 0\)"),
    ({"image_size": (8, 8, 1)}, r"image_size: .* got \(8, 8, 1\)"),
    ({"image_size": "large"}, "image_size: .* got 'large'"),
    ({"patch": 3, "image_size": 28}, "image_size: .* multiples of 6, .* halves them 1 times after cutting them into "
                                     "squares of 3 x 3, got"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED_SETTINGS)
def test_a_network_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        UNet(**(TINY | change))


def call(size=(8, 8, 1), n=2, t=np.array([1, 2]), labels=None, like=lambda x: x, **settings):  # noqa: B008
    """The call of a network with these settings."""
    x = like(np.zeros((n, *size) if n else size, np.float32))
    return lambda: UNet(**TINY, **settings)(x, t, labels=labels)


X_SHAPE = r"x: expected one or more images \(N, H, W, 1\), got shape"
HALVED = "x: height and width must be multiples of 2, .* halves them 1 times; got"
ONE_EACH = "labels: expected 2 integers in {} ... 2, one for each image, got"
INTEGERS = "a NumPy array of integers"
REFUSED_CALLS = [
    *((call((*size, 1)), f"{HALVED} {size[0]} x {size[1]}") for size in ((7, 8), (8, 9), (0, 8))),
    (call((8, 10, 1), patch=2), "x: .* multiples of 4, .* after cutting them into squares of 2 x 2; got 8"),
    (call((8, 8, 1), n=None), X_SHAPE),
    (call((1, 8, 8, 2), n=None), X_SHAPE),
    (call((0, 8, 8, 1), n=None), X_SHAPE),
    (call(like=lambda x: x.astype(np.float64)), "x: expected float32, the dtype of the parameters, got float64", TypeError),
    (call(like=lambda x: x.tolist()), "x: expected an array or a Tensor, got list", TypeError),
    (call(t=np.array([1.0, 2.0])), f"t: expected {INTEGERS}, got float64$", TypeError),
    (call(t=3), f"t: expected {INTEGERS}, got int$", TypeError),
    (call(t=[1, 2]), f"t: expected {INTEGERS}, got list$", TypeError),
    *((call(t=np.array(t)), "t: expected 2 timesteps >= 0") for t in ([1], [[1, 2]], [0, -1])),
    (call(labels=np.array([0, 1])), r"labels: this network knows no classes; make one with UNet\(classes="),
    (call(classes=3), f"labels: expected {INTEGERS}, .* got NoneType", TypeError),
    (call(classes=3, labels=[0, 1]), f"labels: expected {INTEGERS}, .* got list", TypeError),
    (call(classes=3, labels=np.array([0.0, 1.0])), f"labels: expected {INTEGERS}, .* got float64", TypeError),
    *((call(classes=3, labels=np.array(bad)), ONE_EACH.format(0)) for bad in ([0, 3], [-1, 0], [0], [[0, 1]])),
    *((call(classes=3, label_dropout=0.1, labels=np.array(bad)), ONE_EACH.format(-1)) for bad in ([0, 3], [-2, 0])),
    *((lambda c=c, form=form: timestep_encoding(np.array([7]), c, form),
       f"form, channels: expected one of ddpm, .* even number, got '{form}', {c}") for form, c in (("sine", 8), ("ddpm", 7))),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message", "error"), [(*row, ValueError)[:3] for row in REFUSED_CALLS])
def test_what_it_cannot_be_called_with(call, message, error):
    with pytest.raises(error, match=message):
        call()


def test_labels_may_be_unsigned():
    unet, (x, t) = awake(UNet(**TINY, classes=3)), batch()
    of_int, of_uint8 = (unet(x, t, labels=np.array([0, 2], dtype)).data for dtype in ("int64", "uint8"))
    np.testing.assert_array_equal(of_int, of_uint8)
