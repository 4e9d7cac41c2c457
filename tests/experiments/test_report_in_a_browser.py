"""The page in headless Chromium: a phone, a desktop, light and dark; skipped where there is no browser."""

import pytest

from browser import Browser, find_chromium

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no chromium on the path: apt-get install -y chromium"
)
TOO_WIDE = """
[...document.querySelectorAll("body *")].filter((e) => {
  const box = e.closest(".scroll, pre, svg, details");
  return !box && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1;
}).map((e) => e.outerHTML.slice(0, 120))
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(find_chromium(), tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, True)])
def test_it_fits_loads_nothing_and_shows_where_numbers_come_from(browser, page, tmp_path, width, dark):
    file = tmp_path / "index.html"
    file.write_text(page)
    browser.open(file, width, dark=dark)
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(TOO_WIDE) == []
    assert browser.complaints() == []
    outside = [url for url in browser.requests() if not url.startswith("data:")]
    assert outside == [file.absolute().as_uri()]
    paper, ink = (
        browser.evaluate(f"getComputedStyle(document.body).{name}.match(/\\d+/g).map(Number)[0]")
        for name in ("backgroundColor", "color")
    )
    assert (paper < 60 and ink > 200) if dark else (paper > 200 and ink < 60)
    browser.evaluate("document.querySelector('td[data-source]').click()")
    source = browser.evaluate("document.querySelector('td[data-source]').dataset.source.split(' ')[0]")
    assert source in browser.evaluate("document.getElementById('source').textContent")
    browser.screenshot(tmp_path / "page.png", width=width)
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_the_browser_sees_what_does_not_fit_and_what_is_asked_for(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<meta name="viewport" content="width=device-width"><body><p style="width:700px">x<img src="missing.png">'
    )
    browser.open(page, 390)
    assert browser.evaluate("document.documentElement.scrollWidth") > 390
    assert browser.evaluate(TOO_WIDE)
    assert any(url.endswith("missing.png") for url in browser.requests())
    with pytest.raises(RuntimeError):
        browser.evaluate("nothing.there")
