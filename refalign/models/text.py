"""Text encoding: prompts to UMT5 tokens, real tokens only; padding is put back as zeros where a batch needs it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from refalign.errors import GeometryError
from refalign.models.loading import load_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel  # slow to import; training pads prompts without it

TEXT_TOKENS = 512
"""Tokens of a padded prompt, as Wan2.1 was trained."""


class PromptLosses(NamedTuple):
    """What a text encoder does not see of a prompt."""

    cut_tokens: int  # beyond the longest prompt
    unknown: tuple[str, ...]  # words, or pieces of words, that the tokenizer does not know; "?" if it cannot say which

    def describe(self) -> str:
        """One line, or nothing."""
        cut = f"its last {self.cut_tokens} tokens are ignored, shorten it" if self.cut_tokens else ""
        words = f"the text encoder does not know {', '.join(map(repr, dict.fromkeys(self.unknown)))}" if self.unknown else ""
        return "; ".join(filter(None, (cut, words)))


class TextEncoder:
    """A UMT5 encoder, in evaluation mode and without gradients, with its tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: UMT5EncoderModel) -> None:
        self.tokenizer = tokenizer
        self.model = model.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls, source: str, *, revision: str | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> TextEncoder:
        """Loads ``tokenizer/`` and ``text_encoder/`` of a diffusers-layout folder or hub id; errors as `load_pretrained`."""
        from transformers import AutoTokenizer, UMT5EncoderModel

        tokenizer = load_pretrained(AutoTokenizer, source, subfolder="tokenizer", revision=revision)
        model = load_pretrained(UMT5EncoderModel, source, subfolder="text_encoder", revision=revision, dtype=dtype)
        return cls(tokenizer, model.to(device))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], max_tokens: int = TEXT_TOKENS) -> list[Float[Tensor, "L D"]]:
        """Last hidden state of each prompt's own tokens (with the end token), on the model's device.

        Args:
            prompts: any texts; HTML entities are resolved and white space is collapsed, as Wan's own cleaning does.
            max_tokens: longer prompts are cut.
        """
        if not prompts:
            return []
        batch = self.tokenizer(
            [_clean(prompt) for prompt in prompts],
            padding="longest",
            truncation=True,
            max_length=max_tokens,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.model.device)
        hidden = self.model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        return [tokens[mask.bool()] for tokens, mask in zip(hidden, batch.attention_mask, strict=True)]

    def find_losses(self, prompt: str, max_tokens: int = TEXT_TOKENS) -> PromptLosses:
        """What the encoder does not see of a prompt."""
        text = _clean(prompt)
        encoded = self.tokenizer(text, return_offsets_mapping=self.tokenizer.is_fast)
        unknown = [number for number, token in enumerate(encoded.input_ids) if token == self.tokenizer.unk_token_id]
        words = [text[slice(*encoded.offset_mapping[number])] if self.tokenizer.is_fast else "?" for number in unknown]
        return PromptLosses(max(0, len(encoded.input_ids) - max_tokens), tuple(words))


def pad_prompt_embeds(prompt_embeds: Sequence[Float[Tensor, "_ D"]], length: int = TEXT_TOKENS) -> Float[Tensor, "B {length} D"]:
    """Stacks prompts, zeros beyond each one's own tokens; raises a `GeometryError` if one is longer than ``length``."""
    longest = max(len(tokens) for tokens in prompt_embeds)
    if longest > length:
        raise GeometryError(f"a prompt has {longest} tokens, the padded length is {length}; encode with max_tokens={length}.")
    result = prompt_embeds[0].new_zeros(len(prompt_embeds), length, prompt_embeds[0].shape[1])
    for row, tokens in zip(result, prompt_embeds, strict=True):
        row[: len(tokens)] = tokens
    return result


def _clean(prompt: str) -> str:
    return " ".join(html.unescape(html.unescape(prompt)).split())
