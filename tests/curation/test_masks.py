import json

import numpy as np
import pytest

from refalign.curation.masks import cut_out, decode_rle, mask_iou
from refalign.errors import DataError


def test_decode_rle_equals_pycocotools_on_random_masks():
    from pycocotools import mask as coco

    rng = np.random.default_rng(0)
    for density in (0.0, 0.02, 0.5, 0.98, 1.0):
        for size in ((1, 1), (7, 13), (120, 33), (400, 700)):
            mask = rng.random(size) < density
            encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
            assert np.array_equal(decode_rle(encoded["size"], encoded["counts"].decode()), mask)


def test_decode_rle_equals_pycocotools_on_the_real_record(real_data):
    from pycocotools import mask as coco

    entries = json.loads((real_data / "opens2v" / "annotations.json").read_text())
    masks = [mask for entry in entries.values() for mask in entry["annotation"]["mask_annotation"]["0"].values()]
    assert len(masks) == 14
    for mask in masks:
        expected = coco.decode({"size": mask["size"], "counts": mask["counts"]}).astype(bool)
        assert np.array_equal(decode_rle(mask["size"], mask["counts"]), expected)


@pytest.mark.parametrize(
    "size, counts", [((5, 5), "0"), ((0, 0), ""), ((2, 2), "o"), ((-1, 4), "4"), ((2, 2), "\n"), ((2, 2), "oooooooooo0")]
)
def test_a_mask_that_lies_about_its_size_is_refused(size, counts):
    with pytest.raises(DataError) as caught:
        decode_rle(size, counts)
    assert caught.value.reason == "BAD_MASK"


def test_mask_iou():
    left, right = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    assert mask_iou(left, right) == 0
    left[:2], right[1:3] = True, True
    assert mask_iou(left, right) == pytest.approx(1 / 3)


def test_cut_out_keeps_colours_and_puts_the_mask_into_alpha():
    frame = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    mask = np.zeros((20, 30), bool)
    mask[5:10, 5:15] = True
    rgba = cut_out(frame, mask, (4, 4, 16, 12), (100, 100))
    assert rgba.shape == (8, 12, 4)
    assert np.array_equal(rgba[..., :3], frame[4:12, 4:16])
    assert np.array_equal(rgba[..., 3] == 255, mask[4:12, 4:16])
    assert cut_out(frame, mask, (0, 0, 30, 20), (10, 10)).shape[:2] <= (10, 10)
