"""Blind choices: sides are drawn, what people export is read back, and the gate heeds it only where it is told to."""

import csv
from dataclasses import asdict

import numpy as np
import pytest
from make_report import HOSTILE

from refalign.config import GateConfig
from refalign.errors import ArtifactError
from refalign.evaluation.blind import TABLE, Question, Votes, export_questions, place_challenger, read_votes
from refalign.evaluation.gate import decide

KEYS = [f"clip{number}" for number in range(40)]


HEAD = "comparison,question,answer\n"


def read_rows(table):
    with table.open(newline="", encoding="utf-8-sig") as lines:
        return list(csv.DictReader(lines))


def answer(path, comparison, prefers, keys=KEYS):
    """Leaves the table of someone who always ``prefers`` one model, or "same"."""
    sides = {"challenger": {"left": "left", "right": "right"}, "champion": {"left": "right", "right": "left"}}
    chosen = {key: "same" if prefers == "same" else sides[prefers][place_challenger(comparison, key)] for key in keys}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HEAD + "".join(f"{comparison},{key},{chosen[key]}\n" for key in keys))
    return path


def test_sides_and_order_are_drawn_by_comparison_and_prompt(tmp_path):
    sides = [place_challenger("c1", key) for key in KEYS]
    assert 10 <= sides.count("left") <= 30 and sides == [place_challenger("c1", key) for key in KEYS]
    assert sides != [place_challenger("c2", key) for key in KEYS]
    questions = [Question(key, "", (), b"a", b"b") for key in KEYS]
    table = export_questions(tmp_path, "c1", questions)
    ordered = [row["question"] for row in read_rows(table)]
    assert ordered != KEYS and sorted(ordered) == sorted(KEYS)
    for row in read_rows(table):
        side = place_challenger("c1", row["question"])
        shown = {each: (tmp_path / row[each]).read_bytes() for each in ("left", "right")}
        assert shown == {"left": b"a", "right": b"b"} | ({"left": b"b", "right": b"a"} if side == "left" else {})


def test_votes_are_counted_for_the_model_and_not_for_the_side(tmp_path):
    all_of_them = read_votes(answer(tmp_path / "a.csv", "c1", "challenger"), "c1", KEYS)
    assert (all_of_them.share, all_of_them.high, all_of_them.prompts, all_of_them.raters) == (1.0, 1.0, 40, 1)
    assert all_of_them.low == pytest.approx(0.9124, abs=1e-3)  # Wilson, 40 of 40
    assert read_votes(answer(tmp_path / "b.csv", "c1", "champion"), "c1", KEYS).share == 0
    undecided = read_votes(answer(tmp_path / "c.csv", "c1", "same"), "c1", KEYS)
    assert undecided.share == 0.5 and undecided.same == 1 and undecided.low < 0.36 < 0.64 < undecided.high


def test_a_second_person_is_no_second_prompt(tmp_path):
    for person in range(5):
        answer(tmp_path / "people" / f"{person}.csv", "c1", "challenger", KEYS[:10])
    (tmp_path / "people" / "nobody.csv").write_text(HEAD + "c1,clip0,\n")
    five = read_votes(tmp_path / "people", "c1", KEYS)
    one = read_votes(tmp_path / "people" / "0.csv", "c1", KEYS)
    assert (five.raters, five.prompts, five.low) == (5, 10, one.low)


@pytest.mark.parametrize(
    ("exported", "said"),
    [
        (HEAD + "c2,clip0,left", "about comparison c2, not c1"),
        (HEAD + "c1,stranger,left", "stranger: left"),
        (HEAD + "c1,clip0,up", "clip0: up"),
        (HEAD + "c1,clip0,left\nc1,clip0,right", "clip0: right.*, or a second one"),
        (HEAD + "c1", "None: "),
        ("comparison,answer\nc1,left", "no table of answers"),
        (HEAD + f"c1,clip0,{'x' * 200_000}", "no table of answers.*a line longer"),
        ("\udcff", "no table of answers"),
        (HEAD + "c1,clip0,\nc1,clip1,", "no answers; write left, right or same"),
        (HEAD, "no answers; write left, right or same"),
        ("", "no answers; write left, right or same"),
    ],
)
def test_what_is_no_answer_is_refused(tmp_path, exported, said):
    path = tmp_path / "a.csv"
    path.write_bytes(exported.encode(errors="surrogateescape"))
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
    assert asdict(decide(*better, asks_not, votes=disliked))["votes"]["share"] == 0.5
    assert decide(*better, asks, votes=liked).passed
    refused = decide(*better, asks, votes=disliked)
    assert not refused.passed and "people do not prefer it: 0.500" in refused.reason
    unasked = decide(*better, asks)
    assert not unasked.passed and "no votes" in unasked.reason
    assert not decide(*worse, asks, votes=liked).passed, "votes add a condition, they take none away"


def make_questions(prompt, count=3):
    return [Question(f"clip{number}", prompt, (b"picture",), b"champion's", b"challenger's") for number in range(count)]


def test_neither_names_nor_order_nor_table_say_whose_video_is_where(tmp_path):
    table = export_questions(tmp_path, "c1", make_questions(HOSTILE))
    assert {path.name for path in tmp_path.iterdir()} == {TABLE} | {
        f"{number:03}-{what}" for number in (1, 2, 3) for what in ("left.mp4", "right.mp4", "reference-1.png")
    }
    rows = read_rows(table)
    assert {row["prompt"] for row in rows} == {HOSTILE} and [row["references"] for row in rows][0] == "001-reference-1.png"
    assert "challenger" not in table.read_text() and "champion" not in table.read_text()


@pytest.mark.parametrize("sign", "=+-@\t")
def test_a_spreadsheet_takes_no_prompt_for_a_formula(tmp_path, sign):
    rows = read_rows(export_questions(tmp_path, "c1", make_questions(f"{sign}HYPERLINK(1)", count=1)))
    assert rows[0]["prompt"] == f"'{sign}HYPERLINK(1)"


def test_what_is_filled_in_is_read_back_and_not_overwritten(tmp_path):
    table = export_questions(tmp_path, "c1", make_questions("a red ball"))
    rows = read_rows(table)
    for row, chosen in zip(rows, ["Right ", "same", ""], strict=True):
        row["answer"] = chosen
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert export_questions(tmp_path, "c1", make_questions("a red ball")) == table and read_rows(table) == rows
    votes = read_votes(tmp_path, "c1", KEYS)
    liked = float(place_challenger("c1", rows[0]["question"]) == "right")
    assert (votes.raters, votes.prompts, votes.same) == (1, 2, 0.5), "the question that stays open is no vote"
    assert votes.share == pytest.approx((liked + 0.5) / 2, abs=1e-6)
