"""Whether the Transformer's own reference tokens tell subjects apart, block by block, before and after training.

No projector is involved: training a projector alone lowers the alignment loss, but here only the Transformer counts.

Source: RefAlign (arXiv 2603.25743), figure 2b.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.cluster.hierarchy import DisjointSet
from torch import Tensor

from refalign.evaluation.results import BlockSeparability, Separability
from refalign.models.text import pad_prompt_embeds
from refalign.models.wan import RefAlignTransformer
from refalign.shards.reader import ShardIndex

_SAMPLES_PER_SUBJECT = 4  # read to find enough subjects with several pictures
_TIMESTEP = 500.0  # of [0, 1000]

Features = Float[np.ndarray, "N D"]


@dataclass(frozen=True)
class References:
    """Several pictures of each subject, as the Transformer gets them.

    Attributes:
        foreground: share of the subject in each token, in [0, 1].
        subjects: whose picture each is.
    """

    latents: Float[Tensor, "N Z h w"]
    foreground: Float[Tensor, "N P"]
    subjects: tuple[str, ...]


def collect_references(index: ShardIndex, max_subjects: int, per_subject: int) -> References | None:
    """Pictures of the first subjects of a split that have at least two; None if fewer than two subjects have.

    Pictures that a sample pairs show one subject, also over a chain of samples.
    """
    owners = DisjointSet()
    pictures: dict[str, tuple[Tensor, Tensor]] = {}
    for number in range(min(len(index), _SAMPLES_PER_SUBJECT * max_subjects)):
        sample = index.read(number)
        first: dict[int, str] = {}
        for row, info in enumerate(sample.info["references"]):
            name = info["subject_id"]
            owners.add(name)
            owners.merge(name, first.setdefault(info["subject_index"], name))
            tensors = sample.tensors
            pictures.setdefault(name, (tensors["reference_latents"][row].float(), tensors["foreground"][row].float()))
    groups: dict[str, list[str]] = {}
    for name in pictures:
        groups.setdefault(owners[name], []).append(name)
    chosen = [names[:per_subject] for names in groups.values() if len(names) > 1][:max_subjects]
    if len(chosen) < 2:
        return None
    latents, foreground = zip(*(pictures[name] for names in chosen for name in names), strict=True)
    subjects = tuple(names[0] for names in chosen for _ in names)
    return References(torch.stack(latents), torch.stack(foreground), subjects)


@torch.no_grad()
def block_features(
    transformer: RefAlignTransformer,
    reference_latents: Float[Tensor, "N Z h w"],
    foreground: Float[Tensor, "N P"],
    *,
    prompt_embeds: Float[Tensor, "1 L E"],
    num_latent_frames: int,
) -> list[Features]:
    """One vector per block and reference: the mean of its tokens, weighted by ``foreground`` (all tokens where that is 0).

    Each reference is alone beside a video of pure noise, the same for all.
    """
    _, channels, height, width = reference_latents.shape
    parameter = next(transformer.parameters())
    noise = torch.randn(1, channels, num_latent_frames, height, width, generator=torch.Generator().manual_seed(0)).to(parameter)
    weight = torch.where(foreground.sum(1, keepdim=True) > 0, foreground, torch.ones_like(foreground))
    weight = weight / weight.sum(1, keepdim=True)
    features: list[list[Tensor]] = [[] for _ in transformer.blocks]
    for latents, share in zip(reference_latents, weight, strict=True):
        tokens = transformer(
            noise,
            torch.tensor([_TIMESTEP], device=parameter.device),
            prompt_embeds.to(parameter),
            latents[None, None].to(parameter),
            alignment_blocks=tuple(range(len(transformer.blocks))),
        ).reference_tokens
        for block, each in zip(features, tokens, strict=True):
            block.append((each[0, 0].float().cpu() * share[:, None]).sum(0))
    return [torch.stack(block).numpy() for block in features]


def measure(features: Features, subjects: Sequence[object]) -> BlockSeparability:
    """How close references of one subject lie, by cosine of the centred features; retrieval skips subjects with one reference.

    Raises:
        ValueError: no subject has two references, or there is only one subject.
    """
    from sklearn.metrics import silhouette_score

    names = np.array([str(subject) for subject in subjects])
    same = names[:, None] == names[None]
    np.fill_diagonal(same, False)
    has_other = same.any(1)
    if not has_other.any() or len(set(names)) < 2:
        raise ValueError("separability needs two subjects, and two references of some subject")
    centred = features - features.mean(0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-9)
    cosines = unit @ unit.T
    is_self = np.eye(len(names), dtype=bool)
    nearest = np.where(is_self, -np.inf, cosines).argmax(1)
    return BlockSeparability(
        retrieval=float((names[nearest] == names)[has_other].mean()),
        chance=float((same.sum(1) / (len(names) - 1))[has_other].mean()),
        gap=float(cosines[same].mean() - cosines[~same & ~is_self].mean()),
        silhouette=float(silhouette_score(unit, names, metric="cosine")) if len(set(names)) < len(names) else 0.0,
    )


def describe(
    transformer: RefAlignTransformer, references: References, index: ShardIndex, *, max_text_tokens: int, picture_block: int
) -> Separability:
    """The measures of every block, to five digits, and the references of ``picture_block`` in the plane.

    The video is noise and the prompt is empty, so only the pictures can tell subjects apart. ``index`` gives the empty prompt
    and the length of the videos.
    """
    prompt = index.load_null_prompt()
    width = index.read(0).tensors["prompt_embeds"].shape[1]
    prompt = torch.zeros(0, width) if prompt is None else prompt[:max_text_tokens].float()
    features = block_features(
        transformer,
        references.latents,
        references.foreground,
        prompt_embeds=pad_prompt_embeds([prompt], max_text_tokens),
        num_latent_frames=index.entries[0].shape[1],
    )
    measured = [measure(each, references.subjects).model_dump() for each in features]
    names = list(dict.fromkeys(references.subjects))
    return Separability(
        blocks=[BlockSeparability(**{name: round(value, 5) for name, value in each.items()}) for each in measured],
        picture_block=picture_block,
        points=project(features[picture_block]).round(3).tolist(),
        subjects=[names.index(name) for name in references.subjects],
    )


def project(features: Features) -> Float[np.ndarray, "N 2"]:
    """t-SNE of the references in the plane, for a picture: neighbourhoods mean something, distances and axes do not."""
    from sklearn.manifold import TSNE

    perplexity = max(2.0, min(30.0, (len(features) - 1) / 3))
    return TSNE(2, perplexity=perplexity, metric="cosine", init="random", random_state=0).fit_transform(features)
