"""The vision encoder's patch tokens: after the final norm, without prefix, row-major; and the picture embedding."""

import json

import numpy as np
import pytest
import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from refalign.errors import ArtifactError, GeometryError
from refalign.models.dinov3 import VisionEncoder


def make_model(registers: int) -> DINOv3ViTModel:
    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        patch_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_register_tokens=registers,
    )
    return DINOv3ViTModel(config).eval()


def random_images(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("registers", [0, 4, 7])
def test_prefix_tokens_are_derived_from_the_config(registers):
    model = make_model(registers)
    images = random_images(2, 32, 48)
    tokens = VisionEncoder(model).encode(images)
    assert tokens.shape == (2, 2 * 3, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((torch.from_numpy(images) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state[:, -6:]
    torch.testing.assert_close(tokens, expected)


def test_tokens_come_after_the_final_norm():
    model = make_model(4)
    model.norm.bias.data += 3.0
    assert VisionEncoder(model).encode(random_images(1, 32, 32)).mean() > 2


def test_the_grid_is_row_major():
    """A change in one patch of the input changes that patch's token most."""
    encoder = VisionEncoder(make_model(4))
    images = np.full((1, 48, 80, 3), 255, np.uint8)
    changed = images.copy()
    changed[0, 16:32, 48:64] = 0
    difference = (encoder.encode(changed) - encoder.encode(images)).norm(dim=-1)[0]
    assert int(difference.argmax()) == 1 * 5 + 3


def test_sizes_off_the_patch_grid_are_refused_with_the_way_out():
    encoder = VisionEncoder(make_model(4))
    assert encoder.encode(random_images(1, 480, 832)).shape == (1, 1560, 32)
    with pytest.raises(GeometryError, match="480 x 830 px.*16 px"):
        encoder.encode(random_images(1, 480, 830))


def test_embeddings_have_unit_length_and_no_gradient():
    encoder = VisionEncoder(make_model(4))
    embeddings = encoder.embed(random_images(3, 32, 32))
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(3))
    assert not embeddings.requires_grad and not any(parameter.requires_grad for parameter in encoder.model.parameters())
    assert encoder.patch_size_px == 16 and encoder.width == 32


def test_statistics_come_from_the_folder(tmp_path):
    make_model(4).save_pretrained(tmp_path)
    images = random_images(1, 32, 32)
    plain = VisionEncoder.from_pretrained(str(tmp_path)).encode(images)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    other = VisionEncoder.from_pretrained(str(tmp_path)).encode(images)
    assert (plain - other).abs().max() > 1e-3


def test_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(ArtifactError, match="no such model folder"):
        VisionEncoder.from_pretrained(str(tmp_path / "nothing"))
