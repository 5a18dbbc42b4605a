"""A small invented world: things and people, their attributes, and rules about them.

`World.truth` answers every question of the corpus and the benchmarks. Names are invented words, so nothing about them
can be known from elsewhere.

Every entity belongs to one split (train, validation or test). The corpus describes all entities, but a benchmark's
split asks only about its own: fine-tuning can teach the format of the answers, but not the answers.
"""

import random
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


class Attribute(NamedTuple):
    """The values of an attribute, and its wording in statements (after "is") and questions."""

    values: tuple[str, ...]
    statement: str
    question: str


ATTRIBUTES = {
    "material": Attribute(
        ("wood", "metal", "glass", "stone", "cloth", "paper", "rubber", "wax"),
        "made of {value}",
        "what is {subject} made of",
    ),
    "use": Attribute(
        ("cut", "dig", "cook", "clean", "write", "paint", "sew", "fish"),
        "used to {value}",
        "what is {subject} used to do",
    ),
    "place": Attribute(
        ("kitchen", "garden", "school", "forest", "beach", "market", "barn", "attic"),
        "kept in the {value}",
        "where is {subject} kept",
    ),
    "colour": Attribute(
        ("red", "blue", "green", "yellow", "black", "white", "brown", "pink"),
        "painted {value}",
        "what colour is {subject}",
    ),
    "weight": Attribute(("light", "heavy"), "very {value}", "is {subject} light or heavy"),
    "trait": Attribute(("brave", "shy", "kind", "lazy", "clever", "jolly"), "always {value}", "what is {subject} like"),
    "home": Attribute(
        ("hill", "river", "town", "island", "desert", "lake", "valley", "harbour"),
        "from the {value}",
        "where is {subject} from",
    ),
}
THING_ATTRIBUTES = ("material", "use", "place", "colour", "weight")
PERSON_ATTRIBUTES = ("trait", "home")

# Physical rules: place and material determine what a thing does.
PHYSICS: dict[str, dict[str, str]] = {
    "in the fire": dict(
        wood="burns",
        paper="burns",
        cloth="burns",
        metal="glows",
        glass="glows",
        stone="warms",
        rubber="melts",
        wax="melts",
    ),
    "in the water": dict(
        wood="floats",
        wax="floats",
        rubber="floats",
        metal="sinks",
        stone="sinks",
        glass="sinks",
        cloth="soaks",
        paper="tears",
    ),
    "on the rocks": dict(
        glass="breaks",
        wax="breaks",
        rubber="bounces",
        metal="rings",
        stone="thuds",
        wood="thuds",
        cloth="lands",
        paper="lands",
    ),
}

# Social rules: event and trait determine how a person feels.
FEELINGS: dict[str, dict[str, str]] = {
    "storm": dict(brave="calm", shy="scared", kind="sad", lazy="tired", clever="bored", jolly="happy"),
    "race": dict(brave="proud", shy="scared", kind="calm", lazy="tired", clever="angry", jolly="happy"),
    "gift": dict(brave="calm", shy="proud", kind="happy", lazy="bored", clever="sad", jolly="tired"),
    "quarrel": dict(brave="angry", shy="scared", kind="sad", lazy="bored", clever="calm", jolly="tired"),
    "journey": dict(brave="happy", shy="sad", kind="proud", lazy="tired", clever="calm", jolly="bored"),
    "exam": dict(brave="proud", shy="scared", kind="happy", lazy="bored", clever="calm", jolly="angry"),
}

SPLITS = ("train", "validation", "test")
THINGS_PER_SPLIT = {"train": 64, "validation": 24, "test": 112}
PEOPLE_PER_SPLIT = {"train": 32, "validation": 16, "test": 48}


@dataclass(frozen=True)
class Entity:
    """A thing ("the dax") or a person ("mira"), with the values of its attributes."""

    name: str
    split: str
    values: dict[str, str]

    @property
    def is_person(self) -> bool:
        return "trait" in self.values

    @property
    def subject(self) -> str:
        return self.name if self.is_person else f"the {self.name}"


@dataclass(frozen=True)
class Aspect:
    """Something to ask about an entity: an attribute, or the outcome of a rule.

    Args:
        name: An attribute, a place of `PHYSICS`, or an event of `FEELINGS`.
        values: The possible values.
    """

    name: str
    values: tuple[str, ...]

    @property
    def kind(self) -> str:
        if self.name in ATTRIBUTES:
            return "attribute"
        return "physics" if self.name in PHYSICS else "feeling"

    def predicate(self, value: str) -> str:
        """Returns the statement about an entity with this value: "is made of wood", "sinks in the water"."""
        if self.kind == "attribute":
            return "is " + ATTRIBUTES[self.name].statement.format(value=value)
        if self.kind == "physics":
            return f"{value} {self.name}"
        return f"feels {value} after the {self.name}"

    def question(self, subject: str) -> str:
        """Returns the open question without its question mark: "what is the dax made of"."""
        if self.kind == "attribute":
            return ATTRIBUTES[self.name].question.format(subject=subject)
        if self.kind == "physics":
            return f"what happens to {subject} {self.name}"
        return f"how does {subject} feel after the {self.name}"


class World:
    """The entities of one seed. Names and attributes are random; the rules are the same in every world."""

    def __init__(self, seed: int = 0):
        draw = random.Random(f"{seed}/world")
        self.things = _entities(
            draw, thing_names(draw, sum(THINGS_PER_SPLIT.values())), THINGS_PER_SPLIT, THING_ATTRIBUTES
        )
        self.people = _entities(
            draw, people_names(draw, sum(PEOPLE_PER_SPLIT.values())), PEOPLE_PER_SPLIT, PERSON_ATTRIBUTES
        )

    @cached_property
    def thing_aspects(self) -> tuple[Aspect, ...]:
        attributes = tuple(Aspect(name, ATTRIBUTES[name].values) for name in THING_ATTRIBUTES)
        return attributes + tuple(Aspect(place, tuple(sorted(set(rule.values())))) for place, rule in PHYSICS.items())

    @cached_property
    def person_aspects(self) -> tuple[Aspect, ...]:
        attributes = tuple(Aspect(name, ATTRIBUTES[name].values) for name in PERSON_ATTRIBUTES)
        return attributes + tuple(Aspect(event, tuple(sorted(rule.values()))) for event, rule in FEELINGS.items())

    @cached_property
    def _by_split(self) -> dict[tuple[str, bool], list[Entity]]:
        everyone = self.things + self.people
        return {
            (s, p): [e for e in everyone if (e.split, e.is_person) == (s, p)] for s in SPLITS for p in (False, True)
        }

    def of_split(self, split: str, people: bool) -> list[Entity]:
        return self._by_split[split, people]

    def aspects(self, entity: Entity) -> tuple[Aspect, ...]:
        return self.person_aspects if entity.is_person else self.thing_aspects

    def aspect(self, name: str) -> Aspect:
        return next(a for a in self.thing_aspects + self.person_aspects if a.name == name)

    def truth(self, entity: Entity, aspect: Aspect) -> str:
        """Returns the entity's value of an aspect."""
        if aspect.kind == "attribute":
            return entity.values[aspect.name]
        if aspect.kind == "physics":
            return PHYSICS[aspect.name][entity.values["material"]]
        return FEELINGS[aspect.name][entity.values["trait"]]


# English words that the syllables below can form.
ENGLISH = frozenset(
    "balk barb biz blurb bulk curb fax fix flax flux folk fox fur garb milk mix nix pix polk pox silk six skulk stalk "
    "sulk talk tax trox tux".split()
)


def thing_names(draw: random.Random, count: int) -> list[str]:
    """Draws distinct words of one syllable with endings that are rare in English."""
    onsets = "b bl br d dr f fl g gl gr k kl kr m n pl pr s sk sn st t tr v z".split()
    words = [o + v + c for o in onsets for v in "aiou" for c in "x z v lk rb zk mf lg".split()]
    return draw.sample([w for w in words if w not in ENGLISH], count)


def people_names(draw: random.Random, count: int) -> list[str]:
    """Draws distinct words of two open syllables, unlike the names of things."""
    consonants = "bdfgklmnprtvz"
    return draw.sample([a + v + b + w for a in consonants for v in "aeiou" for b in consonants for w in "aio"], count)


def _entities(
    draw: random.Random, names: list[str], sizes: dict[str, int], attributes: tuple[str, ...]
) -> list[Entity]:
    """Creates entities with names from the end of `names`. All values are equally frequent in every split."""
    entities = []
    for split in SPLITS:
        columns = {}
        for attribute in attributes:
            values = ATTRIBUTES[attribute].values
            column = [values[i % len(values)] for i in range(sizes[split])]
            draw.shuffle(column)
            columns[attribute] = column
        for i in range(sizes[split]):
            entities.append(Entity(names.pop(), split, {a: columns[a][i] for a in attributes}))
    return entities
