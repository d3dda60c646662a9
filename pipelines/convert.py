"""Converts official RefAlign / DiffSynth weights to a diffusers folder, or back; --verify also makes one clip with them.

uv run pipelines/convert.py RefAlign-1.3B.safetensors runs/refalign-1.3b --verify --reference a.png --prompt "..."
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refalign.cli import leave, run_command  # noqa: E402


def main() -> None:
    """Parses the flags, converts and says where the result is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a .safetensors file or a folder of them; with --to-official a diffusers folder")
    parser.add_argument("folder", help="where the result goes")
    parser.add_argument("--aesthetic", action="store_true", help="a LAION aesthetic head, from .pth to .safetensors")
    parser.add_argument("--to-official", action="store_true", help="from a diffusers folder to official names")
    parser.add_argument("--num-attention-heads", type=int, help="default: width / 128, right for every released Wan")
    parser.add_argument("--verify", action="store_true", help="say whether the weights are complete, then make one clip")
    parser.add_argument("--base", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="folder or hub id with VAE and text encoder")
    parser.add_argument("--reference", action="append", default=[], help="image of a subject for the clip; repeatable")
    parser.add_argument("--prompt", default="a quiet street in the morning", help="text of the clip")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--num-frames", type=int, default=81)
    parser.add_argument("--num-inference-steps", type=int, default=50)
    leave(run_command(lambda: convert(parser.parse_args())))


def convert(arguments: argparse.Namespace) -> None:
    """Converts in the chosen direction; a clip if asked for."""
    from refalign.models.convert import convert_official, convert_to_official

    if arguments.aesthetic:
        from refalign.models.scores import convert_aesthetic_head

        convert_aesthetic_head(Path(arguments.source), Path(arguments.folder))
        print(f"aesthetic head: {arguments.folder}")
        return
    if arguments.to_official:
        convert_to_official(arguments.source, arguments.folder)
        print(f"official weights: {arguments.folder}")
        return
    summary = convert_official(arguments.source, arguments.folder, num_attention_heads=arguments.num_attention_heads)
    print(f"complete: {summary}\ndiffusers folder: {arguments.folder}")
    if arguments.verify:
        print(f"clip: {make_clip(arguments)}")


def make_clip(arguments: argparse.Namespace) -> Path:
    """Generates one clip with the converted weights and writes it beside them."""
    import torch

    from refalign.generation.pipeline import RefAlignPipeline
    from refalign.io.images import read_image, write_mp4

    on_gpu = torch.cuda.is_available()
    references = [read_image(Path(path)) for path in arguments.reference]
    dtype = torch.bfloat16 if on_gpu else torch.float32
    pipeline = RefAlignPipeline.from_pretrained(arguments.folder, base=arguments.base, torch_dtype=dtype)
    if on_gpu:
        pipeline.enable_model_cpu_offload()
    frames = pipeline(
        arguments.prompt,
        references,
        height=arguments.height,
        width=arguments.width,
        num_frames=arguments.num_frames,
        num_inference_steps=arguments.num_inference_steps,
        generator=torch.Generator().manual_seed(0),
        output_type="uint8",
    ).frames[0]
    path = Path(arguments.folder) / "verify.mp4"
    write_mp4(path, frames.numpy(), fps=16)
    return path


if __name__ == "__main__":
    main()
