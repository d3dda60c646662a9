"""The reference-to-video Transformer: diffusers' Wan with references appended on the time axis.

Same parameters, names and file format as the base model; only the forward pass differs:

* reference latents follow the video's latents on the time axis, so that the stock patch embedding and rotary positions
  (time T, T + 1, ...; height and width from 0) serve both;
* text cross-attention acts on video tokens only; self-attention, feed-forward and timestep modulation on all;
* reference tokens are cut off before the output layer;
* the outputs of chosen blocks are handed out for alignment.
"""

from __future__ import annotations

import functools
import json
from typing import Any, NamedTuple, cast

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformer3DModel, WanTransformerBlock
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from refalign.errors import ArtifactError, GeometryError
from refalign.models.context import SplitAttention, TokenSplit, WholeTokens
from refalign.models.loading import load_pretrained


class DiTOutput(NamedTuple):
    """What the Transformer returns.

    Attributes:
        velocity: predicted noise - x0 of the video latents.
        reference_tokens: per aligned block the block's output for the references, in the order of the input's K;
            zeros where a reference was not attended. Without any reference: the tokens of the zero frame, K = 1.
        video_tokens: per aligned block the block's output for the video's latent frames (the baseline REPA needs them).
    """

    velocity: Float[Tensor, "B Z T h w"]
    reference_tokens: tuple[Float[Tensor, "B K P D"], ...]
    video_tokens: tuple[Float[Tensor, "B T P D"], ...]


class ReferenceWanBlock(WanTransformerBlock):
    """A Wan block in which the last tokens, the references, take no part in text cross-attention."""

    def forward(  # ty: ignore[incompatible-method-override]  # one more argument than the stock block
        self,
        hidden_states: Float[Tensor, "B N D"],
        encoder_hidden_states: Float[Tensor, "B L D"],
        temb: Float[Tensor, "B 6 D"],
        rotary_emb: tuple[Tensor, Tensor],
        num_video_tokens: int,
    ) -> Float[Tensor, "B N D"]:
        dtype = hidden_states.dtype
        modulation = (self.scale_shift_table + temb.float()).unsqueeze(2)
        attn_shift, attn_scale, attn_gate, ffn_shift, ffn_scale, ffn_gate = modulation.unbind(1)

        # 1. Joint self-attention over video and references
        attended = self.norm1(hidden_states.float()) * (1 + attn_scale) + attn_shift
        attended = self.attn1(attended.to(dtype), None, None, rotary_emb)
        hidden_states = (hidden_states.float() + attended * attn_gate).to(dtype)

        # 2. Text cross-attention, video tokens only
        video, references = hidden_states[:, :num_video_tokens], hidden_states[:, num_video_tokens:]
        video = video + self.attn2(self.norm2(video.float()).to(dtype), encoder_hidden_states, None, None)
        hidden_states = torch.cat([video, references], dim=1)

        # 3. Feed-forward
        fed = self.norm3(hidden_states.float()) * (1 + ffn_scale) + ffn_shift
        fed = self.ffn(fed.to(dtype))
        return (hidden_states.float() + fed.float() * ffn_gate).to(dtype)


class RefAlignTransformer(WanTransformer3DModel):
    """Wan's Transformer with references. Loads any Wan2.1 text-to-video folder, and saves one that stock diffusers opens.

    A sample's attended references are packed to the front of the time axis that follows the video; a sample with none
    gets one all-zero frame. All samples of a batch must end with the same number of frames, because the attention has no
    mask: a loader groups samples by it. With K = 1, dropped and kept references mix freely.

    Latents and text are cast to the weights' dtype in the forward pass. Under FSDP2's mixed precision set
    ``cast_forward_inputs`` to False: rotary tables and timesteps must stay in float32 (637 in bf16 is 636).

    Source: arXiv 2603.25743 and its published model. Ours takes batches and per-sample timesteps.
    """

    config: Any  # diffusers' frozen dictionary, whose entries are attributes too
    _gradient_checkpointing_func: Any
    _repeated_blocks = ["ReferenceWanBlock"]
    _no_split_modules = ["ReferenceWanBlock"]
    # The stock plan splits the token axis over devices by position, which would tear references off their video.
    _cp_plan = None
    token_split = WholeTokens()

    @functools.wraps(WanTransformer3DModel.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.image_dim is not None or self.config.added_kv_proj_dim is not None:
            raise ArtifactError("this Wan is image-to-video (it has image_dim or added_kv_proj_dim); give a text-to-video one.")
        for block in self.blocks:
            block.__class__ = ReferenceWanBlock  # same parameters; only forward differs

    def split_tokens(self, group: ProcessGroup) -> None:
        """Deals the tokens of every sample to the ranks of ``group``, which must all be given the same samples.

        Raises:
            GeometryError: the heads do not divide over the ranks.
        """
        split = TokenSplit(group)
        if self.config.num_attention_heads % split.size:
            raise GeometryError(
                f"{self.config.num_attention_heads} heads cannot be dealt to training.parallel.context={split.size} ranks."
            )
        self.token_split = split
        for block in self.blocks:
            cast(Any, block).attn1.set_processor(SplitAttention(split))

    @property
    def width(self) -> int:
        """D, the width of a token."""
        return self.config.num_attention_heads * self.config.attention_head_dim

    def to_json_string(self) -> str:
        """The config as stock diffusers' class, so that the saved folder opens without this package.

        The path it was loaded from is left out: a released file should not tell where it was made.
        """
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        return json.dumps(config | {"_class_name": WanTransformer3DModel.__name__}, indent=2, sort_keys=True) + "\n"

    def make_rope(self) -> WanRotaryPosEmbed:
        """Rotary tables on the CPU, for a model that was built on the meta device (they are in no weight file)."""
        with torch.device("cpu"):
            return WanRotaryPosEmbed(self.config.attention_head_dim, self.config.patch_size, self.config.rope_max_seq_len)

    def forward(  # latents and references instead of one hidden state
        self,
        latents: Float[Tensor, "B Z T h w"],
        timestep: Float[Tensor, "B"] | Int[Tensor, "B"],
        prompt_embeds: Float[Tensor, "B L text_dim"],
        reference_latents: Float[Tensor, "B K Z h w"] | None = None,
        reference_mask: Bool[Tensor, "B K"] | None = None,
        alignment_blocks: tuple[int, ...] = (),
    ) -> DiTOutput:
        """Predicts the velocity of noisy video latents, given text and clean references.

        Args:
            latents: noisy video latents, normalised.
            timestep: 1000 * sigma, one per sample; the references get it too, although they are clean.
            prompt_embeds: text tokens, zeros beyond the prompt's own (``pad_prompt_embeds``).
            reference_latents: clean references, each encoded alone; None is the same as an all-False mask.
            reference_mask: attended references; None attends all. Its values are read on the host, so that keeping
                it on the CPU spares a device sync.
            alignment_blocks: indices of the blocks whose outputs are returned.

        Raises:
            GeometryError: samples of the batch attend different numbers of references, or a block index is too large.
        """
        if alignment_blocks and max(alignment_blocks) >= len(self.blocks):
            raise GeometryError(
                f"alignment block {max(alignment_blocks)} was asked for; the last block is {len(self.blocks) - 1}."
            )
        dtype = self.patch_embedding.weight.dtype

        # 1. Patch and position embedding of the video and, after it on the time axis, the references
        frames, places = _attended_frames(latents, reference_latents, reference_mask)
        sequence = torch.cat([latents.to(dtype), frames.to(dtype)], dim=2)
        patches = self.patch_embedding(sequence)
        num_frames, tokens_per_frame = patches.shape[2] - frames.shape[2], patches.shape[3:].numel()
        num_video_tokens = self.token_split.count(num_frames * tokens_per_frame, patches.shape[2:].numel())
        tokens = patches.flatten(2).mT.contiguous()
        hidden_states, *rotary_emb = (self.token_split.take(each) for each in (tokens, *self.rope(sequence)))

        # 2. Condition
        temb, modulation, text, _ = self.condition_embedder(timestep, prompt_embeds.to(dtype))
        arguments = text, modulation.unflatten(1, (6, -1)), tuple(rotary_emb), num_video_tokens

        # 3. Blocks
        taps: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, *arguments)
            else:
                hidden_states = block(hidden_states, *arguments)
            if index in alignment_blocks:
                taps[index] = self.token_split.gather(hidden_states).unflatten(1, (-1, tokens_per_frame))
        hidden_states = self.token_split.gather(hidden_states)

        # 4. Output: the video's velocity, and the tokens of the aligned blocks
        num_references = 1 if reference_latents is None else reference_latents.shape[1]
        return DiTOutput(
            self._project_out(hidden_states[:, : num_frames * tokens_per_frame], temb, latents.shape),
            tuple(_at_places(taps[index][:, num_frames:], places, num_references) for index in alignment_blocks),
            tuple(taps[index][:, :num_frames] for index in alignment_blocks),
        )

    def _project_out(
        self, tokens: Float[Tensor, "B N D"], temb: Float[Tensor, "B D"], latents_shape: torch.Size
    ) -> Float[Tensor, "B Z T h w"]:
        """Last norm and projection of the video tokens, and patches back to a grid."""
        shift, scale = (self.scale_shift_table + temb[:, None]).chunk(2, dim=1)
        patches = self.proj_out((self.norm_out(tokens.float()) * (1 + scale) + shift).type_as(tokens))
        num_samples, _, num_frames, height, width = latents_shape
        p_t, p_h, p_w = self.config.patch_size
        grid = patches.reshape(num_samples, num_frames // p_t, height // p_h, width // p_w, p_t, p_h, p_w, -1)
        return grid.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(num_samples, -1, num_frames, height, width)


def _attended_frames(
    latents: Float[Tensor, "B Z T h w"],
    reference_latents: Float[Tensor, "B K Z h w"] | None,
    reference_mask: Bool[Tensor, "B K"] | None,
) -> tuple[Float[Tensor, "B Z N h w"], Int[Tensor, "B N"] | None]:
    """The N frames to append, and which input reference each one is (None: all of them, in order)."""
    if reference_latents is None:
        return torch.zeros_like(latents[:, :, :1]), None
    frames = reference_latents.transpose(1, 2)
    if reference_mask is None:
        return frames, None
    attended = [[k for k, is_attended in enumerate(row) if is_attended] for row in reference_mask.tolist()]
    counts = {max(1, len(row)) for row in attended}
    if len(counts) != 1:
        raise GeometryError(
            f"samples of one batch attend {sorted(counts)} reference frames, and attention has no mask; "
            "group samples by their number of attended references (none counts as one zero frame)."
        )
    # A sample without references borrows place 0 for its zero frame.
    is_attended = torch.tensor([bool(row) for row in attended], device=frames.device)[:, None, None, None, None]
    places = torch.tensor([row or [0] for row in attended], device=frames.device)
    packed = frames.gather(2, places[:, None, :, None, None].expand(-1, frames.shape[1], -1, *frames.shape[3:]))
    return torch.where(is_attended, packed, 0.0), None if places.shape[1] == frames.shape[2] else places


def _at_places(
    tokens: Float[Tensor, "B N P D"], places: Int[Tensor, "B N"] | None, num_references: int
) -> Float[Tensor, "B K P D"]:
    """Tokens of the appended frames at the places their references had in the input, zeros elsewhere."""
    if places is None:
        return tokens
    result = tokens.new_zeros(tokens.shape[0], num_references, *tokens.shape[2:])
    return result.scatter(1, places[:, :, None, None].expand_as(tokens), tokens)


def load_transformer(
    source: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32, subfolder: str = "transformer"
) -> RefAlignTransformer:
    """Loads the Transformer of a diffusers-layout folder or hub id.

    Raises:
        ArtifactError: it is missing, gated, an image-to-video model, or lacks weights (diffusers would make some up).
    """
    options = {"torch_dtype": dtype, "output_loading_info": True}
    model, report = load_pretrained(RefAlignTransformer, source, subfolder=subfolder, revision=revision, **options)
    if faults := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
        raise ArtifactError(
            f"{source}/{subfolder}: {len(faults)} weights are missing or not of this model, the first: {faults[0]}; "
            "its files do not belong to its config.json. Download it again."
        )
    return model
