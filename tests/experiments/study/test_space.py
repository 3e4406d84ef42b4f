"""Claims about what a search is over, and what is no such thing."""

import itertools

import pytest

from experiments.study.space import Choice, Range, lines_of, read_space, unseen, with_values
from moe.errors import BadInput


def test_every_form_is_read_by_the_type_of_its_setting():
    lines = {
        "optim.lr": "log 1e-3 3e-2",
        "optim.weight_decay": "float 0 0.2",
        "model.n_layers": "int 1 8",
        "model.d_ff": "log 32 512",
        "model.moe.n_experts": "choice 4,8, 16",
        "router.name": "choice softmax sigmoid",
        "router.renormalize": "choice true,false",
        "router.options.depth": "choice 2,0.5,deep",
    }
    assert read_space(lines) == {
        "optim.lr": Range(1e-3, 3e-2, True),
        "optim.weight_decay": Range(0.0, 0.2),
        "model.n_layers": Range(1, 8),
        "model.d_ff": Range(32, 512, True),
        "model.moe.n_experts": Choice([4, 8, 16]),
        "router.name": Choice(["softmax", "sigmoid"]),
        "router.renormalize": Choice([True, False]),
        "router.options.depth": Choice([2, 0.5, "deep"]),
    }
    assert [type(each) for each in (read_space(lines)["model.n_layers"].low, read_space(lines)["optim.lr"].low)] == [
        int,
        float,
    ]


def test_a_search_may_be_nested_or_dotted():
    nested = {"optim": {"lr": "log 1e-3 3e-2"}, "model.moe.k": "choice 1,2"}
    assert lines_of(nested) == {"optim.lr": "log 1e-3 3e-2", "model.moe.k": "choice 1,2"}


@pytest.mark.parametrize(
    ("key", "line", "sentence"),
    [
        ("optim.rl", "log 1 2", "study.search: optim.rl is not a setting; did you mean optim.lr."),
        ("optim.lr.x", "log 1 2", "study.search: optim.lr.x is not a setting; did you mean optim.lr."),
        ("optim", "log 1 2", "study.search: optim is a group of settings, and a search is over single values."),
        ("optim.betas", "choice 1,2", "study.search: optim.betas is a list of numbers, like [0.1,0.2], and a search"),
        ("optim.lr", "log 3e-2 1e-3", "study.search.optim.lr=log 3e-2 1e-3 is an empty range: the first number must"),
        ("optim.lr", "float 0.1 0.1", "study.search.optim.lr=float 0.1 0.1 is an empty range"),
        ("optim.lr", "log 0 1", "study.search.optim.lr=log 0 1 has no logarithm: both numbers must be above 0."),
        ("optim.lr", "log 1e-3", "study.search.optim.lr=log 1e-3 must have two numbers, like log 0.1 0.5."),
        ("optim.lr", "log a b", "study.search.optim.lr=log a b: a must be a number."),
        ("optim.lr", "float 0 inf", "study.search.optim.lr=float 0 inf: inf must be finite."),
        ("optim.lr", "int 1 2", "study.search.optim.lr=int 1 2 does not fit: optim.lr takes numbers: float or log."),
        ("model.n_layers", "float 1 2", "study.search.model.n_layers=float 1 2 does not fit: model.n_layers takes"),
        ("model.n_layers", "int 1.5 2", "study.search.model.n_layers=int 1.5 2: 1.5 must be a whole number."),
        ("router.name", "int 1 2", "study.search.router.name=int 1 2 does not fit: router.name takes no"),
        ("model.moe.k", "choice 2", "study.search.model.moe.k=choice 2 must name two values or more, each once."),
        ("model.moe.k", "choice 2,2", "study.search.model.moe.k=choice 2,2 must name two values or more"),
        ("model.moe.k", "choice 0,1", "study.search.model.moe.k=choice 0,1: model.moe.k=0 is out of range"),
        ("dispatch", "choice a,b", "study.search.dispatch=choice a,b is over what every trial has in common"),
        ("seed", "int 0 9", "study.search.seed=int 0 9 is over what every trial has in common: leave seed out"),
        ("data.path", "choice a,b", "study.search.data.path=choice a,b is over what every trial has in common"),
        ("router.renormalize", "choice yes,no", "study.search.router.renormalize=choice yes,no: yes must be"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_over_is_one_sentence(key, line, sentence):
    with pytest.raises(BadInput) as refused:
        read_space(lines_of({key: line}))
    assert str(refused.value).startswith(sentence), refused.value
    assert str(refused.value).endswith(".")


@pytest.mark.parametrize("line", ["", "gauss 0 1", 3, None, [1, 2]])
def test_a_line_of_no_known_form_is_refused_with_all_of_them(line):
    with pytest.raises(
        BadInput, match=r"^study\.search\.optim\.lr=.* must be words like 'log 1e-3 3e-2', 'float 0 0\.2'"
    ):
        lines_of({"optim.lr": line})


def test_values_are_laid_over_the_settings_and_leave_them_as_they_were():
    tree = {"optim": {"lr": 1.0}, "model": {"moe": None}, "router": {"options": {}}}
    laid = with_values(tree, {"optim.lr": 0.5, "router.options.a": 1})
    assert laid == {"optim": {"lr": 0.5}, "model": {"moe": None}, "router": {"options": {"a": 1}}}
    assert tree["optim"]["lr"] == 1.0
    with pytest.raises(BadInput, match=r"^study\.search\.model\.moe\.k means nothing here: moe is null in these"):
        with_values(tree, {"model.moe.k": 1})


def test_the_points_not_seen_are_found_one_after_another_wherever_the_search_begins():
    space = {"a": Choice(["x", "y"]), "b": Range(3, 5)}
    every = [{"a": a, "b": b} for a, b in itertools.product(["x", "y"], [3, 4, 5])]
    for start in (0, 4, 2**32 - 1):
        seen = []
        for _ in every:
            seen.append(unseen(space, seen, start))
        assert sorted(seen, key=str) == sorted(every, key=str)
        with pytest.raises(BadInput, match="no point left of the 6"):
            unseen(space, seen, start)
