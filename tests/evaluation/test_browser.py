"""The pages in a real browser, under their own policy: videos play, nothing is blocked, a phone needs no sideways scrolling."""

import pytest
from make_report import make_finished_run

from refalign.evaluation.report import make_report
from tests.chromium import CHROMIUM, show

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

LOOK = """
const videos = [...page.querySelectorAll("video")];
await wait(() => videos.every((video) => video.readyState >= 3 && video.currentTime > 0));
return {
  videos: videos.map((video) => [
    video.readyState, video.duration, video.videoWidth, video.currentTime, video.error && video.error.code,
  ]),
  images: [...page.images].map((image) => image.naturalWidth),
  charts: [...page.querySelectorAll("svg")].map((svg) => svg.getBoundingClientRect().width),
  width: view.innerWidth,
  scroll: page.documentElement.scrollWidth,
};
"""


@pytest.mark.parametrize("width_px", [390, 1280])
def test_the_report_plays_its_videos_and_fits_the_screen(tmp_path, width_px):
    output, steps, summary = make_finished_run(tmp_path / "run")
    (tmp_path / "profile").mkdir()
    shown = show(make_report(summary, output=output, steps=steps), LOOK, width_px=width_px, profile=tmp_path / "profile")
    told = shown.told
    assert "failed" not in told, told
    assert len(told["videos"]) == 2
    for state, duration, width, time, error in told["videos"]:
        assert state >= 3 and duration == pytest.approx(9 / 8, abs=0.05) and width == 80 and time > 0 and error is None
    assert len(told["images"]) == 3 and all(told["images"])
    assert told["charts"] and all(width > 100 for width in told["charts"])
    assert told["width"] == width_px and told["scroll"] <= width_px
    assert shown.console == []


def test_a_broken_page_is_seen_as_one(tmp_path):
    """The test above can fail: a page that is too wide, refused a script and without a playable video."""
    (tmp_path / "profile").mkdir()
    page = tmp_path / "page.html"
    page.write_text(
        "<!doctype html><meta http-equiv='Content-Security-Policy' "
        "content=\"default-src 'none'; media-src data:; style-src 'unsafe-inline'\">"
        "<div style='width:900px'>x</div><video src='data:video/mp4;base64,AAAA'></video><script>document.title = 1</script>"
    )
    shown = show(page, LOOK.replace("await wait", "// await wait"), width_px=390, profile=tmp_path / "profile")
    assert shown.told["scroll"] > 390 and shown.told["videos"][0][0] == 0
    assert any("Content Security Policy" in line for line in shown.console)
