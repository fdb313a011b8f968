"""Short codes that people read out: a digit and two words, such as 7-otter-lamp. 18 bits, for three tries."""

from __future__ import annotations

import re
import secrets

from edgert.errors import UsageError

_ANIMALS = """
adder badger bat bear beaver beetle bison boar bobcat buffalo camel caribou carp cat cheetah clam cobra cod condor
coyote crab crane cricket crow deer dingo dog dolphin donkey dove duck eagle eel egret elk emu falcon ferret finch fox
frog gecko gibbon giraffe gnu goat goose gopher grouse gull hamster hare hawk hen heron hippo hornet horse hyena ibex
ibis iguana impala jackal jaguar kestrel koala krill lark lemming lemur lion lizard llama lobster lynx macaw magpie
mantis marmot marten mink mole moose moth mouse mule newt ocelot octopus orca oriole osprey ostrich otter owl oyster
panda parrot pelican penguin pigeon pony puffin puma quail rabbit raven robin salmon seal shark sheep shrew skunk
sloth snail sparrow spider squid stork swan tapir tiger toad trout turtle viper vole walrus wasp weasel whale wolf
wombat yak zebra
""".split()  # noqa: SIM905 - a list of words is read as text
_THINGS = """
acorn anchor anvil apple arrow axe bagel banjo barrel basket bell bench berry blanket boat bottle bowl bread brick
bridge broom brush bucket button cabin cable cactus cake candle canoe carpet carrot castle cedar chain chair chalk
cherry chest clock cloud coat compass copper coral cotton crown cup curtain desk diamond drum easel engine fence fern
fiddle flag flask flute fork garden gate ginger glass glove guitar hammer harbor harp hat helmet honey hook island
ivory jacket jar kettle key kite ladder lamp lantern leaf lemon letter locker magnet maple marble mast meadow melon
mirror mitten needle nest nickel oar olive orchard oven paddle paper pear pebble pencil pepper piano pillow pine pipe
plate plum pocket pond quilt radio raft ribbon river rocket rope saddle sail scarf shelf shovel silver spoon stone
sugar table tent thimble tower train tulip tunnel valley vase violin wagon walnut wheel whistle willow window yarn
""".split()  # noqa: SIM905 - a list of words is read as text
_CODE = re.compile(r"([1-9])-([a-z]{2,10})-([a-z]{2,10})")


def new_code() -> str:
    """A code of at least 17 bits, from the system's source of randomness."""
    return f"{1 + secrets.randbelow(9)}-{secrets.choice(_ANIMALS)}-{secrets.choice(_THINGS)}"


def parse_code(text: str) -> str:
    """A code as somebody typed it. Raises UsageError where it cannot be one."""
    code = "-".join(text.lower().replace("-", " ").split())
    match = _CODE.fullmatch(code)
    if match is None or match[2] not in _ANIMALS or match[3] not in _THINGS:
        raise UsageError(f"{text!r} is no code", "Type it as `edgert cluster invite` shows it, such as 7-otter-lamp.")
    return code
