import pytest
import torch

from fastvlp.model.keep import keep_text

SEED = torch.arange(4000) * 7919 + 1


def kept(length: int, L: int, keep: int, policy, seed=SEED, **more) -> torch.Tensor:
    """Which positions each row keeps: bool [B L]."""
    index = keep_text(seed, torch.full_like(seed, length), L, keep, policy, **more)
    assert index.shape == (len(seed), min(keep, L)) and (index[:, 1:] > index[:, :-1]).all()
    return torch.zeros(len(seed), L, dtype=torch.bool).scatter(1, index, True)


def close(share: torch.Tensor, expected: float) -> bool:
    return bool((share - expected).abs().max() < 0.04)


def test_random_keeps_padding_as_readily_as_words():
    share = kept(10, 32, 16, "random").float().mean(0)
    pooled = torch.zeros(32, dtype=torch.bool).index_fill(0, torch.tensor([0, 9]), True)
    assert (share[pooled] == 1).all() and close(share[~pooled], 14 / 30)


def test_prioritised_drops_padding_first():
    mask = kept(20, 32, 16, "prioritised")
    assert not mask[:, 20:].any()
    share = mask.float().mean(0)
    assert (share[[0, 19]] == 1).all() and close(share[1:19], 14 / 18)
    mask = kept(10, 32, 16, "prioritised")
    assert mask[:, :10].all() and close(mask[:, 10:].float().mean(0), 6 / 22)


def test_draws_of_two_positions_are_independent():
    mask = kept(32, 32, 16, "random")[:, 1:31].float()
    r = torch.corrcoef(mask.T)
    # Fourteen of thirty without replacement: each pair at -1/29.
    assert (r[~torch.eye(30, dtype=torch.bool)] + 1 / 29).abs().max() < 0.07


def test_positions_can_be_made_to_stay():
    always = torch.zeros(len(SEED), 32, dtype=torch.bool)
    always[:, 5] = always[:, 30] = True
    share = kept(10, 32, 16, "prioritised", always_BL=always).float().mean(0)
    assert (share[[5, 30]] == 1).all() and (share[:10] == 1).all() and close(share[10:30], 5 / 20)
    share = kept(10, 32, 16, "random", always_BL=always & False).float().mean(0)
    assert close(share, 0.5)


def test_a_row_depends_on_its_seed_and_length_alone():
    length = torch.arange(4000) % 30 + 2
    for policy in ("random", "prioritised"):
        whole = keep_text(SEED, length, 32, 16, policy)
        assert torch.equal(keep_text(SEED[7:9], length[7:9], 32, 16, policy), whole[7:9])
        assert len(whole[length == 31].unique(dim=0)) > 100


def test_prioritised_keeps_the_same_words_however_long_the_padding():
    length = torch.arange(4000) % 20 + 2
    words = [keep_text(SEED, length, L, 8, "prioritised") for L in (21, 32)]
    same = [index.masked_fill(index >= length[:, None], -1) for index in words]
    assert torch.equal(*same)


@pytest.mark.parametrize("policy", ["random", "prioritised"])
def test_short_texts_are_encoded_whole(policy):
    assert kept(5, 12, 16, policy).all()


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="keep 0"):
        keep_text(SEED, SEED, 8, 0, "random")
    with pytest.raises(ValueError, match="policy 'some'"):
        keep_text(SEED, SEED, 8, 4, "some")  # type: ignore[arg-type]
