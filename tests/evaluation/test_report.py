"""The report: one file, nothing loaded from elsewhere, nothing that data could smuggle in, whatever is missing."""

import math
import re
from html.parser import HTMLParser

import pytest
from make_report import HOSTILE, VERDICT, make_finished_run

from refalign.evaluation.report import make_page, make_report
from refalign.evaluation.report.charts import ACCENT, SECOND, draw_groups, draw_lines, smooth
from refalign.evaluation.report.page import TEMPLATES
from refalign.pipeline.steps import Step

VOID = {"meta", "link", "img"}
PARTS = TEMPLATES.get_template("parts.html").make_module()


def make_verdicts(verdicts):
    """The table of one sample."""
    return PARTS.verdicts(verdicts).strip()


def draw(*points, kind="line"):
    """The SVG of one curve."""
    return draw_lines("x", {kind: points}).svg


class Page(HTMLParser):
    """Collects tags and attributes, and checks that every tag is closed in order."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self._open = [], [], []
        self.feed(page)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder, steps and summary of a finished run whose texts are hostile."""
    return make_finished_run(tmp_path_factory.mktemp("run"))


def test_report_holds_videos_pictures_and_curves(run):
    output, steps, summary = run
    path = make_report(summary, output=output, steps=steps)
    page = path.read_text()
    assert path == output / "report.html"
    assert page.count("data:video/mp4;base64,") == 2
    assert page.count("data:image/png;base64,") == 1 and page.count("data:image/jpeg;base64,") == 2
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(charts) == 12 and sum(SECOND in chart for chart in charts) == 7, (
        "three of blocks and four of terms have two curves"
    )
    for words in (
        "Sample videos",
        "Scores",
        "Are subjects told apart?",
        "Training",
        "Data flow",
        "Contact sheets",
        "Model",
        "How to reproduce",
        "TOO_SHORT",
    ):
        assert words in page


def test_scores_have_intervals_of_paired_differences():
    def sample(before, after):
        return {"scores": {"before": {"fidelity": before}, "after": {"fidelity": after}}}

    def show(samples):
        scores = {"before": {"fidelity": 0.5}, "after": {"fidelity": 0.6}}
        page = make_page({"evaluation": {"scores": scores, "samples": samples}}, {})
        return page.partition("<h2>Scores</h2>")[2].partition("</table>")[0]

    told = show([sample(0.5, 0.6), sample(0.4, 0.6), sample(0.3, 0.6), sample(0.2, None)])
    assert "+0.200 [-0.048, +0.448]" in told  # t test of .1, .2, .3
    assert "+0.100 [+0.100, +0.100]" in show([sample(0.25, 0.35), sample(0.5, 0.6)])
    assert "[" not in show([sample(0.5, 0.6)])


def test_scores_nobody_measured_have_no_row_and_shares_of_right_attributes_a_tile():
    scores = {"before": {"judged": 0.456, "fidelity": 0.5}, "after": {"judged": 0.784, "fidelity": 0.6}}
    told = make_page({"evaluation": {"scores": scores}}, {})
    assert "Attributes right" in told and "0.784" in told and "Copy-paste" not in told
    assert "<b>46% \u2192 78%</b>" in told
    without = {"before": {"fidelity": 0.5}, "after": {"fidelity": 0.6}}
    assert "attributes right" not in make_page({"evaluation": {"scores": without}}, {}).lower()
    assert "attributes right" not in make_page({}, {}).lower()


def judge(name, **shown):
    """What a judge says of one subject that should be red, belted and one-eyed."""
    wanted = {"main_colour": "red", "pattern": "belt", "eyes": "one"}
    return {"name": name, "attributes": {each: {"wanted": value, "shown": shown.get(each)} for each, value in wanted.items()}}


def test_a_verdict_ticks_what_is_right_and_crosses_out_what_is_shown_instead():
    before = [judge("on the left", main_colour="green", pattern="spots"), judge("on the right")]
    after = [judge("on the left", main_colour="red", pattern="belly"), judge("on the right", eyes="one")]
    told = make_verdicts({"before": before, "after": after})
    Page(told)
    head, *rows = (re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", told, re.DOTALL))
    assert head == ["", "main colour", "pattern", "eyes"]
    names = [row[0] for row in rows]
    assert names == [f"on the {side}, {model}" for side in ("left", "right") for model in ("before training", "trained")]
    cells = [[re.sub(r"<[^>]*>", "", cell) for cell in row[1:]] for row in rows]
    unknown = "\u2717 unclear"
    assert cells == [
        ["\u2717 green", "\u2717 spots", unknown],
        ["\u2713 red", "\u2717 belly", unknown],
        [unknown] * 3,
        [unknown, unknown, "\u2713 one"],
    ]
    assert '<span class="wrong" title="wanted: belt">\u2717 belly</span>' in told
    assert '<span class="right" title="as wanted">\u2713 red</span>' in told


def test_a_verdict_on_one_of_two_videos_is_shown_alone():
    told = make_verdicts({"before": None, "after": [judge("alone", pattern="belt")]})
    assert told.count("<tr>") == 2 and "alone, trained" in told and "base model" not in told


def test_an_attribute_that_only_one_subject_has_is_empty_for_the_other_whatever_it_is_called():
    other = {"name": "b", "attributes": {"items": {"wanted": "two", "shown": None}}}
    told = make_verdicts({"after": [{"name": "a", "attributes": {}}, other]})
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", told, re.DOTALL)[1:]]
    assert cells == [["a, trained", ""], ["b, trained", '<span class="wrong" title="wanted: two">\u2717 unclear</span>']]


@pytest.mark.parametrize("verdicts", [{}, None, {"before": None, "after": None}, {"before": [], "after": []}])
def test_without_a_verdict_there_is_no_table(verdicts, tmp_path):
    assert make_verdicts(verdicts) == ""
    _, steps, summary = make_finished_run(tmp_path, verdict=None)
    assert '<div class="verdict">' not in make_page(summary, steps)


def test_a_hostile_verdict_stays_text(run):
    _, steps, summary = run
    told = make_verdicts({"before": VERDICT, HOSTILE: VERDICT})
    assert set(Page(told).tags) == {"div", "table", "thead", "tbody", "tr", "th", "td", "span"}
    assert {name for name, _ in Page(told).attributes} == {"class", "title"}
    assert make_page(summary, steps).count('<div class="verdict">') == 1


def test_hostile_texts_stay_texts(run):
    _, steps, summary = run
    page = make_page(summary, steps)
    parsed = Page(page)
    assert parsed.tags.count("script") == 1
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert page.count("&lt;script&gt;alert(1)") >= 8


def test_nothing_is_loaded_from_elsewhere(run):
    _, steps, summary = run
    parsed = Page(make_page(summary, steps))
    addresses = [value for name, value in parsed.attributes if name in ("src", "href", "poster", "action", "xlink:href")]
    assert addresses and all(value.startswith(("data:", "#")) for value in addresses), "# is a place in the page itself"
    policy = next(value for name, value in parsed.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'") and "unsafe-inline'; script" in policy
    assert not re.search(r"url\(|@import", make_page(summary, steps))


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 4])
def test_a_run_that_stopped_early_has_a_report(run, kept):
    _, steps, summary = run
    names = ["subjects", "shards", "train", "evaluate"][:kept]
    keys = ["story", "output", "seconds"]
    keys += {0: [], 1: ["videos", "clips", "subjects", "counts", "outcomes"]}.get(
        kept, ["videos", "clips", "counts", "samples", "config"]
    )
    page = make_page({key: summary[key] for key in keys}, {name: steps[name] for name in names})
    Page(page)
    assert "not finished" in page and "register" in page
    assert ("Training" in page) == (kept >= 3)


def test_an_unfinished_step_is_left_out(run, tmp_path):
    _, steps, summary = run
    unfinished = Step.make(tmp_path, "evaluate", "unfinished")
    page = make_report(summary, output=tmp_path, steps={**steps, "evaluate": unfinished}).read_text()
    assert "Not done: evaluate" in page and "Sample videos" not in page


def test_charts_survive_flat_lonely_and_broken_numbers():
    assert draw_lines("nothing", {}) is None and draw_groups("nothing", [], []) is None
    assert draw_lines("nothing", {"line": [(1.0, math.nan)]}) is None
    for points in ([(3.0, 2.0)], [(0.0, 0.0), (1.0, 0.0)], [(0.0, 1.0), (1.0, math.inf), (2.0, 3.0)], [(1.0, 1e-9), (2.0, 2e-9)]):
        svg = draw(*points)
        assert "nan" not in svg and "inf" not in svg and svg.count(f"stroke: {ACCENT}") == 1


def test_long_curves_are_thinned_to_their_means():
    points = [(float(step), float(step % 2)) for step in range(10_000)]
    line = re.search(rf'd="([^"]*)" style="fill: none; stroke: {ACCENT}', draw(*points))
    assert line is not None and 1 < len(line.group(1).split("L")) <= 300
    assert all(abs(y - 0.5) < 0.05 for _, y in smooth([*points, (10_000.0, math.nan)])[500:-500])


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.013, 0.0171), (-3.0, 900.0), (1e-5, 3e-5), (0.001, 0.001), (0.0, 0.0)])
def test_ticks_are_few_round_and_cover_the_range(low, high):
    told = re.findall(r"text-anchor: end[^>]*>([^<]*)</text>", draw((0.0, low), (1.0, high)))
    ticks = sorted(float(tick.replace(",", "").replace("\u2212", "-")) for tick in told)
    assert 3 <= len(ticks) <= 6 and ticks[0] <= low and ticks[-1] >= high * (1 - 1e-9)
    assert all(len(tick) <= 7 for tick in told)


def test_equal_numbers_give_equal_bytes_and_texts_stay_texts():
    charts = [draw_lines(HOSTILE, {"held-out": [(0, 1), (1, 2)]}, [(1, f"${HOSTILE}$")]) for _ in range(2)]
    assert charts[0] == charts[1] and "<metadata" not in charts[0].svg
    Page(charts[0].svg)
    assert "<script" not in charts[0].svg and charts[0].svg.count("&lt;script") == 2
