import torch

from fastvlp.random import _mix, _signed, bits, hash64, hash64_rows, mix64, uniform

GOLDEN = 0x9E3779B97F4A7C15


def test_mixer_gives_the_published_splitmix64_sequence():
    # The first outputs of splitmix64.c (Vigna) from state 1234567.
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    states = [_signed(1234567 + GOLDEN * (i + 1)) for i in range(5)]
    assert [_mix(s % 2**64) for s in states] == known
    assert [x % 2**64 for x in mix64(torch.tensor(states)).tolist()] == known


def test_hash64_depends_on_order_and_fits_int64():
    values = {hash64(*parts) for parts in [(), (0,), (0, 0), (1, 2), (2, 1), (1, 2, 0), (-1,), (2**63,)]}
    assert len(values) == 8
    assert all(0 <= v < 2**63 for v in values)
    assert hash64(1, 2, 3) == hash64(1, 2, 3)


def test_rows_hash_as_one_integer_does():
    index = [0, 1, 7, 2**62, -3]
    for parts in [(), (0,), (2**63, -1), (5, 2**64 - 1)]:
        assert hash64_rows(*parts, torch.tensor(index)).tolist() == [hash64(*parts, i) for i in index]
    both = hash64_rows(torch.tensor(index), 3, torch.tensor(index))
    assert both.tolist() == [hash64(i, 3, i) for i in index]


def test_values_do_not_depend_on_length_or_on_other_rows():
    seed = torch.tensor([5, -9, 2**62])
    whole = uniform(seed, (7, 11), 3)
    assert torch.equal(uniform(seed[1:2], (7, 11), 3)[0], whole[1])
    assert torch.equal(uniform(seed, (4, 6), 3), whole[:, :4, :6])
    assert torch.equal(uniform(seed, (4,), 3), uniform(seed, (9,), 3)[:, :4])
    assert uniform(seed, (), 3).shape == (3,)


def test_draws_are_uniform_and_independent_across_salt_seed_and_place():
    seed = torch.arange(200)
    a, b = uniform(seed, (500,), 0), uniform(seed, (500,), 1)
    assert a.dtype == torch.float32
    assert a.min() >= 0
    assert a.max() < 1
    counts = torch.histc(a, bins=20, min=0, max=1)
    chi2 = ((counts - 5000) ** 2 / 5000).sum()
    assert chi2 < 45  # 19 degrees of freedom: p about 0.0007
    for x, y in [(a, b), (a[:, 1:], a[:, :-1]), (a[1:], a[:-1])]:
        r = torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1]
        assert abs(r) < 0.015
    assert bits(seed, (500,), 0).unique().numel() == 100_000
