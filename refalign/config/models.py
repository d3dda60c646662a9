"""The models of a run."""

from __future__ import annotations

from typing import Literal

from refalign.config.section import Count, Section


class ModelsConfig(Section):
    base: str
    """Wan2.1 in the diffusers layout (transformer, vae, text_encoder, tokenizer): a folder or a hub id."""
    base_revision: str | None = None
    """Hub revision of ``base``; pin it for a run that must be reproducible."""
    vision_encoder: str
    """DINOv3 ViT: a folder or a hub id. Gives the alignment targets and the identity embeddings."""
    vision_encoder_revision: str | None = None
    """Hub revision of ``vision_encoder``."""
    detector: str
    """Segmentation detector: a folder with model.yaml and model.safetensors, or an ultralytics name such as yolo11n-seg.pt;
    yoloe-11l-seg.pt and its like find whatever ``curation.classes`` names."""
    text_image: str | None = None
    """CLIP or SigLIP that scores a clip against its caption: a folder or a hub id. None leaves the score out."""
    text_image_revision: str | None = None
    """Hub revision of ``text_image``."""
    aesthetic: str | None = None
    """Aesthetic head over the embeddings of ``text_image``: a .safetensors file (pipelines/convert.py makes it of a .pth)."""
    captioner: str | None = None
    """Vision-language model that writes captions, of the class of Qwen2.5-VL: a folder or a hub id."""
    captioner_revision: str | None = None
    """Hub revision of ``captioner``."""
    max_text_tokens: Count = 512
    """Text tokens the transformer attends to; shorter prompts are padded with zeros."""
    encoder_dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of the frozen encoders."""
