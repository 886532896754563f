"""A text encoder for a small, known vocabulary: a thing, its background colour, size and motion.

The models which Hocket ships know about a hundred things. For those a language model would be
waste, and free text would promise more than they can draw. So a prompt is *resolved* to the
nearest known one ("two foxs at nite" -> "a fox"), which the user is shown, and what is encoded is
three table rows: the thing, the colour, the size. Models of clips have a fourth, the motion.

Intuition for the shape of the output: a thing's row is a small grid of vectors, which `text_ids`
places over the picture on the rotary axes that the image tokens use. An image token near the top
left thus finds the thing's top left vectors by position alone, and so learns where it is.
"""

import difflib
import re

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

_NEAR = 0.75  # difflib ratio from which a word counts as a misspelling of a known one
_GLUE = frozenset((
    "a", "an", "the", "one", "some", "of", "with", "on", "in", "at", "over", "against", "and",
    "background", "backdrop",
))  # fmt: skip
_COLOUR_SYNONYMS = {
    "grey": "gray", "silver": "gray", "violet": "purple", "lilac": "purple", "magenta": "pink",
    "crimson": "red", "scarlet": "red", "navy": "blue", "cyan": "blue", "teal": "blue",
    "turquoise": "blue", "gold": "yellow", "golden": "yellow", "lime": "green", "beige": "brown",
}  # fmt: skip
_BACKGROUND = re.compile(
    r"\b(?:on|against|over|in front of|with)\s+(?:(?:an?|the)\s+)?"
    r"(?:(?:light|dark|bright|pale|plain)\s+)?"
    r"(?P<colour>[a-z]+)(?P<ground>\s+(?:background|backdrop|bg))?"
)


class WordTextEncoder(ModelMixin, ConfigMixin):
    """Prompt -> (token embeddings, pooled embedding) by table look-up; see the module's text.

    Args:
        things: one row a thing: its name, then its aliases, all lower case.
        plain_names: the names which take no article ("grapes").
        colours: background colours; row 0 is "", the background when none is named.
        size_words: one word a picture size, in ascending size.
        default_size_word: the size assumed when the prompt carries no size word.
        embed_dim: D, the width of a token.
        pooled_dim: P, the width of the pooled vector.
        grid: a thing has grid x grid tokens laid over the picture, and two free ones.
        position_span: the picture's side on the rotary axes, whatever its pixels.
        motions: one row a motion: its name, then its aliases; the first is meant when a prompt
            names none. None where the model draws still pictures.
    """

    @register_to_config
    def __init__(
        self,
        things: list[list[str]],
        plain_names: list[str],
        colours: list[str],
        size_words: list[str],
        default_size_word: str,
        embed_dim: int = 128,
        pooled_dim: int = 128,
        grid: int = 4,
        position_span: float = 16.0,
        motions: list[list[str]] | None = None,
    ) -> None:
        super().__init__()
        self.thing_tokens = grid * grid + 2
        self.thing_embed = nn.Embedding(len(things) + 1, self.thing_tokens * embed_dim)
        self.colour_embed = nn.Embedding(len(colours), embed_dim)
        self.size_embed = nn.Embedding(len(size_words), embed_dim)
        self.thing_pooled = nn.Embedding(len(things) + 1, pooled_dim)
        self.colour_pooled = nn.Embedding(len(colours), pooled_dim)
        self.size_pooled = nn.Embedding(len(size_words), pooled_dim)
        if motions:
            # Added to the size token, so that clips have as many text tokens as pictures have.
            self.motion_embed = nn.Embedding(len(motions) + 1, embed_dim)
            self.motion_pooled = nn.Embedding(len(motions) + 1, pooled_dim)
        self._motion_of = {
            word: row for row, words in enumerate(motions or (), start=1) for word in words
        }
        self._row_of = {
            phrase: row for row, names in enumerate(things, start=1) for phrase in names
        }

    @property
    def tokens(self) -> int:
        """T, the number of text tokens of every prompt (a multiple of four)."""
        return self.thing_tokens + 2

    def text_ids(self) -> torch.Tensor:
        """float32 [T, 3] rotary positions: axis 0 tells text from image, axes 1, 2 are (y, x)."""
        grid, span = self.config.grid, self.config.position_span
        centres = (torch.arange(grid, dtype=torch.float32) + 0.5) * span / grid
        ids = torch.full((self.tokens, 3), span / 2)
        ids[: grid * grid, 0] = 1.0
        ids[: grid * grid, 1] = centres.repeat_interleave(grid)
        ids[: grid * grid, 2] = centres.repeat(grid)
        ids[grid * grid :, 0] = torch.arange(2.0, 6.0)
        return ids

    def tokenize(self, prompt: str) -> torch.Tensor:
        """int64 [1, 3]: the rows of thing, colour and size. No known thing and no text: row 0.

        Of a model with motions [1, 4]: the motion's row comes last.

        The prompt is resolved first, so any text gives something the model can draw. Size words
        ("size128") are taken out of it; without one the default size is meant.
        """
        words = prompt.lower().split()
        sizes = self.config.size_words
        named = [word for word in words if word in sizes]
        rest = " ".join(word for word in words if word not in sizes)
        size = sizes.index(named[-1] if named else self.config.default_size_word)
        thing, colour, motion, _ = self._parse(rest)
        return torch.tensor([[thing, colour, size, motion][: 4 if self._motion_of else 3]])

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed ids as `tokenize` gives them: tokens [B, T, D] and pooled embeddings [B, P]."""
        thing, colour, size, *motion = ids.unbind(1)
        of_thing = self.thing_embed(thing).unflatten(1, (self.thing_tokens, -1))
        of_size = self.size_embed(size)
        pooled = self.thing_pooled(thing) + self.colour_pooled(colour) + self.size_pooled(size)
        if motion:
            of_size = of_size + self.motion_embed(motion[0])
            pooled = pooled + self.motion_pooled(motion[0])
        others = torch.stack([self.colour_embed(colour), of_size], 1)
        return torch.cat([of_thing, others], 1), pooled

    def resolve(self, prompt: str) -> str:
        """The known prompt nearest to what was written; the same text when it is known already.

        Text without any letters resolves to "", the unconditional prompt.
        """
        thing, colour, motion, exact = self._parse(prompt)
        if exact:
            return prompt
        return self.phrase(thing, colour, motion)

    def phrase(self, thing: int, colour: int, motion: int = 0) -> str:
        """The plain wording of rows: (3, 0) -> "a fox", (3, 0, 1) -> "a fox bouncing"."""
        if thing == 0:
            return ""
        name = self.config.things[thing - 1][0]
        text = name if name in self.config.plain_names else f"{_article(name)} {name}"
        if motion:
            text = f"{text} {self.config.motions[motion - 1][0]}"
        if colour == 0:
            return text
        shade = self.config.colours[colour]
        return f"{text} on {_article(shade)} {shade} background"

    def _parse(self, prompt: str) -> tuple[int, int, int, bool]:
        """(thing row, colour row, motion row, whether every word was known as written)."""
        text = " ".join(re.findall(r"[a-z0-9]+", prompt.lower()))
        if not re.search(r"[a-z]", text):
            return 0, 0, 0, not prompt
        colour, text, colour_exact = self._take_colour(text)
        motion, words, motion_exact = self._take_motion(text.split())
        thing, thing_exact = self._find_thing(words)
        return thing, colour, motion, colour_exact and motion_exact and thing_exact

    def _take_motion(self, words: list[str]) -> tuple[int, list[str], bool]:
        """(motion row, words without the motion's, whether it was named by its own name)."""
        if not self._motion_of:
            return 0, words, True
        near = [difflib.get_close_matches(word, self._motion_of, 1, _NEAR) for word in words]
        misspelt = {
            word: match[0]
            for word, match in zip(words, near, strict=True)
            if match and len(word) > 4 and word not in self._known_words()
        }
        for spelt in ({word: word for word in words}, misspelt):
            for place, word in enumerate(words):
                row = self._motion_of.get(spelt.get(word, ""), 0)
                if row:
                    own = word == self.config.motions[row - 1][0]
                    return row, words[:place] + words[place + 1 :], own
        return 1, words, False

    def _take_colour(self, text: str) -> tuple[int, str, bool]:
        """(colour row, text without the background phrase, whether it was spelt as known)."""
        for match in _BACKGROUND.finditer(text):
            word = match["colour"]
            written = _COLOUR_SYNONYMS.get(word, word)
            known = self.config.colours[1:]
            near = difflib.get_close_matches(written, known, 1, _NEAR)
            if not match["ground"] and written not in known:
                continue  # "with a hat", "on a hill": not about a colour
            rest = f"{text[: match.start()]} {text[match.end() :]}"
            if not near:
                return 0, rest, False
            return self.config.colours.index(near[0]), rest, near[0] == word
        return 0, text, True

    def _find_thing(self, words: list[str]) -> tuple[int, bool]:
        """(thing row, whether named by its own name and nothing else was said)."""
        for spell in (lambda word: word, _singular, self._respell):
            spelt = [spell(word) for word in words]
            for length in range(min(4, len(spelt)), 0, -1):
                for start in range(len(spelt) - length + 1):
                    phrase = " ".join(spelt[start : start + length])
                    if phrase not in self._row_of:
                        continue
                    others = words[:start] + words[start + length :]
                    row = self._row_of[phrase]
                    own = self.config.things[row - 1][0] == " ".join(words[start : start + length])
                    return row, own and _GLUE.issuperset(others)
        text = " ".join(word for word in words if word not in _GLUE) or " ".join(words)
        nearest = difflib.get_close_matches(text, list(self._row_of), 1, 0.0)
        return self._row_of[nearest[0]], False

    def _respell(self, word: str) -> str:
        """The known word nearest to a misspelt one, or the word itself when none is near."""
        if word in _GLUE or len(word) < 3:
            return word
        near = difflib.get_close_matches(_singular(word), sorted(self._known_words()), 1, _NEAR)
        return near[0] if near else word

    def _known_words(self) -> set[str]:
        """Every single word in the things' names."""
        return {part for phrase in self._row_of for part in phrase.split()}


def _article(name: str) -> str:
    """English article by first letter, which is right for the words we have bar "unicorn"."""
    vowel = name[0] in "aeiou" and not name.startswith("uni")
    return "an" if vowel else "a"


def _singular(word: str) -> str:
    """Undo a regular English plural; words such as "bus" come out mangled and match nothing."""
    if word.endswith("ies"):
        return word[:-3] + "y"
    if re.search(r"(s|x|z|ch|sh)es$", word):
        return word[:-2]
    return word[:-1] if word.endswith("s") else word
