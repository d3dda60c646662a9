"""Tiny untrained models of the real classes, saved as their hub folders are: CLIP, SigLIP and Qwen2.5-VL with tokenizers."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

_VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def make_tokenizer(ends_texts=False):
    """Byte-level pairs; ``ends_texts`` puts the end token after every text, as CLIP and SigLIP need it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|pad|>", "<|start|>", "<|end|>", *_VISION]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["a red ball rolls over the grass"], trainer)
    if ends_texts:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <|end|>", special_tokens=[("<|end|>", tokenizer.token_to_id("<|end|>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", bos_token="<|start|>", eos_token="<|end|>", extra_special_tokens=_VISION
    )


def save_clip(folder, kind="clip"):
    """A CLIP or SigLIP of width 32 for pictures of 32 px."""
    tokenizer = make_tokenizer(ends_texts=True)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = sizes | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": 24}
    vision = sizes | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
        pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    else:
        model = SiglipModel(SiglipConfig(text_config=text | {"projection_size": 32}, vision_config=vision))
        pictures = SiglipImageProcessor(size={"height": 32, "width": 32})
    for part in (model, tokenizer, pictures):
        part.save_pretrained(folder)
    return str(folder)


def save_captioner(folder):
    """A Qwen2.5-VL of 60 thousand parameters that says nothing sensible, always the same."""
    tokenizer = make_tokenizer()
    number = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<|pad|>", "<|end|>", *_VISION)}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=_TEMPLATE,
    )
    sizes = {"hidden_size": 32, "intermediate_size": 48}
    text = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    ends = {"bos_token_id": None, "eos_token_id": number["<|end|>"], "pad_token_id": number["<|pad|>"]}
    vision = {"depth": 2, "num_heads": 4, "out_hidden_size": 32, "patch_size": 14, "window_size": 56}
    config = Qwen2_5_VLConfig(
        text_config=sizes | text | ends | {"rope_parameters": rope},
        vision_config=sizes | vision | {"fullatt_block_indexes": [1]},
        image_token_id=number["<|image_pad|>"],
        video_token_id=number["<|video_pad|>"],
        vision_start_token_id=number["<|vision_start|>"],
        vision_end_token_id=number["<|vision_end|>"],
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.temperature, model.generation_config.do_sample = 0.7, True  # as published folders say
    for part in (model, processor):
        part.save_pretrained(folder)
    return str(folder)
