"""Ledger: a chain in which every change is found."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evercell.errors import ModelError
from evercell.ledger import START, Ledger

words = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "π", "x\u2028y"]), inner),
    max_leaves=5,
)
stages = st.lists(st.dictionaries(st.sampled_from(["verb", "data", "seed", "metrics"]), values), min_size=1, max_size=4)


def ledger_of(facts: list[dict[str, Any]]) -> Ledger:
    ledger = Ledger()
    for one in facts:
        ledger = ledger.appended(one)
    return ledger


THREE = ledger_of([{"verb": "train", "seed": 1}, {"verb": "update", "note": "β cells"}, {"verb": "update"}])


def test_stages_are_numbered_and_chained() -> None:
    assert [stage.facts["stage"] for stage in THREE] == [1, 2, 3]
    assert [stage.previous for stage in THREE] == [START, *(stage.digest for stage in THREE.stages[:2])]
    assert THREE.head == THREE.stages[-1].digest
    assert Ledger().head == START
    assert len(THREE) == 3


def test_appending_leaves_the_old_ledger_as_it_was() -> None:
    before = THREE.to_text()
    longer = THREE.appended({"verb": "update"})
    assert THREE.to_text() == before
    assert longer.to_text().startswith(before)


@given(stages)
def test_what_is_written_is_read_back(facts: list[dict[str, Any]]) -> None:
    ledger = ledger_of(facts)
    again = Ledger.from_text(ledger.to_text())
    assert again.head == ledger.head
    assert again.to_text() == ledger.to_text()
    assert [stage.facts for stage in again] == [stage.facts for stage in ledger]


def test_facts_are_kept_as_json_gives_them_back() -> None:
    """Tuples and numeric keys have another hash after reading unless they are made plain first."""
    mutable = {"sizes": (1, 2), "per_type": {1: "a", 10: "b", 2: "c"}}
    ledger = Ledger().appended(mutable)
    assert Ledger.from_text(ledger.to_text()).head == ledger.head
    mutable["per_type"][1] = "changed"  # type: ignore[index]
    assert ledger.stages[0].facts["per_type"]["1"] == "a"


@given(st.data())
def test_any_changed_byte_is_found(data: st.DataObject) -> None:
    text = THREE.to_text()
    raw = bytearray(text.encode())
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] = data.draw(st.integers(0, 255).filter(lambda byte: byte != raw[place]))
    changed = raw.decode(errors="replace")
    with pytest.raises(ModelError):
        Ledger.from_text(changed)


@given(st.integers(0, len(THREE.to_text())), st.sampled_from([" ", "\n", "0", "\t", '"a": 1, ']))
def test_any_inserted_text_is_found(place: int, more: str) -> None:
    text = THREE.to_text()
    changed = text[:place] + more + text[place:]
    with pytest.raises(ModelError):
        Ledger.from_text(changed)


@pytest.mark.parametrize("left", [[1, 2], [0, 2], [1], [1, 0, 2], [0, 1, 1]])
def test_removed_reordered_and_repeated_lines_are_found(left: list[int]) -> None:
    lines = THREE.to_text().splitlines(keepends=True)
    with pytest.raises(ModelError, match="line"):
        Ledger.from_text("".join(lines[i] for i in left))


def test_a_forged_line_with_a_hash_of_its_own_breaks_the_next() -> None:
    lines = THREE.to_text().splitlines(keepends=True)
    forged = Ledger(THREE.stages[:1]).appended({"verb": "update", "note": "forged"}).to_text().splitlines(keepends=True)
    with pytest.raises(ModelError, match=r"line 3 of `model/ledger\.jsonl` was changed"):
        Ledger.from_text(lines[0] + forged[1] + lines[2], name="model/ledger.jsonl")


@pytest.mark.parametrize("text", ["[]\n", "{}\n", "no json\n", "null\n", '{"hash": 1}\n', "[" * 100_000 + "\n", "\n"])
def test_what_is_no_stage_is_told(text: str) -> None:
    with pytest.raises(ModelError, match="line 1"):
        Ledger.from_text(text)


def test_a_cut_line_is_told() -> None:
    with pytest.raises(ModelError, match=r"line 3 .* cut off"):
        Ledger.from_text(THREE.to_text()[:-1])


def test_one_line_a_stage_whatever_names_hold() -> None:
    ledger = Ledger().appended({"data": "a\u2028b\x85c\nd\re"})
    assert ledger.to_text().count("\n") == 1
    assert json.loads(ledger.to_text())["data"] == "a\u2028b\x85c\nd\re"
    assert Ledger.from_text(ledger.to_text()).head == ledger.head
