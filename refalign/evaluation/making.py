"""One model at a time, loaded when it is first asked for, and videos made with the run's settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from refalign.config import RunConfig


class VideoMaker:
    """Keeps the pipeline of the last source."""

    def __init__(self, config: RunConfig, device: str) -> None:
        self.config, self.device = config, device
        self._opened: tuple[str, str | None] | None = None
        self._pipeline: Any = None

    def make(self, source: str, prompt: str, references: Sequence[Any], seed: int, *, revision: str | None = None) -> Any:
        """uint8 frames [F, H, W, 3] of one video.

        Args:
            source: folder or hub id of the model.
            references: RGB pictures uint8 [H, W, 3].
            revision: of a hub id.
        """
        import torch

        video, evaluation = self.config.video, self.config.evaluation
        videos = self.open(source, revision)(
            prompt=prompt,
            references=list(references),
            num_frames=video.num_frames,
            height=video.height_px,
            width=video.width_px,
            num_inference_steps=evaluation.num_inference_steps,
            guidance_scale=evaluation.guidance_scale,
            reference_guidance_scale=evaluation.reference_guidance_scale,
            negative_prompt=evaluation.negative_prompt,
            generator=torch.Generator().manual_seed(seed),
            output_type="uint8",
        )
        return videos.frames[0].numpy()

    def open(self, source: str, revision: str | None) -> Any:
        """The pipeline. On a GPU its parts are moved there in turn, so that the largest one decides what fits."""
        import torch

        from refalign.generation.pipeline import RefAlignPipeline

        if self._opened != (source, revision):
            self._pipeline = None
            dtype = getattr(torch, self.config.training.precision)
            self._pipeline = RefAlignPipeline.from_pretrained(source, revision=revision, torch_dtype=dtype)
            self._pipeline.max_sequence_length = self.config.models.max_text_tokens
            self._pipeline.set_progress_bar_config(disable=True)
            if self.device == "cuda":
                self._pipeline.enable_model_cpu_offload()
            self._opened = source, revision
        return self._pipeline
