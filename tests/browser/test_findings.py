"""The checks of pages find what they are for: each fault alone, on a page that is right otherwise."""

from __future__ import annotations

import pytest

from tests.support.pages import opened

RIGHT = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<title>right</title><style>body {{ background: #fff; color: #222; }}</style>
<body><h1>One</h1>{body}</body></html>"""
CHART = (
    '<svg viewBox="0 0 200 40" width="200" role="img" style="overflow: visible" aria-labelledby="t d">'
    '<title id="t">A title</title><desc id="d">What it shows</desc>{inside}</svg>'
)
LONG = "w" * 300

WRONG = {
    "the page is 2": '<div style="width: 2000px">wide</div>',
    "sticks out of the page": f"<p>{LONG}</p>",
    "sticks out of <div>": f'<div style="overflow: hidden; width: 80px">{LONG}</div>',
    "sticks out of its drawing": CHART.format(inside='<text x="190" y="20">outside</text>'),
    "sticks out of a clip": CHART.format(
        inside='<clipPath id="c"><rect x="0" y="0" width="30" height="40"/></clipPath>'
        '<g clip-path="url(#c)"><text x="5" y="20">longer</text></g>'
    ),
    '"first" and "second" overlap': '<p>first</p><p style="margin-top: -30px">second</p>',
    '"one" and "two" overlap': CHART.format(inside='<text x="5" y="20">one</text><text x="9" y="20">two</text>'),
    "px high": '<p style="font-size: 8px">small</p>',
    '"pale" has a contrast of': '<p style="color: #999">pale</p>',
    '"faint" has a contrast of': CHART.format(inside='<text x="5" y="20" fill="#aaa">faint</text>'),
    "not one h1": "<h1>Two</h1>",
    "an h3 follows an h1": "<h3>Three</h3>",
    "id twice is there twice": '<p id="twice">a</p><p id="twice">b</p>',
    "names the id nowhere": '<section aria-labelledby="nowhere">c</section>',
    "has no title": '<svg role="img"><desc>d</desc></svg>',
    "has no desc": '<svg role="img"><title>d</title></svg>',
    "has no role": "<svg></svg>",
    "has no head": "<table><tr><td>1</td></tr></table>",
    "has no scope": "<table><tr><th>h</th></tr></table>",
    "has no label": "<input>",
    "says nothing": "<button></button>",
    "has no name": '<div role="region" tabindex="0">r</div>',
    "cannot be reached": '<div role="region" aria-label="r" style="overflow-x: auto">r</div>',
    "jumps the order": '<p tabindex="3">t</p>',
}


def view_of(browser, tmp_path, body: str, **how):
    path = tmp_path / "page.html"
    path.write_text(RIGHT.format(body=body), encoding="utf-8")
    return opened(browser, path, **how)


@pytest.mark.parametrize("said", WRONG)
def test_a_fault_is_found(browser, tmp_path, said: str) -> None:
    with view_of(browser, tmp_path, WRONG[said]) as view:
        assert [one for one in view.findings() if said in one]


def test_nothing_is_found_where_nothing_is_wrong(browser, tmp_path) -> None:
    body = (
        "<h2>Two</h2><p>some <b>words</b> and <code>code</code></p>"
        f'<div role="region" aria-label="wide" tabindex="0" style="overflow-x: auto">{LONG}</div>'
        '<table><tr><th scope="col">h</th></tr><tr><td>1</td></tr></table><label>how <input type="range"></label>'
        + CHART.format(inside='<text x="5" y="20">in</text><text x="50" y="20" transform="rotate(-90 50 20)">up</text>')
    )
    with view_of(browser, tmp_path, body) as view:
        assert view.findings() == []
        assert view.noise == []


def test_what_is_hidden_does_not_count(browser, tmp_path) -> None:
    with view_of(browser, tmp_path, '<details><summary>s</summary><p style="color: #eee">pale</p></details>') as view:
        assert view.findings() == []
        view.unfold()
        assert len(view.findings()) == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("<script>alert(1)</script>", "dialog: 1"),
        ("<script>console.log('hm')</script>", "log: hm"),
        ("<script>throw new Error('hm')</script>", "error: hm"),
        ('<img alt="" src="other.png">', "request: file://"),
        ("<script>fetch('http://127.0.0.1:9/x').catch(() => 0)</script>", "request: http://127.0.0.1:9/x"),
        ("<script>open('about:blank')</script>", "a new window"),
    ],
)
def test_what_a_page_does_is_heard(browser, tmp_path, body: str, said: str) -> None:
    with view_of(browser, tmp_path, body) as view:
        view.page.wait_for_timeout(200)
        assert [one for one in view.noise if one.startswith(said)]
    if "<script>" in body:
        with view_of(browser, tmp_path, body, scripts=False) as view:
            assert view.noise == []
