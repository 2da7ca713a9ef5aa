"""The shipped items have the harness's forms, are balanced, and cannot be guessed from their length."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from nmsweep.data.tasks import MINI_FOLDER

Item = Mapping[str, Any]

FORMS: dict[str, Callable[[Item], tuple[list[str], int]]] = {
    "science": lambda item: (item["choices"]["text"], item["choices"]["label"].index(item["answerKey"])),
    "continuation": lambda item: (item["endings"], int(item["label"])),
    "cloze": lambda item: ([item["option1"], item["option2"]], int(item["answer"]) - 1),
    "yesno": lambda item: (["no", "yes"], int(item["label"])),
}
"""File -> function that returns an item's choices and the index of the right one."""


def items(name: str) -> list[Item]:
    return [json.loads(line) for line in (MINI_FOLDER / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", FORMS)
def test_there_are_enough_items_and_no_two_are_alike(name: str) -> None:
    found = items(name)
    assert len(found) >= 64
    told = [
        json.dumps({key: value for key, value in item.items() if key not in ("id", "ind", "idx")}) for item in found
    ]
    assert len(set(told)) == len(told)
    for item in found:
        choices, gold = FORMS[name](item)
        assert 0 <= gold < len(choices)
        assert len(set(choices)) == len(choices)
        assert all(choice.strip() for choice in choices)


@pytest.mark.parametrize("name", FORMS)
def test_right_answers_are_balanced_over_positions(name: str) -> None:
    gold = Counter(FORMS[name](item)[1] for item in items(name))
    assert max(gold.values()) - min(gold.values()) <= 1


@pytest.mark.parametrize("name", ["science", "continuation", "cloze"])
@pytest.mark.parametrize("pick", [min, max])
def test_length_alone_is_no_better_than_chance(name: str, pick: Callable[..., int]) -> None:
    answered = [FORMS[name](item) for item in items(name)]
    hits = sum(pick(range(len(c)), key=lambda i, c=c: len(c[i])) == gold for c, gold in answered)
    chance = 1 / len(answered[0][0])
    slack = 2 * (chance * (1 - chance) / len(answered)) ** 0.5
    assert hits / len(answered) <= chance + slack


def test_the_length_of_a_passage_does_not_reveal_the_answer() -> None:
    found = items("yesno")
    for key in ("passage", "question"):
        mean = {gold: sum(len(i[key]) for i in found if int(i["label"]) == gold) / 42 for gold in (0, 1)}
        assert mean[0] == pytest.approx(mean[1], rel=0.05)


def test_the_calibration_text_is_not_the_evaluated_text() -> None:
    prose, calibration = ((MINI_FOLDER / f"{name}.txt").read_text().split() for name in ("prose", "calibration"))
    assert min(len(prose), len(calibration)) >= 7000
    spans = {tuple(prose[i : i + 13]) for i in range(len(prose) - 12)}
    assert not any(tuple(calibration[i : i + 13]) in spans for i in range(len(calibration) - 12))


@pytest.mark.parametrize("name", FORMS)
def test_examples_are_of_the_same_form_and_not_among_the_items(name: str) -> None:
    examples = [json.loads(line) for line in (MINI_FOLDER / f"{name}_examples.jsonl").read_text().splitlines()]
    assert len(examples) == 5
    evaluated = {tuple(FORMS[name](item)[0]) for item in items(name)} if name != "yesno" else set()
    for example in examples:
        choices, gold = FORMS[name](example)
        assert 0 <= gold < len(choices)
        assert tuple(choices) not in evaluated
        assert set(example) == set(items(name)[0])
    keys = ("question", "ctx", "sentence")
    asked = {item[key] for item in items(name) for key in keys if key in item}
    assert not asked & {example[key] for example in examples for key in keys if key in example}
