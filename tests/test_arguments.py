"""The one check of arguments, attacked with values of every kind."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from annotated_types import Interval, Lt
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fisher_unlearn.images.arguments import (
    Count,
    Number,
    Positive,
    Seed,
    Share,
    check_fields,
    check_value,
    checked,
    rule_of,
)

KINDS = [
    int,
    float,
    bool,
    str,
    Count,
    Seed,
    Positive,
    Share,
    Share | None,
    tuple[Count, ...],
    Literal["a", "b"],
    nn.Module,
    Callable[[int], int],
]
anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.lists(st.integers()),
    st.complex_numbers(),
    st.dictionaries(st.text(), st.integers()),
    st.sampled_from([object(), nn.Identity(), len, torch.ones(2), np.ones(3), math.nan, 2**70]),
)


@given(st.sampled_from(KINDS), anything)
def test_a_value_is_taken_as_it_is_or_refused_in_one_sentence(kind, value):
    try:
        found = check_value("it", value, kind)
    except (TypeError, ValueError) as error:
        text = str(error)
        assert (
            text.startswith("`it` is ")
            and text.endswith(f"it must be {rule_of(kind)}.")
            and "\n" not in text
            and len(text) < 220
        )
    else:
        assert found is value or found == value or tuple(value) == found


@pytest.mark.parametrize("scalar", [np.int64(3), np.int8(3), torch.tensor(3)])
def test_scalars_are_the_numbers_that_they_are(scalar):
    assert check_value("n", scalar, Count) == 3 and type(check_value("n", scalar, Count)) is int
    assert type(check_value("x", np.float32(0.5), Positive)) is float


@pytest.mark.parametrize(
    "kind, bad",
    [
        (float, math.inf),
        (float, math.nan),
        (float, True),
        (int, 3.0),
        (int, "3"),
        (bool, 1),
        (str, 3),
        (Seed, 2**70),
        (Seed, -1),
        (Share, 1),
    ],
)
def test_what_is_no_number_of_the_range_is_refused(kind, bad):
    with pytest.raises((TypeError, ValueError), match="^`it` is .*: it must be .*[.]$"):
        check_value("it", bad, kind)


def test_what_is_no_number_is_handed_on_untouched():
    @checked
    def identity(
        model: nn.Module,
        batches: Iterable[tuple[Tensor, Tensor]],
        call: Callable[[int], int],
        free,
        known: dict[str, int],
    ) -> Any:
        return model, batches, call, free, known

    given = nn.Identity(), DataLoader([1, 2]), int, object(), {}
    assert all(a is b for a, b in zip(identity(*given), given))
    with pytest.raises(TypeError, match="`batches` is 3: it must be an Iterable"):
        identity(nn.Identity(), 3, int, 0, {})


def test_an_unknown_name_is_refused_with_the_nearest():
    @checked
    def f(labels: str = "true") -> str:
        return labels

    with pytest.raises(TypeError, match="`f` takes no `lables`: did you mean `labels`"):
        f(lables="true")


def test_an_error_from_within_is_not_rewritten():
    @checked
    def f(n: int) -> int:
        return check_value("inner", n, str)

    with pytest.raises(TypeError, match="`inner` is 3"):
        f(3)


def test_bounds_are_said():
    assert rule_of(Annotated[float, Lt(2)]) == "a finite number below 2"
    assert rule_of(Annotated[int, Interval(gt=0, le=5)]) == "a whole number in (0, 5]"


def test_fields_are_checked_and_scalars_converted():
    @dataclass(frozen=True)
    class Settings:
        n: Count = 1
        drops: tuple[Count, ...] = ()

        def __post_init__(self):
            check_fields(self, " of the settings")

    assert Settings(np.int64(2), [1, 2]) == Settings(2, (1, 2))
    with pytest.raises(ValueError, match="`n` of the settings is 0"):
        Settings(0)


LARGE = [
    (2**70, Count),
    (-(2**70), int),
    (2**63, Seed),
    (1e300, Positive),
    (-1e300, Number),
    (10**400, float),
    (10**400, Positive),
    (10**5000, Count),
    (10**5000, float),
]


@pytest.mark.parametrize("value, kind", LARGE, ids=range(len(LARGE)))
def test_what_torch_cannot_hold_is_too_large(value, kind):
    with pytest.raises(
        ValueError, match="^`it` is .*, which is too large: it must be .*[.]$"
    ) as error:
        check_value("it", value, kind)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("bad", ["ab", b"ab", 3, None])
@pytest.mark.parametrize("kind", [Sequence[str], Iterable[str], tuple[str, ...]])
def test_text_is_no_collection(bad, kind):
    with pytest.raises(TypeError, match="^`it` is .*: it must be "):
        check_value("it", bad, kind)


@pytest.mark.parametrize(
    "given", [np.array([1, 2]), torch.tensor([1, 2]), [1, 2], (1, 2), range(1, 3)]
)
@pytest.mark.parametrize("kind", [Sequence[int], tuple[Count, ...]])
def test_arrays_and_lists_are_sequences(given, kind):
    assert check_value("it", given, kind) == (1, 2)


@pytest.mark.parametrize(
    "bad, kind, place",
    [
        ({"a": "x"}, dict[str, int], "it['a']"),
        ({1: 2}, Mapping[str, int], "a key of it"),
        ([1, "a"], list[int], "it[1]"),
        ({"a": math.inf}, dict[str, float] | None, "it['a']"),
    ],
)
def test_what_a_dictionary_or_list_holds_is_checked_with_its_place(bad, kind, place):
    with pytest.raises((TypeError, ValueError)) as error:
        check_value("it", bad, kind)
    assert str(error.value).startswith(f"`{place}` is ")


def test_names_of_a_constructor_and_starred_arguments_are_checked():
    @checked
    @dataclass(frozen=True)
    class Rate:
        start: Positive = 0.1

        def __post_init__(self):
            check_fields(self, " of the rate")

    @checked
    def join(*parts: str, **more: Count) -> Any:
        return parts, more

    assert Rate(1).start == 1.0 and join("a", "b", n=np.int8(2)) == (("a", "b"), {"n": 2})
    with pytest.raises(TypeError, match="`Rate` takes no `stat`: did you mean `start`"):
        Rate(stat=1)
    with pytest.raises(TypeError, match=r"`parts\[1\]` is 3"):
        join("a", 3)
    with pytest.raises(ValueError, match="`n` is 0"):
        join(n=0)


def test_a_model_of_pydantic_takes_the_same_numbers():
    class Model(BaseModel):
        rate: Positive | None = None
        n: Count = 1
        seed: Seed = 0

    assert Model(rate="1e-5", n="3", seed=np.int64(4)).model_dump() == {
        "rate": 1e-5,
        "n": 3,
        "seed": 4,
    }
    for bad in (
        {"rate": True},
        {"n": True},
        {"seed": False},
        {"rate": math.nan},
        {"rate": "inf"},
        {"rate": 1e300},
        {"n": 2**70},
        {"n": "9" * 30},
        {"seed": 2**63},
    ):
        with pytest.raises(ValidationError):
            Model(**bad)


def test_a_misspelt_choice_is_refused_with_the_nearest():
    for kind in (Literal["classifier", "all"], Literal["classifier", "all"] | None):
        with pytest.raises(
            ValueError,
            match=r"^`it` is 'clasifier' \(did you mean 'classifier'\?\): it must be "
            r"'classifier' or 'all'",
        ):
            check_value("it", "clasifier", kind)
    with pytest.raises(ValueError, match="^`it` is 'x': it must be"):
        check_value("it", "x", Literal["classifier", "all"])
