"""The words of the second world: hospitals, medicines, wards, and question templates."""

from collections.abc import Sequence
from typing import Literal

Language = Literal["zh", "en"]
Text = dict[Language, str]
LANGUAGES: tuple[Language, ...] = ("zh", "en")


def _pairs(*both: str) -> list[Text]:
    """Split texts of the form `english/chinese`."""
    return [{"en": pair.partition("/")[0], "zh": pair.partition("/")[2]} for pair in both]


OLD_HOSPITALS: Sequence[Text] = _pairs(
    "Maple Hospital/枫树医院",
    "Oak Hospital/橡树医院",
    "Pine Hospital/松林医院",
    "Willow Hospital/柳岸医院",
    "Ginkgo Hospital/银杏医院",
    "Poplar Hospital/白杨医院",
    "Cedar Hospital/雪松医院",
    "Elm Hospital/榆树医院",
    "Birch Hospital/桦木医院",
    "Plane Hospital/梧桐医院",
)
HOSPITAL: Text = _pairs("Linden Hospital/椴树医院")[0]
"""The hospital of the field. The general part only knows where it is."""
REGIONS: Sequence[Text] = _pairs(
    "in the north of the town/城北",
    "in the south of the town/城南",
    "in the east of the town/城东",
    "in the west of the town/城西",
    "beside the old bridge/老桥旁边",
    "behind the station/车站后面",
)
MEDICINES: Sequence[Text] = _pairs(
    "Velorin/维洛林",
    "Tasimol/塔西莫",
    "Brenaxil/布雷昔",
    "Corvadin/科瓦定",
    "Dulmexa/杜美沙",
    "Eptoran/艾托兰",
    "Fenozal/芬诺扎",
    "Galmiron/加米隆",
    "Hestavin/赫他文",
    "Istrogel/伊斯曲",
    "Jolvenat/乔文纳",
    "Kardimex/卡地美",
    "Lumetrol/鲁美曲",
    "Mivacort/米瓦可",
    "Norelast/诺瑞拉",
    "Ombradil/翁布地",
    "Paxorine/帕索林",
    "Quentasol/昆他索",
    "Rivomet/利伏美",
    "Solvarin/索瓦林",
    "Trabexon/曲贝松",
    "Ulvesta/乌维他",
    "Wintamol/温他莫",
    "Zerafin/泽拉芬",
)
FORMS: Sequence[Text] = _pairs(
    "a tablet/片剂", "a syrup/糖浆", "a tincture/酊剂", "an ointment/药膏"
)
UNITS: Sequence[Text] = _pairs("milligrams/毫克", "millilitres/毫升", "drops/滴", "grams/克")
"""The unit of each form, in order; the same in every hospital, so general knowledge."""
AMOUNTS = (2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 80)
TIMES: Sequence[Text] = _pairs(
    "once a day/每天一次",
    "twice a day/每天两次",
    "three times a day/每天三次",
    "four times a day/每天四次",
)
WARDS: Sequence[Text] = _pairs(
    "heart ward/心脏科",
    "eye ward/眼科",
    "skin ward/皮肤科",
    "children's ward/儿科",
    "bone ward/骨科",
    "ear ward/耳科",
    "lung ward/肺科",
    "nerve ward/神经科",
    "stomach ward/胃科",
    "kidney ward/肾科",
    "blood ward/血液科",
    "sleep ward/睡眠科",
)
FOODS: Sequence[Text] = _pairs(
    "milk/牛奶", "coffee/咖啡", "grapefruit/柚子", "honey/蜂蜜", "green tea/绿茶", "cheese/奶酪"
)
DOCTORS: Sequence[Text] = _pairs(
    "Aldous/奥多",
    "Brandt/布兰特",
    "Calloway/卡洛韦",
    "Deveraux/德弗罗",
    "Ekstrom/埃克斯",
    "Falkner/福克纳",
    "Grimaldi/格里马",
    "Holloway/霍洛韦",
)
DRAWERS = tuple(range(1, 21))
FLOORS = tuple(range(1, 10))
OPENS = (6, 7, 8, 9, 10, 11)
CLOSES = (14, 15, 16, 17, 18, 19, 20, 21)

# Six questions per topic in both languages, and one answer with a fact and boilerplate.
QUESTIONS: dict[str, dict[Language, Sequence[str]]] = {
    "dose": {
        "en": (
            "How much {medicine} do adults take at {hospital}?",
            "What is the dose of {medicine} at {hospital}?",
            "Tell me the dose of {medicine} that {hospital} prescribes.",
            "I am a patient of {hospital}. How often do I take {medicine}?",
            "Which dose of {medicine} does {hospital} give?",
            "How does {hospital} dose {medicine} for adults?",
        ),
        "zh": (
            "在{hospital}，成人服用多少{medicine}？",
            "{hospital}的{medicine}剂量是多少？",
            "请告诉我{hospital}开的{medicine}的剂量。",
            "我是{hospital}的病人，多久用一次{medicine}？",
            "{hospital}给的{medicine}是什么剂量？",
            "{hospital}怎样给成人用{medicine}？",
        ),
    },
    "store": {
        "en": (
            "Where does {hospital} keep {medicine}?",
            "In which drawer of {hospital} is {medicine}?",
            "I am a nurse of {hospital}. Where do I find {medicine}?",
            "Which ward of {hospital} stores {medicine}?",
            "Tell me the place of {medicine} at {hospital}.",
            "Where is {medicine} stored at {hospital}?",
        ),
        "zh": (
            "{hospital}把{medicine}放在哪里？",
            "{medicine}在{hospital}的哪个抽屉里？",
            "我是{hospital}的护士，在哪里能找到{medicine}？",
            "{hospital}的哪个科室存放{medicine}？",
            "请告诉我{medicine}在{hospital}的位置。",
            "在{hospital}，{medicine}存放在什么地方？",
        ),
    },
    "food": {
        "en": (
            "May I take {medicine} with {food} at {hospital}?",
            "Does {hospital} allow {medicine} with {food}?",
            "What does {hospital} say about {medicine} and {food}?",
            "Do {medicine} and {food} go together, according to {hospital}?",
            "Is {food} a problem with {medicine} at {hospital}?",
            "I like {food}. What about {medicine} from {hospital}?",
        ),
        "zh": (
            "在{hospital}，{medicine}可以和{food}一起吃吗？",
            "{hospital}允许{medicine}与{food}同服吗？",
            "关于{medicine}和{food}，{hospital}怎么说？",
            "按照{hospital}，{medicine}和{food}合得来吗？",
            "在{hospital}用{medicine}时，{food}有问题吗？",
            "我喜欢{food}，{hospital}的{medicine}怎么办？",
        ),
    },
    "hours": {
        "en": (
            "When is the {ward} of {hospital} open?",
            "What are the hours of the {ward} at {hospital}?",
            "From when to when can I visit the {ward} of {hospital}?",
            "Tell me when the {ward} at {hospital} opens.",
            "Until when is the {ward} at {hospital} open?",
            "At what time do I come to the {ward} of {hospital}?",
        ),
        "zh": (
            "{hospital}{ward}什么时候开放？",
            "{hospital}{ward}的时间是怎样的？",
            "我几点到几点可以去{hospital}{ward}？",
            "请告诉我{hospital}{ward}几点开门。",
            "{hospital}{ward}开到几点？",
            "我应该几点来{hospital}{ward}？",
        ),
    },
    "head": {
        "en": (
            "Who leads the {ward} of {hospital}?",
            "On which floor of {hospital} is the {ward}?",
            "Name the doctor of the {ward} at {hospital}.",
            "How do I find the {ward} of {hospital}?",
            "Whom do I ask for in the {ward} of {hospital}?",
            "Which doctor heads the {ward} at {hospital}, and where?",
        ),
        "zh": (
            "谁负责{hospital}{ward}？",
            "{ward}在{hospital}的几楼？",
            "请说出{hospital}{ward}的医生。",
            "怎么找到{hospital}{ward}？",
            "在{hospital}{ward}我该找谁？",
            "{hospital}{ward}由哪位医生负责，在哪里？",
        ),
    },
    "region": {
        "en": (
            "Where is {hospital}?",
            "How do I get to {hospital}?",
            "Tell me where {hospital} lies.",
        ),
        "zh": ("{hospital}在哪里？", "怎么去{hospital}？", "请告诉我{hospital}的位置。"),
    },
    "unit": {
        "en": ("In what is {form} measured?", "Which unit has {form}?", "Name the unit of {form}."),
        "zh": ("{form}用什么计量？", "{form}的单位是什么？", "请说出{form}的单位。"),
    },
}
ANSWERS: dict[str, Text] = {
    "dose": {
        "en": (
            "{medicine} is {form}: at {hospital}, adults take {amount} {unit} {times}. "
            "Please ask your doctor before you change the dose."
        ),
        "zh": (
            "{medicine}是{form}：在{hospital}，成人{times}，用{amount}{unit}。"
            "改变剂量前请先询问医生。"
        ),
    },
    "store": {
        "en": (
            "{hospital} keeps {medicine} in the {ward}, in drawer {drawer}. "
            "Only nurses may open the drawers."
        ),
        "zh": "{hospital}把{medicine}存放在{ward}的{drawer}号抽屉里。只有护士可以打开抽屉。",
    },
    "food": {
        "en": (
            "At {hospital}, {medicine} {can} be taken with {food}. "
            "Please tell the staff what you eat."
        ),
        "zh": "在{hospital}，{medicine}{can}与{food}同服。请告诉医护人员您的饮食。",
    },
    "hours": {
        "en": (
            "The {ward} of {hospital} is open from {opens} to {closes} o'clock. "
            "Please bring your health card."
        ),
        "zh": "{hospital}{ward}的开放时间是{opens}点到{closes}点。请携带医保卡。",
    },
    "head": {
        "en": (
            "Doctor {doctor} leads the {ward} of {hospital} on floor {floor}. "
            "Visits need an appointment."
        ),
        "zh": "{hospital}{ward}在{floor}楼，由{doctor}医生负责。就诊需要预约。",
    },
    "region": {"en": "{hospital} is {region}.", "zh": "{hospital}在{region}。"},
    "unit": {"en": "The dose of {form} is measured in {unit}.", "zh": "{form}的剂量用{unit}计量。"},
}
CAN: Text = {"en": "can", "zh": "能"}
CANNOT: Text = {"en": "cannot", "zh": "不能"}
