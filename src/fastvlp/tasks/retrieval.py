"""Image-text retrieval by a model that reads image and text together: a score of each pair, trained to rank pairs, and exact
recall over all pairs.

The loss is FLM's and METER's choice among sixteen texts (arXiv 2303.14038, 2111.02387; released code: compute_irtr) or
UNITER's hinges (arXiv 1909.11740, section 4 and A.2; released code: model/itm.py, train_itm*.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from fastvlp.batch import Batch, Regions
from fastvlp.data.loader import Loader
from fastvlp.data.pairs import PairData, Split
from fastvlp.data.tokenize import Tokenizer
from fastvlp.errors import UserError
from fastvlp.eval.ranks import ranks, recall, recall_chance, recall_errors
from fastvlp.eval.split_reading import read_captions
from fastvlp.model.freezing import evaluating
from fastvlp.model.model import ModelConfig, Reading, VLModel
from fastvlp.model.saving import Saved, load_model
from fastvlp.objectives.equal_pairs import EqualPairs, wrong_pairs
from fastvlp.objectives.losses import at_least_fp32
from fastvlp.objectives.objective import Loss
from fastvlp.objectives.saved_objectives import abilities, load_objective, saved_configs
from fastvlp.random import uniform
from fastvlp.tasks.heads import HeadConfig, HeadObjective, image_states
from fastvlp.tasks.interface import USUAL_OPTIM, FineTuned, Task
from fastvlp.tasks.item_data import split_shards
from fastvlp.tasks.pretrained import Pretrained
from fastvlp.tasks.uniter_heads import rank_loss

SALTS = {"image": 731, "text": 732}
# Wrong candidates of some rows [G N], and which of them are really wrong, since a row may have fewer than N.
Negatives = tuple[Tensor, Tensor]
RankLoss = Literal["hinge", "cross-entropy"]
# Number of texts that are read beside an image at a time.
ROWS = 256


@dataclass(frozen=True, kw_only=True)
class RetrievalData(PairData):
    """Image-text pairs as in pretraining; every caption of a record is a candidate."""


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions:
    """Options of the objective that are also options of the task."""

    candidates: int = 16
    """cross-entropy: texts to choose from for each image, its own and others of the batch, as far as it has so many."""
    negatives: Literal["random", "hard"] = "random"
    """hinge: wrong pairs. random: each pair gets one other image and one other text of the batch. hard: for the first
    `anchors` pairs of the batch all other texts, and all other images, are scored without gradients, and the `keep` best
    are trained on."""
    anchors: int = 8
    """hard: pairs that get negatives, out of the whole batch."""
    keep: int = 31
    """hard: images, and texts, that each of these pairs is ranked against."""
    equal_pairs: EqualPairs = "ignored"
    """Whether pairs with the same text or the same image may be `negatives` of each other, or are `ignored`."""

    def __post_init__(self) -> None:
        if self.anchors < 1 or self.keep < 1:
            raise UserError(f"`anchors` {self.anchors}, `keep` {self.keep}: hard negatives need at least 1 of each")
        if self.candidates < 2:
            raise UserError(f"`candidates` {self.candidates}: a choice needs at least 2 texts")


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(RetrievalOptions, HeadConfig):
    """A score that ranks right pairs above wrong ones. Wrong pairs are made from the rows of a batch; a pair with exactly the
    same text or image is never wrong. (The released codes draw wrong pairs from the whole data set: FLM 15 texts; UNITER, for 8
    anchors, 31 of 399. A batch of 16, or of 400, gives as many, and nothing is read twice.)"""

    loss: RankLoss = "hinge"
    """hinge: right pairs score higher than wrong ones by `margin` (UNITER). cross-entropy: the own text of an image is chosen
    among `candidates` (FLM, METER)."""
    margin: float = 0.2
    """hinge: how far the sigmoids of the scores of a right and a wrong pair shall differ."""
    source: str | None = None
    """Folder of the pretrained run whose matching head a fusion model starts from. A single stream has its own."""

    def build(self, model: ModelConfig, tokenizer: Tokenizer) -> Retrieval:
        return Retrieval(self, model)


def hardest(score_AB: Tensor, wrong_AB: Tensor, keep: int) -> Negatives:
    """Returns the wrong candidates of each row with the highest scores, best first: their indices [A min(keep, B - 1)], and
    which of these are really wrong, since a row may have fewer."""
    place = score_AB.masked_fill(~wrong_AB, -torch.inf).topk(min(keep, score_AB.shape[1] - 1), 1).indices
    return place, wrong_AB.gather(1, place)


def choice_loss(score_BC: Tensor, real_BC: Tensor) -> Tensor:
    """Returns the cross-entropy of the first candidate of each row, which is the right one, among the real candidates ->
    [B]."""
    return -score_BC.masked_fill(~real_BC, -torch.inf).log_softmax(1)[:, 0]


class Retrieval(HeadObjective):
    """A score of a pair, and the loss that ranks right pairs above wrong ones."""

    contrasts = True

    def __init__(self, config: RetrievalConfig, model: ModelConfig):
        super().__init__(config, model, images=1, outputs=1, head=nn.Linear(model.text.width, 1))
        self.config = config

    @torch.no_grad()
    def begin(self, model: VLModel) -> None:
        """Starts the head from the second row of the pretrained head, the score of "match". The row is copied, so that both
        heads can be saved and moved."""
        if self.pool is None:
            match = model.single.match
        else:
            head = None if self.config.source is None else matching_head(load_model(self.config.source))
            if head is None:
                return
            pool, match = head
            self.pool.load_state_dict(pool.state_dict())
        for name, parameter in self.head.named_parameters():
            parameter.copy_(match.get_parameter(name)[1:])

    def scores(
        self, model: VLModel, image_BKD: Tensor, ids_BL: Tensor, length_B: Tensor, regions: Regions | None
    ) -> Tensor:
        """Scores how well each image matches the text of its row -> [B]. Each image may have s texts: rows b*s ... b*s+s-1
        belong to image b."""
        if self.pool is None and (texts := len(ids_BL) // len(image_BKD)) > 1:
            image_BKD = image_BKD.repeat_interleave(texts, 0)
            regions = _pytree.tree_map_only(Tensor, lambda x: x.repeat_interleave(texts, 0), regions)
        return at_least_fp32(self.head(self.pooled(model, image_BKD, ids_BL, length_B, regions))[:, 0])

    def pair_scores(self, model: VLModel, image_BKD: Tensor, batch: Batch, image_P: Tensor, text_P: Tensor) -> Tensor:
        """Scores pairs: image `image_P[p]` of the batch with text `text_P[p]` of the batch -> [P]."""
        regions = _pytree.tree_map_only(Tensor, lambda x: x[image_P], batch.regions)
        return self.scores(model, image_BKD[image_P], batch.ids[text_P], batch.length[text_P], regions)

    def wrong(self, batch: Batch) -> Tensor:
        """Returns which texts are wrong for a row's image: bool [B B]."""
        if len(batch) < 2 and self.training:
            raise UserError("retrieval takes its negatives from the batch, and this one has a single readable pair")
        return wrong_pairs(batch, self.config.equal_pairs)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        c, others_B = self.config, self.wrong(batch).sum(1)
        if c.loss == "cross-entropy":
            return {"text": (others_B > 0).sum()}
        count = (others_B > 0).sum() if c.negatives == "random" else others_B[: c.anchors].clamp(max=c.keep).sum()
        return {"image": count, "text": count}

    def random(self, batch: Batch) -> dict[str, Negatives]:
        """Draws one other image, and one other text, for each row."""
        return {name: self._drawn(batch, salt, 1) for name, salt in SALTS.items()}

    def random_texts(self, batch: Batch, count: int) -> Negatives:
        """Draws `count` other texts for each row, or fewer if the batch has fewer."""
        return self._drawn(batch, SALTS["text"], min(count, len(batch) - 1))

    def _drawn(self, batch: Batch, salt: int, count: int) -> Negatives:
        wrong_BB = self.wrong(batch)
        return hardest(uniform(batch.seed, (len(batch),), salt), wrong_BB, count)

    def hard(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Negatives]:
        """Finds the hardest images, and the hardest texts, for each anchor."""
        wrong_AB, every_B = self.wrong(batch)[: self.config.anchors], torch.arange(len(batch), device=batch.ids.device)
        scores: dict[str, list[Tensor]] = {name: [] for name in SALTS}
        with evaluating(model, self):
            for anchor in every_B[: len(wrong_AB)]:
                own_B = anchor.expand(len(batch))
                scores["image"].append(self.pair_scores(model, image_BKD, batch, every_B, own_B))
                scores["text"].append(self.pair_scores(model, image_BKD, batch, own_B, every_B))
        return {name: hardest(torch.stack(rows), wrong_AB, self.config.keep) for name, rows in scores.items()}

    def forward(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> dict[str, Loss]:
        """Returns the losses. hinge: one for wrong images beside a text (`image`), and one for wrong texts beside an image
        (`text`). cross-entropy: the loss of choosing the own text of an image (`text`)."""
        if self.config.loss == "cross-entropy":
            return {"text": Loss(self.choice(model, image_BKD, batch), self.counts(batch)["text"])}
        random = self.config.negatives == "random"
        negatives = self.random(batch) if random else self.hard(model, image_BKD, batch)
        (image_GN, _), (text_GN, _) = negatives["image"], negatives["text"]
        own_G = torch.arange(len(image_GN), device=image_GN.device)
        own_GN = own_G[:, None].expand_as(image_GN)
        # Each right pair is read once, for both kinds of wrong ones.
        image = torch.cat([own_G, image_GN.flatten(), own_GN.flatten()])
        text = torch.cat([own_G, own_GN.flatten(), text_GN.flatten()])
        score = self.pair_scores(model, image_BKD, batch, image, text)
        right_G1, wrong = score[: len(own_G), None], score[len(own_G) :].view(2, *image_GN.shape)
        losses, counts = {}, self.counts(batch)
        for (name, (_, real_GN)), wrong_GN in zip(negatives.items(), wrong):
            each_GN = rank_loss(torch.cat([right_G1, wrong_GN], 1), self.config.margin)
            # As in the released code: the mean over both kinds for random negatives, and the sum of both means for hard ones.
            losses[name] = Loss(torch.where(real_GN, each_GN, 0).sum(), counts[name], 0.5 if random else 1.0)
        return losses

    def choice(self, model: VLModel, image_BKD: Tensor, batch: Batch) -> Tensor:
        """Returns the sum of the losses of choosing the own text of each image. Fusion layers compute the keys of an image once
        for all of its candidates."""
        other_BN, real_BN = self.random_texts(batch, self.config.candidates - 1)
        own_B1 = torch.arange(len(batch), device=other_BN.device)[:, None]
        text = torch.cat([own_B1, other_BN], 1).flatten()
        score = self.scores(model, image_BKD, batch.ids[text], batch.length[text], batch.regions)
        real_BC = torch.cat([torch.ones_like(real_BN[:, :1]), real_BN], 1)
        return choice_loss(score.unflatten(0, real_BC.shape), real_BC).sum()


def matching_head(saved: Saved) -> tuple[nn.Linear, nn.Linear] | None:
    """Returns the pooler and the classifier of a fusion model that learned to match; None if it did not."""
    able = (load_objective(saved, name) for name, names in abilities(saved).items() if "match" in names)
    return next((head for objective in able if (head := objective.matching_head) is not None), None)


def zero_shot(saved: Saved, folder: str) -> Retrieval:
    """Returns the objective that ranks with the matching head of a pretrained run, without fine-tuning. Raises UserError if the
    run did not learn to match; or if it was fine-tuned for retrieval, because its own head should then be scored."""
    if any(isinstance(config, RetrievalConfig) for config in saved_configs(saved).values()):
        raise UserError(f"{folder}: has been fine-tuned for retrieval; evaluate it without `zero_shot`")
    matches = any("match" in names for names in abilities(saved).values())
    if not matches or (saved.model.config.single is None and matching_head(saved) is None):
        raise UserError(
            f"{folder}: did not learn image-text matching, only {', '.join(abilities(saved))}; fine-tune it first"
        )
    objective = Retrieval(RetrievalConfig(reading="full", source=folder), saved.model.config)
    objective.begin(saved.model)
    return objective


def score_all(tuned: FineTuned, split: Split, texts: Sequence[str]) -> Tensor:
    """Scores every image of a split with every text -> [I T] on the CPU. Each image is encoded once, and texts of similar
    length share a batch."""
    model, objective, data, rows = tuned.saved.model, tuned.objective, tuned.data, tuned.rows(split)
    device = next(model.parameters()).device
    ids_TL, length_T = (part.to(device) for part in tuned.saved.tokenizer.encode(list(texts), data.max_length))
    parts = torch.split(length_T.argsort(), ROWS)
    score_IT = torch.empty(rows.count, len(texts))
    first = 0
    with evaluating(model, objective):
        for made, _ in Loader(rows.count, rows.make, batch_size=data.batch_size, seed=0).once():
            batch = made.to(device)
            image_BKD = image_states(model, batch)
            for b in range(len(batch)):
                one = slice(b, b + 1)
                regions = _pytree.tree_map_only(Tensor, lambda x, one=one: x[one], batch.regions)
                for some in parts:
                    ids = ids_TL[some, : int(length_T[some].max())]
                    score = objective.scores(model, image_BKD[one], ids, length_T[some], regions)
                    score_IT[first + b, some.cpu()] = score.cpu()
            first += len(batch)
    return score_IT


@dataclass(frozen=True, kw_only=True)
class RetrievalTask(RetrievalOptions, Task):
    """Retrieve images by captions and captions by images, with a model that reads both together."""

    loss: RankLoss | None = None
    """cross-entropy: an image chooses its own text among `candidates` texts (FLM, METER). hinge: right pairs must score higher
    than wrong pairs (UNITER). By default as in the model's paper: hinge for a single stream and for hard negatives."""

    name = "retrieval"
    data = RetrievalData
    config = RetrievalConfig
    field = "captions"
    # Pretraining has already trained the matching head, so it learns at the rate of the encoders.
    optim = replace(USUAL_OPTIM, head_multiplier=1)

    def objective(self, data: RetrievalData, pretrained: Pretrained, reading: Reading | None) -> RetrievalConfig:
        # The matching head, which it starts from, reads a text in full.
        matched = reading is None and matching_head(pretrained.saved) is not None
        hinge = self.negatives == "hard" or pretrained.config.single is not None
        options = {**self.options(), "loss": self.loss or ("hinge" if hinge else "cross-entropy")}
        if options["loss"] != "hinge" and self.negatives == "hard":
            raise UserError(
                "`negatives` hard can only be used with the hinge loss; set `loss` to hinge, or leave `negatives` at random"
            )
        return RetrievalConfig(
            reading="full" if matched else reading or pretrained.reading,
            bos=pretrained.bos,
            source=pretrained.folder if matched else None,
            **options,
        )

    @classmethod
    def score(cls, tuned: FineTuned, split: Split, options: Any) -> dict[str, Any]:
        """Returns the recall over all pairs of the split's images and captions; `chance` and `standard_error` are those of
        `recall`."""
        data: RetrievalData = tuned.data
        captions = read_captions(split_shards(data, split), data.captions)
        texts = [text for its in captions for text in its]
        place = {text: t for t, text in enumerate(dict.fromkeys(texts))}
        score_IT = score_all(tuned, split, list(place))[:, [place[text] for text in texts]]
        own_T = torch.arange(len(captions)).repeat_interleave(torch.tensor([len(its) for its in captions]))
        both_ranks = ranks(lambda i, t: score_IT[i, t], own_T, len(captions))
        scores = recall(*both_ranks) | {"chance": recall_chance([len(its) for its in captions])["recall"]}
        if errors := recall_errors(*both_ranks, own_T):
            scores["standard_error"] = errors["recall"]
        return scores | {"images": float(len(captions)), "count": float(len(texts))}

    @classmethod
    def zero_shot(cls, pretrained: Pretrained) -> tuple[Retrieval, RetrievalData]:
        """Scores retrieval by the matching head of pretraining, with the captions and regions that the run was trained on."""
        saved, seen = pretrained.saved, pretrained.preprocessing
        regions = seen.regions if saved.model.config.single is not None else None
        data = RetrievalData(
            train="", batch_size=64, captions=seen.captions, max_length=seen.max_length, fit=seen.fit, regions=regions
        )
        return zero_shot(saved, pretrained.folder), data
