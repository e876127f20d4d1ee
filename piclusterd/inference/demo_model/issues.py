"""Made-up issues with labels: what the demo model is trained and measured on.

An issue is drawn from a matter (`kind` in phrases.toml: a crash, a leak, a wish, ...), a component, a
product, the impact the reporter mentions, and a layout (templates.toml); then it is roughened the way
people write: typos, lower case, missing stops. The label follows from matter and impact alone: a matter
that breaks a main feature is P1, and P2 if the reporter says that only one customer sees it.

The held-out split shares with training neither wordings, templates, products nor combinations:

* wordings, remarks on impact and layouts: the `held` lists, never drawn for training;
* products: the `held` names;
* combinations (component, kind): one in `HELD_OUT_EVERY`, chosen by CRC-32, is kept out of training, and
  the held-out split draws only those.

Manners (greetings, log lines, version lines) are noise to the label and are shared. Pure: everything comes
from the `random.Random` given, so a seed names a data set on every machine.
"""

import random
import re
import tomllib
import zlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Final, Literal

Split = Literal["training", "held_out"]

HELD_OUT_EVERY: Final = 8  # one (component, kind) pair in eight is never trained on
TYPE_WEIGHTS: Final = {"bug": 49, "feature": 17, "question": 15, "chore": 19}  # per cent, roughly what trackers hold
PSEUDO_PRODUCT_SHARE: Final = 0.4  # training also sees made-up names, so that an unknown name means nothing
SYLLABLES: Final = (
    "ka",
    "lo",
    "mi",
    "ter",
    "zan",
    "pri",
    "dox",
    "vel",
    "um",
    "bra",
    "shi",
    "net",
    "qua",
    "fy",
    "gro",
    "ex",
)
LONG_SHARE: Final = 0.15  # issues with further logs, versions and remarks around the matter
LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"

_CHOICE = re.compile(r"<([^<>]*)>")
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Issue:
    """One labelled issue. `template` names the title and body layout, `kind` the matter behind it."""

    title: str
    body: str
    type: str
    priority: str
    reason: str
    kind: str
    component: str
    product: str
    template: tuple[str, str]

    @property
    def combination(self) -> tuple[str, str]:
        """The (component, kind) pair that the held-out split is cut by."""
        return (self.component, self.kind)


@cache
def _toml(name: str) -> dict[str, Any]:
    return tomllib.loads(files(__package__).joinpath(name).read_text(encoding="utf-8"))


def is_held_out(component: str, kind: str) -> bool:
    """Return whether the pair belongs to the held-out split; the same on every machine."""
    return zlib.crc32(f"{component}/{kind}".encode()) % HELD_OUT_EVERY == 0


def wordings(table: dict[str, Any], split: Split) -> list[str]:
    """Return the list of a phrase table that `split` may use."""
    listed: list[str] = table["said" if split == "training" else "held"]
    return listed


def expand(text: str, rng: random.Random) -> str:
    """Resolve every `<a|b>` in `text`, innermost first."""
    while match := _CHOICE.search(text):
        text = text[: match.start()] + rng.choice(match.group(1).split("|")) + text[match.end() :]
    return text


def _number(rng: random.Random) -> str:
    return str(rng.choice((rng.randint(2, 30), rng.randint(2, 99), rng.randint(3, 24))))


def _fill(text: str, rng: random.Random, slots: dict[str, str]) -> str:
    """Replace `{slot}`s; `{n}` is a new number each time and unknown names (code in logs) stay as they are."""
    return _SLOT.sub(lambda m: _number(rng) if m[1] == "n" else slots.get(m[1], m[0]), text)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def pseudo_word(rng: random.Random) -> str:
    """Return a word that means nothing, to stand for names and words the model does not know."""
    return "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3)))


def _product(rng: random.Random, split: Split) -> str:
    products = _toml("phrases.toml")["products"]
    if split == "training" and rng.random() < PSEUDO_PRODUCT_SHARE:
        name = pseudo_word(rng).capitalize()
        return name if name not in products["held"] else "Acorn"
    return rng.choice(wordings(products, split))


def _kind_and_component(rng: random.Random, split: Split) -> tuple[dict[str, Any], str]:
    phrases = _toml("phrases.toml")
    wanted = rng.choices(list(TYPE_WEIGHTS), list(TYPE_WEIGHTS.values()))[0]
    kind = rng.choice([k for k in phrases["kind"] if k["type"] == wanted])
    components = phrases["components"]["said"]
    mine = [c for c in components if is_held_out(c, kind["name"]) == (split == "held_out")]
    return kind, rng.choice(mine or components[:1])


def _reason(kind: dict[str, Any], impact: str) -> str:
    """Return the matter's own reason, or the impact's where it is the impact that set the priority."""
    if kind["priority"][impact] == kind["priority"]["none"]:
        return str(kind["reason"])
    return str(_toml("phrases.toml")["impact"][impact]["reason"].get(kind["type"], kind["reason"]))


def _impact(kind: dict[str, Any], rng: random.Random, split: Split) -> tuple[str, str]:
    """Return (name of the impact, its sentence or "")."""
    impact = rng.choice(list(kind["priority"]))
    if impact == "none":
        return impact, ""
    table = _toml("phrases.toml")["impact"][impact]
    said = [rng.choice(wordings(table, split)) for _ in range(1 if rng.random() < 0.75 else 2)]
    return impact, expand(" ".join(dict.fromkeys(said)), rng)


def _manners(rng: random.Random) -> dict[str, str]:
    manners = _toml("templates.toml")["manners"]
    return {name: expand(rng.choice(listed), rng) for name, listed in manners.items()}


def _ramble(body: str, kind: dict[str, Any], rng: random.Random, split: Split, names: dict[str, str]) -> str:
    """Return `body` between one to six pieces that say nothing on the label, the way long reports do."""
    templates = _toml("templates.toml")
    manners = templates["manners"]
    sources = [wordings(templates["why"][kind["type"]], split), manners["log"], manners["env"], manners["steps"]]
    extra = [_fill(expand(rng.choice(rng.choice(sources)), rng), rng, names) for _ in range(rng.randint(1, 6))]
    extra.insert(rng.randint(0, len(extra)), body)
    return "\n\n".join(extra)


def _lay_out(kind: dict[str, Any], component: str, rng: random.Random, split: Split) -> Issue:
    impact, impact_text = _impact(kind, rng, split)
    product = _product(rng, split)
    templates = _toml("templates.toml")
    title_form = rng.choice(wordings(templates["title"][kind["type"]], split))
    forms = wordings(templates["body"][kind["type"]], split)
    body_form = rng.choice([form for form in forms if not impact_text or "{impact}" in form])
    names = {"c": component, "p": product}
    say, again = (_fill(expand(rng.choice(wordings(kind, split)), rng), rng, names) for _ in range(2))
    slots = names | {"say": say, "Say": _capital(say), "again": again, "impact": _fill(impact_text, rng, names)}
    slots |= {key: _fill(text, rng, names) for key, text in _manners(rng).items()}
    slots["why"] = _fill(expand(rng.choice(wordings(templates["why"][kind["type"]], split)), rng), rng, names)
    reason = _reason(kind, impact)
    title, body = _fill(title_form, rng, slots), _fill(body_form, rng, slots)
    if rng.random() < LONG_SHARE:
        body = _ramble(body, kind, rng, split, names)
    label = kind["priority"][impact]
    template = (title_form, body_form)
    return Issue(title, body, kind["type"], label, reason, kind["name"], component, product, template)


def _typo(word: str, rng: random.Random) -> str:
    """Swap, drop, double or replace one letter inside a word of four letters or more."""
    if len(word) < 4 or not word.isalpha():
        return word
    i = rng.randrange(1, len(word) - 1)
    match rng.randrange(4):
        case 0:
            return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
        case 1:
            return word[:i] + word[i + 1 :]
        case 2:
            return word[:i] + word[i] + word[i:]
        case _:
            return word[:i] + rng.choice(LETTERS) + word[i + 1 :]


def roughen(text: str, rng: random.Random) -> str:
    """Return `text` as a hurried human would have typed it: some typos, perhaps no capitals or no full stops."""
    rate = rng.choice((0.0, 0.0, 0.01, 0.04))
    rough = re.sub(r"[A-Za-z]+", lambda m: _typo(m[0], rng) if rng.random() < rate else m[0], text)
    case = rng.random()
    if case < 0.15:
        rough = rough.lower()
    elif case < 0.18:
        rough = rough.upper()
    if rng.random() < 0.1:
        rough = rough.replace(".", "").replace(",", "")
    return re.sub(r"[ \t]{2,}", " ", rough).strip()


def draw_issue(rng: random.Random, split: Split = "training") -> Issue:
    """Draw one issue of the split from `rng`."""
    kind, component = _kind_and_component(rng, split)
    issue = _lay_out(kind, component, rng, split)
    return Issue(
        title=roughen(issue.title, rng),
        body=roughen(issue.body, rng),
        type=issue.type,
        priority=issue.priority,
        reason=issue.reason,
        kind=issue.kind,
        component=issue.component,
        product=issue.product,
        template=issue.template,
    )


def draw_issues(count: int, seed: int, split: Split = "training") -> list[Issue]:
    """Return `count` issues of the split; the same list for the same seed."""
    rng = random.Random(seed)
    return [draw_issue(rng, split) for _ in range(count)]
