"""What our code takes from inside of libraries: each fails here, by name, when a new version changes it."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock

from refalign.models.yolo import prepare_ultralytics


def test_padding_of_wans_causal_convolution_is_left_right_top_bottom_past_future():
    """`refalign.models.vae.convolve_planes`."""
    assert WanCausalConv3d(2, 3, (3, 5, 7), padding=(1, 2, 3))._padding == (3, 3, 2, 2, 2, 0)
    assert list(inspect.signature(WanCausalConv3d.forward).parameters) == ["self", "x", "cache_x"]


def test_conv_idx_and_feat_map_are_the_vaes_cache():
    """`workshop.weights.train_vae`."""
    vae = AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    vae.clear_cache()
    assert vae._conv_idx == [0] and set(vae._feat_map) == {None}
    assert list(inspect.signature(vae.decoder.forward).parameters) == ["x", "feat_cache", "feat_idx", "first_chunk"]


def test_class_of_a_wan_block_can_be_changed_because_it_has_these_parts_alone():
    """`refalign.models.wan.ReferenceWanBlock` has the forward pass written out for them."""
    block = WanTransformerBlock(dim=24, ffn_dim=32, num_heads=2, cross_attn_norm=True)
    parts = {name for name, _ in block.named_children()} | {name for name, _ in block.named_parameters(recurse=False)}
    assert parts == {"norm1", "attn1", "attn2", "norm2", "ffn", "norm3", "scale_shift_table"}
    arguments = ["self", "hidden_states", "encoder_hidden_states", "temb", "rotary_emb"]
    assert list(inspect.signature(WanTransformerBlock.forward).parameters) == arguments


def test_processor_of_a_wan_attention_is_called_with_these_arguments():
    """`refalign.models.context.SplitAttention`."""

    class Record:
        def __call__(self, *arguments):
            self.arguments = arguments
            return arguments[1]

    attention, record = WanAttention(dim=24, heads=2, dim_head=12), Record()
    attention.set_processor(record)
    states, rotary = torch.zeros(1, 4, 24), (torch.zeros(1), torch.zeros(1))
    attention(states, None, None, rotary)
    assert record.arguments == (attention, states, None, None, rotary)
    assert attention.heads == 2 and len(attention.to_out) == 2


def test_row_of_bytetracker_is_box_track_score_class_and_place():
    """`refalign.models.yolo.Detector.track`."""
    prepare_ultralytics()
    from ultralytics.engine.results import Boxes
    from ultralytics.trackers.byte_tracker import BYTETracker
    from ultralytics.utils import YAML, IterableSimpleNamespace
    from ultralytics.utils.checks import check_yaml

    tracker = BYTETracker(IterableSimpleNamespace(**YAML.load(check_yaml("bytetrack.yaml"))))
    found = np.array([[0, 0, 20, 20, 0.6, 3], [40, 40, 70, 80, 0.9, 5]], np.float32)  # box, score, class
    rows = tracker.update(Boxes(found, (96, 96)), np.zeros((96, 96, 3), np.uint8))
    assert rows.shape == (2, 8) and sorted(rows[:, 4]) == [1, 2]
    for row in rows:
        np.testing.assert_allclose(row[[0, 1, 2, 3, 5, 6]], found[int(row[7])], atol=1e-3)


def test_classes_of_detectors_are_ultralytics_own():
    """`refalign.models.detector_files` tells them by name."""
    prepare_ultralytics()
    from ultralytics import utils
    from ultralytics.nn import tasks

    from refalign.models.detector_files import _TASKS

    assert utils.SAFE_LOAD is True
    assert all(inspect.isclass(getattr(tasks, name)) for name in _TASKS)


def test_settings_of_ray_train_are_in_v2():
    """`refalign.training.launch`."""
    config = pytest.importorskip("ray.train.v2.api.config")
    from ray.train.v2.api.exceptions import TrainingFailedError

    assert issubclass(TrainingFailedError, Exception)
    assert {field.name for field in dataclasses.fields(config.FailureConfig)} >= {"max_failures"}
    assert {field.name for field in dataclasses.fields(config.ScalingConfig)} >= {"num_workers", "use_gpu"}
    assert inspect.isclass(config.RunConfig) and inspect.isclass(config.LoggingConfig)
