"""Blind choices: sides are drawn, what people export is read back, and the gate heeds it only where it is told to."""

import json

import numpy as np
import pytest
from make_report import HOSTILE
from make_run import make_evaluate, make_picture

from refalign.config import GateConfig
from refalign.errors import ArtifactError
from refalign.evaluation.blind import Question, Votes, order_questions, place_challenger, read_votes
from refalign.evaluation.gate import decide
from refalign.evaluation.report.blind import make_blind_page
from refalign.io.images import encode_png
from tests.chromium import CHROMIUM, show

KEYS = [f"clip{number}" for number in range(40)]


def answer(path, comparison, prefers, keys=KEYS):
    """Leaves the export of someone who always ``prefers`` one model, or "same"."""
    sides = {"challenger": {"left": "left", "right": "right"}, "champion": {"left": "right", "right": "left"}}
    chosen = {key: "same" if prefers == "same" else sides[prefers][place_challenger(comparison, key)] for key in keys}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"comparison": comparison, "answers": chosen}))
    return path


def test_sides_and_order_are_drawn_by_comparison_and_prompt():
    sides = [place_challenger("c1", key) for key in KEYS]
    assert 10 <= sides.count("left") <= 30 and sides == [place_challenger("c1", key) for key in KEYS]
    assert sides != [place_challenger("c2", key) for key in KEYS]
    questions = [Question(key, "", (), b"a", b"b") for key in KEYS]
    ordered = [question.key for question in order_questions("c1", questions)]
    assert ordered != KEYS and sorted(ordered) == sorted(KEYS)


def test_votes_are_counted_for_the_model_and_not_for_the_side(tmp_path):
    all_of_them = read_votes(answer(tmp_path / "a.json", "c1", "challenger"), "c1", KEYS)
    assert (all_of_them.share, all_of_them.high, all_of_them.prompts, all_of_them.raters) == (1.0, 1.0, 40, 1)
    assert all_of_them.low == pytest.approx(0.9124, abs=1e-3)  # Wilson, 40 of 40
    assert read_votes(answer(tmp_path / "b.json", "c1", "champion"), "c1", KEYS).share == 0
    undecided = read_votes(answer(tmp_path / "c.json", "c1", "same"), "c1", KEYS)
    assert undecided.share == 0.5 and undecided.same == 1 and undecided.low < 0.36 < 0.64 < undecided.high


def test_a_second_person_is_no_second_prompt(tmp_path):
    for person in range(5):
        answer(tmp_path / "people" / f"{person}.json", "c1", "challenger", KEYS[:10])
    five = read_votes(tmp_path / "people", "c1", KEYS)
    one = read_votes(tmp_path / "people" / "0.json", "c1", KEYS)
    assert (five.raters, five.prompts, five.low) == (5, 10, one.low)


@pytest.mark.parametrize(
    ("exported", "said"),
    [
        ('{"comparison": "c2", "answers": {}}', "about comparison c2, not c1"),
        ('{"comparison": "c1", "answers": {"stranger": "left"}}', "stranger: left"),
        ('{"comparison": "c1", "answers": {"clip0": "up"}}', "clip0: up"),
        ('{"comparison": "c1"', "no exported answers"),
        ("[]", "no exported answers"),
        ('{"comparison": "c1", "answers": 3}', "no exported answers"),
        ('{"comparison": "c1", "answers": {"clip0": []}}', "clip0: "),
        ("[" * 100_000, "nested too deeply"),
        ('{"comparison": "c1", "answers": {}}', "no answers; open the page"),
    ],
)
def test_what_is_no_answer_is_refused(tmp_path, exported, said):
    path = tmp_path / "a.json"
    path.write_text(exported)
    with pytest.raises(ArtifactError, match=said):
        read_votes(path, "c1", KEYS)


def make_scores(gain):
    rng = np.random.default_rng(0)
    before = {str(number): {"fidelity": rng.uniform(0.4, 0.6)} for number in range(40)}
    return before, {key: {"fidelity": each["fidelity"] + gain + rng.normal(0, 0.02)} for key, each in before.items()}


def test_the_gate_heeds_votes_only_where_it_is_told_to():
    liked, disliked = (Votes(1, 40, share, low, high, 0.0) for share, low, high in ((0.8, 0.65, 0.9), (0.5, 0.35, 0.65)))
    asks, asks_not = GateConfig(min_vote_share=0.5), GateConfig()
    better, worse = make_scores(0.1), make_scores(-0.01)
    assert decide(*better, asks_not).passed and decide(*better, asks_not, votes=disliked).passed
    assert decide(*better, asks_not, votes=disliked).to_record()["votes"]["share"] == 0.5
    assert decide(*better, asks, votes=liked).passed
    refused = decide(*better, asks, votes=disliked)
    assert not refused.passed and "people do not prefer it: 0.500" in refused.reason
    unasked = decide(*better, asks)
    assert not unasked.passed and "no votes" in unasked.reason
    assert not decide(*worse, asks, votes=liked).passed, "votes add a condition, they take none away"


def make_questions(tmp_path, count=3):
    step = make_evaluate(tmp_path)
    video = (step.parts_folder / "before-clip.mp4").read_bytes()
    pictures = (encode_png(make_picture(0)),)
    # Bytes behind the end of an mp4 are ignored: the two sides differ and both play.
    return [Question(f"clip{number}", HOSTILE, pictures, video, video + b"challenger") for number in range(count)]


def test_the_page_escapes_texts_and_does_not_say_whose_video_is_where(tmp_path):
    page = make_blind_page("c1", make_questions(tmp_path))
    assert "<script>alert" not in page and page.count("&lt;script&gt;alert(1)") == 3
    assert "challenger" not in page and "champion" not in page and "http" not in page.replace("http-equiv", "")


PRESS = """
const press = (key) => page.dispatchEvent(new view.KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const open = () => [...page.querySelectorAll(".question")].filter((each) => !each.hidden);
const first = open()[0];
await wait(() => [...first.querySelectorAll("video")].every((video) => video.currentTime > 0));
const playing = [...first.querySelectorAll("video")].map((video) => video.currentTime > 0);
const order = [...page.querySelectorAll(".question")].map((each) => each.dataset.key);
const shown = open().length;
press("ArrowLeft"); press("ArrowUp"); press("2");
press("0");
open()[0].querySelector('[data-answer="right"]').click();
let saved = null;
view.URL.createObjectURL = (blob) => { blob.text().then((text) => { saved = text; }); return "data:application/json,x"; };
view.HTMLAnchorElement.prototype.click = function () { saved = saved || this.download; };
page.getElementById("save").click();
await wait(() => saved && saved.startsWith("{"));
return { playing, order, shown, saved, done: !page.getElementById("done").hidden, scroll: page.documentElement.scrollWidth };
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_keys_and_buttons_answer_and_what_is_saved_is_read_back(tmp_path):
    page = tmp_path / "ask.html"
    page.write_text(make_blind_page("c1", make_questions(tmp_path)))
    (tmp_path / "profile").mkdir()
    shown = show(page, PRESS, width_px=390, profile=tmp_path / "profile")
    told = shown.told
    assert "failed" not in told, told
    assert told["playing"] == [True, True] and told["shown"] == 1 and told["done"] and told["scroll"] <= 390
    assert shown.console == []
    exported = json.loads(told["saved"])
    assert exported == {"comparison": "c1", "answers": dict(zip(told["order"], ["right", "same", "right"], strict=True))}
    (tmp_path / "answers.json").write_text(told["saved"])
    votes = read_votes(tmp_path / "answers.json", "c1", KEYS)
    expected = [place_challenger("c1", told["order"][0]) == "right", 0.5, place_challenger("c1", told["order"][2]) == "right"]
    assert votes.share == pytest.approx(np.mean([float(each) for each in expected]), abs=1e-6)
