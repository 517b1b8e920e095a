"""The U-Net: what it computes, how it starts, what is random, and what it refuses."""

import json

import numpy as np
import pytest
import reference
from gradcheck import check_model
from hypothesis import given
from ideal import moved
from ops import NUMPY, a_unet
from tiny_training import TINY

from tinyddpm import UNet, backward, no_grad
from tinyddpm.autograd.tensor import Parameter
from tinyddpm.network.checks import ENCODINGS
from tinyddpm.network.unet import timestep_encoding


def batch():
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, 8, 8, 1)).astype(np.float32), rng.integers(0, 1000, 2)


@given(a_unet)
def test_it_is_the_network_of_the_paper_with_its_options_and_every_gradient_is_right(drawn):
    unet, (x, t, _, labels), settings = drawn
    rng = np.random.default_rng(0)
    for p in unet.to(dtype="float64").parameters():  # away from 0 and 1, so that every path through it counts
        p.data = p.data + 0.3 * rng.standard_normal(p.shape)
    image, u = Parameter(x), rng.standard_normal((*x.shape[:3], unet.config["out_channels"]))
    run = lambda: unet(image, t, labels=labels)
    y, expected = run().data, reference.unet(NUMPY, unet.state_dict(), x, t, None, labels, **settings)
    np.testing.assert_allclose(y, expected, 1e-9, 1e-9, strict=True)
    gradients = check_model(lambda: (run() * u).sum(), [image, *unet.parameters()], rng)
    assert set(gradients) == {image, *unet.parameters()}

    image.data = x.astype(np.float32)
    unet.to(dtype="float32")
    y32 = run()
    np.testing.assert_allclose(y32.data, y, rtol=0, atol=1e-4 * (1 + np.abs(y).max()))
    gradients = backward((y32 * u.astype(np.float32)).sum())
    assert {y32.dtype, *(g.dtype for g in gradients.values())} == {np.dtype("float32")}


@pytest.mark.parametrize("form", ENCODINGS)
def test_every_encoding_of_the_timesteps(form):
    t = np.array([0, 1, 7, 999])
    usual = {} if form == "ddpm" else {"form": form}
    np.testing.assert_allclose(timestep_encoding(t, 8, **usual), reference.encoded(t, 8, form), atol=1e-12)


def test_it_starts_as_zero_since_the_layers_that_do_are_those_of_ho_et_al():
    unet = UNet(**TINY)
    zero = [name for name, p in unet.named_parameters().items() if name.endswith(".w") and not p.data.any()]
    assert set(zero) == reference.STARTS_AS_ZERO and not unet(*batch()).data.any()
    assert unet.down[0].resize.padding == ((0, 1), (0, 1))
    # as UNet2DModel(block_out_channels=(32, 64, 128), layers_per_block=2, attention at 7x7) of diffusers
    assert UNet().size == 3_939_393


def test_a_class_begins_as_a_vector_of_variance_1_and_the_seed_decides_about_all_weights():
    w = UNet(**(TINY | {"channels": (32, 32), "classes": 64})).class_embedding.w.data
    assert w.shape == (64, 128) and abs(w.std() - 1) < 0.02 and abs(w.mean()) < 0.05
    assert UNet(**TINY, classes=3, label_dropout=0.1).class_embedding.w.shape == (4, 16)  # one for "no label"
    first, again, usual, other = (
        UNet(**TINY, **seed).state_dict() for seed in ({"rng": 0}, {"rng": np.random.default_rng(0)}, {}, {"rng": 1})
    )
    assert all((first[name] == again[name]).all() and (first[name] == usual[name]).all() for name in first)
    assert any((first[name] != other[name]).any() for name in first)


def test_dropout_acts_only_with_a_generator_and_in_every_block():
    unet, (x, t), rng, seen = moved(UNet(**TINY, dropout=0.5)), batch(), np.random.default_rng(1), []
    plain, again, dropped, redropped = (unet(x, t, r and np.random.default_rng(r)).data for r in (None, None, 1, 1))
    np.testing.assert_array_equal(plain, again)
    np.testing.assert_array_equal(dropped, redropped)
    assert (dropped != plain).any()
    without = moved(UNet(**TINY))
    np.testing.assert_array_equal(without(x, t, rng).data, without(x, t).data)

    state = lambda: rng.bit_generator.state["state"]["state"]
    blocks = [unet.middle1, unet.middle2, *(block for level in unet.down + unet.up for block in level.res)]
    for block in blocks:
        # the masks are drawn between norm2 and conv2: the generator has moved on since the block before
        block.norm2 = lambda h, silu, norm2=block.norm2: seen.append(state()) or norm2(h, silu)
    unet(x, t, rng)
    assert unet.dropout == 0.5
    assert len({*seen, state()}) == len(seen) + 1 == len(blocks) + 1


def test_labels_are_dropped_with_their_probability_if_there_is_a_generator():
    unet = moved(UNet(**TINY, classes=3, label_dropout=0.3))
    x, t, labels = np.ones((500, 2, 2, 1), np.float32), np.full(500, 7), np.ones(500, np.uint8)
    with no_grad():
        told, untold = (unet(x, t, labels=np.full(500, label)).data for label in (1, -1))
        np.testing.assert_array_equal(unet(x, t, labels=labels).data, told)
        y = unet(x, t, labels=labels, rng=np.random.default_rng(0)).data
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


@pytest.mark.parametrize("settings", [
    {"channels": (4, 1), "groups": 1},  # a level as narrow as one channel
    {"channels": (4, 6), "heads": 3},  # which need not divide what has no attention
    {"channels": (4, 8, 6), "heads": 3, "attention": (False, False, False)},
    {"channels": (4, 6), "heads": 4, "attention": (True, False), "middle_attention": False},
    {"image_size": 28},  # and it takes other sizes
    {"channels": (4,), "attention": (False,), "image_size": 1},
])  # fmt: skip
def test_a_network_that_may_be(settings):
    assert UNet(**(TINY | settings))(*batch()).shape == (2, 8, 8, 1)


SEQUENCE = "expected a sequence with an entry for each level, got"
REFUSED_SETTINGS = [
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
    ({"label_dropout": 0.1}, "label_dropout: 0.1 of what labels[?] Give classes too"),
    ({"downsample_padding": 2}, "downsample_padding: expected an integer from 0 to 1, got 2"),
    ({"center_input": 1}, "center_input: expected True or False, got 1"),
    ({"image_size": 7}, r"image_size: expected a height and a width that are multiples of 2, .* got \(7, 7\)"),
    *(({"image_size": n}, f"image_size: .* got {got}")
      for n, got in ((0, r"\(0, 0\)"), ((8, 8, 1), r"\(8, 8, 1\)"), ("large", "'large'"))),
    ({"patch": 3, "image_size": 28},
     "image_size: .* multiples of 6, .* halves them 1 times after cutting them into squares of 3 x 3, got"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED_SETTINGS)
def test_a_network_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        UNet(**(TINY | change))


def call(shape=(2, 8, 8, 1), t=np.array([1, 2]), labels=None, to=lambda x: x, **settings):  # noqa: B008
    """The call of a network with these settings."""
    return lambda: UNet(**TINY, **settings)(to(np.zeros(shape, np.float32)), t, labels=labels)


X_SHAPE = r"x: expected one or more images \(N, H, W, 1\), got shape"
HALVED = "x: height and width must be multiples of 2, .* halves them 1 times; got"
ONE_EACH = "labels: expected 2 integers in {} ... 2, one for each image, got"
INTEGERS, ONES = "a NumPy array of integers", np.ones(2)
REFUSED_CALLS = [
    *((call((2, h, w, 1)), f"{HALVED} {h} x {w}") for h, w in ((7, 8), (8, 9), (0, 8))),
    (call((2, 8, 10, 1), patch=2), "x: .* multiples of 4, .* after cutting them into squares of 2 x 2; got 8"),
    *((call(shape), X_SHAPE) for shape in ((8, 8, 1), (1, 8, 8, 2), (0, 8, 8, 1))),
    (call(to=np.float64), "x: expected float32, the dtype of the parameters, got float64", TypeError),
    (call(to=list), "x: expected an array or a Tensor, got list", TypeError),
    *((call(t=t), f"t: expected {INTEGERS}, got {got}$", TypeError) for t, got in (([1.0], "list"), (ONES, "float64"))),
    *((call(t=np.array(t)), "t: expected 2 timesteps >= 0") for t in ([1], [[1, 2]], [0, -1])),
    (call(labels=np.array([0, 1])), r"labels: this network knows no classes; make one with UNet\(classes="),
    *((call(classes=3, labels=bad), f"labels: expected {INTEGERS}, .* got {got}", TypeError)
      for bad, got in ((None, "NoneType"), ([0, 1], "list"), (ONES, "float64"))),
    *((call(classes=3, labels=np.array(bad)), ONE_EACH.format(0)) for bad in ([0, 3], [-1, 0], [0], [[0, 1]])),
    *((call(classes=3, label_dropout=0.1, labels=np.array(bad)), ONE_EACH.format(-1)) for bad in ([0, 3], [-2, 0])),
    *((lambda c=c, form=form: timestep_encoding(np.array([7]), c, form),
       f"form, channels: expected one of ddpm, .* even number, got '{form}', {c}")
      for form, c in (("sine", 8), ("ddpm", 7))),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message", "error"), [(*row, ValueError)[:3] for row in REFUSED_CALLS])
def test_what_it_cannot_be_called_with(call, message, error):
    with pytest.raises(error, match=f"^{message}"):
        call()
