"""What a call takes beside its weights, estimated from the model's configuration.

Good to a factor of two or three: enough to tell what fits, to be replaced by what is measured (in
gpuworker/memory/activations.py). Counted is what is alive at once at the widest place of a forward:

- the denoiser: a block's input, its norm, queries, keys, values, the attention's result, and the
  feed-forward's inner layer, four times as wide, before and after its activation; for each row of
  each job's branches of guidance, over the members that share the tokens. Attention itself keeps
  no token-by-token matrix.
- the decoder: the maps of the last stage, which has the pixels' size and the narrowest channels,
  and of the one before, which has a quarter of the pixels and at most twice the channels; a tile's,
  where it decodes in tiles.
- text encoders: as the denoiser, for one row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

_ALIVE_WIDTHS = 7 + 2 * 4  # times the model's width, for each token
_ALIVE_MAPS = 4  # of the decoder's last stage: input, norm, result, what is added to it
_TILE_SIDE_PX = 512  # of diffusers' tiled decoding
_TEXT_TOKENS = 512
_TEXT_WIDTH = 4096  # of an encoder that does not say
_BRANCHES = 2  # of guidance, which a call may have or not
# Frames that a video's decoder has in hand at a time, where not all of them.
_FRAMES_AT_ONCE = {
    "AutoencoderKLWan": 4,
    "AutoencoderKLQwenImage": 4,
    "AutoencoderKLCogVideoX": 8,
    "AutoencoderKLHunyuanVideo": 17,
}


class ModelCall(NamedTuple):
    """What is asked of a model in one go."""

    node: str
    width: int
    height: int
    frames: int = 1
    batch: int = 1
    degree: int = 1


def denoiser_bytes(
    config: Any,
    call: ModelCall,
    token_px: int,
    frames_a_token: int,
    element_bytes: int,
    guided: bool,
) -> int:
    """Of one step."""
    rows = -(-call.height // token_px)
    columns = -(-call.width // token_px)
    tokens = rows * columns * (1 + (call.frames - 1) // frames_a_token) + _TEXT_TOKENS
    width = int(config.num_attention_heads) * int(config.attention_head_dim)
    branches = _BRANCHES if guided else 1
    whole = tokens * width * _ALIVE_WIDTHS * element_bytes * branches * call.batch
    return whole // call.degree


def decoder_bytes(config: Any, call: ModelCall, tiled_over_px: int, element_bytes: int) -> int:
    """Of one job's decode: jobs are decoded one after the other."""
    pixels = call.width * call.height
    at_once = min(pixels, _TILE_SIDE_PX**2) if pixels > tiled_over_px else pixels
    channels = _narrowest(config)
    frames = min(call.frames, _FRAMES_AT_ONCE.get(config.get("_class_name"), call.frames))
    maps = at_once * frames * channels * _ALIVE_MAPS * 3 // 2 * element_bytes
    return int(maps + pixels * call.frames * 3 * 4)


def text_bytes(config: Any, element_bytes: int) -> int:
    """Of one prompt."""
    named = (getattr(config, name, None) for name in ("hidden_size", "d_model", "embed_dim"))
    width = next((width for width in named if width), _TEXT_WIDTH)
    return int(_TEXT_TOKENS * width * _ALIVE_WIDTHS * element_bytes)


def _narrowest(config: Any) -> int:
    """Channels at the pixels' size."""
    for name in ("decoder_block_out_channels", "block_out_channels"):
        if widths := config.get(name):
            return int(min(widths))
    return int(config.get("base_dim") or config.get("decoder_base_dim") or 128)
