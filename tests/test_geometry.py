import numpy as np
import pytest
from PIL import Image

from refalign import geometry
from refalign.errors import GeometryError


@pytest.mark.parametrize(
    ("height", "width", "inside"), [(10, 40, np.s_[12:20, :]), (40, 10, np.s_[:, 12:20]), (7, 7, np.s_[:, :])]
)
def test_letterbox_centres_without_cropping(height, width, inside):
    pixels, is_padding = geometry.letterbox(np.full((height, width, 3), (200, 30, 40), np.uint8), 32, 32)
    expected = np.ones((32, 32), bool)
    expected[inside] = False
    assert np.array_equal(is_padding, expected)
    assert (pixels[is_padding] == 255).all() and (pixels[~is_padding] == (200, 30, 40)).all()


def test_letterbox_turns_transparency_white():
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 16, 8))
    pixels, is_padding = geometry.letterbox(image, 16, 16)
    assert (pixels[0] == 255).all() and (pixels[15] == (255, 0, 0)).all() and not is_padding.any()
    with pytest.raises(GeometryError, match="no pixels"):
        geometry.letterbox(Image.new("RGB", (0, 4)), 16, 16)


def test_grids_follow_the_sizes():
    assert geometry.token_grid(480, 832) == (30, 52)
    assert geometry.latent_shape(81, 480, 832) == (21, 60, 104)


def test_pooled_mask_is_the_share_of_each_token_row_major():
    mask = np.zeros((32, 48), bool)
    mask[0:16, 16:24] = True
    mask[16:32, 32:48] = True
    assert geometry.pool_to_tokens(mask).tolist() == [0, 0.5, 0, 0, 0, 1]


def test_sizes_off_the_grid_name_the_nearest():
    geometry.check_geometry(480, 832, 81)
    geometry.check_geometry(16, 16, 1)
    with pytest.raises(GeometryError, match=r"height=470 is not a multiple of 16; nearest: 464 or 480"):
        geometry.check_geometry(470, 832, 81)
    with pytest.raises(GeometryError, match=r"num_frames=80 is not 1 more than a multiple of 4; nearest: 77 or 81"):
        geometry.check_geometry(480, 832, 80)
    with pytest.raises(GeometryError, match=r"width=0 .* nearest: 16 or 32.*num_frames=0 .* nearest: 1 or 5"):
        geometry.check_geometry(480, 0, 0)


def test_models_whose_tokens_differ_are_refused():
    geometry.check_token_grid(8, 2, 16)
    with pytest.raises(GeometryError, match="the vision encoder's patch is 14 px"):
        geometry.check_token_grid(8, 2, 14)
