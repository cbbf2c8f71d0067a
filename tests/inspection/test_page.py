"""The page holds whatever is in the pairs, needs nothing from outside, and shows what is picked."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from looking import dom_of, needs_chromium, readable_tokenizer
from tiny_models import conversation, rows, tiny_model

from fastpref.inspection import inspect_teacher, write_page
from fastpref.inspection.page import brief
from fastpref.inspection.plots import BINS, HEIGHT, histogram, two_histograms

TOKENIZER = readable_tokenizer()
HOSTILE = [
    "</script><script>document.title = 'owned'</script>",
    "<!-- <script> \"><img src=x onerror=\"document.title = 'owned'\">' {{ 7 * 7 }} {% raw %}",
    "\u2028\u2029\0 é ü 漢字 🙂 \N{RIGHT-TO-LEFT OVERRIDE}\n\nnew &lt;line&gt; \\u003c `",
]
ROWS = [conversation(*HOSTILE), conversation(*HOSTILE[::-1]), *rows(3)]
TEACHER, STUDENT, REFERENCE = (tiny_model(TOKENIZER, seed=seed) for seed in range(3))
FOUND = inspect_teacher(ROWS, TEACHER, TOKENIZER, student=STUDENT, reference=REFERENCE)
FOUND.facts["teacher"] = HOSTILE[0]


class Parsed(HTMLParser):
    """What a browser would find: tags, attributes and the text of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script" and data.strip():
            self.scripts.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    write_page(FOUND, file)
    return file


def test_hostile_text_stays_text(page):
    parsed = Parsed(page.read_text("utf-8"))
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("script") == 2 and "img" not in tags
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    pairs = json.loads(parsed.scripts[0])["pairs"]
    for pair, shown in zip(FOUND.pairs, pairs, strict=True):
        assert shown["tokens"] == [pair.chosen, pair.rejected]
        assert shown["prompt"] == pair.prompt
    assert "".join(pairs[0]["tokens"][0]).strip() == f"{HOSTILE[1]}</s>"


def test_nothing_comes_from_outside(page):
    text = page.read_text("utf-8")
    addresses = set(re.findall(r"\w+://[^\s\"']+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, which is never fetched
    for _, attributes in Parsed(text).tags:
        assert not {"src", "href", "action"} & set(attributes)
    assert "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text


def test_the_table_has_the_numbers_and_plots_have_words(page):
    text = page.read_text("utf-8")
    for measures in FOUND.measures:
        assert f"<code>{measures.name}</code>" in text
        assert f"{100 * measures.ranked_first.share:.0f} %" in text
        assert measures.alpha is not None and f"<td>{brief(measures.alpha)}</td>" in text
    figures = [attributes for tag, attributes in Parsed(text).tags if tag == "svg"]
    named = [one for one in figures if one.get("id") != "curve"]  # which the script names
    assert len(named) == 3 * len(FOUND.measures)
    assert all(one["role"] == "img" and one["aria-label"] for one in named)


def test_the_same_inspection_makes_the_same_page(page, tmp_path):
    write_page(FOUND, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_a_page_without_a_student(tmp_path):
    write_page(FOUND._replace(student_gaps=None), tmp_path / "alone.html")
    assert "Beside the student" not in (tmp_path / "alone.html").read_text("utf-8")


@pytest.mark.parametrize("name", ["report.txt", "nowhere/report.html"])
def test_an_output_that_is_no_page_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="output: expected a file"):
        write_page(FOUND, tmp_path / name)


def test_numbers_are_brief():
    numbers = {0.0: "0", 0.12345: "0.123", -12.345: "−12.3", 1.0: "1", 123456.0: "123000",
               -4e-7: "−4e−07", None: "–"}  # fmt: skip
    assert {number: brief(number) for number in numbers} == numbers
    assert brief(0.96, 1) == "1" and brief(2345.0, 2) == "2300"


def test_histograms_count_every_pair():
    gaps = torch.tensor([-1e9, -0.6, -0.6, -1e-3, 0.0, 0.2, 1e9], dtype=torch.float64)
    bars = histogram(gaps, "value").bars
    assert sum(bar.height for bar in bars) == pytest.approx(HEIGHT * 7 / 3)
    assert [bar.side for bar in bars] == ["rejected", "rejected", "chosen", "chosen"]
    both = two_histograms(gaps[1:-1], 10 * gaps[1:-1], "value")
    assert both.limit == pytest.approx(6, rel=0.1) and len(both.line.split()) == 2 * BINS


PICK = """<script>
at("pair").selectedIndex = 3; at("pair").dispatchEvent(new Event("change"));
at("signal").selectedIndex = 5; at("signal").dispatchEvent(new Event("change"));
for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight"])
  at("rejected").dispatchEvent(new KeyboardEvent("keydown", { key }));
at("table").open = true; showTable();
</script>"""


@needs_chromium
def test_the_pair_that_is_picked_is_shown(page, tmp_path):
    picked = tmp_path / "picked.html"
    picked.write_text(page.read_text("utf-8").replace("</body>", PICK + "</body>"), "utf-8")
    dom = dom_of(picked, tmp_path / "profile")
    signal, pair = FOUND.signals[5], FOUND.pairs[3]
    assert signal.name == "logit"
    sums = signal.sums()[3].tolist()
    (summary,) = re.findall(r'id="summary"[^>]*>(.*?)</p>', dom)
    assert summary.startswith("Row 3: logit gives the chosen response ")
    said = [float(one.replace("−", "-")) for one in re.findall(r"[+−][\d.]+\d", summary)]
    assert said[:2] == pytest.approx(sums, rel=1e-3)
    assert said[2] == pytest.approx(float(FOUND.student_gaps[3]), rel=1e-3)
    (status,) = re.findall(r'id="token"[^>]*>(.*?)</p>', dom)
    assert status.startswith(f'rejected, token 2 of {len(pair.rejected)}, "{pair.rejected[1]}"')
    step = float(signal.steps(signal.curves[3][1])[1])
    found = float(re.search(r"shaping ([+−][\d.]+)", status)[1].replace("−", "-"))
    assert found == pytest.approx(step, rel=1e-3)
    assert dom.count("<polyline class") - dom.count('class="student"') == 2
    assert dom.count("</span></div>") == 2
    tokens = re.findall(r"<span[^>]*data-token[^>]*>([^<]*)</span>", dom)
    assert tokens == [one.replace("<", "&lt;").replace(">", "&gt;") for one in
                      pair.chosen + pair.rejected]  # fmt: skip
    assert dom.count("<caption>") == 2 and dom.count("<tr>") > 10


@needs_chromium
def test_hostile_text_is_shown_as_text(page, tmp_path):
    dom = dom_of(page, tmp_path / "profile")
    assert "<title>Does this teacher tell your pairs apart?</title>" in dom
    assert dom.count("<script") == 2 and "<img" not in dom
    tokens = "".join(re.findall(r"<span[^>]*data-token[^>]*>([^<]*)</span>", dom))
    assert "&lt;!-- &lt;script&gt;" in tokens and "漢" in tokens and "↵" in tokens
