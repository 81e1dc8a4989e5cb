"""Log-probabilities, entropy, keyed noise and sampling, whole and sharded over two ranks."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from refine_kernels.dispatch import (
    combine_keys,
    counter_uniform,
    linear_log_probs_and_entropy,
    log_probs_and_entropy,
    sample_tokens,
)
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def reference(golden):
    return load_file(golden / "objective.safetensors")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "name,dtype,tolerance", [("f64", torch.float64, 1e-9), ("f32", None, 1e-5)]
)
def test_golden_values(reference, temperature, name, dtype, tolerance):
    logits = reference["ent.logits.f32"].to(dtype or torch.float32)
    log_probs, entropy = log_probs_and_entropy(
        logits, reference["ent.labels"], with_entropy=True, temperature=temperature
    )
    for ours, key in ((log_probs, "logprob"), (entropy, "entropy")):
        theirs = reference[f"ent.{key}.t{temperature}.{name}"]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def test_golden_gradient(reference):
    logits = reference["ent.logits.f32"].requires_grad_()
    log_probs, _ = log_probs_and_entropy(
        logits, reference["ent.labels"], with_entropy=False, temperature=0.7
    )
    log_probs.sum().backward()
    theirs = reference["ent.dlogprob_sum_dlogits.t0.7.f32"]
    torch.testing.assert_close(logits.grad, theirs, rtol=0, atol=1e-5)


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    vocab=st.integers(1, 12),
    padding=st.integers(0, 3),
    rows_per_slice=st.integers(1, 10),
    temperature=st.floats(0.2, 3.0),
)
def test_equals_log_softmax(seed, rows, vocab, padding, rows_per_slice, temperature):
    gen = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(rows, vocab + padding, dtype=torch.float64, generator=gen)
    logits.requires_grad_()
    targets = torch.randint(vocab, (rows,), generator=gen)
    upstream = torch.randn(rows, dtype=torch.float64, generator=gen)
    log_probs, entropy = log_probs_and_entropy(
        logits,
        targets,
        with_entropy=True,
        temperature=temperature,
        vocab_size=vocab,
        rows_per_slice=rows_per_slice,
    )
    log_softmax = (logits[:, :vocab] / temperature).log_softmax(-1)
    expected = log_softmax.gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(log_probs, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        entropy, -(log_softmax.exp() * log_softmax).sum(-1), rtol=1e-10, atol=1e-10
    )
    assert entropy is not None and not entropy.requires_grad
    (ours,) = torch.autograd.grad(log_probs, logits, upstream)
    (theirs,) = torch.autograd.grad(expected, logits, upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_low_precision_logits_and_ignored_targets():
    logits = torch.randn(2, 3, 7).bfloat16().requires_grad_()
    targets = torch.tensor([[0, -100, 6], [1, 2, 3]])
    log_probs, entropy = log_probs_and_entropy(logits, targets, with_entropy=True)
    assert entropy is not None
    assert log_probs.dtype == torch.float32 and log_probs.shape == entropy.shape == (2, 3)
    assert log_probs.isfinite().all()
    (log_probs * (targets >= 0)).sum().backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16
    assert not logits.grad[0, 1].any()


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    vocab=st.integers(1, 12),
    padding=st.integers(0, 3),
    tile_entries=st.integers(1, 130),  # of at most 135 logits: tiles, and all of them kept
    temperature=st.floats(0.2, 3.0),
    with_entropy=st.booleans(),
)
def test_linear_form_equals_the_softmax_of_the_product(
    seed, rows, vocab, padding, tile_entries, temperature, with_entropy
):
    gen = torch.Generator().manual_seed(seed)
    hidden, weight = (
        torch.randn(size, 4, dtype=torch.float64, generator=gen).requires_grad_()
        for size in (rows, vocab + padding)
    )
    targets = torch.randint(vocab, (rows,), generator=gen)
    targets[0] = -100  # ignored: read as logit 0
    upstream = torch.randn(rows, dtype=torch.float64, generator=gen)
    log_probs, entropy = linear_log_probs_and_entropy(
        hidden,
        weight,
        targets,
        with_entropy=with_entropy,
        temperature=temperature,
        vocab_size=vocab,
        tile_entries=tile_entries,
    )
    scaled = (hidden @ weight.t())[:, :vocab] / temperature
    picked = scaled.gather(1, targets.clamp(min=0)[:, None])[:, 0] * (targets >= 0)
    expected = picked - scaled.logsumexp(-1)
    torch.testing.assert_close(log_probs, expected, rtol=1e-10, atol=1e-10)
    assert (entropy is not None) == with_entropy
    if entropy is not None:
        log_softmax = scaled.log_softmax(-1)
        of_all = -(log_softmax.exp() * log_softmax).sum(-1)
        torch.testing.assert_close(entropy, of_all, rtol=1e-10, atol=1e-10)
        assert not entropy.requires_grad
    found = torch.autograd.grad(log_probs, (hidden, weight), upstream, retain_graph=True)
    again = torch.autograd.grad(log_probs, (hidden, weight), upstream)
    wanted = torch.autograd.grad(expected, (hidden, weight), upstream)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert all(map(torch.equal, found, again))


@pytest.mark.parametrize("tile_entries", [7, 1000])
def test_linear_form_passes_gradcheck(tile_entries):
    hidden, weight = (torch.randn(n, 5, dtype=torch.float64).requires_grad_() for n in (6, 11))
    targets = torch.tensor([[0, 9, 3], [4, 4, -1]])

    def log_probs(hidden, weight):
        return linear_log_probs_and_entropy(
            hidden.view(2, 3, 5),
            weight,
            targets,
            with_entropy=False,
            temperature=0.7,
            vocab_size=10,
            tile_entries=tile_entries,
        )[0]

    assert torch.autograd.gradcheck(log_probs, (hidden, weight))
    weight.requires_grad_(False)  # a frozen vocabulary
    assert torch.autograd.gradcheck(log_probs, (hidden, weight))


@pytest.mark.parametrize("tile_entries", [7, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_linear_form_adds_the_gradient_of_its_weight(dtype, tile_entries):
    """To sums of its dtype or wider ones; autograd is handed the weight itself, with no memory."""
    gen = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(n, 5, dtype=torch.float64, generator=gen).to(dtype).requires_grad_()
        for n in (6, 11)
    )
    targets, upstream = torch.tensor([0, 9, 3, 4, 4, -1]), torch.rand(6, generator=gen)

    def gradients(sums: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        log_probs, _ = linear_log_probs_and_entropy(
            hidden,
            weight,
            targets,
            with_entropy=False,
            tile_entries=tile_entries,
            weight_sums=sums,
        )
        return torch.autograd.grad(log_probs, (hidden, weight), upstream.to(log_probs.dtype))

    before = torch.randn(11, 5, generator=gen).to(torch.promote_types(dtype, torch.float32))
    sums = before.clone()
    of_hidden, of_weight = gradients(None)
    found, handed = gradients(sums)
    assert torch.equal(found, of_hidden)
    torch.testing.assert_close(sums, before + of_weight, rtol=1e-6, atol=1e-6)
    assert handed.data_ptr() == weight.data_ptr()


def test_linear_form_rounds_a_gradient_as_one_product_does():
    """Many tiles in bfloat16, against float64: no error that grows with their number."""
    gen = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(96, 32, generator=gen), torch.randn(1024, 32, generator=gen) / 4
    targets, upstream = torch.randint(1024, (96,), generator=gen), torch.rand(96, generator=gen)
    gradients = {}
    for dtype, tile_entries in ((torch.float64, 2**20), (torch.bfloat16, 2**20), (None, 96 * 8)):
        h, w = (x.bfloat16().to(dtype or torch.bfloat16).requires_grad_() for x in (hidden, weight))
        log_probs, _ = linear_log_probs_and_entropy(
            h, w, targets, with_entropy=False, tile_entries=tile_entries
        )
        gradients[dtype] = torch.autograd.grad(log_probs, (h, w), upstream.to(log_probs.dtype))
    for index in (0, 1):
        exact = gradients[torch.float64][index]
        one, tiles = (
            (gradients[dtype][index].double() - exact).norm() / exact.norm()
            for dtype in (torch.bfloat16, None)
        )
        assert one < 6e-3 and tiles < 1.2 * one


def kolmogorov_smirnov(u: torch.Tensor) -> float:
    """Largest gap between the empirical and the uniform distribution, times sqrt(n)."""
    u = u.flatten().sort().values
    grid = torch.arange(1, len(u) + 1, dtype=u.dtype) / len(u)
    return ((grid - u).abs().max() * len(u) ** 0.5).item()


def test_noise_is_uniform_along_and_across_keys():
    keys = combine_keys(1234, torch.arange(300))
    u = counter_uniform(keys, torch.arange(500))
    assert u.dtype == torch.float64 and u.min() > 0 and u.max() < 1
    # 1.63 is the 1 % point of the Kolmogorov distribution; plain keys must do as well as mixed
    for sample in (u, u[0], u[:, 0], counter_uniform(torch.arange(300), torch.arange(500))):
        assert kolmogorov_smirnov(sample) < 1.63


def test_neighbouring_keys_and_counters_are_independent():
    for keys in (torch.arange(400), combine_keys(7, torch.arange(400))):
        u = counter_uniform(keys, torch.arange(400)) - 0.5
        for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u[1:, :-1], u[:-1, 1:])):
            correlation = 12 * (a * b).mean() * a.numel() ** 0.5
            assert correlation.abs() < 4
    assert counter_uniform(torch.arange(400), torch.arange(400)).unique().numel() == 400 * 400


def test_noise_of_a_shard_is_a_slice_of_the_whole():
    keys = combine_keys(torch.arange(5), 9)
    whole = counter_uniform(keys, torch.arange(40))
    assert torch.equal(counter_uniform(keys, torch.arange(17, 33)), whole[:, 17:33])
    assert torch.equal(counter_uniform(keys[2:3], torch.arange(40)), whole[2:3])


def test_float32_noise_stays_inside_the_open_interval():
    u = counter_uniform(torch.arange(1000), torch.arange(1000), torch.float32)
    assert u.dtype == torch.float32 and u.min() > 0 and u.max() < 1


def test_keys_depend_on_every_part_and_its_place():
    parts = torch.arange(4)
    keys = combine_keys(
        5, parts[:, None, None], parts[None, :, None], parts[None, None, :]
    ).flatten()
    assert keys.unique().numel() == 64
    assert combine_keys(5, 1, 2, 3) == keys[1 * 16 + 2 * 4 + 3]
    assert combine_keys(1, 2) != combine_keys(2, 1)


def test_key_of_known_integers_never_changes():
    """Runs resume and results are compared across versions: the stream is part of the format."""
    assert combine_keys(1, 2, 3).item() == -1532074704679183783


def test_samples_follow_the_softmax():
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 9.0]).expand(40_000, 5)
    keys = combine_keys(3, torch.arange(40_000))
    tokens = sample_tokens(logits, keys, temperature=1.5, vocab_size=4)
    expected = (logits[0, :4] / 1.5).softmax(-1)
    frequency = torch.bincount(tokens, minlength=4) / len(tokens)
    assert ((frequency - expected).abs() < 4 * (expected * (1 - expected) / 40_000).sqrt()).all()


def test_rows_are_drawn_by_their_own_keys():
    logits = torch.randn(6, 50)
    keys = combine_keys(1, torch.arange(6))
    tokens = sample_tokens(logits, keys)
    order = torch.tensor([4, 0, 5])
    assert torch.equal(sample_tokens(logits[order], keys[order]), tokens[order])


def test_greedy_takes_the_lowest_of_equals_and_no_padding():
    logits = torch.tensor([[1.0, 3.0, 3.0, 9.0], [0.0, 0.0, 0.0, 9.0]])
    assert sample_tokens(logits, None, vocab_size=3).tolist() == [1, 0]


def _sharded_rank(rank: int, store: str, vocab_size: int, local: int) -> None:
    """Both ranks compare their shard with the whole; a rank may hold nothing but padding."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    gen = torch.Generator().manual_seed(0)
    whole = torch.randn(9, 2 * local, dtype=torch.float64, generator=gen).requires_grad_()
    targets = torch.randint(vocab_size, (9,), generator=gen)
    upstream = torch.randn(9, dtype=torch.float64, generator=gen)
    columns = slice(rank * local, (rank + 1) * local)
    shard = whole.detach()[:, columns].clone().requires_grad_()
    options: dict[str, Any] = {"with_entropy": True, "temperature": 0.8, "vocab_size": vocab_size}
    expected = log_probs_and_entropy(whole, targets, **options)
    actual = log_probs_and_entropy(
        shard, targets, **options, group=dist.group.WORLD, rows_per_slice=4
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    expected[0].backward(upstream)
    actual[0].backward(upstream)
    assert whole.grad is not None
    torch.testing.assert_close(shard.grad, whole.grad[:, columns], rtol=1e-12, atol=1e-12)
    hidden = torch.randn(9, 3, dtype=torch.float64, generator=gen).requires_grad_()
    weight = torch.randn(2 * local, 3, dtype=torch.float64, generator=gen).requires_grad_()
    rows = weight.detach()[columns].clone().requires_grad_()
    for tile_entries in (10, 1000):
        hidden.grad = weight.grad = rows.grad = None
        expected = linear_log_probs_and_entropy(hidden, weight, targets, **options)
        expected[0].backward(upstream)
        of_hidden, hidden.grad = hidden.grad, None
        actual = linear_log_probs_and_entropy(
            hidden, rows, targets, **options, group=dist.group.WORLD, tile_entries=tile_entries
        )
        actual[0].backward(upstream)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(hidden.grad, of_hidden, rtol=1e-12, atol=1e-12)
        assert weight.grad is not None
        torch.testing.assert_close(rows.grad, weight.grad[columns], rtol=1e-12, atol=1e-12)
    keys = combine_keys(11, torch.arange(9))
    tied = (whole.detach() * 0).index_fill_(1, torch.tensor([1, local]), 1.0)
    for logits, row_keys in ((whole, keys), (whole, None), (tied, None)):
        sharded = sample_tokens(
            logits[:, columns], row_keys, vocab_size=vocab_size, group=dist.group.WORLD
        )
        assert torch.equal(sharded, sample_tokens(logits, row_keys, vocab_size=vocab_size))
    dist.destroy_process_group()


@pytest.mark.parametrize("vocab_size,local", [(11, 6), (5, 8)], ids=["padded", "empty_shard"])
def test_two_ranks_equal_one(tmp_path: Path, vocab_size: int, local: int):
    mp.spawn(_sharded_rank, (str(tmp_path / "store"), vocab_size, local), nprocs=2)
