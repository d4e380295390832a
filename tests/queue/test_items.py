"""Invariant: the items are exactly the ones that the settings say, of the types that the workflow has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from balanced_offload.offload.queue.items import make_batch
from balanced_offload.offload.queue.values import parse_values
from balanced_offload.offload.queue.workflow import Asked

from .stub import WORKFLOW


def values(*settings: str, combine: str = "product") -> list[dict[str, Any]]:
    batch = make_batch(WORKFLOW, settings, combine)
    assert [item.number for item in batch.items] == list(range(1, len(batch.items) + 1))
    return [{str(target): value for target, value in item.values.items()} for item in batch.items]


@pytest.mark.parametrize(
    ("text", "present", "made"),
    [
        ("1..4", 7, [1, 2, 3, 4]),
        ("1..20:5", 7, [1, 6, 11, 16]),
        ("3..1", 7, [3, 2, 1]),
        ("-2..2:2", 7, [-2, 0, 2]),
        ("10..0:-5", 7, [10, 5, 0]),
        ("0.1..0.3:0.1", 1.0, [0.1, 0.2, 0.3]),
        ("6.5..8:0.5", 8, [6.5, 7, 7.5, 8]),
        ("18446744073709551615", 7, [18446744073709551615]),
        ("5", 1.0, [5.0]),
        ("1e-3", 1.0, [0.001]),
        ("1..4", "text", ["1..4"]),
        ("a, b", "text", ["a, b"]),
        ('"a, b"', "text", ["a, b"]),
        ("", "text", [""]),
        ("YES", False, [True]),
        ("0", True, [False]),
        ("5", None, [5]),
        ("five", None, ["five"]),
    ],
)
def test_values_have_the_type_of_the_workflow(text: str, present: Any, made: list[Any]) -> None:
    got = parse_values(text, present, "3.x")
    assert got == made
    assert [type(one) for one in got] == [type(one) for one in made]


@pytest.mark.parametrize(
    ("text", "present", "words"),
    [
        ("many", 7, ["'many'", "a whole number", "1..20:5"]),
        ("", 7, ["''"]),
        ("inf", 1.0, ["'inf'", "a number"]),
        ("nan", 1.0, ["'nan'"]),
        ("1e999999999", 7, ["1e999999999"]),
        ("1..9:-1", 7, ["never gets", "1..9:1"]),
        ("1..9:0", 7, ["never gets", "1..9:1"]),
        ("1..999999999999999", 7, ["values", "100,000"]),
        ("1..1e999999999", 7, ["'1e999999999'"]),
        ("maybe", True, ["'maybe'", "true or false"]),
    ],
)
def test_values_that_are_none(text: str, present: Any, words: list[str]) -> None:
    with pytest.raises(Asked) as error:
        parse_values(text, present, "3.x")
    for word in ["--set 3.x", *words]:
        assert word in str(error.value)


def test_nothing_set_is_one_item() -> None:
    assert values() == [{}]
    assert values(combine="zip") == [{}]


def test_the_product_has_the_last_one_fastest() -> None:
    got = values("3.seed=1..2", "6.text=a cat", "3.steps=10..20:10")
    assert [(one["3.seed"], one["3.steps"], one["6.text"]) for one in got] == [
        (1, 10, "a cat"),
        (1, 20, "a cat"),
        (2, 10, "a cat"),
        (2, 20, "a cat"),
    ]


def test_zip_goes_side_by_side_and_one_value_goes_with_all() -> None:
    got = values("3.seed=1..3", "3.steps=10..30:10", "6.text=b", combine="zip")
    assert [tuple(one.values()) for one in got] == [(1, 10, "b"), (2, 20, "b"), (3, 30, "b")]
    with pytest.raises(Asked, match=r"3\.seed \(3\), 3\.steps \(2\)"):
        values("3.seed=1..3", "3.steps=1..2", combine="zip")
    with pytest.raises(Asked, match="product, zip"):
        values("3.seed=1..3", combine="pairs")


def test_one_input_set_again_has_more_values() -> None:
    got = values("4.ckpt_name=a.safetensors", "Load.ckpt_name=b.safetensors", "3.seed=1..2", "3.seed=9")
    assert len(got) == 6
    assert [one["4.ckpt_name"] for one in got] == ["a.safetensors"] * 3 + ["b.safetensors"] * 3
    assert [one["3.seed"] for one in got] == [1, 2, 9] * 2


def test_the_sentence_says_how_many() -> None:
    batch = make_batch(WORKFLOW, ["3.seed=1..20", "3.steps=1..2"])
    assert batch.sentence == "40 items: 3.seed (20) x 3.steps (2)"
    with pytest.raises(Asked, match=r"3\.seed \(1000\) x 3\.steps \(1000\) = 1,000,000 items"):
        make_batch(WORKFLOW, ["3.seed=1..1000", "3.steps=1..1000"])


def test_the_fingerprint_is_of_the_graph_and_of_the_items() -> None:
    one = make_batch(WORKFLOW, ["3.seed=1..3"]).fingerprint
    assert make_batch(WORKFLOW, ["Sampler.seed=1", "3.seed=2..3"]).fingerprint == one
    assert make_batch(WORKFLOW, ["3.seed=1..4"]).fingerprint != one
    assert make_batch({**WORKFLOW, "1": WORKFLOW["7"]}, ["3.seed=1..3"]).fingerprint != one


# ---------------------------------------------------------------------- files
def table(folder: Path, text: str, name: str = "prompts.csv") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_one_column_with_and_without_a_header(tmp_path: Path) -> None:
    wanted = [{"6.text": "a cat"}, {"6.text": "a dog, wet"}, {"6.text": 'a "fox"'}]
    cells = 'a cat\n"a dog, wet"\n"a ""fox"""\n'
    for header in ("", "text\n", "6.text\n", "Positive.text\n", "\ufefftext\n"):
        path = table(tmp_path, header + cells)
        if header == "Positive.text\n":
            assert values(f"Positive.text={path}") == wanted
        else:
            assert values(f"6.text={path}") == wanted


def test_a_column_per_input(tmp_path: Path) -> None:
    path = table(tmp_path, '6.text,Sampler.seed,4.fast\n"a, b",1,true\n\nc,2,no\n"two\nlines",3,0\n')
    wanted = [
        {"6.text": "a, b", "3.seed": 1, "4.fast": True},
        {"6.text": "c", "3.seed": 2, "4.fast": False},
        {"6.text": "two\nlines", "3.seed": 3, "4.fast": False},
    ]
    assert values(path) == wanted
    assert values(f"6.text={path}") == wanted
    with pytest.raises(Asked, match=r"no column 3\.steps"):
        values(f"3.steps={path}")
    assert len(values(path, "3.steps=1..2")) == 6
    with pytest.raises(Asked, match=r"3\.seed: set twice"):
        values(path, "3.seed=1")


def test_a_text_file_has_a_text_per_line(tmp_path: Path) -> None:
    path = table(tmp_path, 'a cat, wet\r\n\r\n"quoted"\nline\u2028separator\n', "prompts.txt")
    assert [one["6.text"] for one in values(f"6.text={path}")] == ["a cat, wet", '"quoted"', "line\u2028separator"]
    with pytest.raises(Asked, match="needs an input"):
        values(path)


def test_a_long_prompt_and_a_text_that_looks_like_a_file(tmp_path: Path) -> None:
    long = "x" * 200_000
    assert values(f"6.text={table(tmp_path, long)}") == [{"6.text": long}]
    assert values('6.text="none.csv"') == [{"6.text": "none.csv"}]


@pytest.mark.parametrize(
    ("text", "setting", "words"),
    [
        ("6.text,3.seed\na,1\nb\n", "", ["line 3", "1 cells", "2 are expected"]),
        ("6.text,3.seed\na,1\nb,many\n", "", ["line 3", "'many'", "3.seed"]),
        ("6.text,3.sead\na,1\n", "", ["line 1", "'sead'", "seed"]),
        ("6.text,6.text\na,1\n", "", ["two columns", "6.text"]),
        ("6.text,Positive.text\na,1\n", "", ["two columns", "6.text"]),
        ("a cat, wet\na dog\n", "6.text=", ["2 columns", "double quotes", ".txt"]),
        ("a cat\na dog, wet\n", "6.text=", ["line 2", "2 cells", "double quotes"]),
        ("6.text\n", "", ["no rows"]),
        ("", "6.text=", ["no rows"]),
        ('a "cat"" b\n"open', "6.text=", ["line"]),
        ("3.model\nx\n", "", ["linked to node 4"]),
        ("3.model\nx\n", "6.text=", ["linked to node 4"]),
    ],
)
def test_files_that_do_not_fit(text: str, setting: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(Asked) as error:
        values(f"{setting}{table(tmp_path, text)}")
    for word in words:
        assert word in str(error.value)


def test_files_that_are_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(Asked, match="within double quotes"):
        values("6.text=none.csv")
    (tmp_path / "latin.csv").write_bytes(b"caf\xe9\n")
    with pytest.raises(Asked, match="not UTF-8"):
        values(f"6.text={tmp_path / 'latin.csv'}")
    with pytest.raises(Asked, match=r"NODE\.INPUT=VALUE"):
        values("3.seed")
