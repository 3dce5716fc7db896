"""An independent reader of the corpus: a sentence is parsed again and judged by the objects' attributes."""

import re

from fastvlp.data.world.corpus import WorldConfig

CONFIG = WorldConfig()
COLOURS = {c: c for c in ["red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"]}
COLOURS |= {"violet": "purple", "turquoise": "cyan"}
SHAPES = {s: s for s in ["circle", "square", "triangle", "diamond", "star", "cross", "heart", "ring"]}
SHAPES |= {"disc": "circle", "box": "square", "rhombus": "diamond", "plus sign": "cross", "hoop": "ring"}
SIZES = {
    "small": "small",
    "little": "small",
    "medium": "medium",
    "medium-sized": "medium",
    "large": "large",
    "big": "large",
}
THINGS = {"shape": None, "object": None, "thing": None}
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
NOUNS = {**SHAPES, **THINGS}
NOUNS |= {noun + ("es" if noun[-1] in "sx" else "s"): value for noun, value in NOUNS.items()}
EXTREMES = "leftmost|rightmost|topmost|lowest"


def either(words):
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


NOUN_PHRASE = re.compile(
    rf"\b(?:(a|an|the|{either(NUMBERS)}) )?(?:({EXTREMES}) )?(?:({either(SIZES)}) )?"
    rf"(?:({either(COLOURS)}) )?({either(NOUNS)})\b"
)
RELATIONS = {
    "left": "to the left of|left of|on the left side of",
    "right": "to the right of|right of|on the right side of",
    "above": "above|over|higher than",
    "below": "below|under|lower than",
}
RELATION = "|".join(RELATIONS.values())


def parse(text):
    """The text with its noun phrases replaced by #, and the phrases as (article, extreme, size, colour, shape)."""
    found = []

    def keep(match):
        article, extreme, size, colour, noun = match.groups()
        found.append((article, extreme, SIZES.get(size), COLOURS.get(colour), NOUNS[noun]))
        return "#"

    text = re.sub(r"(largest|biggest|smallest) (?:shape|object|thing)", r"\1", text)
    text = re.sub(r"(what|which|same) shape\b|the shape(?= of)", r"\1 form", text)
    return NOUN_PHRASE.sub(keep, text), found


def centre(thing):
    x0, y0, x1, y1 = thing["box"]
    return (x0 + x1) / 2 / CONFIG.size, (y0 + y1) / 2 / CONFIG.size


def fits(phrase, thing):
    return all(want in (None, thing[name]) for want, name in zip(phrase[2:], ("size", "colour", "shape")))


def matching(phrase, things):
    if phrase[1]:
        axis, sign = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "lowest": (1, -1)}[phrase[1]]
        return [min(things, key=lambda thing: sign * centre(thing)[axis])]
    return [thing for thing in things if fits(phrase, thing)]


def holds(phrase, things):
    """Whether the number that a phrase names is the number there is; "a" means one or more, "the" exactly one."""
    count = len(matching(phrase, things))
    return (
        count == NUMBERS.index(phrase[0]) if phrase[0] in NUMBERS else count == 1 if phrase[0] == "the" else count >= 1
    )


def only(phrase, things):
    found = matching(phrase, things)
    assert len(found) == 1, phrase
    return found[0]


def where(a, b, least=0.1):
    """Every relation that a person could not deny."""
    dx, dy = centre(a)[0] - centre(b)[0], centre(a)[1] - centre(b)[1]
    found = {("left" if dx < 0 else "right") if abs(dx) > least else None}
    return (found | {("above" if dy < 0 else "below") if abs(dy) > least else None}) - {None}


def related_thing(subject, word, other, things):
    name = next(name for name, words in RELATIONS.items() if word in words.split("|"))
    return any(name in where(subject, thing) for thing in matching(other, things) if thing is not subject)


def size_rank(thing):
    return ("small", "medium", "large").index(thing["size"])


def in_place(thing, words):
    x, y = centre(thing)
    tests = {"left": x < 0.42, "right": x > 0.58, "top": y < 0.42, "bottom": y > 0.58}
    if "centre" in words or "middle" in words:
        return 0.3 < x < 0.7 and 0.3 < y < 0.7
    named = [test for name, test in tests.items() if name in words]
    assert named, words
    return all(named)


PLACE = r"(?:at|in|on|near) the (?:top|bottom|left|right|centre|middle)(?: left| right)?(?: corner| edge)?"
BACKGROUND = r"(?:on|in front of) a (?:\w+ )?\w+ background"
FRAMES = {
    "split": r"(?:there are |the picture shows )?#[,:] .*",
    "relation": rf"(?:there is |we can see )?# (?:is )?(?P<first>{RELATION}) #(?: and (?P<second>{RELATION}) #)?",
    "inverted": rf"(?P<first>{RELATION}) # there is #",
    "largest": r"the (?:largest|biggest)(?: in the picture)? is #|# is the largest here",
    "extremes": r"the largest is # and the smallest is #|the smallest is # and the biggest one is #",
    "place": rf"(?:there is )?# ({PLACE})(?: of the picture)?|({PLACE}) of the picture there is #",
    "places": rf"# (?:is )?({PLACE}) and # (?:is )?({PLACE})|({PLACE}) there is # and ({PLACE}) #",
    "order": r"from left to right (?:there (?:is|are)|we see) LIST|LIST from left to right",
    "among": r"there are #, among them LIST|# with LIST among them|# in total, including LIST",
    "list": "LIST(?: in the picture)?|(?:there (?:is|are)|a picture of|this image shows|we can see) LIST"
    rf"|(?:there (?:is|are) )?LIST {BACKGROUND}|{BACKGROUND} there (?:is|are) LIST",
    "single": "(?:a picture of|this image shows) #|there is # in the picture|we can see only # here"
    rf"|a picture of # {BACKGROUND}",
}
FRAMES = {name: re.compile(frame.replace("LIST", "#(?:(?:, | and )#)*")) for name, frame in FRAMES.items()}


def check_split(text, things):
    """For example "three circles, two red and one blue" or "the picture shows two red things: a star and a ring"."""
    head, tail = re.split(r"[,:] ", text, maxsplit=1)
    whole = parse(head)[1][0]
    assert whole[0] in NUMBERS and holds(whole, things), text
    group, total = matching(whole, things), 0
    for part in re.split(r", | and ", tail):
        number, name = part.split(" ", 1)
        phrase = (number, None, None, COLOURS[name], None) if name in COLOURS else parse(part)[1][0]
        count = len(matching(phrase, group))
        assert count == (1 if number in ("a", "an") else NUMBERS.index(number)), text
        total += count
    assert total == len(group), text


def check_background(text, background):
    if on := re.search(r"a (?:(\w+) )?(\w+) background", text):
        assert {"simple": "plain", "checkered": "checked"}.get(on[1], on[1]) in (None, background["pattern"]), text
        assert {"gray": "grey", "sandy": "beige"}.get(on[2], on[2]) == background["colour"], text


def check_caption(text, info):
    """Fails unless the caption is read to its last word and all of it is true of the objects."""
    things = info["objects"]
    skeleton, found = parse(text)
    check_background(text, info["background"])
    name, match = next((n, m) for n, frame in FRAMES.items() if (m := frame.fullmatch(skeleton)))
    if name == "split" and (found[0][3] is None) != (found[0][4] is None):
        check_split(text, things)
        return name
    if name == "split":
        name = "list"
    assert all(holds(phrase, things) for phrase in found), text
    if name == "relation":
        words = [word for word in (match["first"], match["second"]) if word]
        # A chain speaks of one subject: one and the same thing must satisfy all of it.
        assert any(
            all(related_thing(subject, word, other, things) for word, other in zip(words, found[1:]))
            for subject in matching(found[0], things)
        ), text
    elif name == "inverted":
        assert any(related_thing(s, match["first"], found[0], things) for s in matching(found[1], things)), text
    elif name in ("largest", "extremes"):
        ends = [max(things, key=size_rank), min(things, key=size_rank)]
        order = found[::-1] if skeleton.startswith("the smallest") else found
        assert all(fits(phrase, thing) for phrase, thing in zip(order, ends)), text
        ranks = sorted(map(size_rank, things))
        assert ranks[-1] > ranks[-2] and (name == "largest" or len(ranks) == 2 or ranks[0] < ranks[1]), text
    elif name in ("place", "places"):
        spots = [group for group in match.groups() if group]
        assert all(any(in_place(t, spot) for t in matching(p, things)) for p, spot in zip(found, spots)), text
    elif name == "order":
        ordered = sorted(things, key=lambda thing: centre(thing)[0])
        assert len(found) == len(things) and all(map(fits, found, ordered)), text
    return name


def answer(text, things):
    """The answer to a question, from the objects alone."""
    skeleton, found = parse(text)
    if match := re.search(r"\b(colour|form|size|big)\b", re.sub("#.*same", "same", skeleton)):
        attribute = {"big": "size", "form": "shape"}.get(match[1], match[1])
        picked = [only(phrase, things)[attribute] for phrase in found]
        return picked[0] if len(picked) == 1 else "yes" if picked[0] == picked[1] else "no"
    if "many" in skeleton or "number" in skeleton:
        return str(len(matching(found[0], things)))
    if match := re.search(r"(more|fewer) # than #", skeleton):
        one, two = (len(matching(phrase, things)) for phrase in found)
        assert one != two, text
        return "yes" if (one > two) == (match[1] == "more") else "no"
    if match := re.search(r"# (bigger|larger|smaller) than #", skeleton):
        return "yes" if compared(match[1], found, things) else "no"
    if skeleton in ("where is #, seen from #?", "on which side of # is #?"):
        first, second = (only(phrase, things) for phrase in (found if skeleton[0] == "w" else found[::-1]))
        dx, dy = (a - b for a, b in zip(centre(first), centre(second)))
        assert max(abs(dx), abs(dy)) > 1.1 * min(abs(dx), abs(dy)), text
        return ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else "above" if dy < 0 else "below"
    if match := re.fullmatch(rf"is # ({RELATION}) #\?", skeleton):
        return "yes" if one_sided(found, match[1], things) else "no"
    assert re.fullmatch(r"(?:is there|does the picture show|can we see) #\?", skeleton), text
    return "yes" if holds(found[0], things) else "no"


def compared(word, found, things):
    first, second = (size_rank(only(phrase, things)) for phrase in found)
    assert first != second
    return first < second if word == "smaller" else first > second


def one_sided(found, word, things):
    """Whether the relation holds of the two things, which must be clearly apart one way or the other."""
    first, second = (only(phrase, things) for phrase in found)
    name, sides = next(name for name, words in RELATIONS.items() if word in words.split("|")), where(first, second)
    assert sides & ({"left", "right"} if name in ("left", "right") else {"above", "below"})
    return name in sides


def truth(text, things):
    """Whether a statement about one scene holds."""
    skeleton, found = parse(text)
    if match := re.fullmatch(r"# is (bigger|larger|smaller) than #", skeleton):
        return compared(match[1], found, things)
    if match := re.fullmatch(rf"# is ({RELATION}) #", skeleton):
        return one_sided(found, match[1], things)
    frames = r"there (?:is|are) (?:not |exactly )?#|the picture (?:shows|does not show) (?:exactly )?#"
    assert re.fullmatch(frames + r"|(?:exactly )?# can (?:not )?be seen", skeleton), text
    assert ("exactly" in skeleton) == (found[0][0] in NUMBERS), text
    return holds(found[0], things) != (" not " in skeleton)


def pair_truth(text, things):
    """Whether a statement about two images holds."""
    skeleton, (phrase, *rest) = parse(text)
    assert not rest
    left, right = (len([t for t in matching(phrase, things) if t["image"] == side]) for side in (0, 1))
    number = NUMBERS.index(phrase[0]) if phrase[0] in NUMBERS else None
    frames = {
        r"both images show #|there is # in both images|# can be seen in each image": left and right,
        r"exactly one of the images shows #|# is in only one of the images": bool(left) != bool(right),
        r"neither image shows #|there is not # in either image": not left and not right,
        r"only the left image shows #": left and not right,
        r"only the right image shows #": right and not left,
        r"the left image shows exactly #|there (?:is|are) exactly # in the left image": left == number,
        r"the right image shows exactly #|there (?:is|are) exactly # in the right image": right == number,
        r"there (?:is|are) exactly # in the two images together|the images show exactly # in total": left + right
        == number,
        r"the left image has more # than the right one|there are more # in the left image": left > right,
        r"the right image has more # than the left one|there are more # in the right image": right > left,
        r"both images have the same number of #|there are as many # in one image as in the other": left == right,
    }
    (value,) = [value for frame, value in frames.items() if re.fullmatch(frame, skeleton)]
    return bool(value)
