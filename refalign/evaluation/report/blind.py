"""The page on which people choose: one HTML file that needs no network, used with a mouse, fingers or keys."""

from __future__ import annotations

from collections.abc import Sequence

from refalign.evaluation.blind import Question, order_questions, place_challenger
from refalign.evaluation.report import html

_SCRIPT = """
const root = document.getElementById("blind"), questions = [...document.querySelectorAll(".question")], answers = {};
const done = document.getElementById("done"), progress = document.getElementById("progress");
let place = 0;
const show = (next) => {
  place = Math.max(0, Math.min(questions.length, next));
  questions.forEach((question, number) => {
    question.hidden = number !== place;
    for (const video of question.querySelectorAll("video")) {
      if (number === place) { video.currentTime = 0; video.play().catch(() => {}); } else video.pause();
    }
    for (const button of question.querySelectorAll("button[data-answer]"))
      button.setAttribute("aria-pressed", answers[question.dataset.key] === button.dataset.answer);
  });
  done.hidden = place !== questions.length;
  progress.textContent = `${Object.keys(answers).length} of ${questions.length} answered`;
  document.getElementById("answers").value = JSON.stringify({ comparison: root.dataset.comparison, answers }, null, 1);
};
const choose = (answer) => {
  if (place === questions.length) return;
  answers[questions[place].dataset.key] = answer;
  show(place + 1);
};
document.addEventListener("click", ({ target }) => {
  if (target.dataset.answer) choose(target.dataset.answer);
  if (target.dataset.go) show(place + Number(target.dataset.go));
  if (target.id === "save") {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([document.getElementById("answers").value], { type: "application/json" }));
    link.download = `answers-${root.dataset.comparison}.json`;
    link.click();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "TEXTAREA") return;
  const answer = { ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right", ArrowDown: "same", 0: "same" }[event.key];
  if (answer) { event.preventDefault(); choose(answer); }
  if (event.key === "Backspace" || event.key === "ArrowUp") { event.preventDefault(); show(place - 1); }
});
addEventListener("beforeunload", (event) => { if (Object.keys(answers).length && done.hidden) event.preventDefault(); });
show(0);
"""
_ASK = (
    "Which video shows the subjects of the pictures, doing what the text says? Both videos are of one text and one seed; which "
    "model is left and which is right was drawn for each question."
)
_KEYS = "Keys: left arrow or 1, right arrow or 2, down arrow or 0 for no difference, up arrow or backspace to go back."


def make_blind_page(comparison: str, questions: Sequence[Question]) -> str:
    """The whole page; nothing in it says which video is whose but the order that `place_challenger` drew."""
    ordered = order_questions(comparison, questions)
    body = (
        f'<h1>Left or right?</h1><p>{_ASK}</p><p class="soft">{_KEYS}</p>',
        f'<div id="blind" data-comparison="{html.text(comparison)}"><p id="progress" role="status"></p>',
        *(_make_question(comparison, question) for question in ordered),
        '<section id="done" hidden><h2>Done</h2><p>Save the answers and hand the file to whoever asked.</p>'
        '<p><button id="save">Save answers</button> <button data-go="-1">Back</button></p>'
        '<textarea id="answers" readonly rows="12" aria-label="answers as text"></textarea></section></div>',
    )
    return html.page("Left or right?", body, _SCRIPT)


def _make_question(comparison: str, question: Question) -> str:
    sides = {"left": question.challenger, "right": question.champion}
    if place_challenger(comparison, question.key) == "right":
        sides = {"left": question.champion, "right": question.challenger}
    pictures = "".join(html.image(data, "image/png", "picture of a subject") for data in question.references)
    videos = "".join(html.figure(html.video(data, side), side) for side, data in sides.items())
    prompt = html.text(question.prompt or "(no text)")
    labels = {"left": "Left", "same": "No difference", "right": "Right"}
    buttons = " ".join(f'<button data-answer="{answer}">{label}</button>' for answer, label in labels.items())
    return (
        f'<section class="question" data-key="{html.text(question.key)}" hidden><p>{prompt}</p>'
        f'<div class="row"><div class="references">{pictures}</div><div class="videos">{videos}</div></div>'
        f'<p class="answers">{buttons} <button data-go="-1">Back</button></p></section>'
    )
