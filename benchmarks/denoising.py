"""At which noise levels does the embedded stage 1 lose what creatures look like?

    uv run benchmarks/denoising.py [--per-tier 2] [--picture FILE]

Held-out clips are encoded, mixed with noise at some level as in training, and denoised from there with their prompt and
references, without guidance; the judges then read what is left of the creatures. Beside it: the same latents with noise added and
not denoised, which shows how much of an error the VAE's decoder forgives.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from recording import describe_machine, write_result
from torch import Tensor

from refalign.generation import make_scheduler
from refalign.models.text import TextEncoder, pad_prompt_embeds
from refalign.models.vae import VideoVAE
from refalign.models.wan import RefAlignTransformer, load_transformer
from refalign.presets import load_preset
from refalign.toy import WEIGHTS_FOLDER
from refalign.toy.cases import Case, make_benchmark
from refalign.toy.rendering import render_scene
from refalign.toy.scoring import score_clip, summarise
from refalign.toy.seeing import Watcher

LEVELS = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Share of noise in what denoising begins with."""
ADDED = (0.0, 0.2, 0.5)
"""Standard deviations of noise that is added to latents, whose own is about 1, and left in."""
STEPS = 20
SCORES = ("text", "fidelity", "pose")


@torch.no_grad()
def denoise(transformer: RefAlignTransformer, latents: Tensor, level: float, shift: float, **conditions: Tensor) -> Tensor:
    """Euler steps from ``level`` to 0 over those of ``STEPS`` shifted levels that lie below it; [1, Z, T, h, w]."""
    scheduler = make_scheduler("euler", shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, STEPS + 1)[:-1].tolist())
    levels = [level, *scheduler.sigmas[scheduler.sigmas < level].tolist()]
    for now, then in zip(levels, levels[1:], strict=False):
        latents = latents + (then - now) * transformer(latents, torch.tensor([1000 * now]), **conditions).velocity
    return latents


def degrade(case: Case, vae: VideoVAE, text: TextEncoder, transformer: RefAlignTransformer) -> dict[str, np.ndarray]:
    """The case's clip, uint8 [F, H, W, 3], after each treatment."""
    preset = load_preset("toy")
    latents = vae.encode(torch.from_numpy(render_scene(case.plan).frames[None]))
    conditions = {
        "prompt_embeds": pad_prompt_embeds(text.encode([case.prompt]), preset.models.max_text_tokens),
        "reference_latents": vae.encode_images(torch.from_numpy(np.stack(case.named_references)))[None],
    }
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    treated = {f"added {size:g}": latents + size * noise for size in ADDED}
    for level in LEVELS:
        mixed = (1 - level) * latents + level * noise
        treated[f"from {level:g}"] = denoise(transformer, mixed, level, preset.objective.shift, **conditions)
    return {name: np.asarray(vae.decode(each)[0]) for name, each in treated.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS_FOLDER)
    parser.add_argument("--per-tier", type=int, default=2)
    parser.add_argument("--picture", type=Path, help="a PNG: a row per clip, its middle frame after each treatment")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe_machine()
    watcher = Watcher.load(arguments.weights / "judges")
    transformer = load_transformer(str(arguments.weights / "stage1" / "export")).eval()
    base = str(arguments.weights / "wan")
    vae, text = VideoVAE.from_pretrained(base), TextEncoder.from_pretrained(base)
    cases, rows, scores = make_benchmark(arguments.per_tier), [], {}
    for case in cases:
        clips = degrade(case, vae, text, transformer)
        rows.append(np.concatenate([clip[len(clip) // 2] for clip in clips.values()], axis=1))
        for name, clip in clips.items():
            scores.setdefault(name, []).append(score_clip(case, clip, watcher.watch(clip)))
    if arguments.picture:
        Image.fromarray(np.concatenate(rows)).save(arguments.picture)
    summaries = {treatment: summarise(records) for treatment, records in scores.items()}
    means = {treatment: {name: summary[name] for name in SCORES} for treatment, summary in summaries.items()}
    write_result("denoising", {"clips": len(cases), "read_by_the_judges": means}, machine)


if __name__ == "__main__":
    main()
