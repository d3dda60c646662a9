"""The classes that hold the tiny weights, built at the sizes of the real ones on the meta device."""

import pytest
import torch


def count(model) -> float:
    """Parameters in millions."""
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def test_dinov3_vit_l():
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(
        patch_size=16,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_register_tokens=4,
    )
    with torch.device("meta"):
        model = DINOv3ViTModel(config)
    assert count(model) == pytest.approx(303.1, abs=0.3)


def test_umt5_xxl_encoder():
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=256_384, d_model=4096, d_kv=64, d_ff=10_240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    assert count(model) == pytest.approx(5681, abs=3)
    assert model.config.d_model == 4096, "what Wan's text_dim expects"


def test_wan_vae():
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        vae = AutoencoderKLWan()
    assert count(vae) == pytest.approx(126.9, abs=0.2)
    assert (vae.config.z_dim, len(vae.config.latents_mean)) == (16, 16)
    assert (vae.config.scale_factor_spatial, vae.config.scale_factor_temporal) == (8, 4)


def test_yolo11x_seg():
    from refalign.models.yolo import prepare_ultralytics

    prepare_ultralytics()
    from ultralytics.nn.tasks import SegmentationModel

    model = SegmentationModel("yolo11x-seg.yaml", verbose=False)  # it runs itself once to find its strides: not on meta
    assert count(model) == pytest.approx(62.1, abs=0.3)
