import numpy as np
import pytest
from PIL import Image

from refalign import geometry
from refalign.errors import GeometryError
from refalign.geometry import Grid


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


SMALL = Grid(stride_px=4, stride_frames=4, patch=2)


def test_grids_follow_the_sizes():
    assert Grid().token_px == 16 and SMALL.token_px == 8
    assert Grid().tokens(480, 832) == (30, 52) and SMALL.tokens(48, 80) == (6, 10)
    assert Grid().latent_shape(81, 480, 832) == (21, 60, 104) and SMALL.latent_shape(9, 48, 80) == (3, 12, 20)


def test_each_latent_frame_begins_with_its_first_pixel_frame():
    assert Grid().first_frames(1) == [0]
    assert Grid().first_frames(9) == [0, 1, 5]
    assert Grid().first_frames(81)[-1] == 77 and len(Grid().first_frames(81)) == 21
    assert Grid(stride_frames=2).first_frames(5) == [0, 1, 3]


def test_pooled_mask_is_the_share_of_each_token_row_major():
    mask = np.zeros((32, 48), bool)
    mask[0:16, 16:24] = True
    mask[16:32, 32:48] = True
    assert Grid().pool(mask).tolist() == [0, 0.5, 0, 0, 0, 1]
    assert SMALL.pool(mask[::2, ::2]).tolist() == [0, 0.5, 0, 0, 0, 1]


def test_sizes_off_the_grid_name_the_nearest():
    Grid().check(480, 832, 81)
    Grid().check(16, 16, 1)
    SMALL.check(48, 80, 9)
    with pytest.raises(GeometryError, match=r"height=470 is not a multiple of 16; nearest: 464 or 480"):
        Grid().check(470, 832, 81)
    with pytest.raises(GeometryError, match=r"num_frames=80 is not 1 more than a multiple of 4; nearest: 77 or 81"):
        Grid().check(480, 832, 80)
    with pytest.raises(GeometryError, match=r"width=0 .* nearest: 16 or 32.*num_frames=0 .* nearest: 1 or 5"):
        Grid().check(480, 0, 0)
    with pytest.raises(GeometryError, match=r"height=44 is not a multiple of 8; nearest: 40 or 48"):
        SMALL.check(44, 80, 9)


def test_models_whose_tokens_differ_are_refused():
    Grid().check_vision(16)
    SMALL.check_vision(8)
    with pytest.raises(GeometryError, match="8 x Transformer patch 2 = 16 px per token, the vision encoder's patch is 14 px"):
        Grid().check_vision(14)
    with pytest.raises(GeometryError, match="4 x Transformer patch 2 = 8 px per token, the vision encoder's patch is 16 px"):
        SMALL.check_vision(16)


def test_the_grid_is_read_from_the_models_configs():
    assert Grid.of({}, {"patch_size": (1, 2, 2)}) == Grid()
    assert Grid.of({"scale_factor_spatial": 4}, {"patch_size": [1, 2, 2]}) == SMALL
    assert Grid.of({"scale_factor_spatial": 16, "scale_factor_temporal": 2}, {"patch_size": [1, 1, 1]}) == Grid(16, 2, 1)


@pytest.mark.parametrize("patch_size", [(2, 2, 2), (1, 2, 4), (2, 2), (1, 0, 0), (1, "2", "2"), 2, None])
def test_patches_that_make_no_grid_are_refused(patch_size):
    with pytest.raises(GeometryError, match="make no grid"):
        Grid.of({}, {"patch_size": patch_size})


@pytest.mark.parametrize("vae", [{"scale_factor_spatial": 0}, {"scale_factor_temporal": "4"}, {"scale_factor_spatial": None}])
def test_strides_that_make_no_grid_are_refused(vae):
    with pytest.raises(GeometryError, match="make no grid"):
        Grid.of(vae, {"patch_size": [1, 2, 2]})
