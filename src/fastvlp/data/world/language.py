"""The grammar of the embedded corpus: meanings, and how English and Chinese express them.

A meaning is a form ("relation", "count", ...) with arguments. Both languages express the same meanings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, NamedTuple

from fastvlp.data.world.scene import Look


class Phrase(NamedTuple):
    """A noun phrase.

    Attributes:
        number: how many things; None is a plural without a number ("red circles").
        size, colour, shape: attributes of the things that the phrase names; None: not named.
        place: an extreme place, such as "leftmost".
        definite: whether it begins with "the".
        bare: whether the noun is left out, because the sentence has named it before ("two red").
        numeral: how the number one is expressed: "some" ("a", at least one), "counted" ("a" or "one"), "exact" ("one").
    """

    number: int | None = 1
    size: str | None = None
    colour: str | None = None
    shape: str | None = None
    place: str | None = None
    definite: bool = False
    bare: bool = False
    numeral: str = "some"

    def fits(self, look: Look) -> bool:
        """Returns whether a look has the size, colour and shape that the phrase names."""
        size, colour, shape = look
        return self.size in (None, size) and self.colour in (None, colour) and self.shape in (None, shape)


Argument = Phrase | str | tuple[Phrase, ...]
Meaning = tuple[Any, ...]  # (form, *arguments), hashable


@dataclass(frozen=True, kw_only=True)
class Language:
    """A language, with the words and templates that express meanings.

    Attributes:
        words: synonyms of each key, the most common one first.
        forms: templates of each form.
        noun: function that expresses a noun phrase.
        comma, last: separator of the items of a list, and separator before its last item.
        length: function that counts the words or characters of a text.
        limits: shortest and longest length of a caption.
    """

    words: Mapping[str, Sequence[str]]
    forms: Mapping[str, Sequence[str]]
    noun: Callable[[Language, Random, Phrase], str]
    comma: str
    last: str
    length: Callable[[str], int]
    limits: tuple[int, int]

    def shortened(self, words: int, templates: int) -> Language:
        """The language with at most so many synonyms of a word, and so many templates of a form."""
        forms = {key: options[:templates] for key, options in self.forms.items()}
        return replace(self, words={key: options[:words] for key, options in self.words.items()}, forms=forms)

    def word(self, rng: Random, key: str) -> str:
        """Draws a synonym of the key, most often the most common one."""
        options = self.words[key]
        return options[0] if len(options) == 1 or rng.random() < 0.6 else rng.choice(options)

    def express(self, rng: Random, meaning: Meaning) -> str:
        """Draws a sentence with this meaning."""
        form, *arguments = meaning
        subject = arguments[0] if isinstance(arguments[0], Phrase) else arguments[0][0]
        be = "is" if subject.number == 1 else "are"
        template = rng.choice(self.forms[form])
        return template.format(*(self._render(rng, argument) for argument in arguments), be=be)

    def _render(self, rng: Random, argument: Argument) -> str:
        if isinstance(argument, str):
            return self.word(rng, argument)
        if isinstance(argument, Phrase):
            return self.noun(self, rng, argument)
        parts = [self.noun(self, rng, phrase) for phrase in argument]
        return self.last.join([*([self.comma.join(parts[:-1])] if parts[:-1] else []), parts[-1]])


CHINESE_NUMBERS = ("零", "一", "两", "三", "四", "五", "六", "七", "八", "九", "十", "十一", "十二")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def _english_noun(language: Language, rng: Random, phrase: Phrase) -> str:
    head = language.word(rng, phrase.shape or "thing")
    if phrase.place:
        return f"the {language.word(rng, phrase.place)} {head}"
    many = phrase.number != 1
    kept = [language.word(rng, key) for key in (phrase.size, phrase.colour) if key]
    words = kept if phrase.bare and not phrase.shape else [*kept, _plural(head) if many else head]
    if phrase.definite:
        words.insert(0, "the")
    elif phrase.number == 1 and not phrase.bare and phrase.numeral != "exact":
        if phrase.numeral == "counted" and rng.random() < 0.2:
            return " ".join(["one", *words])
        words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    elif phrase.number is not None:
        words.insert(0, NUMBERS[phrase.number])
    return " ".join(words)


def _chinese_noun(language: Language, rng: Random, phrase: Phrase) -> str:
    head = language.word(rng, phrase.shape or "thing")
    if phrase.place:
        return f"{language.word(rng, phrase.place)}的{head}"
    size = f"{language.word(rng, phrase.size)}的" if phrase.size else ""
    colour = language.word(rng, phrase.colour) if phrase.colour else ""
    noun = "" if phrase.bare and not phrase.shape else head
    silent = phrase.definite or phrase.number is None or (phrase.number == 1 and phrase.numeral == "some")
    number = "" if silent else f"{CHINESE_NUMBERS[phrase.number or 0]}个"
    return f"{number}{size}{colour}{noun}"


ENGLISH = Language(
    noun=_english_noun,
    comma=", ",
    last=" and ",
    length=lambda text: len(text.split()),
    limits=(6, 20),
    words={
        **{name: (name,) for name in ("red", "orange", "yellow", "green", "blue", "pink")},
        **{name: (name,) for name in ("white", "black", "triangle", "star", "heart")},
        **{name: (name,) for name in ("striped", "dotted", "shaded", "topmost", "lowest", "leftmost", "rightmost")},
        "purple": ("purple", "violet"),
        "cyan": ("cyan", "turquoise"),
        "beige": ("beige", "sandy"),
        "grey": ("grey", "gray"),
        "plain": ("plain", "simple"),
        "checked": ("checked", "checkered"),
        "circle": ("circle", "disc"),
        "square": ("square", "box"),
        "diamond": ("diamond", "rhombus"),
        "cross": ("cross", "plus sign"),
        "ring": ("ring", "hoop"),
        "small": ("small", "little"),
        "medium": ("medium", "medium-sized"),
        "large": ("large", "big"),
        "thing": ("shape", "object", "thing"),
        "left": ("to the left of", "left of", "on the left side of"),
        "right": ("to the right of", "right of", "on the right side of"),
        "above": ("above", "over", "higher than"),
        "below": ("below", "under", "lower than"),
        "at-top-left": ("at the top left", "in the top left corner"),
        "at-top": ("at the top", "near the top"),
        "at-top-right": ("at the top right", "in the top right corner"),
        "at-left": ("on the left", "at the left edge"),
        "at-centre": ("in the centre", "in the middle"),
        "at-right": ("on the right", "at the right edge"),
        "at-bottom-left": ("at the bottom left", "in the bottom left corner"),
        "at-bottom": ("at the bottom", "near the bottom"),
        "at-bottom-right": ("at the bottom right", "in the bottom right corner"),
    },
    forms={
        "list": (
            "{0}",
            "there {be} {0}",
            "a picture of {0}",
            "this image shows {0}",
            "we can see {0}",
            "{0} in the picture",
        ),
        "list-on": (
            "{0} on a {1} background",
            "there {be} {0} on a {1} background",
            "on a {1} background there {be} {0}",
        ),
        "list-patterned": ("{0} on a {2} {1} background", "{0} in front of a {2} {1} background"),
        "in-order": ("from left to right there {be} {0}", "{0} from left to right", "from left to right we see {0}"),
        "relation": ("{0} is {1} {2}", "there is {0} {1} {2}", "we can see {0} {1} {2}", "{1} {2} there is {0}"),
        "relations": ("{0} is {1} {2} and {3} {4}", "there is {0} {1} {2} and {3} {4}"),
        "split": ("{0}, {1}", "there {be} {0}, {1}", "the picture shows {0}: {1}"),
        "among": ("there {be} {0}, among them {1}", "{0} with {1} among them", "{0} in total, including {1}"),
        "largest": ("the largest {1} is {0}", "the biggest {1} in the picture is {0}", "{0} is the largest {1} here"),
        "extremes": (
            "the largest {2} is {0} and the smallest is {1}",
            "the smallest {2} is {1} and the biggest one is {0}",
        ),
        "place": ("there is {0} {1}", "{0} {1} of the picture", "{1} of the picture there is {0}"),
        "places": ("{0} {1} and {2} {3}", "{0} is {1} and {2} is {3}", "{1} there is {0} and {3} {2}"),
        "relative": ("{0} is {1} {2}",),
        "exists": ("there is {0}", "the picture shows {0}", "{0} can be seen"),
        "none": ("there is not {0}", "the picture does not show {0}", "{0} can not be seen"),
        "count": ("there {be} exactly {0}", "exactly {0} can be seen", "the picture shows exactly {0}"),
        "bigger": ("{0} is bigger than {1}", "{0} is larger than {1}"),
        "smaller": ("{0} is smaller than {1}",),
        "q-colour": ("what colour is {0}?", "what is the colour of {0}?", "which colour does {0} have?"),
        "q-shape": ("what shape is {0}?", "what is the shape of {0}?", "which shape does {0} have?"),
        "q-size": ("what size is {0}?", "how big is {0}?"),
        "q-count": ("how many {0} are there?", "how many {0} can be seen?", "what is the number of {0}?"),
        "q-exists": ("is there {0}?", "does the picture show {0}?", "can we see {0}?"),
        "q-where": ("where is {0}, seen from {1}?", "on which side of {1} is {0}?"),
        "q-relation": ("is {0} {1} {2}?",),
        "q-bigger": ("is {0} bigger than {1}?", "is {0} larger than {1}?"),
        "q-smaller": ("is {0} smaller than {1}?",),
        "q-more": ("are there more {0} than {1}?", "does the picture show more {0} than {1}?"),
        "q-fewer": ("are there fewer {0} than {1}?",),
        "q-same-colour": ("do {0} and {1} have the same colour?", "are {0} and {1} of the same colour?"),
        "q-same-shape": ("do {0} and {1} have the same shape?", "are {0} and {1} of the same shape?"),
        "p-both": ("both images show {0}", "there is {0} in both images", "{0} can be seen in each image"),
        "p-one": ("exactly one of the images shows {0}", "{0} is in only one of the images"),
        "p-neither": ("neither image shows {0}", "there is not {0} in either image"),
        "p-left-only": ("only the left image shows {0}",),
        "p-right-only": ("only the right image shows {0}",),
        "p-left": ("the left image shows exactly {0}", "there {be} exactly {0} in the left image"),
        "p-right": ("the right image shows exactly {0}", "there {be} exactly {0} in the right image"),
        "p-total": ("there {be} exactly {0} in the two images together", "the images show exactly {0} in total"),
        "p-left-more": ("the left image has more {0} than the right one", "there are more {0} in the left image"),
        "p-right-more": ("the right image has more {0} than the left one", "there are more {0} in the right image"),
        "p-same": ("both images have the same number of {0}", "there are as many {0} in one image as in the other"),
        "single": (
            "a picture of {0}",
            "this image shows {0}",
            "there is {0} in the picture",
            "we can see only {0} here",
        ),
        "single-on": ("{0} on a {1} background", "a picture of {0} on a {1} background"),
    },
)

CHINESE = Language(
    noun=_chinese_noun,
    comma="、",
    last="和",
    length=len,
    limits=(8, 60),
    words={
        "red": ("红色", "红色的"),
        "orange": ("橙色", "橘色"),
        "yellow": ("黄色", "黄色的"),
        "green": ("绿色", "绿色的"),
        "cyan": ("青色",),
        "blue": ("蓝色", "蓝色的"),
        "purple": ("紫色", "紫色的"),
        "pink": ("粉色", "粉红色"),
        "white": ("白色",),
        "beige": ("米色",),
        "grey": ("灰色",),
        "black": ("黑色",),
        "plain": ("纯色",),
        "striped": ("条纹",),
        "dotted": ("圆点",),
        "checked": ("格子",),
        "shaded": ("渐变",),
        "circle": ("圆形", "圆"),
        "square": ("正方形", "方块"),
        "triangle": ("三角形",),
        "diamond": ("菱形",),
        "star": ("星形", "五角星"),
        "cross": ("十字形", "十字"),
        "heart": ("心形", "爱心"),
        "ring": ("圆环", "环形"),
        "small": ("小",),
        "medium": ("中等",),
        "large": ("大",),
        "thing": ("图形", "物体", "东西"),
        "leftmost": ("最左边",),
        "rightmost": ("最右边",),
        "topmost": ("最上面",),
        "lowest": ("最下面",),
        "left": ("左边", "左侧"),
        "right": ("右边", "右侧"),
        "above": ("上方", "上面"),
        "below": ("下方", "下面"),
        "at-top-left": ("左上角",),
        "at-top": ("上方", "顶部"),
        "at-top-right": ("右上角",),
        "at-left": ("左侧", "左边"),
        "at-centre": ("中间", "中央"),
        "at-right": ("右侧", "右边"),
        "at-bottom-left": ("左下角",),
        "at-bottom": ("下方", "底部"),
        "at-bottom-right": ("右下角",),
    },
    forms={
        "list": ("图中有{0}", "图片里有{0}", "这张图显示了{0}", "可以看到{0}", "这里有{0}"),
        "list-on": ("{1}背景上有{0}", "图中有{0},背景是{1}的"),
        "list-patterned": ("{1}{2}背景上有{0}", "图中有{0},背景是{1}{2}"),
        "in-order": ("从左到右有{0}", "从左到右可以看到{0}"),
        "relation": ("{0}在{2}的{1}", "{2}的{1}有{0}"),
        "relations": ("{0}在{2}的{1},也在{4}的{3}",),
        "split": ("图中有{0},其中有{1}", "有{0}:{1}"),
        "among": ("一共有{0},其中有{1}", "图中的{0}里有{1}"),
        "largest": ("最大的{1}是{0}", "图中最大的是{0}"),
        "extremes": ("最大的{2}是{0},最小的是{1}", "最小的{2}是{1},最大的是{0}"),
        "place": ("图片的{1}有{0}", "{0}在图片的{1}"),
        "places": ("{1}有{0},{3}有{2}", "{0}在{1},{2}在{3}"),
        "relative": ("{0}在{2}的{1}",),
        "exists": ("图中有{0}", "可以看到{0}"),
        "none": ("图中没有{0}", "看不到{0}"),
        "count": ("图中正好有{0}", "正好可以看到{0}"),
        "bigger": ("{0}比{1}大",),
        "smaller": ("{0}比{1}小",),
        "q-colour": ("{0}是什么颜色?", "{0}的颜色是什么?"),
        "q-shape": ("{0}是什么形状?", "{0}的形状是什么?"),
        "q-size": ("{0}有多大?", "{0}的大小是什么?"),
        "q-count": ("有多少个{0}?", "图中有几个{0}?"),
        "q-exists": ("图中有{0}吗?", "能看到{0}吗?"),
        "q-where": ("{0}在{1}的哪一边?", "{0}在{1}的什么位置?"),
        "q-relation": ("{0}在{2}的{1}吗?",),
        "q-bigger": ("{0}比{1}大吗?",),
        "q-smaller": ("{0}比{1}小吗?",),
        "q-more": ("{0}比{1}多吗?",),
        "q-fewer": ("{0}比{1}少吗?",),
        "q-same-colour": ("{0}和{1}的颜色相同吗?",),
        "q-same-shape": ("{0}和{1}的形状相同吗?",),
        "single": ("图中有{0}", "这张图显示了{0}", "图片里只有{0}", "可以看到{0}"),
        "single-on": ("{1}背景上有{0}", "图中有{0},背景是{1}的"),
    },
)
