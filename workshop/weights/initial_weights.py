"""The toy's models with untrained weights, and their folder in the hub's layout.

    python -m workshop.weights.initial_weights FOLDER

Every class is the real one (UMT5, Wan's Transformer and VAE, DINOv3). The shapes are those of the shipped ``config.json`` files.
Each training script of this folder replaces the weights of one model.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from refalign.toy import WEIGHTS_FOLDER
from refalign.toy.drawing import FRAME_HEIGHT_PX, FRAME_WIDTH_PX
from refalign.toy.scenes import caption_words

SEED = 0
NEARNESS = 5.0
"""Added to the logits of the words that an untrained head attends to, and taken from the others."""
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
"""In T5's order: padding is 0, the end of a prompt is 1, words outside the vocabulary are 2."""
MAX_PROMPT_TOKENS = 512


def make_transformer(seed: int = SEED) -> Any:
    """Wan's DiT with 5 heads of 32 and 5 blocks: 2.4 M parameters, which one core trains in an hour or two."""
    torch.manual_seed(seed)
    config: Any = WanTransformer3DModel.load_config(WEIGHTS_FOLDER / "wan" / "transformer")
    model: Any = WanTransformer3DModel.from_config(config)
    torch.nn.init.zeros_(model.proj_out.weight)  # a first prediction of zero spares the first steps
    return model


def make_vae(seed: int = SEED) -> Any:
    """Wan's VAE with 16 channels and a stride of 4 in time and in space: a token is 8 px wide. 1.9 M parameters."""
    torch.manual_seed(seed)
    config: Any = AutoencoderKLWan.load_config(WEIGHTS_FOLDER / "wan" / "vae")
    return AutoencoderKLWan.from_config(config, latents_mean=[0.0] * 16, latents_std=[1.0] * 16)


def make_vision_encoder(seed: int = SEED) -> Any:
    """DINOv3's ViT: patch 8, 4 registers, 96 wide, 4 layers: 0.5 M parameters."""
    torch.manual_seed(seed)
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig.from_pretrained(WEIGHTS_FOLDER / "dinov3"))


def make_text_encoder(vocabulary_size: int, seed: int = SEED) -> Any:
    """UMT5's encoder, 96 wide, 2 layers. Its heads begin by attending to the words of their own clause.

    Without that start the encoder became a bag of words: a Transformer that knows no colours yet cannot use which colour belongs
    to which side, and the encoder learned to ignore where words stand.
    """
    torch.manual_seed(seed)
    config = transformers.UMT5Config.from_pretrained(WEIGHTS_FOLDER / "wan" / "text_encoder", vocab_size=vocabulary_size)
    encoder: Any = transformers.UMT5EncoderModel(config)
    rows = encoder.shared.weight.data
    rows /= rows.square().mean(1, keepdim=True).sqrt()  # so that the first norm does not change an embedding
    for block in encoder.encoder.block:
        # [buckets, heads]: bucket n is n words before, 16 + n is n words after
        bias = block.layer[0].SelfAttention.relative_attention_bias.weight.data
        for head, near in enumerate((range(1, 6), range(17, 22), (0, 1, 2, 17, 18))):
            bias[:, head] -= NEARNESS
            bias[list(near), head] += NEARNESS
    return encoder


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a word of the captions, lower case; ``</s>`` is appended as T5 does."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *caption_words()])}
    tokenizer: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    # A hyphen belongs to its word ("diamond-shaped"); punctuation is a word of its own.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[,.;:!?]"), behavior="isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=MAX_PROMPT_TOKENS,
    )


def replace_folder(target: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` fill a folder beside ``target``, then puts it in its place: a reader sees the old folder or the new one."""
    fresh, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    write(fresh)
    for path in fresh.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors writes files that only their owner can read
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def save_half(model: Any, target: Path) -> None:
    """Writes a model's ``config.json`` and half-precision safetensors as ``target``."""
    replace_folder(target, model.half().save_pretrained)


def save_vision_encoder(model: Any, target: Path) -> None:
    """Writes the vision encoder, and beside it the mean and deviation that its inputs are normalised with."""

    def write(folder: Path) -> None:
        model.half().save_pretrained(folder)
        transformers.DINOv3ViTImageProcessor(size={"height": FRAME_HEIGHT_PX, "width": FRAME_WIDTH_PX}).save_pretrained(folder)

    replace_folder(target, write)


def write_initial_weights(output: Path) -> None:
    """Writes all models untrained, and what needs no training (tokenizer, scheduler, index)."""
    tokenizer: Any = make_tokenizer()
    pipeline: Any = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=make_text_encoder(len(tokenizer)),
        vae=make_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0),
        transformer=make_transformer(),
    )
    replace_folder(output / "wan", pipeline.to(torch.float16).save_pretrained)
    save_vision_encoder(make_vision_encoder(), output / "dinov3")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="FOLDER", help="wan/ and dinov3/ are written there")
    write_initial_weights(parser.parse_args().output)
