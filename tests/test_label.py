"""A word on a picture."""

from PIL import Image

from memorization_guard.reports.label import labelled


def test_a_picture_is_labelled_in_its_corner_and_stays_itself():
    for size in ((8, 8), (64, 64), (512, 384)):
        for mode in ("RGB", "RGBA", "L"):
            picture = Image.new(mode, size, 200)
            before = picture.tobytes()
            drawn = labelled(picture, "not judged")
            assert picture.tobytes() == before
            assert (drawn.mode, drawn.size) == ("RGB", size)
            assert drawn.tobytes() != picture.convert("RGB").tobytes()
    top = drawn.crop((0, 0, 512, 300))
    assert top.tobytes() == picture.convert("RGB").crop((0, 0, 512, 300)).tobytes()
