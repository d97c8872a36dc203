"""The report in Chromium: every figure with its numbers, by pointer and by keyboard, in every theme, on a phone."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from support.runs.made_run import TOP_K, make_trajectory, tokenizer_json
from support.runs.reported import HOSTILE, TWO, make_run, plain_bounds, trajectories_of, with_equal_steps

from client.models.detokenize import Detokenizer, tokenizer_of, visible
from client.report.findings import gather
from client.report.page import page, report_page


@pytest.fixture(scope="module")
def chromium_browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def test_in_a_browser_tokens_are_read_by_pointer_and_by_keyboard_and_nothing_else_runs(tmp_path, chromium_browser):
    hostile = "".join(HOSTILE)
    trajectories = [make_trajectory(f"{hostile}{index}", seed=index, tokens=12) for index in range(3)]
    run = make_run(
        tmp_path / "run", trajectories, tokenizer_json(HOSTILE), {t.problem_id: hostile for t in trajectories}
    )
    (tmp_path / "page.html").write_text(report_page(run), encoding="utf-8")
    page = chromium_browser.new_page(viewport={"width": 390, "height": 844})
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(f"file://{tmp_path}/page.html")
    shown = page.locator(".trajectory").first
    tokens, detail = shown.locator("[role=option]"), shown.locator(".detail p").first
    tokens.nth(4).click()
    assert detail.inner_text().startswith("step 4:")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert detail.inner_text().startswith("step 6:") and tokens.nth(6).get_attribute("aria-selected") == "true"
    page.keyboard.press("ArrowLeft")
    assert detail.inner_text().startswith("step 5:")
    page.keyboard.press("End")
    assert detail.inner_text().startswith("step 11:")
    told = []
    for index in range(tokens.count()):
        tokens.nth(index).hover()
        told += shown.locator(".detail code").all_text_contents()
        inside = page.evaluate("[...document.querySelectorAll('.detail *')].map((made) => made.localName)")
        assert set(inside) == {"p", "code", "b", "table", "thead", "tbody", "tr", "th", "td"}
    assert {visible(token) for token in HOSTILE} & set(told)
    tokens.nth(2).hover()
    assert detail.inner_text().startswith("step 2:") and shown.locator(".detail tbody tr").count() == TOP_K
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()
    assert said == []


def test_in_a_browser_every_figure_is_drawn_with_the_runs_numbers(tmp_path, chromium_browser):
    trajectories = with_equal_steps(trajectories_of(12), 6)
    run = make_run(tmp_path / "run", trajectories, beta=0.5)
    lines = [{"step": step, "loss": 1 / step} for step in range(1, 30)]
    run.bucket.put("training/metrics.jsonl", b"\n".join(json.dumps(line).encode() for line in lines))
    measured = [
        {"step": step, "loss": (step - 14) ** 2 / 200, "shift": step / 9, "other_shift": step / 40, "agreement": 0.7}
        for step in range(0, 30, 2)
    ]
    run.bucket.put("training/held_out.jsonl", b"\n".join(json.dumps(row).encode() for row in measured))
    (tmp_path / "page.html").write_text(report_page(run), encoding="utf-8")
    page = chromium_browser.new_page(viewport={"width": 1200, "height": 900})
    page.goto(f"file://{tmp_path}/page.html")
    drawn = "(chart) => [...chart.querySelectorAll('{}')].map((mark) => {})"
    charts = page.locator("figure svg.chart")
    where = [charts.nth(index).evaluate("(chart) => chart.closest('section').id") for index in range(charts.count())]
    assert where == ["divergence", "beta", "alpha", "alpha", "steps", *["training"] * 4]
    for index in range(charts.count()):
        box = charts.nth(index).bounding_box()
        assert box["width"] > 200 and box["height"] > 100 and box["x"] >= 0 and box["x"] + box["width"] <= 1200
        shapes = charts.nth(index).evaluate(drawn.format(".bar, .line", "mark.getBBox().width"))
        assert shapes and all(width > 0 for width in shapes)

    bounds, complete = plain_bounds(trajectories)
    bars = charts.nth(0).evaluate(drawn.format(".bar", "[mark.classList.contains('marked'), mark.getBBox().height]"))
    assert sorted(height for _, height in bars)[-2] > 0.8 * bars[0][1]
    (said,) = (text for text in charts.nth(0).locator(".words").all_text_contents() if text.endswith(" steps"))
    assert said == f"{(bounds < 1e-4).sum()} steps" and bars[0][1] == max(height for _, height in bars)
    marked = sum(height for is_marked, height in bars[1:] if is_marked) / sum(height for _, height in bars[1:])
    assert marked == pytest.approx((bounds > 0.5).sum() / (bounds >= 1e-4).sum(), abs=0.01)
    rows = page.locator("#beta .pair tbody tr").all_inner_texts()
    kept = {float(row.split()[0]): int(row.split("\t")[1].replace(",", "")) for row in rows}
    assert kept == {beta: int(((bounds > beta) & complete).sum()) for beta in kept} and len(kept) >= 7
    losses = charts.nth(5).evaluate("(chart) => [...chart.querySelector('.line').points].map((point) => point.y)")
    heights = np.array([1 / line["step"] for line in lines])
    drawn_heights = (losses[-1] - np.array(losses)) / (losses[-1] - losses[0])
    np.testing.assert_allclose(drawn_heights, (heights - heights[-1]) / (heights[0] - heights[-1]), atol=0.01)
    points = "(chart) => [...chart.querySelectorAll('.line')].map((line) => [...line.points].map(({x, y}) => [x, y]))"
    (_, held_out), (scores,), shifts, (agreement,) = (charts.nth(index).evaluate(points) for index in range(5, 9))
    lowest = scores[np.argmax([y for _, y in scores])][0]  # y grows downwards
    assert lowest == charts.nth(6).evaluate("(chart) => chart.querySelector('.threshold').x1.baseVal.value")
    assert scores[0][0] < lowest < held_out[np.argmax([y for _, y in held_out])][0]
    assert [line[-1][1] for line in shifts] == sorted(line[-1][1] for line in shifts) and len(agreement) == 15
    page.close()


@pytest.mark.parametrize("width", [360, 375, 1200])
def test_in_a_browser_every_table_fits_where_it_stands_on_a_phone_too(tmp_path, chromium_browser, width):
    run = make_run(
        tmp_path / "run", trajectories_of(3), tokenizer_json(["internationalization", "<|end_of_sentence|>"])
    )
    adapter, figures = "s3://bucket/adapters/tilt-2025", {"olympiadbench": TWO}
    body = {"benchmarks": figures, "models": {"base": figures, adapter: figures}}
    body["origins"] = {adapter: {"of_this_run": False, "step": 123_456}}
    run.write_evaluation("adapter-2025", json.dumps(body).encode())
    run.bucket.put("training/metrics.jsonl", b'{"step": 1, "loss": 1}\n{"step": 2, "loss": 1}')  # charts of another
    found = gather(run)
    large = [
        replace(token, token_id=row, seen=1_234_567, kept=123_456, mean_kl=12.345, share=0.123, mean_log_ratio=16.3)
        for row, token in enumerate(found.tokens)
    ]
    written = page(replace(found, tokens=large), Detokenizer(tokenizer_of(run.tokenizer(), "here")))
    (tmp_path / "page.html").write_text(written, encoding="utf-8")
    shown = chromium_browser.new_page(viewport={"width": width, "height": 800})
    shown.goto(f"file://{tmp_path}/page.html")
    shown.locator(".trajectory [role=option]").first.click()
    assert "another training" in shown.locator("#training table").inner_text()
    tables = shown.locator("table").all()
    assert len(tables) >= 6
    for table in tables:
        room = table.evaluate("(table) => table.parentElement.getBoundingClientRect().right")
        cells = table.locator("th, td").evaluate_all(
            "(cells) => cells.map((cell) => cell.getBoundingClientRect().right)"
        )
        assert max(cells) <= room <= width, table.inner_text()
    tokens = shown.locator("#tokens tbody th").all()
    assert all(token.bounding_box()["width"] > 30 for token in tokens)
    shown.close()


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_in_a_browser_text_stands_out_from_its_ground_in_every_theme(tmp_path, chromium_browser, scheme):
    (tmp_path / "page.html").write_text(report_page(make_run(tmp_path / "run", trajectories_of(3))), encoding="utf-8")
    page = chromium_browser.new_page()
    page.emulate_media(
        media="print" if scheme == "print" else "screen", color_scheme="dark" if scheme == "dark" else "light"
    )
    page.goto(f"file://{tmp_path}/page.html")
    ground, ink = page.evaluate(
        "[getComputedStyle(document.documentElement).backgroundColor, getComputedStyle(document.body).backgroundColor,"
        " getComputedStyle(document.body).color].map((colour) => colour.match(/[0-9.]+/g).map(Number))"
        ".filter((colour, index) => index == 2 || colour.length < 4 || colour[3] > 0).slice(-2)"
    )

    def luminance(colour):
        linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
        return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    lighter, darker = sorted((luminance(ground), luminance(ink)), reverse=True)
    assert (lighter + 0.05) / (darker + 0.05) > 7  # WCAG AAA
    assert (luminance(ground) > luminance(ink)) == (scheme != "dark")
    assert all(token.is_visible() for token in page.locator(".trajectory [role=option]").all()[:5])
    page.close()
