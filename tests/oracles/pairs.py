"""Loop twin of `refalign.curation.matching.match_subjects`."""

from __future__ import annotations


def match_subjects_slowly(embeddings, clips, *, min_similarity, max_similarity, limit):
    """For every two subjects of different clips: are they each other's nearest in the other's clip, within the limits?"""
    count = len(clips)

    def cosine(i, j):
        return float(sum(a * b for a, b in zip(embeddings[i], embeddings[j], strict=True)))

    def nearest(i, clip):
        return max((j for j in range(count) if clips[j] == clip), key=lambda j: (cosine(i, j), -j))

    pairs = []
    for i in range(count):
        found = []
        for clip in sorted(set(clips)):
            if clip == clips[i]:
                continue
            j = nearest(i, clip)
            if nearest(j, clips[i]) == i and min_similarity <= cosine(i, j) <= max_similarity:
                found.append((-cosine(i, j), j))
        pairs += [(i, j, -value) for value, j in sorted(found)[:limit]]
    return pairs
