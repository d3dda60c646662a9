"""What a caption says: where every subject stands and its pose, the shape and main colour of some, and mostly the setting.

Pattern, second colour, eyes, headwear and limbs are left to the reference image on purpose: a model that gets them right has
looked. Sides of the frame are said because they tell which words belong together: two colours and two shapes alone could be
paired either way, and a Transformer with relative positions has no other hint of who is to become what.
"""

from __future__ import annotations

from collections.abc import Sequence

from refalign.toy.backgrounds import BACKGROUND_PHRASES
from refalign.toy.drawing import Pose
from refalign.toy.identities import MAIN_COLOURS, SHAPES, attributes_of
from refalign.toy.scenes import FRAME_SIZE_PX, ScenePlan, SubjectPlan

POSE_VERBS: dict[Pose, str] = {
    "standing": "stands",
    "walking": "walks",
    "jumping": "jumps",
    "waving": "waves",
    "dancing": "dances",
    "sleeping": "sleeps",
}
PLAIN_NAME = "creature"
SIDES = ("on the left", "in the middle", "on the right")
"""Where subjects stand in the first frame; of two nobody stands in the middle, and one alone may stand anywhere."""


def subject_phrase(identity: int, *, named: bool) -> str:
    """``a red round creature`` or ``a creature``."""
    if not named:
        return f"a {PLAIN_NAME}"
    attributes = attributes_of(identity)
    article = "an" if attributes.main_colour[0] in "aeiou" else "a"
    return f"{article} {attributes.main_colour} {attributes.shape} {PLAIN_NAME}"


def make_caption(plan: ScenePlan) -> str:
    """``On the left a red round creature stands and on the right a creature walks at night.``"""
    clauses: list[str] = []
    spoken: set[str] = set()
    subjects = sorted(plan.subjects, key=lambda subject: subject.x_px[0])
    for side, subject in zip(_sides(subjects), subjects, strict=True):
        phrase = subject_phrase(subject.identity, named=subject.named)
        if phrase in spoken:
            phrase = "another " + phrase.split(" ", 1)[1]
        spoken.add(phrase)
        clauses.append(f"{side} {phrase} {POSE_VERBS[subject.pose]}")
    text = " and ".join([", ".join(clauses[:-1]), clauses[-1]]) if len(clauses) > 1 else clauses[0]
    place = f" {BACKGROUND_PHRASES[plan.background]}" if plan.background_named else ""
    return f"{text[0].upper()}{text[1:]}{place}."


def _sides(subjects: Sequence[SubjectPlan]) -> Sequence[str]:
    """The side of each of some subjects in order."""
    if len(subjects) > 1:
        return SIDES[:: 2 if len(subjects) == 2 else 1]
    place = subjects[0].x_px[0] / FRAME_SIZE_PX
    return [SIDES[1 - (place < 3 / 8) + (place > 5 / 8)]]


def caption_tier(plan: ScenePlan) -> str:
    """``named`` (shape and colour of all), ``mixed`` or ``plain`` (of none)."""
    named = [subject.named for subject in plan.subjects]
    return "named" if all(named) else "mixed" if any(named) else "plain"


def caption_words() -> list[str]:
    """Every word a caption can hold, lower case, in a fixed order; the toy tokenizer's vocabulary."""
    attributes = *MAIN_COLOURS, *SHAPES, *POSE_VERBS.values()
    phrases = ["a an another and , .", *SIDES, PLAIN_NAME, *attributes, *BACKGROUND_PHRASES.values()]
    return list(dict.fromkeys(word for phrase in phrases for word in phrase.split()))
