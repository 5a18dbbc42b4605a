"""The world's facts are balanced, disjoint between splits, and follow the rules."""

import re
from collections import Counter

from microworld.corpus import documents
from microworld.world import (
    FEELINGS,
    PEOPLE_PER_SPLIT,
    PHYSICS,
    SPLITS,
    THING_ATTRIBUTES,
    THINGS_PER_SPLIT,
    World,
)


def test_one_seed_gives_one_world_and_another_seed_another():
    assert World(0).things == World(0).things
    assert World(0).people != World(1).people


def test_names_are_unique_and_splits_share_no_entity():
    world = World(0)
    names = [e.name for e in world.things + world.people]
    assert len(set(names)) == len(names)
    assert Counter(e.split for e in world.things) == THINGS_PER_SPLIT
    assert Counter(e.split for e in world.people) == PEOPLE_PER_SPLIT


def test_values_are_equally_frequent_in_every_split():
    world = World(0)
    for split in SPLITS:
        for attribute in THING_ATTRIBUTES:
            counts = Counter(e.values[attribute] for e in world.of_split(split, people=False))
            assert max(counts.values()) - min(counts.values()) <= 1


def test_rules_decide_what_things_do_and_people_feel():
    world = World(0)
    for thing in world.things:
        assert world.truth(thing, world.aspect("in the water")) == PHYSICS["in the water"][thing.values["material"]]
    for person in world.people:
        assert world.truth(person, world.aspect("storm")) == FEELINGS["storm"][person.values["trait"]]


def test_corpus_is_deterministic_and_marks_only_what_is_true():
    world = World(0)
    first = [text for text, _ in zip(documents(world, 0, simple=500), range(1500), strict=False)]
    assert first == [text for text, _ in zip(documents(world, 0, simple=500), range(1500), strict=False)]
    things = {thing.name: thing for thing in world.things}
    claims = [claim for text in first for claim in re.findall(r"the \*?(\w+) is made of \*(\w+)", text)]
    assert len(claims) > 20
    for name, material in claims:
        assert things[name].values["material"] == material
