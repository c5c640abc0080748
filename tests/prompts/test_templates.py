"""Templates: what they say, what they refuse, and that what is drawn depends on nothing but seed, row and template."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdbatch.errors import InputError
from sdbatch.prompts.expansion import Chance, Words, count, drawn, every
from sdbatch.prompts.template import BadTemplate, parse, parse_option
from sdbatch.prompts.wildcards import check_template, read_wildcards
from sdbatch.spec import Prompt

COLOURS = {"colours": tuple(map(parse_option, ["red", "blue", "2::green"]))}
WORDS = Words({"product": "lamp", "surface": "", "kind": "desk"}, COLOURS)


def all_of(template: str, words: Words = WORDS) -> list[str]:
    return list(every(parse(template), words))


def test_what_templates_say() -> None:
    assert all_of("a {product}") == ["a lamp"]
    assert all_of("{a|b} {c|d}") == ["a c", "a d", "b c", "b d"]
    assert all_of("{2$$a|b|c}") == ["a, b", "a, c", "b, c"]
    assert all_of("{1-2$$ and $$a|b}") == ["a", "b", "a and b"]
    assert all_of("{0-1$$a}x") == ["x", "ax"]
    assert all_of("__colours__ {product}") == ["red lamp", "blue lamp", "green lamp"]
    assert all_of("{surface|table}") == ["table"]
    assert all_of("{kind|table|chair}") == ["desk"]
    assert all_of("{{kind}|table}") == ["desk", "table"]
    assert all_of("{a|{b|c} d}") == ["a", "b d", "c d"]
    assert all_of("{|very }big") == ["big", "very big"]
    assert all_of(r"\{a\} \__colours__ (word:1.2) a|b") == ["{a} __colours__ (word:1.2) a|b"]


def test_the_table_of_the_documentation_is_true() -> None:
    text = (Path(__file__).parents[2] / "docs/prompts.md").read_text(encoding="utf-8")
    examples = re.findall(r"^\| `(.+?)` \| (`.*`) \|$", text, re.MULTILINE)
    assert len(examples) == text.count("\n| `") > 10
    for template, makes in examples:
        told = [one.strip("`") for one in makes.replace("\\|", "|").split(" · ")]
        assert all_of(template.replace("\\|", "|")) == told, template


def test_lines_of_files_see_no_columns() -> None:
    words = Words({"red": "a cell"}, {"c": (parse_option("{red|blue}"),)})
    assert all_of("__c__ {red|blue}", words) == ["red a cell", "blue a cell"]
    assert {drawn(parse("__c__"), words, Chance(i)) for i in range(20)} == {"red", "blue"}


def test_what_a_cell_holds_is_never_read_as_grammar() -> None:
    words = Words({"product": "{a|b} __colours__ \\{"}, COLOURS)
    assert all_of("{product}", words) == [words.values["product"]]


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("a {b|c", "the '{' at character 3 is not closed"),
        ("a } b", "character 3 is a '}' that closes nothing"),
        ("{}", "hold nothing"),
        ("{3$$a|b}", "ask for 3 to 3 of 2 options"),
        ("{2-1$$a|b}", "ask for 2 to 1 of 2 options"),
        ("{0::a|0::b}", "no weight"),
        ("{99$$" + "a|" * 200 + "}", "ask for 99 options; at most 20"),
        ("{" * 30 + "a|b" + "}" * 30, "within more than 20 others"),
    ],
)
def test_what_can_not_be_read_says_where(template: str, told: str) -> None:
    with pytest.raises(BadTemplate, match=told):
        parse(template)


#: Templates that can be read, of choices in choices.
TEMPLATES = st.recursive(
    st.sampled_from(["a", "b ", "__colours__", "{product}", "", "x, y"]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(lambda options: "{" + "|".join(options) + "}"),
        st.lists(inner, min_size=2, max_size=3).map(lambda options: "{1-2$$" + "|".join(options) + "}"),
        st.tuples(inner, inner).map("".join),
    ),
    max_leaves=8,
)


@given(TEMPLATES, st.integers(0, 2**63 - 1), st.text(max_size=8))
def test_what_is_drawn_is_among_all_that_can_be_said(template: str, seed: int, row: str) -> None:
    parsed = parse(template)
    ways = count(parsed, WORDS)
    said = drawn(parsed, WORDS, Chance(seed, row, 0))
    assert said == drawn(parsed, WORDS, Chance(seed, row, 0))
    if ways <= 2_000:
        found = list(every(parsed, WORDS))
        assert len(found) == ways
        # A choice that takes several may take them in another order than the template's.
        assert "1-2$$" in template or said in found


def test_weights_are_how_often() -> None:
    template = parse("{3::a|1::b|0::c}")
    said = [drawn(template, WORDS, Chance(1, str(i), 0)) for i in range(2000)]
    assert 1400 < said.count("a") < 1600
    assert said.count("c") == 0


def test_counting_builds_nothing() -> None:
    assert count(parse("{a|b|c|d|e|f|g|h|i|j}" * 40), WORDS) == 10**40


def test_wildcard_files(tmp_path: Path) -> None:
    (tmp_path / "animals").mkdir()
    (tmp_path / "animals/cats.txt").write_text("# comment\n\n2::lion\ntiger\r\n", encoding="utf-8")
    (tmp_path / "animals/dogs.txt").write_text("wolf\n", encoding="utf-8")
    (tmp_path / "any.txt").write_text("a __animals/*__\n", encoding="utf-8")
    (tmp_path / "broken.txt").write_text("{is nobody's business", encoding="utf-8")
    found = read_wildcards(Prompt(template="__any__", wildcards=str(tmp_path)))
    assert sorted(found.sha256) == ["animals/cats", "animals/dogs", "any"]
    assert all_of("__any__", Words({}, found.lines)) == ["a lion", "a tiger", "a wolf"]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"a": "__b__", "b": "__a__"}, "a → b → a goes round in a circle"),
        ({"a": "{x"}, "a.txt, line 1: the '{' at character 1 is not closed"),
        ({"a": "\n"}, "a.txt has no lines"),
        ({"a": "0::x"}, "a.txt gives all its lines no weight"),
        ({"a": "__c__"}, "a.txt: there is no wildcard file c.txt; there is: a"),
        ({"a": "{x}"}, "a.txt names a column"),
        ({}, "holds no .txt files"),
        ({f"f{i}": f"__f{i + 1}__" * 100 for i in range(10)} | {"f10": "x"}, "more than 100,000 characters"),
        ({f"f{i:02}": f"__f{i + 1:02}__" for i in range(40)} | {"f40": "x"}, "more than 20 deep"),
    ],
)
def test_wildcard_files_that_can_not_be_used(files: dict[str, str], told: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=told):
        read_wildcards(Prompt(template_column="t", wildcards=str(tmp_path)))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "nothing"])
def test_a_wildcard_leads_nowhere_else(name: str) -> None:
    template = parse(f"__{name}__")
    if any(not isinstance(part, str) for part in template):
        with pytest.raises(InputError, match="there is no wildcard file"):
            check_template(template, COLOURS, "prompt.template")
