"""The networks of hocket-emoji and how a picture of any size becomes tokens with positions."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from gpuworker.models.word_text import WordTextEncoder
from tools.train_emoji.vocabulary import COLOURS, PLAIN_NAMES, SIZE_WORDS, THINGS

PATCH_PX = 8  # picture pixels a token, each way
LATENT_CHANNELS = 16
POSITION_SPAN = 16.0  # the picture's side on the rotary axes, whatever its pixels
WIDTH = 128
HEADS = 4


def new_text_encoder() -> WordTextEncoder:
    """The text encoder over this tree's vocabulary, untrained."""
    return WordTextEncoder(
        things=[[thing.name, *thing.aliases] for thing in THINGS],
        plain_names=list(PLAIN_NAMES),
        colours=list(COLOURS),
        size_words=list(SIZE_WORDS.values()),
        default_size_word=SIZE_WORDS[128],
        embed_dim=WIDTH,
        pooled_dim=WIDTH,
        position_span=POSITION_SPAN,
    )


def new_transformer() -> FluxTransformer2DModel:
    """The shipped diffusion transformer, untrained: 2.8 million parameters."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 14, 14),
    )


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Plain flow-match Euler; the shift spends more of the steps where the noise is high."""
    return FlowMatchEulerDiscreteScheduler(shift=2.5)


def image_ids(rows: int, columns: int) -> torch.Tensor:
    """float32 [rows * columns, 3] rotary positions (0, y, x): cell centres on 0..POSITION_SPAN."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = ((torch.arange(rows) + 0.5) * POSITION_SPAN / rows)[:, None]
    ids[..., 2] = ((torch.arange(columns) + 0.5) * POSITION_SPAN / columns)[None, :]
    return ids.reshape(-1, 3)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, rows, columns] -> tokens [B, rows * columns, C], row by row."""
    return latents.flatten(2).transpose(1, 2)


def unpack(tokens: torch.Tensor, rows: int) -> torch.Tensor:
    """Tokens [B, rows * columns, C] -> latents [B, C, rows, columns]."""
    return tokens.transpose(1, 2).unflatten(2, (rows, -1))
