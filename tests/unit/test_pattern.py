import pytest

from nmsweep.config.pattern import Pattern, parse_pattern
from nmsweep.errors import InputError


@pytest.mark.parametrize("text", ["dense", "2:4", "8:16", "16:32", "1:1", "3:4", "50%", "12.5%", "threshold:50%"])
def test_a_pattern_survives_writing_and_reading(text: str) -> None:
    assert str(parse_pattern(text)) == text
    assert parse_pattern(str(parse_pattern(text))) == parse_pattern(text)


@pytest.mark.parametrize(
    "text",
    ["0:4", "5:4", "8-16", "150%", "0%", "100%", "-1:4", "2:4:8", "", "none", "dense ly", "4", "60", None, True, 2.5],
)
def test_an_invalid_pattern_is_refused_with_the_allowed_forms(text: object) -> None:
    with pytest.raises(InputError, match="N kept of M"):
        parse_pattern(text)


def test_every_unquoted_pattern_is_recovered_from_its_base_60_integer() -> None:
    for m in range(1, 60):
        for n in range(1, m + 1):
            with pytest.warns(UserWarning, match="quote it"):
                assert parse_pattern(60 * n + m) == Pattern("n:m", n, m)


def test_budget_of_a_token_follows_the_definition() -> None:
    assert parse_pattern("2:8").kept(64) == 16
    assert parse_pattern("50%").kept(7) == max(1, round(3.5))
    assert parse_pattern("99.9%").kept(10) == 1
    assert parse_pattern("3:4").sparsity == 0.25


@pytest.mark.parametrize(
    ("text", "bits"), [("2:4", 0.75), ("4:8", 0.875), ("8:16", 0.875), ("16:32", 0.9375), ("4:4", 0.0)]
)
def test_metadata_bits_are_those_of_the_binomial(text: str, bits: float) -> None:
    assert parse_pattern(text).metadata_bits == bits


def test_unstructured_patterns_have_no_metadata_bits() -> None:
    assert parse_pattern("50%").metadata_bits is None
