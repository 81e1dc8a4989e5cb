"""What counts as a difference, and when it holds."""

from __future__ import annotations

import math

import torch

from refine_mcore.evaluation.differences import Difference, broken, largest, relative, unequal


def test_relative_to_the_norm_of_what_is_expected() -> None:
    expected = torch.tensor([3.0, 4.0])
    found = relative("x", expected + torch.tensor([0.0, 0.5]), expected, 0.2)
    assert found.error == 0.1 and found.holds and found.used == 0.5
    assert not relative("x", expected * 2, expected, 0.2).holds
    assert relative("x", expected + 1.0, expected, 0.2, floor=100.0).holds


def test_zeros_are_met_by_zeros_alone() -> None:
    zeros = torch.zeros(2)
    assert relative("x", zeros, zeros, 0.0).holds
    assert not relative("x", zeros + 1e-30, zeros, 1e6).holds
    assert relative("x", zeros + 1e-30, zeros, 1e-6, floor=1e-4).holds


def test_not_a_number_never_holds() -> None:
    x = torch.ones(2)
    found = relative("x", x * math.nan, x, math.inf)
    assert not found.holds and found.used == math.inf
    assert not largest("x", x * math.nan, x, math.inf).holds


def test_other_shapes_and_dtypes_never_hold() -> None:
    x = torch.ones(2)
    assert not relative("x", x[:1], x, 1.0).holds
    assert not largest("x", x[:1], x, 1.0).holds
    assert not largest("x", x.double(), x, 1.0).holds
    assert not unequal("x", torch.ones(1).int(), torch.ones(2).int()).holds


def test_integers_are_counted() -> None:
    found = unequal("x", torch.tensor([1, 2, 3]), torch.tensor([1, 0, 0]))
    assert found.error == 2 and not found.holds
    assert unequal("x", torch.tensor([1]), torch.tensor([1])).holds


def test_the_worst_comes_first() -> None:
    differences = [Difference("a", 2, 1), Difference("b", 1, 1), Difference("c", 5, 1)]
    assert [d.what for d in broken(differences)] == ["c", "a"]
