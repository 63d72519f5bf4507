"""The page in a real browser: no error, no request, sorting and filtering, no sideways scroll."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.report_pages import pages

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--v=0",
    "--host-resolver-rules=MAP * ~NOTFOUND",
]


def browse(path, tmp_path, query="", width=1280):
    """(DOM after scripts ran, console lines, addresses requested for the page) from a real browser."""
    log = tmp_path / f"net-{path.stem}.json"
    done = subprocess.run(
        [
            CHROMIUM,
            *FLAGS,
            f"--user-data-dir={tmp_path / f'profile-{path.stem}'}",
            f"--log-net-log={log}",
            f"--window-size={width},900",
            "--dump-dom",
            f"file://{os.fspath(path)}{query}",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    events = json.loads(log.read_text())
    start = events["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    jobs = [e["params"] for e in events["events"] if e["type"] == start and "url" in e.get("params", {})]
    # The browser's own errands (its clock, its updates) come from no page.
    urls = [job["url"] for job in jobs if job.get("initiator") != "not an origin"]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, console, [u for u in urls if not u.startswith(("data:", "file:"))]


PROBE = """<script>
const table = document.getElementById("layers-table");
const ranks = () => [...table.tBodies[0].rows].map((row) => Number(row.cells[6].dataset.value));
const shared = ranks();
table.querySelector("[data-key=params] button").click();
const sizes = [...table.tBodies[0].rows].map((row) => Number(row.cells[7].dataset.value));
document.documentElement.dataset.probe = JSON.stringify({ shared, sizes, query: location.search,
  overflow: document.documentElement.scrollWidth - innerWidth, width: innerWidth,
  shown: [...document.getElementById("trials-table").tBodies[0].rows].filter((row) => !row.hidden).length });
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_in_a_browser(tmp_path):
    made = pages()
    text = made.paths["sweep"].read_text(encoding="utf-8")
    probed = tmp_path / "probed.html"
    probed.write_text(text.replace("</body>", PROBE), encoding="utf-8")
    dom, console, urls = browse(probed, tmp_path, "?layers=final.asc&trials.find=uniform", width=400)
    assert console == [] and urls == []
    found = json.loads(re.search(r'data-probe="([^"]*)"', dom)[1].replace("&quot;", '"'))
    assert found["shared"] == sorted(made.trace.final_ranks)  # the link's own sorting
    assert found["sizes"] == sorted(found["sizes"], reverse=True)  # a click's
    assert "layers=params.desc" in found["query"] and "trials.find=uniform" in found["query"]
    assert found["shown"] == 4 and found["width"] <= 500 and found["overflow"] <= 0


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_hostile_names_do_nothing_in_a_browser(tmp_path):
    dom, console, urls = browse(pages().paths["hostile"], tmp_path)
    assert console == [] and urls == []
    assert dom.count("<script") == 1 and "<img" not in dom


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_the_browser_check_can_fail(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<link rel="icon" href="data:,"><script>console.error("boom")</script><img src="http://127.0.0.1:9/x.png">'
    )
    _, console, urls = browse(page, tmp_path)
    assert any("boom" in line for line in console) and urls == ["http://127.0.0.1:9/x.png"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_the_demo_report_in_a_browser(tmp_path):
    """The page that the README shows: no error, no request, the rank of every layer readable."""
    folder = Path(__file__).parents[2] / "reports"
    dom, console, urls = browse(folder / "demo.html", tmp_path)
    assert console == [] and urls == []
    trace = json.loads((folder / "demo.json").read_text(encoding="utf-8"))["trace"]
    table = dom[dom.index('id="layers-table"') :]
    for layer, rank in zip(trace["layers"], trace["allocations"][-1]["ranks"], strict=True):
        row = re.search(rf"<tr[^>]*>(?:(?!</tr>).)*{re.escape(layer['name'])}(?:(?!</tr>).)*</tr>", table, re.S)[0]
        cells = re.findall(r"<t[dh]\b([^>]*)>", row)
        assert f'data-value="{rank}"' in cells[6], layer["name"]
