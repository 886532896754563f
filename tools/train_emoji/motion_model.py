"""The networks of hocket-emoji-motion: the picture model's, inflated from frames to clips.

A token is one latent pixel of two frames in a row. Beside its latents it carries channels that say
where and when it is, since a clip's motion runs over absolute time, which rotary positions (they
only tell differences) say badly.
"""

import math

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from gpuworker.models.word_text import WordTextEncoder
from tools.train_emoji.model import HEADS, LATENT_CHANNELS, POSITION_SPAN, WIDTH, image_ids
from tools.train_emoji.motion import FRAMES, MOTIONS, MOVED
from tools.train_emoji.sample import ASSETS
from tools.train_emoji.vocabulary import COLOURS, PLAIN_NAMES, THINGS

FRAMES_A_TOKEN = 2
TIMES = FRAMES // FRAMES_A_TOKEN  # tokens along time
PLACE_CHANNELS = 8
TIME_SPAN = 2.0  # a clip's length on rotary axis 0, on the side of zero where no text token is
SIZE_WORDS = {64: "size64", 128: "size128"}


def new_text_encoder() -> WordTextEncoder:
    """The text encoder over the things that move, untrained."""
    known = {thing.name: thing for thing in THINGS}
    return WordTextEncoder(
        things=[[name, *known[name].aliases] for name in MOVED],
        plain_names=[name for name in PLAIN_NAMES if name in MOVED],
        colours=list(COLOURS),
        size_words=list(SIZE_WORDS.values()),
        default_size_word=SIZE_WORDS[64],
        embed_dim=WIDTH,
        pooled_dim=WIDTH,
        position_span=POSITION_SPAN,
        motions=[[name, *others] for name, others in MOTIONS.items()],
    )


def new_transformer() -> FluxTransformer2DModel:
    """The picture model's transformer with wider ends, untrained."""
    channels = LATENT_CHANNELS * FRAMES_A_TOKEN
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=channels + PLACE_CHANNELS,
        out_channels=channels,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 14, 14),
    )


def clip_ids(times: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """float32 [times * rows * columns, 3] rotary positions (time, y, x) of those times' tokens."""
    ids = image_ids(rows, columns).repeat(len(times), 1)
    ids[:, 0] = (-TIME_SPAN / TIMES * times).repeat_interleave(rows * columns)
    return ids


def places(times: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """float32 [times * rows * columns, PLACE_CHANNELS]: when and where each token is."""
    share = (times + 0.5) / TIMES
    turn = 2 * math.pi * share
    waves = [turn.sin(), turn.cos(), (2 * turn).sin(), (2 * turn).cos(), (4 * turn).sin()]
    when = torch.stack([*waves, 2 * share - 1], 1)
    spots = image_ids(rows, columns)[:, 1:] * 2 / POSITION_SPAN - 1
    whole = [when.repeat_interleave(rows * columns, 0), spots.repeat(len(times), 1)]
    return torch.cat(whole, 1)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, F, C, rows, columns] -> tokens [B, F/2 * rows * columns, 2 C]."""
    pairs = latents.unflatten(1, (-1, FRAMES_A_TOKEN)).permute(0, 1, 4, 5, 2, 3)
    return pairs.flatten(4).flatten(1, 3)


def unpack(tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Tokens [B, F/2 * rows * columns, 2 C] -> latents [B, F, C, rows, columns]."""
    pairs = tokens.unflatten(2, (FRAMES_A_TOKEN, -1)).unflatten(1, (-1, rows, columns))
    return pairs.permute(0, 1, 4, 5, 2, 3).flatten(1, 2)


class MotionNetworks(nn.Module):
    """What is trained together, begun from the picture model: at first every frame is a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.text = new_text_encoder()
        self.transformer = new_transformer()
        self._begin_text(WordTextEncoder.from_pretrained(ASSETS / "text_encoder").float())
        learned = FluxTransformer2DModel.from_pretrained(ASSETS / "transformer").float()
        self._begin_transformer(learned)

    @torch.no_grad()
    def _begin_text(self, learned: WordTextEncoder) -> None:
        names = [words[0] for words in learned.config.things]
        rows = torch.tensor([0] + [1 + names.index(name) for name in MOVED])
        known = learned.config.size_words
        sizes = torch.tensor([known.index(word) for word in SIZE_WORDS.values()])
        for kind in ("embed", "pooled"):
            for table, kept in (("thing", rows), ("colour", slice(None)), ("size", sizes)):
                source = getattr(learned, f"{table}_{kind}").weight
                getattr(self.text, f"{table}_{kind}").weight.copy_(source[kept])
            nn.init.normal_(getattr(self.text, f"motion_{kind}").weight, std=0.1)

    @torch.no_grad()
    def _begin_transformer(self, learned: FluxTransformer2DModel) -> None:
        state = learned.state_dict()
        wide = torch.zeros_like(self.transformer.x_embedder.weight)
        channels = LATENT_CHANNELS
        narrow = state["x_embedder.weight"]
        apart = torch.randn(narrow.shape, generator=torch.Generator().manual_seed(0)) * narrow.std()
        wide[:, :channels] = narrow / 2 + apart / 2
        wide[:, channels : 2 * channels] = narrow / 2 - apart / 2
        state["x_embedder.weight"] = wide
        state["proj_out.weight"] = state["proj_out.weight"].repeat(FRAMES_A_TOKEN, 1)
        state["proj_out.bias"] = state["proj_out.bias"].repeat(FRAMES_A_TOKEN)
        self.transformer.load_state_dict(state)
