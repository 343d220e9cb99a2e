"""The printed checklist is one sheet of paper, as `make test`'s browser prints it."""

import re

from lab import ARGS, find_chromium
from playwright.sync_api import sync_playwright

from benchmarks.course_pages import SHEET, sheet


def pages_of(html: str) -> int:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(playwright), args=ARGS, headless=True)
        page = browser.new_page()
        page.set_content(html)
        printed = page.pdf(prefer_css_page_size=True)
        browser.close()
    return int(re.search(rb"/Count (\d+)", printed)[1])


def test_the_checklist_fits_on_one_sheet() -> None:
    assert pages_of(SHEET.read_text(encoding="utf-8")) == 1


def test_twice_its_lines_would_not() -> None:
    html = sheet()
    begin, end = html.index("<tr><td>K01"), html.index("</table>")
    assert pages_of(html[:end] + html[begin:end] + html[end:]) == 2
