"""The report in a real browser: its content, its controls, and that no text of the data runs as a script."""

from __future__ import annotations

import numpy as np
import pytest
from browser import browser, console, open_page

from tracer.report import write_report
from tracer.types import TopK

pytest.importorskip("PIL")

N, M, K, C = 150, 20, 4, 3
RNG = np.random.default_rng(5)
SCORES = RNG.normal(size=(N, M))
SELF = RNG.gamma(1.0, 1.0, N)
LABELS, TARGET_LABELS = RNG.integers(0, C, N), np.arange(M) % C
PREDICTIONS = np.where(RNG.random(N) < 0.2, (LABELS + 1) % C, LABELS)
KNOWN = np.arange(N) % 11 == 0
NAMES = ["ant", "bee", "cat"]
IMAGES = RNG.integers(0, 256, (N, 6, 9, 3), dtype=np.uint8)
ORDER = np.argsort(-SELF, kind="stable")
EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"


def strongest(scores, k=K):
    order = np.argsort(-scores, axis=0, kind="stable")[:k]
    return TopK(order.T, np.take_along_axis(scores, order, 0).T)


PROPONENTS = strongest(SCORES)
OPPONENTS = TopK(strongest(-SCORES).indices, -strongest(-SCORES).scores)


def report(folder, **options):
    settings = {
        "self_influence": SELF, "proponents": PROPONENTS, "opponents": OPPONENTS, "scores": SCORES,
        "train_labels": LABELS, "target_labels": TARGET_LABELS, "train_predictions": PREDICTIONS,
        "class_names": NAMES, "known_mislabelled": KNOWN, "figures": False,
    }  # fmt: skip
    return write_report(folder, **{**settings, **options})


@pytest.fixture(scope="module")
def chrome():
    with browser() as driver:
        yield driver


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return report(tmp_path_factory.mktemp("images"), train_inputs=IMAGES, target_inputs=IMAGES[:M])


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    words = [f"row {row} speaks of {'honey' if row % 7 == 0 else 'nothing'}" for row in range(N)]
    tokens = [text.split() for text in words]
    pairs = {(target, int(row)): np.arange(5) - 1.5 for target in range(M) for row in PROPONENTS.indices[target]}
    folder = tmp_path_factory.mktemp("texts")
    return report(
        folder, train_inputs=words, target_inputs=words[:M], train_tokens=tokens, target_tokens=tokens[:M],
        token_scores=pairs,
    )  # fmt: skip


def table_rows(chrome):
    """The indices of the training examples in the table."""
    cells = "return Array.from(document.querySelectorAll('#suspects tbody th'), (cell) => Number(cell.textContent))"
    return chrome.execute_script(cells)


def choose(chrome, part, control, value):
    """Set a control and wait until the page has reacted."""
    chrome.execute_script(
        "const control = document.querySelector(`#${arguments[0]} [data-control=${arguments[1]}]`);"
        "control.value = arguments[2];"
        "for (const name of ['input', 'change']) control.dispatchEvent(new Event(name));",
        part, control, value,
    )  # fmt: skip
    chrome.execute_async_script("setTimeout(arguments[0], 250)")  # the page waits for the end of typing


def click(chrome, selector):
    chrome.execute_script("document.querySelector(arguments[0]).click()", selector)


def shown_target(chrome):
    """The heading of the shown target, and the indices of its proponents and opponents."""
    return chrome.execute_script(
        "const rows = (list) => Array.from(list.querySelectorAll('.top span:first-child'),"
        " (each) => Number(each.textContent.replace('train ', '')));"
        "return [document.querySelector('.target-card h3').textContent,"
        " ...Array.from(document.querySelectorAll('.ends ol'), rows)]"
    )


@pytest.mark.parametrize("kind", ["vectors", "texts"])
def test_nothing_of_the_data_runs(chrome, tmp_path, kind):
    evil_texts = [EVIL] * N
    options = {
        "vectors": {"train_inputs": np.ones((N, 1)), "feature_names": [EVIL]},
        "texts": {
            "train_inputs": evil_texts,
            "target_inputs": evil_texts[:M],
            "train_tokens": [[EVIL]] * N,
            "target_tokens": [[EVIL]] * M,
            "token_scores": {(target, int(row)): [1.0] for target in range(M) for row in PROPONENTS.indices[target]},
        },
    }[kind]
    names = [f"{EVIL}{place}" for place in range(C)]
    page = report(
        tmp_path / "report", class_names=names, title=EVIL, settings={EVIL: EVIL}, rankings={EVIL: SELF}, **options
    )
    open_page(chrome, page)
    click(chrome, "#targets [data-control=next]")
    choose(chrome, "suspects", "search", "script")
    assert chrome.execute_script("return window.hacked") is None
    assert chrome.execute_script("return document.title") == EVIL
    assert chrome.execute_script("return document.querySelectorAll('img, iframe, script[src]').length") == 0
    assert EVIL in chrome.execute_script("return document.querySelector('#targets').textContent")
    assert console(chrome) == []


def test_nothing_is_loaded(chrome, images):
    open_page(chrome, images)
    loaded = chrome.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [address for address in loaded if not address.startswith("data:")] == []


def test_a_heading_sorts_and_says_so(chrome, texts):
    open_page(chrome, texts)
    assert table_rows(chrome) == ORDER[:24].tolist()
    click(chrome, '#suspects th[data-key="mean"] button')
    means = SCORES.mean(axis=1)
    assert table_rows(chrome) == np.argsort(-means)[:24].tolist()
    state = 'return document.querySelector(\'#suspects th[data-key="mean"]\').getAttribute("aria-sort")'
    assert chrome.execute_script(state) == "descending"
    click(chrome, '#suspects th[data-key="mean"] button')
    assert table_rows(chrome) == np.argsort(means)[:24].tolist()
    assert chrome.execute_script(state) == "ascending"
    assert chrome.execute_script("return document.activeElement.closest('th').dataset.key") == "mean"


def test_filters_by_label_text_and_flag(chrome, texts):
    open_page(chrome, texts)
    code = chrome.execute_script(
        "return Array.from(document.querySelector('#suspects [data-control=label]').options)"
        ".find((option) => option.textContent === 'bee').value"
    )
    choose(chrome, "suspects", "label", code)
    assert table_rows(chrome) == [row for row in ORDER.tolist() if NAMES[LABELS[row]] == "bee"][:24]
    choose(chrome, "suspects", "search", "HONEY")
    honey = [row for row in ORDER.tolist() if NAMES[LABELS[row]] == "bee" and row % 7 == 0]
    assert table_rows(chrome) == honey
    choose(chrome, "suspects", "flag", "disagrees")
    assert table_rows(chrome) == [row for row in honey if LABELS[row] != PREDICTIONS[row]]
    choose(chrome, "suspects", "label", "")
    choose(chrome, "suspects", "search", "")
    choose(chrome, "suspects", "flag", "not-known")
    assert table_rows(chrome) == [row for row in ORDER.tolist() if not KNOWN[row]][:24]
    choose(chrome, "suspects", "search", "no such words")
    assert "No training example matches" in chrome.execute_script(
        "return document.querySelector('#suspects').textContent"
    )


def test_pages_go_through_all_rows(chrome, texts):
    open_page(chrome, texts)
    seen = table_rows(chrome)
    while not chrome.execute_script("return document.querySelector('#suspects [data-control=next]').disabled"):
        click(chrome, "#suspects [data-control=next]")
        seen += table_rows(chrome)
    assert seen == ORDER.tolist()
    choose(chrome, "suspects", "page", "3")
    assert table_rows(chrome) == ORDER[48:72].tolist()


def test_records_show_all_fields_and_are_sorted_by_any(chrome, tmp_path):
    ages = [-1.5 * (row % 40) if (row + 1) % 9 else "" for row in range(N)]
    records = [
        {"town": f"Ulm {row % 13}", **({"age": age} if age != "" else {}), "<b>": EVIL} for row, age in enumerate(ages)
    ]
    open_page(chrome, report(tmp_path / "report", train_inputs=records, train_tokens=None, token_scores=None))
    shown = chrome.execute_script("return document.querySelector('#suspects tbody .features').textContent")
    assert shown == "".join(f"{name}{value}" for name, value in records[ORDER[0]].items())
    known = [row for row in range(N) if ages[row] != ""]
    for way, sign in (("down", -1), ("up", 1)):
        choose(chrome, "suspects", "sort", f"field1 {way}")
        assert table_rows(chrome) == sorted(known, key=lambda row: (sign * ages[row], list(ORDER).index(row)))[:24]
    choose(chrome, "suspects", "sort", "field0 up")
    assert table_rows(chrome) == sorted(range(N), key=lambda row: (row % 13, list(ORDER).index(row)))[:24]
    choose(chrome, "suspects", "search", "ulm 12")
    assert {row % 13 for row in table_rows(chrome)} == {12}
    assert chrome.execute_script("return window.hacked") is None


def test_named_numbers_are_all_shown_and_sort(chrome, tmp_path):
    vectors = np.random.default_rng(5).normal(size=(N, 40)).astype(np.float32)
    names = [f"x{place}" for place in range(40)]
    open_page(chrome, report(tmp_path / "report", train_inputs=vectors, feature_names=names))
    assert (
        chrome.execute_script(
            "return document.querySelectorAll('#suspects tbody tr:first-child .features span').length"
        )
        == 40
    )
    choose(chrome, "suspects", "sort", "field37 down")
    assert table_rows(chrome) == np.argsort(-vectors[:, 37])[:24].tolist()


def test_targets_are_chosen_by_button_number_search_and_key(chrome, texts):
    open_page(chrome, texts)

    def expect(target):
        rows = PROPONENTS.indices[target].tolist(), OPPONENTS.indices[target].tolist()
        assert shown_target(chrome) == [f"Target {target}", *rows]

    expect(0)
    choose(chrome, "targets", "number", "7")
    expect(7)
    choose(chrome, "targets", "search", "bee")
    bees = [target for target in range(M) if NAMES[TARGET_LABELS[target]] == "bee"]
    found = chrome.execute_script("return document.querySelectorAll('.strip button').length")
    assert found == len(bees)
    choose(chrome, "targets", "search", "12")
    expect(12)
    choose(chrome, "targets", "search", "")
    choose(chrome, "targets", "number", "1")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    chrome.find_element(By.CSS_SELECTOR, ".strip [aria-current=true]").send_keys(Keys.ARROW_RIGHT)
    expect(2)
    chrome.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    expect(1)


def test_proponents_and_opponents_end_at_zero(chrome, tmp_path):
    scores = np.array([[2.0, -1.0], [0.5, -2.0], [0.0, -0.5], [-1.0, -3.0]])
    top, low = strongest(scores), strongest(-scores)
    page = write_report(
        tmp_path / "report", self_influence=np.ones(4), proponents=top, opponents=TopK(low.indices, -low.scores),
        figures=False,
    )  # fmt: skip
    open_page(chrome, page)
    assert shown_target(chrome) == ["Target 0", [0, 1], [3]]
    click(chrome, "#targets [data-control=next]")
    assert shown_target(chrome) == ["Target 1", [3, 1, 0, 2]]
    assert "No training example has a score above zero." in chrome.execute_script(
        "return document.querySelector('.ends').textContent"
    )


def test_tokens_are_coloured_and_listed_with_their_scores(chrome, texts):
    open_page(chrome, texts)
    titles, colours, listed = chrome.execute_script(
        "const tile = document.querySelector('.ends li');"
        "const spans = Array.from(tile.querySelectorAll('.tokens span'));"
        "return [spans.map((span) => span.title), spans.map((span) => getComputedStyle(span).backgroundColor),"
        " Array.from(tile.querySelectorAll('tbody tr'), (line) => line.textContent)]"
    )
    words = f"row {PROPONENTS.indices[0, 0]} speaks of nothing".split()
    words = words[:-1] + ["honey" if PROPONENTS.indices[0, 0] % 7 == 0 else "nothing"]
    scores = ["−1.5", "−0.5", "+0.5", "+1.5", "+2.5"]
    assert titles == [f"{word}: {score}" for word, score in zip(words, scores, strict=True)]
    assert listed == [f"{word}{score}" for word, score in zip(words, scores, strict=True)]
    assert len(set(colours)) == 5


def test_thumbnails_show_the_images(chrome, images):
    open_page(chrome, images)
    chrome.execute_async_script(
        "const done = arguments[0]; const look = () => document.querySelector('#suspects canvas[data-drawn]') ? done()"
        " : setTimeout(look, 20); look()"
    )
    pixels, words = chrome.execute_script(
        "const canvas = document.querySelector('#suspects canvas');"
        "return [Array.from(canvas.getContext('2d').getImageData(0, 0, 9, 6).data), canvas.getAttribute('aria-label')]"
    )
    row = ORDER[0]
    np.testing.assert_allclose(np.reshape(pixels, (6, 9, 4))[..., :3], IMAGES[row], atol=1)
    assert words == f"Image of training example {row}, label {NAMES[LABELS[row]]}"


def test_cards_and_table_are_views_of_the_same_rows(chrome, images):
    open_page(chrome, images)
    cards = chrome.execute_script(
        "return Array.from(document.querySelectorAll('#suspects .tile .top span:first-child'),"
        " (each) => Number(each.textContent.replace('train ', '')))"
    )
    click(chrome, "#suspects [data-view=table]")
    assert table_rows(chrome) == cards == ORDER[:24].tolist()
    pressed = "return document.querySelector('#suspects [data-view=table]').getAttribute('aria-pressed')"
    assert chrome.execute_script(pressed) == "true"


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_controls_and_pictures_have_names_for_screen_readers(chrome, kind, request):
    open_page(chrome, request.getfixturevalue(kind))
    nameless = chrome.execute_script(
        "const named = (each) => each.getAttribute('aria-label') || each.labels && each.labels.length"
        " || each.textContent.trim();"
        "return Array.from(document.querySelectorAll('button, input, select, canvas, svg, a, [role=group]'))"
        ".filter((each) => !named(each)).map((each) => each.outerHTML.slice(0, 80))"
    )
    assert nameless == []
    landmarks = chrome.execute_script(
        "return ['header', 'nav[aria-label]', 'main', 'footer', 'h1'].map((name) => "
        "document.querySelectorAll(name).length)"
    )
    assert landmarks == [1, 1, 1, 1, 1]
    assert chrome.execute_script("return document.documentElement.lang") == "en"
    assert chrome.execute_script(
        "return Array.from(document.querySelectorAll('section')).every("
        "(part) => document.getElementById(part.getAttribute('aria-labelledby')).tagName === 'H2')"
    )


def test_light_and_dark_follow_the_reader(chrome, images):
    colours = []
    for scheme in ("light", "dark"):
        open_page(chrome, images, media={"prefers-color-scheme": scheme})
        colours.append(chrome.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(244, 246, 249)", "rgb(14, 18, 23)"]


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_a_phone_does_not_scroll_sideways(chrome, kind, request):
    open_page(chrome, request.getfixturevalue(kind), width=390)
    click(chrome, "#targets [data-control=next]")
    assert chrome.execute_script("return document.documentElement.scrollWidth") == 390


def test_a_hundred_thousand_rows_are_sorted_searched_and_paged(chrome, tmp_path):
    rng = np.random.default_rng(0)
    num_rows, num_targets = 100_000, 3_000
    own, loss = rng.random(num_rows), rng.random(num_rows)
    top = TopK(rng.integers(0, num_rows, (num_targets, 3)), np.ones((num_targets, 3)))
    page = write_report(
        tmp_path / "report", self_influence=own, proponents=top, opponents=top, rankings={"loss": loss}, figures=False,
        train_labels=rng.integers(0, 10, num_rows), train_inputs=rng.integers(0, 256, (num_rows, 4, 4), dtype=np.uint8),
    )  # fmt: skip
    assert page.stat().st_size < 12_000_000
    open_page(chrome, page)
    click(chrome, "#suspects [data-view=table]")
    click(chrome, '#suspects th[data-key="ranking0"] button')
    click(chrome, "#suspects [data-control=next]")
    # neighbours may be equal in the page's float32, so their order is not part of the claim
    np.testing.assert_allclose(loss[table_rows(chrome)], -np.sort(-loss)[24:48], rtol=1e-6)
    choose(chrome, "suspects", "search", "77777")
    assert table_rows(chrome) == [77777]


def test_ids_are_shown_and_those_that_are_files_are_links(chrome, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"data/x {row}#.png" for row in range(N)]
    (tmp_path / "data").mkdir()
    (tmp_path / names[ORDER[0]]).touch()
    names[ORDER[1]] = EVIL
    names[ORDER[2]] = "javascript:alert(1)"
    page = report(tmp_path / "out" / "page", train_ids=names, target_ids=range(500, 500 + M), train_inputs=IMAGES)
    open_page(chrome, page)
    tiles = chrome.find_elements("css selector", "#suspects .tile .id")
    assert [tile.text for tile in tiles[:3]] == [names[row] for row in ORDER[:3]]
    (link,) = (tile for tile in tiles if tile.tag_name == "a")
    assert link.get_attribute("href") == (tmp_path / names[ORDER[0]]).as_uri()
    assert "500" in chrome.find_element("css selector", ".target-card .id").text
    assert chrome.execute_script("return window.hacked") is None
