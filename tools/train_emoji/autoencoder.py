"""Train the picture autoencoder: diffusers' `AutoencoderTiny`, 8 px a latent pixel.

It is convolutional throughout, so there are no patch seams, and has no normalisation layers, so
one network serves every picture size. Latents are held to zero mean and unit variance a channel
(the diffusion model then needs no scaling), and the decoder is trained on slightly noisy latents,
since at serving time it sees the transformer's imperfect ones.
"""

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny

from tools.train_emoji.data import WORK, background, compose, icons
from tools.train_emoji.parallel import all_reduce_gradients, join
from tools.train_emoji.vocabulary import COLOURS

_Pair = tuple[torch.nn.Parameter, torch.nn.Parameter]

CROP = 64
LATENT_NOISE = 0.1


def new_autoencoder() -> AutoencoderTiny:
    """The shipped architecture; widths are small because a CPU decodes it."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        latent_channels=16,
        num_encoder_blocks=(1, 1, 2, 2),
        num_decoder_blocks=(3, 2, 2, 1),
    )


def random_crops(
    pictures: dict[str, np.ndarray], count: int, rng: np.random.Generator
) -> torch.Tensor:
    """Crops of random icons, sizes and colours: float32 [count, 3, CROP, CROP] in -1..1.

    A quarter of the backgrounds are arbitrary colours, to keep the latent space smooth.
    """
    crops = np.empty((count, CROP, CROP, 3), np.float32)
    for row in range(count):
        of_size = pictures[str(rng.choice([64, 64, 128, 128, 256]))]
        rgba = of_size[rng.integers(of_size.shape[0]), rng.integers(of_size.shape[1])]
        top, left = rng.integers(0, rgba.shape[0] - CROP + 1, 2)
        colour = np.asarray(background(int(rng.integers(len(COLOURS)))))
        if rng.random() < 0.25:
            colour = rng.integers(0, 256, 3)
        crops[row] = compose(rgba[top : top + CROP, left : left + CROP], colour)
    return torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def losses(vae: AutoencoderTiny, crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(total loss, mean squared error): squared and absolute error, edges, latent moments."""
    with torch.autocast("cpu", torch.bfloat16):
        latents = vae.encoder(crops).float()
        noisy = latents + LATENT_NOISE * torch.randn_like(latents)
        out = vae.decoder(noisy).float()
    error = out - crops
    edges = (error[..., 1:] - error[..., :-1]).abs().mean()
    edges = edges + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    mean, spread = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
    moments = mean.square().mean() + (spread - 1).square().mean()
    squared = F.mse_loss(out, crops)
    return squared + 0.1 * error.abs().mean() + 0.1 * edges + 0.01 * moments, squared


def optimizers(
    vae: AutoencoderTiny, rate: float
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer, list[_Pair]]:
    """(Muon, AdamW, pairs of convolution weight and its matrix view, which is Muon's parameter).

    torch's Muon takes matrices alone, so each inner convolution's weight is handed over as the
    matrix [out, in * 3 * 3] sharing its storage. The outermost layers and biases are AdamW's.
    """
    ends = [side.layers[end] for side in (vae.encoder, vae.decoder) for end in (0, -1)]
    edge = {id(layer.weight) for layer in ends}
    matrices: list[_Pair] = []
    others: list[torch.nn.Parameter] = []
    for parameter in vae.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim == 4 and id(parameter) not in edge:
            matrices.append((parameter, torch.nn.Parameter(parameter.data.flatten(1))))
        else:
            others.append(parameter)
    muon: torch.optim.Optimizer = torch.optim.Muon(
        [matrix for _, matrix in matrices], rate, weight_decay=0, adjust_lr_fn="match_rms_adamw"
    )
    return muon, torch.optim.AdamW(others, rate, betas=(0.9, 0.98), weight_decay=0), matrices


def main() -> None:
    """Train for a number of steps, saving a checkpoint every 500."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--decoder-only", action="store_true", help="leave the encoder as it is")
    parser.add_argument("--resume", action="store_true", help="start from the saved weights")
    args = parser.parse_args()
    rank = join()
    torch.manual_seed(args.seed)
    vae = new_autoencoder()
    if args.resume:
        vae = AutoencoderTiny.from_pretrained(WORK / "vae").train()
    if args.decoder_only:
        vae.encoder.requires_grad_(False)
    torch.manual_seed(args.seed + 1 + rank)
    rng = np.random.default_rng(args.seed + 1 + rank)
    pictures = icons()
    muon, adam, matrices = optimizers(vae, args.rate)
    recent: list[float] = []
    for step in range(1, args.steps + 1):
        loss, squared = losses(vae, random_crops(pictures, args.batch, rng))
        loss.backward()
        all_reduce_gradients(vae)
        for parameter, matrix in matrices:
            assert parameter.grad is not None
            matrix.grad = parameter.grad.view_as(matrix)
        share = min(1.0, step / 50) * (1 - (step - 1) / args.steps)
        for optimizer in (muon, adam):
            optimizer.param_groups[0]["lr"] = args.rate * share
            optimizer.step()
        vae.zero_grad(set_to_none=True)
        recent.append(squared.item())
        if rank == 0 and step % 100 == 0:
            psnr = 10 * np.log10(4 / np.mean(recent[-100:]))
            print(f"{step} psnr {psnr:.2f} cpu_s {time.process_time():.0f}", flush=True)
        if rank == 0 and (step % 500 == 0 or step == args.steps):
            vae.save_pretrained(WORK / "vae")


if __name__ == "__main__":
    main()
