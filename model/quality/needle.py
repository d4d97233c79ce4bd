"""A needle in a haystack: one sentence with a code, hidden in a long text and asked for at its end.

The model continues the question; a base model can, no chat is needed. Which thing has a code is an
adjective and a noun. Half of the pairs are for training and half for asking, so that an answer is
never one that was learnt; each word occurs in both halves, so that none is new.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

ADJECTIVES = (
    "amber", "ancient", "bitter", "blue", "brave", "bright", "broken", "calm", "clever", "cold",
    "copper", "crooked", "dark", "distant", "dusty", "early", "empty", "fierce", "gentle", "golden",
    "green", "happy", "hidden", "hollow", "humble", "iron", "kind", "late", "little", "lonely",
    "loud", "narrow", "old", "pale", "patient", "proud", "purple", "quick", "quiet", "red", "round",
    "secret", "sharp", "silent", "silver", "small", "soft", "strange", "sunny", "sweet", "tall",
    "tiny", "velvet", "warm", "white", "wild", "winter", "wise", "wooden", "yellow",
)  # fmt: skip

NOUNS = (
    "anchor", "apple", "arrow", "bear", "bell", "bird", "boat", "book", "bridge", "candle",
    "castle", "cat", "cloud", "clock", "crown", "dog", "door", "dragon", "drum", "eagle", "feather",
    "fish", "flower", "forest", "fox", "garden", "ghost", "hammer", "harbor", "hat", "horse",
    "house", "island", "key", "king", "lamp", "lantern", "lion", "mirror", "moon", "mountain",
    "mouse", "owl", "piano", "queen", "rabbit", "river", "road", "robot", "ship", "star", "stone",
    "sword", "tower", "tree", "turtle", "village", "whale", "window", "wolf",
)  # fmt: skip

DIGITS = 5


@dataclass(frozen=True)
class Needle:
    """Someone's code. The statement begins with the question, goes on with a space and the answer,
    and ends with a full stop."""

    adjective: str
    noun: str
    answer: str

    @property
    def question(self) -> str:
        return f"The secret code of the {self.adjective} {self.noun} is"

    @property
    def statement(self) -> str:
        return f"{self.question} {self.answer}."


def is_heldout(adjective: str, noun: str) -> bool:
    """Whether the pair is kept for asking: every other one, along words and across them."""
    return (ADJECTIVES.index(adjective) + NOUNS.index(noun)) % 2 == 1


def draw(pick: Random, heldout: bool) -> Needle:
    """A needle from one half of the pairs, with a random code of five digits."""
    adjective = pick.choice(ADJECTIVES)
    noun = pick.choice([noun for noun in NOUNS if is_heldout(adjective, noun) == heldout])
    return Needle(adjective, noun, f"{pick.randrange(10**DIGITS):0{DIGITS}d}")
