"""The blind score: what counting the answers of training questions with the same words gives."""

import pytest

from fastvlp.data.blind import LEAST, AnsweredQuestion, answered_questions, blind_score


def asked(text, answer, times=1):
    return [AnsweredQuestion(text, {answer: 1.0})] * times


TRAIN = [
    *asked("how many cats are there?", "2", LEAST),
    *asked("how many dogs are there?", "3", LEAST + 5),
    *asked("how many birds are there?", "4", LEAST - 1),
    *asked("is there a cat?", "yes", LEAST),
]


def test_the_longest_common_beginning_decides():
    assert blind_score(TRAIN, asked("how many cats are there?", "2")) == (1.0, 0.0, 1)
    # Of birds there are too few questions: "how many" decides.
    assert blind_score(TRAIN, asked("how many birds are there?", "3")).blind == 1.0
    assert blind_score(TRAIN, asked("How many  horses?", "3")).blind == 1.0
    assert blind_score(TRAIN, asked("is it night?", "yes")).blind == 1.0
    assert blind_score(TRAIN, asked("why?", "3")) == (1.0, 1.0, 1)


def test_ends_decide_where_they_say_more_as_in_chinese():
    train = [*asked("红色的是什么形状?", "圆形", LEAST), *asked("红色的有几个?", "2", LEAST + 1)]
    scored = [*asked("蓝色的是什么形状?", "圆形"), *asked("蓝色的有几个?", "2")]
    assert blind_score(train, scored) == (1.0, 0.5, 2)


def test_scores_of_several_answers_are_summed_and_averaged():
    train = [
        AnsweredQuestion("what is it?", {"cat": 0.6, "kitten": 0.3}),
        AnsweredQuestion("what is it?", {"kitten": 0.4}),
    ]
    assert blind_score(train, [AnsweredQuestion("what is it?", {"kitten": 0.5})]) == (0.5, 0.5, 1)
    assert blind_score(train, []) is None and blind_score([], train) is None


def test_entries_of_another_form_are_left_out():
    good = {"question": "what\tis it?", "answers": {"cat": 1}}
    wrong = ({"question": 3, "answers": {"a": 1}}, {"question": "a"}, {"question": "a", "answers": {"b": 2}}, 7)
    assert list(answered_questions([good, *wrong])) == [AnsweredQuestion("what is it?", {"cat": 1.0})]
    assert list(answered_questions(good)) == []


def test_ties_go_to_the_first_answer_by_the_alphabet():
    train = [*asked("a?", "no"), *asked("a?", "maybe")]
    assert blind_score(train, asked("a?", "maybe")).blind == pytest.approx(1.0)
