"""Verdicts on training examples: given in the page, kept by the browser, downloaded and applied to labels."""

from __future__ import annotations

import json

import numpy as np
import pytest
from browser import browser, open_page

from tracer import InputError, MismatchError, apply_corrections
from tracer.report import write_report
from tracer.types import TopK

IDS = ["=a.png", "b, c.png", "d.png", "e.png"]
LABELS = np.array([0, 1, 2, 1])
NAMES = ["ant", "bee", "-1 cat"]


def write(path, *rows):
    lines = ["id,label,suggested_label,verdict", *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_confirmed_labels_are_replaced_and_others_stay(tmp_path):
    path = write(tmp_path / "v.csv", (3, 1, 0, "confirmed"), (0, 0, 1, "ignored"))
    assert apply_corrections(path, LABELS).tolist() == [0, 1, 2, 0]
    assert LABELS.tolist() == [0, 1, 2, 1]


def test_ids_and_class_names_are_those_of_the_report(tmp_path):
    given = ("'=a.png", "ant", "'-1 cat", "confirmed"), ('"b, c.png"', "bee", "ant", "confirmed")
    path = write(tmp_path / "v.csv", *given)
    assert apply_corrections(path, LABELS, ids=IDS, class_names=NAMES).tolist() == [2, 0, 2, 1]
    texts = [NAMES[label] for label in LABELS]
    assert apply_corrections(path, texts, ids=IDS).tolist() == ["-1 cat", "ant", "-1 cat", "bee"]


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ((9, 1, 0, "confirmed"), InputError, "not among the 4"),
        ((3, 2, 0, "confirmed"), MismatchError, "has the label '2' in the report and '1'"),
        ((3, 1, "", "confirmed"), InputError, "no suggested label"),
        ((3, 1, 7, "confirmed"), InputError, "unknown label '7'"),
        ((3, 1, 0, "maybe"), InputError, "verdict 'maybe'"),
        ((3, 1), InputError, "verdict 'None'"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, row, error, message):
    with pytest.raises(error, match=message):
        apply_corrections(write(tmp_path / "v.csv", row), LABELS)


def test_another_file_and_equal_ids_are_refused(tmp_path):
    (tmp_path / "v.csv").write_text("a,b\n1,2\n")
    (tmp_path / "v.json").write_text("no json")
    for name in ("v.csv", "v.json"):
        with pytest.raises(InputError, match="is no file of verdicts"):
            apply_corrections(tmp_path / name, LABELS)
    with pytest.raises(InputError, match="there is no file .*download the verdicts"):
        apply_corrections(tmp_path / "none.csv", LABELS)
    with pytest.raises(InputError, match="alike"):
        apply_corrections(write(tmp_path / "w.csv"), LABELS, ids=["a", "a", "b", "c"])


def test_verdicts_are_given_kept_filtered_and_applied(tmp_path):
    none = TopK(np.zeros((1, 1), int), np.ones((1, 1), np.float32))
    page = write_report(
        tmp_path / "report", self_influence=[4.0, 3.0, 2.0, 1.0], proponents=none, opponents=none, train_labels=LABELS,
        class_names=NAMES, train_ids=IDS, figures=False,
    )  # fmt: skip

    def press(chrome, row, verdict):
        chrome.execute_script(f"document.querySelectorAll('#suspects [data-verdict={verdict}]')[{row}].click()")

    def shown(chrome, verdict):
        chrome.execute_script(
            "const select = document.querySelector('#suspects [data-control=flag]'); select.value = arguments[0];"
            "select.dispatchEvent(new Event('change'))",
            verdict,
        )
        return chrome.execute_async_script(
            "const done = arguments[0], cells = () => document.querySelectorAll('#suspects tbody th');"
            "setTimeout(() => done(Array.from(cells(), (cell) => Number(cell.textContent))), 50)"
        )

    with browser() as chrome:
        open_page(chrome, page)
        press(chrome, 0, "confirmed")
        press(chrome, 1, "ignored")
        press(chrome, 2, "ignored")
        press(chrome, 2, "ignored")  # taken back
        open_page(chrome, page)  # another visit
        said = chrome.execute_script("return document.querySelector('#suspects [data-control=verdicts]').textContent")
        assert said == "1 confirmed, 1 ignored"
        assert (shown(chrome, "confirmed"), shown(chrome, "ignored"), shown(chrome, "undecided")) == ([0], [1], [2, 3])
        csv, rows = chrome.execute_script("return [VERDICTS.csv(), VERDICTS.rows()]")
        chrome.execute_script("localStorage.clear()")
    assert rows[0] == {"id": "=a.png", "label": "ant", "suggested_label": "", "verdict": "confirmed"}
    rows[0]["suggested_label"] = "-1 cat"
    (tmp_path / "verdicts.json").write_text(json.dumps(rows))
    assert apply_corrections(tmp_path / "verdicts.json", LABELS, ids=IDS, class_names=NAMES).tolist() == [2, 1, 2, 1]
    (tmp_path / "verdicts.csv").write_text(csv.replace("ant,,confirmed", "ant,'-1 cat,confirmed"), newline="")
    assert apply_corrections(tmp_path / "verdicts.csv", LABELS, ids=IDS, class_names=NAMES).tolist() == [2, 1, 2, 1]
