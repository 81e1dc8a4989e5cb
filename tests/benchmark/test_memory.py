"""What a layer keeps for its backward, at the published sizes in bfloat16."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from refine_mcore.benchmark.memory import (
    count_saved_bytes,
    describe,
    estimate_memory,
    saved_tensors,
)
from refine_mcore.errors import UserError
from refine_mcore.models.architecture import AttentionOptions
from refine_mcore.models.presets import preset
from tools.estimate_memory import main

# Most bytes per token and layer.
LIMITS = {"deltanet-1.3b": 90e3, "lact-760m": 130e3, "gated-deltanet-1.3b": 110e3}
# More than a chunk of LaCT: an update is made and read.
TOKENS = {"lact-760m": 2560}


@pytest.mark.parametrize("name", LIMITS)
def test_a_layer_keeps_little(name: str, single_rank: Any) -> None:
    architecture = preset(name).with_overrides({"vocab_size": 64})
    tokens = TOKENS.get(name, 256)
    counted, selective = (
        count_saved_bytes(architecture, single_rank, tokens=tokens, selective_recompute=setting)
        for setting in (False, True)
    )
    largest = describe(counted.largest[:12])
    assert counted.layer <= LIMITS[name], (
        f"{counted.layer:,.0f} bytes a token and layer, the most of one layer and the head:\n"
        f"{largest}"
    )
    # as much as its inputs at least: the projections' [tokens, D], the MLP's [tokens, 3 m]
    least = 2 * (6 * architecture.hidden_size + 3 * architecture.intermediate_size)
    assert counted.layer > least
    assert selective.layer <= 0.7 * counted.layer, describe(selective.largest[:12])
    # without the norms' outputs and the MLP's activation
    assert selective.layer > least - 2 * (
        2 * architecture.hidden_size + architecture.intermediate_size
    )


def test_storages_count_once_and_parameters_not_at_all() -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    found = saved_tensors(lambda: (x[:2].exp().exp() * weight, x[1:].square()), [weight])
    # exp keeps its result, the product its left factor (the same), the square all of x
    assert [(saved.bytes, saved.shape) for saved in found] == [
        (48, (2, 4)),
        (32, (2, 4)),
        (32, (2, 4)),
    ]


def test_the_estimate_adds_up(single_rank: Any) -> None:
    """Of 4 + 12 bytes a parameter beside the bfloat16 weights, and the optimizer's are shared."""
    architecture = preset("tiny-deltanet")
    counted = count_saved_bytes(architecture, single_rank, tokens=64)
    one, four = (
        estimate_memory(architecture, counted, tokens=64, data_parallel=size) for size in (1, 4)
    )
    assert one.optimizer == 2 * one.weights_and_gradients == 4 * four.optimizer
    assert one.activations == 64 * (2 * counted.layer + counted.rest) == four.activations
    assert one.total == sum(one)


@pytest.mark.parametrize("name", ["tiny-lact", "tiny-gated-deltanet", "tiny-olmo-hybrid"])
def test_the_count_does_not_depend_on_products(
    name: str, single_rank: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = count_saved_bytes(preset(name), single_rank, tokens=96)
    monkeypatch.setattr("refine_mcore.benchmark.memory._WithoutProducts", nullcontext)
    computed = count_saved_bytes(preset(name), single_rank, tokens=96)
    assert [(x.bytes, x.dtype, x.shape) for x in without.largest] == [
        (x.bytes, x.dtype, x.shape) for x in computed.largest
    ]
    assert without.layer == computed.layer


def test_layers_of_a_hybrid_count_as_what_they_are(single_rank: Any) -> None:
    """The mean of its kinds of layers, each as in a model of that kind alone."""
    base = preset("tiny-gated-deltanet").with_overrides({"num_layers": 4})
    attention = AttentionOptions((), 2, kv_channels=64, attention_output_gate=True)

    def layer(attended: tuple[int, ...], post_norm: tuple[int, ...]) -> float:
        hybrid = replace(
            base,
            attention=replace(attention, layers=attended),
            post_norm_layers=post_norm,
        )
        return count_saved_bytes(hybrid, single_rank, tokens=64).layer

    mixers, attentions, last_ones = layer((), ()), layer((0, 1, 2, 3), ()), (2, 3)
    assert attentions > 1.2 * mixers
    assert layer((3,), ()) == pytest.approx((3 * mixers + attentions) / 4)
    post_norms = layer((), (0, 1, 2, 3))
    assert layer((3,), last_ones) == pytest.approx(
        (2 * mixers + post_norms + layer((0, 1, 2, 3), (0, 1, 2, 3))) / 4
    )


def test_the_command(capsys: Any) -> None:
    arguments = ["--preset", "tiny-lact", "--sequence-length", "64", "--gpus", "1,8"]
    main(arguments)
    first, *_, one, eight = capsys.readouterr().out.splitlines()
    assert one.startswith("| 1 | 0.0 GiB |") and eight.startswith("| 8 |")
    with pytest.raises(UserError, match="--gpus must be whole numbers above 0, as 1,8,64, not '0'"):
        main([*arguments, "--gpus", "8,0"])
    main([*arguments, "--recompute", "selective"])
    assert first != capsys.readouterr().out.splitlines()[0]
