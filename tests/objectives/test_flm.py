"""The tokens that a prediction of FLM may see, and its loss: the tests that spec flm.md section 7 names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvlp.batch import Batch
from fastvlp.model.model import VLModel
from fastvlp.objectives.flm import FLM, FLMConfig, draw_spans, official_flm
from fastvlp.objectives.objective import combine
from tests.made import SPECIALS, made_batch, made_config, made_model

SPAN_CONFIGS = [
    FLMConfig(),
    FLMConfig(span_mode="uniform", span_rate=0.4),
    FLMConfig(span_mode="centred", span_rate=0.6),
    FLMConfig(span_mode="centred", span_rate=0.6, bos="official"),
    official_flm("centred", 0.6),
]


def reconstructed(model: VLModel, objective: FLM, batch: Batch, embedded: Tensor | None = None) -> Tensor:
    """States of rows 1..L-1; with `embedded` the word table's output for the two streams is replaced by it."""
    c = objective.config
    spans = draw_spans(c.span_mode, c.span_rate, batch.seed, batch.length, batch.ids.shape[1])
    streams = model.streams(model.encode_image(batch.image), batch.ids, batch.length, bos=c.bos, whole=False)
    return objective.queries(batch, spans, streams, model)


def dependency(model: VLModel, objective: FLM, batch: Batch, row: int) -> Tensor:
    """bool [L-1 L]: does the reconstruction of position i+1 of this row change with the word at position j?

    Found by gradients with respect to the embedded words of the streams (double precision; a zero is exactly zero)."""
    words: list[Tensor] = []

    def keep(module, args, output):
        if not words:  # the first call embeds the streams, the second one the queries
            output = output.detach().requires_grad_()
            words.append(output)
        return output

    hook = model.text.word.register_forward_hook(keep)
    try:
        state = reconstructed(model, objective, batch)[row]
    finally:
        hook.remove()
    length, L = int(batch.length[row]), batch.ids.shape[1]
    flipped = objective.config.bos == "blind"
    matrix = torch.zeros(L - 1, L, dtype=torch.bool)
    for i in range(length - 1):
        (gradient,) = torch.autograd.grad(state[i].sum(), words[0], retain_graph=True)
        forward, reverse = gradient.unflatten(0, (len(batch), 2))[row].abs().sum(-1) > 0
        column = torch.arange(len(reverse))
        matrix[i, column] = forward
        matrix[i, torch.where(column < length, length - 1 - column, column) if flipped else column] |= reverse
    return matrix


def test_a_query_of_a_shallow_model_depends_on_all_but_its_token():
    model, batch = shallow_model().double(), made_batch(lengths=(7, 4), seed=3)
    for row, n in enumerate((7, 4)):
        matrix = dependency(model, FLM(FLMConfig()), batch, row)
        for i in range(1, n):
            assert set(matrix[i - 1].nonzero().flatten().tolist()) == set(range(n)) - {i}


@pytest.mark.parametrize("config", SPAN_CONFIGS, ids=lambda c: f"{c.span_mode}-{c.span_rate}-{c.bos}-{c.empty_rows}")
def test_a_query_depends_on_all_but_its_span(config: FLMConfig):
    model, batch = made_model().double(), made_batch(lengths=(9, 4, 7, 3), seed=3)
    objective = FLM(config)
    L = batch.ids.shape[1]
    start, end = draw_spans(config.span_mode, config.span_rate, batch.seed, batch.length, L)
    for row in range(len(batch)):
        n = int(batch.length[row])
        matrix = dependency(model, objective, batch, row)
        for i in range(1, n):
            a, b = int(start[row, i]), int(end[row, i])
            expected = {j for j in range(1, n) if j < a or j >= b}
            if config.bos == "blind":
                expected.add(0)
            if not expected:
                if config.empty_rows == "official":
                    expected = set(range(n))  # rule O1: the row sees everything, its own token included
                else:
                    continue  # the row is left out of the loss: see test_rows_without_keys_are_left_out
            assert set(matrix[i - 1].nonzero().flatten().tolist()) - set(range(n, L)) == expected, (row, i, a, b)


def test_the_dependency_matrix_of_the_spec():
    """Spec 1.6, n = 7, rate 0, released masks: rows 1..6."""
    model, batch = made_model().double(), made_batch(lengths=(7,))
    expected = ["..#####", ".#.####", ".##.###", ".###.##", ".####.#", ".#####."]
    matrix = dependency(model, FLM(official_flm()), batch, 0)
    assert ["".join(".#"[int(cell)] for cell in line) for line in matrix] == expected


@pytest.mark.parametrize("config", SPAN_CONFIGS[:4], ids=lambda c: f"{c.span_mode}-{c.span_rate}-{c.bos}")
def test_words_inside_the_span_leave_the_query_bit_identical(config: FLMConfig):
    model, batch = made_model(), made_batch(lengths=(11, 8), seed=5)
    objective = FLM(config)
    L = batch.ids.shape[1]
    start, end = draw_spans(config.span_mode, config.span_rate, batch.seed, batch.length, L)
    before = reconstructed(model, objective, batch)
    for row in range(len(batch)):
        n = int(batch.length[row])
        for i in range(1, n - 1):
            a, b = max(1, int(start[row, i])), min(int(end[row, i]), n - 1)
            if config.bos == "official" and a <= 1 and b >= n - 1 and int(end[row, i]) >= n:
                continue
            ids = batch.ids.clone()
            ids[row, a:b] = (ids[row, a:b] - 4 + 7) % 30 + 4
            changed = Batch(image=batch.image, ids=ids, length=batch.length, seed=batch.seed)
            after = reconstructed(model, objective, changed)
            assert torch.equal(before[row, i - 1], after[row, i - 1])


def test_rows_without_keys_are_left_out():
    """Released masks, an empty caption: its one target </s> has nothing to read, so it is dropped, and counted so."""
    model, batch = made_model(), made_batch(lengths=(2, 6))
    losses = FLM(FLMConfig(bos="official"))(model, model.encode_image(batch.image), batch)
    assert losses["reconstruct"].count == 5
    assert torch.isfinite(combine(losses))
    hidden = torch.ones_like(batch.ids), torch.full_like(batch.ids, 6)
    given = FLM(FLMConfig(bos="official"))(model, model.encode_image(batch.image), batch, spans=hidden)
    assert given["reconstruct"].count == 0, "rows are judged by the spans that are given"
    blind = FLM(FLMConfig())(model, model.encode_image(batch.image), batch)
    assert blind["reconstruct"].count == 6, "a text-blind <s> is always there to be read: no row is empty"


def shallow_model() -> VLModel:
    """Two layers for texts, one of fusion, and a reconstructor of one layer, as in flm_fast_demo."""
    model, config = made_model(), made_config()
    assert config.fusion is not None and config.reconstructor is not None
    fusion, part = replace(config.fusion, depth=1), replace(config.reconstructor, bottom=0, top=1)
    shallow = VLModel(replace(config, fusion=fusion, reconstructor=part))
    known = model.state_dict()
    shallow.load_state_dict({name: known[name] for name in shallow.state_dict()})
    return shallow


@pytest.mark.parametrize("make", [made_model, shallow_model])
@pytest.mark.parametrize("bos", ["blind", "official"])
def test_the_loss_equals_a_loop_over_tokens(bos, make):
    """Every prediction computed alone: one text, one query, no batching, no folding of directions, no flipping."""
    model, batch = make().double(), made_batch(lengths=(9, 5, 6), seed=1)
    objective = FLM(FLMConfig(span_mode="uniform", span_rate=0.4, bos=bos))
    image = model.encode_image(batch.image)
    losses = objective(model, image, batch)
    L = batch.ids.shape[1]
    start, end = draw_spans("uniform", 0.4, batch.seed, batch.length, L)
    first = 0 if bos == "blind" else 1
    totals, counts = dict.fromkeys(losses, 0.0), dict.fromkeys(losses, 0)
    for row in range(len(batch)):
        n = int(batch.length[row])
        one = Batch(**{k: getattr(batch, k)[row : row + 1] for k in ("image", "ids", "length", "seed")})
        one = Batch(image=one.image, ids=one.ids[:, :n], length=one.length, seed=one.seed)
        forward, reverse = plain_streams(model, image[row : row + 1], one.ids, bos)
        for i in range(1, n):
            a, b = int(start[row, i]), int(end[row, i])
            keys = [("f", j) for j in range(first, max(a, 1 - first))] + [("r", k) for k in range(b, n)]
            if keys:
                state = plain_query(model, i, keys, forward, reverse)
                totals["reconstruct"] += nll(model, state, one.ids[0, i])
                counts["reconstruct"] += 1
        for i in range(first, n - 1):
            totals["forward"] += nll(model, model.fusion.norm(forward[-1][0, i]), one.ids[0, i + 1])
            counts["forward"] += 1
        for i in range(2, n):
            totals["reverse"] += nll(model, model.fusion.norm(reverse[-1][0, i]), one.ids[0, i - 1])
            counts["reverse"] += 1
    for name, loss in losses.items():
        assert loss.count == counts[name], name
        assert abs(loss.total.item() - totals[name]) < 1e-9 * counts[name], name


def plain_streams(model: VLModel, image: Tensor, ids: Tensor, bos: str) -> tuple[list[Tensor], list[Tensor]]:
    """Both streams of one unpadded text with explicit masks, layer by layer (bottom states, then top states)."""
    n = ids.shape[1]
    row, column = torch.arange(n)[:, None], torch.arange(n)[None]
    if bos == "blind":
        seen = {"forward": column <= row, "reverse": column >= row}
    else:
        seen = {"forward": (column <= row) & (column >= 1), "reverse": (column >= row) & (column >= 1)}
        for mask in seen.values():
            mask[0] = True
    result = []
    for direction, kind in (
        ("forward", model.fusion.text_type),
        ("reverse", model.reconstructor.reverse_type),
    ):
        x = model.text.embed(ids, torch.arange(n)[None])
        states = []
        for block in model.text.blocks:
            x = block(x, mask=seen[direction][None, None])
            states.append(x)
        x = model.fusion.text_in(x) + kind
        memory = model.fusion.image_memory(image, None)
        for block in model.fusion.blocks:
            x = block(x, mask=seen[direction][None, None], memory=block.keys(memory))
            states.append(x)
        result.append(states)
    return result[0], result[1]


def plain_query(model: VLModel, position: int, keys, forward: list[Tensor], reverse: list[Tensor]) -> Tensor:
    part, depth = model.reconstructor, len(model.text.blocks)
    x = model.text.embed(torch.tensor([[SPECIALS["mask"]]]), torch.tensor([[position]]))
    top, layers = depth + len(model.fusion.blocks), []
    # Each stage of the reconstructor reads the last layers of its own part of the streams.
    for end, blocks, norms in ((depth, part.bottom, part.bottom_key_norm), (top, part.top, part.top_key_norm)):
        layers += [(end - len(blocks) + i, block, norm) for i, (block, norm) in enumerate(zip(blocks, norms))]
    for l, block, norm in layers:  # noqa: E741
        states = torch.stack([(forward if kind == "f" else reverse)[l][0, j] for kind, j in keys])
        if block is part.top[0]:
            x = model.fusion.text_in(x) + part.query_type
        x = block(x, memory=block.keys(norm(states)[None]))
    return part.norm(x)[0, 0]


def nll(model: VLModel, state: Tensor, target: Tensor) -> float:
    return F.cross_entropy(model.head(state)[None], target[None]).item()


def test_target_counts():
    """M reconstructed; official streams M-1 each (spec 1.5), a text-blind <s> adds the first word to the forward one."""
    lengths = (9, 4, 7)
    model, batch = made_model(), made_batch(lengths=lengths)
    M = sum(lengths) - len(lengths)
    counts = {k: int(v) for k, v in FLM(FLMConfig(bos="official")).counts(batch).items()}
    assert counts == {"reconstruct": M, "forward": M - 3, "reverse": M - 3}
    counts = {k: int(v) for k, v in FLM(FLMConfig()).counts(batch).items()}
    assert counts == {"reconstruct": M, "forward": M, "reverse": M - 3}
    official = {k: int(v) for k, v in FLM(official_flm()).counts(batch).items()}
    assert official["reverse"] == M - 3 + 2, "every text shorter than the padded length has one trivial target (O3)"
    losses = FLM(FLMConfig())(model, model.encode_image(batch.image), batch)
    assert {k: int(v.count) for k, v in losses.items()} == counts


@pytest.mark.parametrize("config", [FLMConfig(), official_flm("centred", 0.6)], ids=["default", "official"])
def test_queries_of_padding_are_left_out_without_a_change(config: FLMConfig, monkeypatch):
    lengths = (30, *[4 + i % 5 for i in range(15)])
    batch, results, computed = made_batch(lengths=lengths), [], []
    model = made_model().double()
    model.reconstructor.top[0].mlp_in.register_forward_pre_hook(lambda _, x: computed.append(x[0][..., 0].numel()))
    for share in (7 / 8, 0.0):
        monkeypatch.setattr("fastvlp.objectives.flm.MOST_REAL", share)
        losses = FLM(config)(model, model.encode_image(batch.image), batch)
        model.zero_grad()
        combine(losses).backward()
        results.append({name: loss.total.detach() for name, loss in losses.items()})
        results[-1] |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(results[0], results[1])
    real = sum(lengths) - len(lengths)
    assert real <= computed[0] < real + 64 and computed[1] == len(lengths) * 29


@pytest.mark.parametrize("config", SPAN_CONFIGS[:4], ids=lambda c: f"{c.span_mode}-{c.span_rate}-{c.bos}")
def test_padding_changes_nothing(config: FLMConfig):
    model, batch = made_model().double(), made_batch(lengths=(9, 4, 7), seed=2)
    wide = Batch(
        image=batch.image,
        ids=F.pad(batch.ids, (0, 5), value=SPECIALS["pad"]),
        length=batch.length,
        seed=batch.seed,
    )
    image = model.encode_image(batch.image)
    narrow_losses, wide_losses = (FLM(config)(model, image, b) for b in (batch, wide))
    for name in narrow_losses:
        assert narrow_losses[name].count == wide_losses[name].count
        assert torch.allclose(narrow_losses[name].total, wide_losses[name].total, rtol=1e-12)


# Spec 1.3: mean over rows of hidden / M, 4,000 draws of the released function.
EFFECTIVE = {
    (0.15, 4): 0.250, (0.15, 13): 0.144, (0.30, 7): 0.277, (0.30, 29): 0.284, (0.40, 13): 0.366,
    (0.50, 4): 0.436, (0.50, 13): 0.451, (0.70, 19): 0.620, (0.90, 7): 0.746, (1.0, 13): 0.840,
}  # fmt: skip


@pytest.mark.parametrize(("rate", "M"), EFFECTIVE, ids=str)
def test_effective_rate_of_centred_spans_is_the_released_one(rate: float, M: int):
    draws, L = 4000, M + 1
    seed = torch.arange(draws) * 2654435761 + 17
    start, end = draw_spans("centred", rate, seed, torch.full((draws,), L), L)
    start, end = start[:, 1:].clamp(min=1), end[:, 1:].clamp(max=L)
    assert ((end - start).double().mean() / M).item() == pytest.approx(EFFECTIVE[rate, M], abs=0.006)


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
def test_uniform_spans_hide_the_stated_share_and_stay_inside(rate: float):
    draws, M = 4000, 13
    seed = torch.arange(draws) * 40503 + 5
    start, end = draw_spans("uniform", rate, seed, torch.full((draws,), M + 1), M + 1)
    position = torch.arange(M + 1)
    start, end, position = start[:, 1:], end[:, 1:], position[1:]
    assert (start >= 1).all() and (end <= M + 1).all() and (start <= position).all() and (end > position).all()
    assert ((end - start).double().mean() / M).item() == pytest.approx(rate, abs=0.006)


def test_separate_heads_compute_the_same_losses_as_shared_ones_with_equal_weights():
    shared, separate = made_model(), made_model(separate_heads=True)
    state = shared.state_dict()
    for name in ("forward_head", "reverse_head"):
        state |= {k.replace("head.", f"{name}.", 1): v for k, v in shared.state_dict().items() if k.startswith("head.")}
    separate.load_state_dict(state)
    batch = made_batch(lengths=(9, 4, 7))
    ours, theirs = (FLM(FLMConfig())(m, m.encode_image(batch.image), batch) for m in (shared, separate))
    for name in ours:
        assert torch.allclose(ours[name].total, theirs[name].total, rtol=1e-5)


def test_a_weight_of_zero_leaves_the_loss_out():
    model, batch = made_model(), made_batch(lengths=(9, 4))
    losses = FLM(FLMConfig(forward_weight=0, reverse_weight=0))(model, model.encode_image(batch.image), batch)
    assert list(losses) == ["reconstruct"] and losses["reconstruct"].weight == 1.0


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="span_rate"):
        FLMConfig(span_mode="centred", span_rate=1.5)
    with pytest.raises(ValueError, match="`span_mode`"):
        FLMConfig(span_rate=0.3)
