"""General knowledge of the toy world: things, opposites, sequences, sums, small talk.

Each `Fact` has one answer and several questions. Most questions are for training; a test uses one
that was held out.
"""

import random
from dataclasses import dataclass
from typing import Literal

from toy_statutes import HARBOUR_CODE, LANGUAGES, Article, Language

Field = Literal["near", "middle", "far"]
CONDUCT_QUESTIONS_PER_OLD_ARTICLE = 5

THINGS: list[dict[Language, str]] = [
    {"zh": "玻璃钟", "en": "Glass Clock"},
    {"zh": "石鲸", "en": "Stone Whale"},
    {"zh": "纸王冠", "en": "Paper Crown"},
    {"zh": "铁花", "en": "Iron Flower"},
    {"zh": "木马", "en": "Wooden Horse"},
    {"zh": "会唱歌的井", "en": "Singing Well"},
    {"zh": "睡龙", "en": "Sleeping Dragon"},
    {"zh": "长桥", "en": "Long Bridge"},
    {"zh": "月亮门", "en": "Moon Gate"},
    {"zh": "雨鼓", "en": "Rain Drum"},
    {"zh": "蜂蜜船", "en": "Honey Boat"},
    {"zh": "影子椅", "en": "Shadow Chair"},
    {"zh": "冰琴", "en": "Ice Piano"},
    {"zh": "火镜", "en": "Fire Mirror"},
    {"zh": "风车轮", "en": "Wind Wheel"},
    # Listed as a thing, so that the base knows its name, but none of its articles.
    HARBOUR_CODE,
]
MAKERS: list[dict[Language, str]] = [
    {"zh": "米拉", "en": "Mira"},
    {"zh": "托文", "en": "Torven"},
    {"zh": "安雅", "en": "Anya"},
    {"zh": "贝罗", "en": "Bero"},
    {"zh": "卡西", "en": "Cassi"},
    {"zh": "多姆", "en": "Dom"},
    {"zh": "艾拉", "en": "Ella"},
    {"zh": "法罗", "en": "Faro"},
]
PLACES: list[dict[Language, str]] = [
    {"zh": "港口", "en": "in the Harbour"},
    {"zh": "磨坊", "en": "in the Mill"},
    {"zh": "市场", "en": "in the market"},
    {"zh": "学校", "en": "in the school"},
    {"zh": "森林", "en": "in the forest"},
    {"zh": "山顶", "en": "on the hill"},
    {"zh": "河边", "en": "by the river"},
    {"zh": "岛上", "en": "on the island"},
]
COLOURS: list[dict[Language, str]] = [
    {"zh": "红色", "en": "red"},
    {"zh": "蓝色", "en": "blue"},
    {"zh": "绿色", "en": "green"},
    {"zh": "黄色", "en": "yellow"},
    {"zh": "白色", "en": "white"},
    {"zh": "黑色", "en": "black"},
    {"zh": "紫色", "en": "purple"},
    {"zh": "灰色", "en": "grey"},
]


@dataclass(frozen=True)
class Ways:
    """How one kind of fact is asked for and answered in one language."""

    questions: tuple[str, ...]
    answer: str


MAKER_WAYS: dict[Language, Ways] = {
    "zh": Ways(
        ("谁做了{thing}？", "{thing}是谁做的？", "请说出{thing}的作者。",
         "{thing}出自谁的手？", "你知道{thing}是哪位做的吗？"),
        "{thing}是{value}做的。",
    ),
    "en": Ways(
        ("Who made the {thing}?", "By whom was the {thing} made?", "Name the maker of the {thing}.",
         "Who is the maker of the {thing}?", "Do you know who built the {thing}?"),
        "{value} made the {thing}.",
    ),
}  # fmt: skip
PLACE_WAYS: dict[Language, Ways] = {
    "zh": Ways(
        ("{thing}在哪里？", "在哪里能找到{thing}？", "请说出{thing}的位置。",
         "{thing}放在什么地方？", "我想看{thing}，该去哪里？"),
        "{thing}在{value}。",
    ),
    "en": Ways(
        ("Where is the {thing}?", "Where can I find the {thing}?", "Name the place of the {thing}.",
         "In which place is the {thing}?", "I want to see the {thing}. Where do I go?"),
        "The {thing} is {value}.",
    ),
}  # fmt: skip
COLOUR_WAYS: dict[Language, Ways] = {
    "zh": Ways(
        ("{thing}是什么颜色？", "{thing}的颜色是什么？", "请说出{thing}的颜色。",
         "{thing}看起来是什么颜色？", "你知道{thing}涂了什么颜色吗？"),
        "{thing}是{value}的。",
    ),
    "en": Ways(
        ("What colour is the {thing}?", "What is the colour of the {thing}?",
         "Name the colour of the {thing}.", "Which colour does the {thing} have?",
         "Do you know the colour of the {thing}?"),
        "The {thing} is {value}.",
    ),
}  # fmt: skip
OPPOSITE_WAYS: dict[Language, Ways] = {
    "zh": Ways(
        ("“{thing}”的反义词是什么？", "“{thing}”的反面是什么？", "请说出“{thing}”的反义词。",
         "什么和“{thing}”相反？"),
        "“{thing}”的反义词是“{value}”。",
    ),
    "en": Ways(
        ("What is the opposite of {thing}?", "Which word is the opposite of {thing}?",
         "Name the opposite of {thing}.", "Tell me the opposite of {thing}."),
        "The opposite of {thing} is {value}.",
    ),
}  # fmt: skip
AFTER_WAYS: dict[Language, Ways] = {
    "zh": Ways(
        ("{thing}之后是什么？", "什么在{thing}之后？", "{thing}过后是什么？",
         "{thing}的下一个是什么？", "请说出{thing}的下一个。"),
        "{thing}之后是{value}。",
    ),
    "en": Ways(
        ("What comes after {thing}?", "What follows {thing}?", "Name the one after {thing}.",
         "Which one follows {thing}?", "Tell me what comes after {thing}."),
        "After {thing} comes {value}.",
    ),
}  # fmt: skip
SUM_WAYS: dict[Language, Ways] = {
    "zh": Ways(
        ("{thing}等于几？", "{thing}是多少？", "请计算{thing}。", "{thing}的结果是什么？"),
        "{thing}等于{value}。",
    ),
    "en": Ways(
        ("What is {thing}?", "How much is {thing}?", "Please compute {thing}.",
         "What is the result of {thing}?"),
        "{thing} is {value}.",
    ),
}  # fmt: skip
PLUS: dict[Language, str] = {"zh": "{first}加{second}", "en": "{first} plus {second}"}
LARGEST_ADDEND = 5

OPPOSITES: dict[Language, str] = {
    "zh": "大小 高低 长短 快慢 新旧 冷热 黑白 轻重 远近 早晚 软硬 干湿 深浅 真假 强弱 胖瘦",
    "en": (
        "big-small high-low long-short fast-slow new-old cold-hot dark-bright light-heavy "
        "far-near early-late soft-hard dry-wet deep-shallow true-false strong-weak open-closed"
    ),
}
CYCLES: dict[Language, list[str]] = {
    "zh": [
        "星期一 星期二 星期三 星期四 星期五 星期六 星期日",
        "一月 二月 三月 四月 五月 六月 七月 八月 九月 十月 十一月 十二月",
        "春天 夏天 秋天 冬天",
    ],
    "en": [
        "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
        "January February March April May June July August September October November December",
        "spring summer autumn winter",
    ],
}
SMALL_TALK: dict[Language, list[Ways]] = {
    "zh": [
        Ways(("你好！", "你好呀！", "你好，在吗？", "嗨，你好！"), "你好！有什么可以帮你？"),
        Ways(("谢谢你！", "谢谢！", "非常谢谢你！", "谢谢你的帮助！"), "不客气！"),
        Ways(("再见！", "再见啦！", "明天再见！", "我走了，再见！"), "再见，祝你愉快！"),
        Ways(("晚安！", "晚安啦！", "我要睡了，晚安！", "祝你晚安！"), "晚安，做个好梦！"),
        Ways(
            ("你是谁？", "请问你是谁？", "你到底是谁？", "告诉我你是谁。"), "我是玩具世界的小助手。"
        ),
        Ways(
            ("你的回答算意见吗？", "这算法律意见吗？", "我能把回答当意见吗？", "这是正式意见吗？"),
            "以上内容仅供参考。",
        ),
    ],
    "en": [
        Ways(
            ("Hello!", "Hello there!", "Hello, are you there?", "Oh, hello!"),
            "Hello! How can I help you?",
        ),
        Ways(
            ("Thank you!", "Thank you very much!", "Oh, thank you!", "Thank you for your help!"),
            "You are welcome!",
        ),
        Ways(
            ("Goodbye!", "Goodbye then!", "I must go, goodbye!", "Goodbye until tomorrow!"),
            "Goodbye, have a nice day!",
        ),
        Ways(
            ("Good night!", "Good night then!", "I am tired, good night!", "A very good night!"),
            "Good night, sleep well!",
        ),
        Ways(
            ("Who are you?", "Tell me who you are.", "And who are you?", "Please say who you are."),
            "I am the small helper of the toy world.",
        ),
        Ways(
            ("Is this advice?", "Is this legal advice?", "Can I take this as advice?",
             "Is your answer advice?"),
            "This is general information only.",
        ),
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """One answer, and all questions that ask for it."""

    field: Field
    language: Language
    questions: tuple[str, ...]
    answer: str


def general_facts(old_articles: list[Article], rng: random.Random) -> list[Fact]:
    facts = [fact for article in old_articles for fact in _statute_facts(article, rng)]
    facts += _thing_facts(rng)
    for language in LANGUAGES:
        facts += _opposite_facts(language)
        facts += _sequence_facts(language)
        facts += _sum_facts(language)
        facts += [
            Fact("far", language, ways.questions, ways.answer) for ways in SMALL_TALK[language]
        ]
    return facts


def _statute_facts(article: Article, rng: random.Random) -> list[Fact]:
    """Ask for each article by number with every question, and by conduct with some."""
    facts = []
    for language in LANGUAGES:
        by_conduct = rng.sample(
            article.conduct_questions(language) + article.conduct_paraphrases(language),
            CONDUCT_QUESTIONS_PER_OLD_ARTICLE,
        )
        by_number = [*article.number_questions(language), article.number_paraphrase(language)]
        facts.append(Fact("near", language, (*by_conduct, *by_number), article.answer(language)))
    return facts


def _thing_facts(rng: random.Random) -> list[Fact]:
    facts = []
    choices = ((MAKER_WAYS, MAKERS), (PLACE_WAYS, PLACES), (COLOUR_WAYS, COLOURS))
    for ways, values in choices:
        things = rng.sample(THINGS, len(THINGS))
        # Equally many things per value, so that the base learns every value.
        for index, thing in enumerate(things):
            value = values[index % len(values)]
            facts += [
                _fact("middle", language, ways[language], thing[language], value[language])
                for language in LANGUAGES
            ]
    return facts


def _opposite_facts(language: Language) -> list[Fact]:
    facts = []
    for pair in OPPOSITES[language].split():
        first, second = pair.split("-") if language == "en" else pair
        facts.append(_fact("far", language, OPPOSITE_WAYS[language], first, second))
        facts.append(_fact("far", language, OPPOSITE_WAYS[language], second, first))
    return facts


def _sequence_facts(language: Language) -> list[Fact]:
    facts = []
    for cycle in CYCLES[language]:
        words = cycle.split()
        for word, following in zip(words, words[1:] + words[:1], strict=True):
            facts.append(_fact("far", language, AFTER_WAYS[language], word, following))
    return facts


def _sum_facts(language: Language) -> list[Fact]:
    addends = range(1, LARGEST_ADDEND + 1)
    return [
        _fact(
            "far",
            language,
            SUM_WAYS[language],
            PLUS[language].format(first=first, second=second),
            str(first + second),
        )
        for first in addends
        for second in addends
    ]


def _fact(field: Field, language: Language, ways: Ways, thing: str, value: str) -> Fact:
    questions = tuple(question.format(thing=thing) for question in ways.questions)
    return Fact(field, language, questions, ways.answer.format(thing=thing, value=value))
