"""The nearest training images, and the threshold that a folder's own images give."""

import numpy as np
import pytest
from PIL import Image, ImageOps

pytest.importorskip("safetensors")

from memorization_guard.audit import nearest
from memorization_guard.audit.nearest import OwnPairs, Vectors, encoded, own_pairs, search
from memorization_guard.evaluation.encoders import Thumbnails, unit


class Held:
    """An image in memory; counts how often it is opened."""

    def __init__(self, image):
        self.image, self.opened = image, 0

    def open(self):
        self.opened += 1
        return self.image


def _pictures(count, seed=0):
    """Images of a few broad strokes, so that none is like another by chance alone."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (count, 5, 5, 3), dtype=np.uint8)
    return [Held(Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)) for pixels in coarse]


@pytest.fixture
def blocks(monkeypatch):
    monkeypatch.setattr(nearest, "BLOCK", 7)


def test_the_nearest_of_all_blocks_is_found(tmp_path, blocks):
    images, encoder = _pictures(30), Thumbnails()
    vectors = Vectors.make(tmp_path, images, encoder, key="a", progress=False)
    assert len(list(tmp_path.glob("vectors-*"))) == 5
    asked = [images[3], Held(ImageOps.mirror(images[22].image)), *_pictures(5, seed=1)]
    views = [encoded(asked, encoder, mirrored=mirrored) for mirrored in (False, True)]
    found = search(views, vectors)
    every = np.maximum(*(view @ encoded(images, encoder).T for view in views))
    np.testing.assert_allclose(found.similarity, every.max(1), atol=2e-3)
    np.testing.assert_array_equal(found.nearest, every.argmax(1))
    np.testing.assert_allclose(found.reached, every.max(0), atol=2e-3)
    assert list(found.nearest[:2]) == [3, 22]
    assert (found.similarity[:2] > 0.999).all()


def test_vectors_go_on_where_they_stopped_and_belong_to_their_images_and_encoder(tmp_path, blocks):
    images, encoder = _pictures(20), Thumbnails()
    Vectors.make(tmp_path, images, encoder, key="a", progress=False)
    (tmp_path / "vectors-000001.safetensors").write_bytes(b"damaged")
    Vectors.make(tmp_path, images, encoder, key="a", progress=False)
    assert [image.opened for image in images] == [1] * 7 + [2] * 7 + [1] * 6
    vectors = Vectors.make(tmp_path, images, encoder, key="b", progress=False)
    assert [image.opened for image in images] == [2] * 7 + [3] * 7 + [2] * 6
    np.testing.assert_allclose(vectors.take(np.array([0, 6, 7, 19])), encoded(images, encoder)[[0, 6, 7, 19]], atol=1e-3)
    Vectors.delete(tmp_path)
    with pytest.raises(FileNotFoundError):
        list(vectors.blocks())


def test_own_pairs_leave_doubles_out_and_count_mirror_images(tmp_path, blocks):
    images, encoder = _pictures(20), Thumbnails()
    mirrored = Held(ImageOps.mirror(images[4].image))
    doubled = [*images, images[2], mirrored]
    own = own_pairs(doubled, Vectors.make(tmp_path, doubled, encoder, key="a", progress=False), encoder)
    assert own.doubles == 4
    alone = own_pairs(images, Vectors.make(tmp_path, images, encoder, key="b", progress=False), encoder)
    assert alone.doubles == 0
    np.testing.assert_allclose(own.nearest[:20], alone.nearest, atol=1e-3)
    rows = [encoded(images, encoder, mirrored=mirrored) for mirrored in (False, True)]
    every = np.maximum(*(view @ rows[0].T for view in rows)) - 2 * np.eye(20)
    np.testing.assert_allclose(alone.nearest, every.max(1), atol=2e-3)


def test_a_threshold_is_not_moved_by_a_few_images_that_are_almost_the_same():
    rng = np.random.default_rng(0)
    nearest = np.tanh(rng.normal(0.6, 0.25, 1000)).astype(np.float32)
    threshold = OwnPairs(nearest, 0).threshold()
    assert threshold == pytest.approx(np.quantile(nearest, 0.99), abs=0.02)
    close = np.concatenate([nearest, np.full(50, 0.985, np.float32)])
    assert OwnPairs(close, 0).threshold() == pytest.approx(threshold, abs=0.02)
    assert np.quantile(close, 0.99) > 0.98


def test_a_threshold_has_bounds_and_needs_two_images(tmp_path):
    assert OwnPairs(np.zeros(50, np.float32), 0).threshold() == nearest.LOWEST
    assert OwnPairs(np.full(50, 0.989, np.float32), 0).threshold() <= nearest.SAME
    images, encoder = _pictures(1) * 2, Thumbnails()
    own = own_pairs(images, Vectors.make(tmp_path, images, encoder, key="a", progress=False), encoder)
    assert own.threshold() is None
    assert own.doubles == 2


def test_vectors_of_no_length_are_like_nothing():
    assert not unit(np.zeros((2, 5))).any()
