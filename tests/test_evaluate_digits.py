"""examples/evaluate_digits.py: each number against a plain computation of it, and the whole as a user would run it."""

import gzip
import json
import pathlib
import runpy
import subprocess
import sys

import numpy as np
import pytest
from gradcheck import check_op
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tinyddpm import Diffusion, UNet, load_digits, load_model, make_schedule, sample, save_model
from tinyddpm.data import COUNTS, read_idx
from tinyddpm.image import to_uint8

SCRIPT = pathlib.Path(__file__).parents[1] / "examples" / "evaluate_digits.py"
MNIST = pathlib.Path(__file__).parents[2] / "shared" / "data" / "mnist"
HELD_OUT, HELD_OUT_LABELS = load_digits(train=False)


@pytest.fixture(scope="module")
def example():
    sys.modules["evaluate_digits"] = module = type(sys)("evaluate_digits")
    vars(module).update(runpy.run_path(str(SCRIPT)))
    return module


@pytest.fixture(scope="module")
def classifier(example):
    return example.load_classifier(example.CLASSIFIER)


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=300)


class TestFrechetDistance:
    def test_of_normal_distributions_that_are_known(self, example):
        """With diagonal covariances it is ||m - m'||^2 + sum (s - s')^2 of the standard deviations; features are made
        that have exactly these means and covariances, and turned, which changes nothing."""
        rng = np.random.default_rng(0)
        white = rng.standard_normal((500, 5))
        white -= white.mean(axis=0)
        white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
        m, n, s, t = rng.standard_normal((4, 5))
        turn = np.linalg.qr(rng.standard_normal((5, 5)))[0]
        f, g = (m + white * s) @ turn, (n + white * t) @ turn
        expected = ((m - n) ** 2).sum() + ((np.abs(s) - np.abs(t)) ** 2).sum()
        np.testing.assert_allclose(example.frechet_distance(f, g), expected, rtol=1e-9)

    def test_of_covariances_that_do_not_commute(self, example):
        """tr (S T)^(1/2) is the sum of the square roots of the eigenvalues of S T itself."""
        rng = np.random.default_rng(1)
        f, g = (rng.standard_normal((400, 4)) @ rng.standard_normal((4, 4)) for _ in range(2))
        S, T = np.cov(f, rowvar=False), np.cov(g, rowvar=False)
        cross = np.sqrt(np.linalg.eigvals(S @ T).real).sum()
        expected = ((f.mean(0) - g.mean(0)) ** 2).sum() + np.trace(S + T) - 2 * cross
        np.testing.assert_allclose(example.frechet_distance(f, g), expected, rtol=1e-9)
        np.testing.assert_allclose(example.frechet_distance(g, f), expected, rtol=1e-9)

    def test_of_the_same_it_is_0_also_where_there_are_fewer_than_dimensions(self, example):
        f = np.random.default_rng(2).standard_normal((10, 64)).astype(np.float32)
        assert (
            abs(example.frechet_distance(f, f)) < 1e-4
        )  # of 64; the roots of eigenvalues that are nearly 0 are not exact


@given(st.integers(6, 20), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_precision_and_recall_one_by_one(example, n, k, seed):
    rng = np.random.default_rng(seed)
    real, generated = rng.standard_normal((n, 3)), 0.7 * rng.standard_normal((n, 3)) + 0.5

    def share_within(points, centers):
        reach = [sorted(np.linalg.norm(c - other) for other in centers)[k] for c in centers]
        inside = [any(np.linalg.norm(p - c) <= r for c, r in zip(centers, reach)) for p in points]
        return sum(inside) / len(points)

    expected = share_within(generated, real), share_within(real, generated)
    np.testing.assert_allclose(example.precision_and_recall(real, generated, k), expected)


def test_precision_and_recall_of_the_same_and_of_what_is_far_away(example):
    x = np.random.default_rng(0).standard_normal((50, 8))
    assert example.precision_and_recall(x, x) == (1, 1)
    assert example.precision_and_recall(x, x + 100) == (0, 0)
    few = np.repeat(x[:2], 25, axis=0) + 1e-6 * x  # all of these are real, but hardly any of the real is among these
    precision, recall = example.precision_and_recall(x, few)
    assert precision == 1 and recall < 0.1


def test_nearest(example):
    rng = np.random.default_rng(0)
    training = rng.uniform(-1, 1, (230, 28, 28, 1)).astype(np.float32)
    images = np.concatenate(
        [training[[7, 211]], training[[3]] + np.float32(2 / 255), rng.uniform(-1, 1, (120, 28, 28, 1))]
    )
    found = example.nearest(images.astype(np.float32), training, "")
    levels = 127.5 * (images[:, None] - training)
    expected = np.sqrt((levels**2).mean(axis=(2, 3, 4))).min(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert found[0] == found[1] == 0 and abs(found[2] - 1) < 1e-3  # one grey level


class TestClassifier:
    def test_it_is_right_about_held_out_digits(self, classifier):
        _, p = classifier.look(HELD_OUT)
        np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-5)
        assert (p.argmax(axis=1) == HELD_OUT_LABELS).mean() > 0.99

    @pytest.mark.slow
    @pytest.mark.skipif(not MNIST.exists(), reason="the full MNIST is not at hand")
    def test_it_is_right_about_98_8_percent_of_mnist_s_test_digits_at_least(self, classifier):
        count = COUNTS["t10k"]
        pixels = read_idx(gzip.open(MNIST / "t10k-images-idx3-ubyte.gz").read(), (count, 28, 28))
        labels = read_idx(gzip.open(MNIST / "t10k-labels-idx1-ubyte.gz").read(), (count,))
        _, p = classifier.look(pixels[..., None] / np.float32(127.5) - 1)
        assert (p.argmax(axis=1) == labels).mean() > 0.988

    def test_it_is_small(self, example):
        assert example.CLASSIFIER.stat().st_size < 500_000

    def test_the_loss_and_its_gradient(self, example):
        labels = np.array([0, 2, 2, 1])
        scores = np.random.default_rng(0).standard_normal((4, 3))
        loss = example.cross_entropy(scores, labels=labels).data
        p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(loss, -np.log(p[np.arange(4), labels]).mean())
        check_op(example.cross_entropy, scores, labels=labels)
        assert np.isfinite(example.cross_entropy(1e5 * scores, labels=labels).data)

    def test_shifts_move_the_digit_and_lose_nothing_of_it(self, example):
        x = np.full((50, 28, 28, 1), -1, np.float32)
        x[:, 10:18, 12:16] = 1
        seen = []
        example.Shifted.loss(seen.append, x, np.random.default_rng(0))
        (y,) = seen
        assert y.shape == x.shape and ((y > 0).sum(axis=(1, 2, 3)) == 32).all()
        tops = (y[..., 0] > 0).any(axis=2).argmax(axis=1)
        assert set(tops) == set(range(7, 14))  # three up to three down

    @pytest.mark.slow
    def test_training_it_on_the_bundled_digits(self, tmp_path):
        """9,000 of them teach it to be right about 98 % of the others."""
        result = run("--train", tmp_path / "c.safetensors", "--train-steps=800")
        assert result.returncode == 0, result.stderr
        right = float(result.stdout.split("right about ")[1].split("%")[0])
        assert "of 1,000 digits it has not learned from" in result.stdout and right >= 98


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The same 40 real digits in a folder of pictures and in .npz files of several kinds."""
    folder = tmp_path_factory.mktemp("digits")
    images = load_digits()[0][::250]
    (folder / "pictures").mkdir()
    for i, pixels in enumerate(to_uint8(images)[..., 0]):
        Image.fromarray(pixels).save(folder / "pictures" / f"{i:02}.png")
    np.savez(folder / "uint8.npz", to_uint8(images)[..., 0])
    np.savez(folder / "floats.npz", images=images, labels=np.arange(40))
    np.savez(folder / "channels_first.npz", images=images.transpose(0, 3, 1, 2).astype(np.float64))
    return folder


def test_a_folder_and_arrays_are_the_same_images(example, digits):
    for name in ("pictures", "uint8.npz", "floats.npz", "channels_first.npz"):
        images = example.read_images(digits / name)
        assert images.dtype == np.float32
        np.testing.assert_allclose(images, load_digits()[0][::250], atol=1e-6, err_msg=name)


def test_what_it_says_of_real_digits(digits, tmp_path):
    results = []
    for name in ("pictures", "uint8.npz"):
        result = run(digits / name, f"--json={tmp_path / 'r.json'}")
        assert result.returncode == 0, result.stderr
        assert "Frechet distance" in result.stdout and "generated:" in result.stderr  # a bar
        results.append(json.loads((tmp_path / "r.json").read_text()))
        assert results[-1].pop("source") == str(digits / name)
    assert results[0] == results[1]  # the same images give the same numbers, every time
    assert results[0]["samples"] == 40 and results[0]["held_out"] == 2000 and results[0]["training"] == 10000
    generated, real = results[0]["generated"], results[0]["real"]
    assert generated["nearest"] == 0 and generated["nearest_percentile_1"] == 0  # these are training digits themselves
    assert real["nearest"] > 20
    assert generated["classes"] == [0.1] * 10 and generated["confident"] > 0.9
    assert abs(generated["frechet"] - real["frechet"]) < 5 * real["frechet_deviation"]  # and as good as others


def test_what_is_no_digit_is_found_out(example, classifier):
    """Noise, halves of digits, and one digit many times over: each shows in the numbers that are about it."""
    held_out, training, rng = HELD_OUT[::4], load_digits()[0], np.random.default_rng(0)
    real = load_digits()[0][5::50]
    few = np.repeat(real[:4], 50, axis=0) + rng.normal(0, 0.01, (200, 28, 28, 1)).astype(np.float32)
    half = np.where(np.arange(28)[:, None, None] < 14, real, -1).astype(np.float32)
    noise = rng.uniform(-1, 1, real.shape).astype(np.float32)
    results = {
        name: example.evaluate(x, held_out, training, training, classifier)
        for name, x in (("real", real), ("half", half), ("noise", noise), ("few", few))
    }
    generated = {name: result["generated"] for name, result in results.items()}
    floor = results["real"]["real"]
    assert generated["real"]["frechet"] < floor["frechet"] + 5 * floor["frechet_deviation"]
    for name in ("half", "noise", "few"):
        assert generated[name]["frechet"] > 5 * floor["frechet"], name
    assert floor["confident"] > 0.95 and generated["half"]["confident"] < 0.8
    assert min(floor["precision"], floor["recall"]) > 0.7
    assert generated["noise"]["precision"] < 0.1 and generated["noise"]["recall"] < 0.1
    assert generated["few"]["precision"] > 0.7 and generated["few"]["recall"] < 0.2
    assert sorted(generated["few"]["classes"])[:9] == [0] * 9  # all of them are zeros
    assert generated["few"]["nearest"] < 0.1 * floor["nearest"] < generated["noise"]["nearest"]


def test_a_model_is_sampled_with_its_labels(example, tmp_path):
    unet = UNet(channels=(8, 8), blocks=1, attention=(False, True), classes=10, label_dropout=0.1, patch=2)
    diffusion = Diffusion(make_schedule("cosine", 30), "x0")
    save_model(tmp_path / "m.safetensors", unet, diffusion)
    settings = ["--samples=12", "--steps=3", "--guidance=2", "--seed=5", f"--json={tmp_path / 'r.json'}"]
    result = run(tmp_path / "m.safetensors", *settings)
    assert result.returncode == 0, result.stderr
    assert "what was asked for" in result.stdout
    found = json.loads((tmp_path / "r.json").read_text())
    labels = np.arange(12) % 10
    images = sample(
        *load_model(tmp_path / "m.safetensors")[::-1], (12, 28, 28, 1), "ddpm", 3, 5, labels=labels, guidance=2
    )
    np.savez(tmp_path / "a.npz", images)
    assert run(tmp_path / "a.npz", *settings[3:]).returncode == 0
    again = json.loads((tmp_path / "r.json").read_text())
    del found["generated"]["as_asked"], found["source"], again["source"]
    assert found == again


@pytest.fixture(scope="module")
def damaged(digits):
    """The folder, with what is not to be accepted beside."""
    images = np.zeros((12, 28, 28))
    np.savez(digits / "two.npz", a=images, b=images)
    np.savez(digits / "few.npz", images[:3])
    np.savez(digits / "large.npz", np.zeros((12, 32, 32)))
    np.savez(digits / "bright.npz", images + np.arange(12)[:, None, None] * 255 / 11)
    np.savez(digits / "nan.npz", images * np.nan)
    np.savez(digits / "text.npz", np.array(["abc"] * 12))
    np.savez(digits / "pickled.npz", np.array([{}, []], object))
    for suffix in ("npz", "safetensors"):
        (digits / f"broken.{suffix}").write_bytes(b"PK nothing of the kind")
    save_model(
        digits / "colour.safetensors", UNet(3, 3, (8, 8), 1, (False, True)), Diffusion(make_schedule("linear", 1000))
    )
    content = bytearray(SCRIPT.with_name("digit_classifier.safetensors").read_bytes())
    content[-1] ^= 1
    (digits / "flipped.safetensors").write_bytes(content)
    return digits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected what to evaluate, or --train FILE"),
        (["nowhere"], "there is no nowhere"),
        (["{digits}/uint8.npz", "--samples=5"], "--samples must be from 10 to 10000, got 5"),
        (["{digits}/uint8.npz", "--workers=0"], "--workers must be 1 or greater, got 0"),
        (["{digits}/uint8.npz", "--seed=-1"], "--seed must be 0 or greater, got -1"),
        (["{digits}/uint8.npz", "--json=nowhere/r.json"], "--json: cannot write nowhere/r.json"),
        (["{digits}/uint8.npz", "--classifier={digits}/uint8.npz"], "--classifier: "),
        (["{digits}/uint8.npz", "--classifier={digits}/flipped.safetensors"], "flipped.safetensors has been damaged"),
        (["{digits}/two.npz"], "expected an array 'images', or only one, got a, b"),
        (["{digits}/few.npz"], "expected at least 10 images, got 3"),
        (
            ["{digits}/large.npz"],
            "expected images (N, 28, 28), uint8 or floats in [-1, 1], got float64 (12, 32, 32, 1)",
        ),
        (["{digits}/bright.npz"], "expected floats in [-1, 1], got 0 ... 255"),
        (["{digits}/nan.npz"], "expected floats in [-1, 1], got nan"),
        (["{digits}/text.npz"], "uint8 or floats in [-1, 1], got <U3 (12,)"),
        (["{digits}/pickled.npz"], "pickled.npz"),
        (["{digits}/broken.npz"], "broken.npz"),
        (["{digits}/broken.safetensors"], "broken.safetensors"),
        (["{digits}/colour.safetensors"], "expected a model of grey digits, got one of 3 channels, None classes"),
    ],
)
def test_bad_input_is_refused_in_a_line(refusal, damaged, arguments, message):
    assert message in refusal(SCRIPT, *(argument.format(digits=damaged) for argument in arguments))
