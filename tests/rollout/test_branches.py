"""Where rollouts leave their texts, and draws that know nothing of the layout."""

import torch

from refine_mcore.rollout.branches import Branches, Randomness


def test_branches_are_sequence_major() -> None:
    branches = Branches.at([[3, 9], [4, 6]])
    assert branches == Branches((0, 0, 1, 1), (3, 9, 4, 6))
    assert len(branches) == 4
    assert branches.fork(2) == Branches((0, 0, 0, 0, 1, 1, 1, 1), (3, 3, 9, 9, 4, 4, 6, 6))


def test_rows_before_and_after_a_position() -> None:
    """Position counts consumed tokens: the token before p is p - 1, the k after it start at p."""
    per_token = torch.arange(20).reshape(2, 10, 1)  # [B, S, 1]: token t of text b is 10 b + t
    branches = Branches((0, 1), (3, 6))
    assert branches.rows_before(per_token)[:, 0].tolist() == [2, 15]
    assert branches.rows_after(per_token, 3)[..., 0].tolist() == [[3, 4, 5], [16, 17, 18]]
    assert branches.rows_after(per_token, 2, skip=1)[..., 0].tolist() == [[4, 5], [17, 18]]


def test_position_uniforms_depend_on_sample_chunk_seed_and_step() -> None:
    samples = torch.arange(50)
    uniforms = Randomness(1, 2).position_uniforms(samples, 8)
    assert uniforms.shape == (50, 8) and uniforms.unique().numel() == 400
    assert uniforms.min() > 0 and uniforms.max() < 1 and abs(uniforms.mean() - 0.5) < 0.05
    assert torch.equal(Randomness(1, 2).position_uniforms(samples[7:9], 8), uniforms[7:9])
    assert torch.equal(Randomness(1, 2).position_uniforms(samples, 3), uniforms[:, :3])
    for other in (Randomness(2, 2), Randomness(1, 3)):
        assert not torch.isin(other.position_uniforms(samples, 8), uniforms).any()


def test_token_keys_are_one_per_sample_position_rollout_and_token() -> None:
    samples, branches = torch.tensor([40, 41]), Branches.at([[3, 9], [4, 6]])
    keys = Randomness(1, 2).token_keys(samples, branches, 3, 5)
    assert keys.shape == (5, 12) and keys.unique().numel() == 5 * 12
    assert torch.equal(Randomness(1, 2).token_keys(samples, branches, 3, 2), keys[:2])
    # alone, with fewer rollouts, in another batch: the same keys
    alone = Randomness(1, 2).token_keys(torch.tensor([0, 0, 41]), Branches((2,), (6,)), 2, 5)
    assert torch.equal(alone, keys[:, 9:11])
    for other in (Randomness(2, 2), Randomness(1, 3)):
        assert not torch.isin(other.token_keys(samples, branches, 3, 5), keys).any()
