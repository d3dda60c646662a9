"""What a caption says: the pose of every subject, the shape and main colour of some, and mostly the place; never anything else.

Pattern, second colour, eyes, headwear and limbs are left to the reference image on purpose: a model that gets them right has
looked.
"""

from __future__ import annotations

from refalign.toy.backgrounds import BACKGROUND_PHRASES
from refalign.toy.drawing import Pose
from refalign.toy.identities import MAIN_COLOURS, SHAPES, attributes_of
from refalign.toy.scenes import ScenePlan

POSE_VERBS: dict[Pose, str] = {
    "standing": "stands",
    "walking": "walks",
    "jumping": "jumps",
    "waving": "waves",
    "dancing": "dances",
    "sleeping": "sleeps",
}
PLAIN_NAME = "creature"


def subject_phrase(identity: int, *, named: bool) -> str:
    """``a red round creature`` or ``a creature``."""
    if not named:
        return f"a {PLAIN_NAME}"
    attributes = attributes_of(identity)
    article = "an" if attributes.main_colour[0] in "aeiou" else "a"
    return f"{article} {attributes.main_colour} {attributes.shape} {PLAIN_NAME}"


def make_caption(plan: ScenePlan) -> str:
    """One sentence about a scene, subjects from left to right as they stand in the first frame."""
    clauses: list[str] = []
    spoken: set[str] = set()
    for subject in sorted(plan.subjects, key=lambda subject: subject.x_px[0]):
        phrase = subject_phrase(subject.identity, named=subject.named)
        if phrase in spoken:
            phrase = "another " + phrase.split(" ", 1)[1]
        spoken.add(phrase)
        clauses.append(f"{phrase} {POSE_VERBS[subject.pose]}")
    text = " and ".join([", ".join(clauses[:-1]), clauses[-1]]) if len(clauses) > 1 else clauses[0]
    place = f" {BACKGROUND_PHRASES[plan.background]}" if plan.background_named else ""
    return f"{text[0].upper()}{text[1:]}{place}."


def caption_tier(plan: ScenePlan) -> str:
    """``named`` (shape and colour of all), ``mixed`` or ``plain`` (of none)."""
    named = [subject.named for subject in plan.subjects]
    return "named" if all(named) else "mixed" if any(named) else "plain"


def caption_words() -> list[str]:
    """Every word a caption can hold, lower case, in a fixed order; the toy tokenizer's vocabulary."""
    phrases = ["a an another and , .", PLAIN_NAME, *MAIN_COLOURS, *SHAPES, *POSE_VERBS.values(), *BACKGROUND_PHRASES.values()]
    return list(dict.fromkeys(word for phrase in phrases for word in phrase.split()))
