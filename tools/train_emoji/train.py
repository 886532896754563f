"""Train the diffusion transformer and its text encoder by flow matching on cached latents.

The rate is constant after a warm-up until `--decay` is given, when it falls linearly to zero over
the run: how long a run is need not be known beforehand, and any checkpoint can be cooled down to
a usable model. Hidden matrices are trained by Muon, which makes more of each step where
CPU time is scarce, all else by AdamW. Start it again to go on from the last checkpoint.
"""

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tools.train_emoji.data import WORK
from tools.train_emoji.model import image_ids, new_text_encoder, new_transformer, pack
from tools.train_emoji.parallel import all_reduce_gradients, join
from tools.train_emoji.vocabulary import COLOURS, SIZE_WORDS, THINGS

PLACEMENT_SHARES = torch.tensor([0.4, 0.15, 0.15, 0.15, 0.15])
BATCH = {64: 48, 128: 16, 256: 4}  # a rank's, by picture size
# Mean of the logit of the noise level: the more tokens show a picture, the more noise it takes
# to hide it.
NOISE_LOGIT = {64: 0.3, 128: 0.7, 256: 1.2}
DROPPED = 0.1  # share of captions blanked, for classifier-free guidance
PLAIN = 0.25  # share of captions which name no colour
EMA_HORIZON = 400  # steps


class Networks(nn.Module):
    """What is trained together: the text encoder and the transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.text = new_text_encoder()
        self.transformer = new_transformer()
        for name, table in self.text.named_children():
            nn.init.normal_(table.weight, std=0.5 if name.endswith("pooled") else 1.0)
        nn.init.zeros_(self.transformer.proj_out.weight)
        for module in self.transformer.modules():
            if type(module).__name__.startswith("AdaLayerNorm"):
                nn.init.zeros_(module.linear.weight)
                nn.init.zeros_(module.linear.bias)


@dataclass(frozen=True)
class Task:
    """What a run trains on: kinds of batches, and the loss of one drawn from a generator."""

    kinds: Sequence[str]
    loss: Callable[[Any, str, torch.Generator], torch.Tensor]


def optimizers(networks: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon over the blocks' matrices but the modulations, AdamW over everything else."""
    matrices, tables, others = [], [], []
    for name, parameter in networks.named_parameters():
        if name.startswith("text."):
            tables.append(parameter)
        elif parameter.ndim == 2 and "blocks" in name and ".linear." not in name:
            matrices.append(parameter)
        else:
            others.append(parameter)
    muon = torch.optim.Muon(
        [{"params": matrices, "scale": 1.0}],
        rate,
        weight_decay=0.01,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    groups = [{"params": others, "scale": 1.0}, {"params": tables, "scale": 4.0}]
    adam = torch.optim.AdamW(groups, rate, betas=(0.9, 0.98), weight_decay=0.0)
    return [muon, adam]


def batch_of(
    latents: torch.Tensor, side: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(clean latents [B, C, rows, columns], caption ids [B, 3]) drawn at random."""
    count = BATCH[side]
    things = torch.randint(len(THINGS), (count,), generator=generator)
    colours = torch.randint(1, len(COLOURS), (count,), generator=generator)
    colours[torch.rand(count, generator=generator) < PLAIN] = 0
    shares = PLACEMENT_SHARES[: latents.shape[0]]
    places = torch.multinomial(shares, count, replacement=True, generator=generator)
    kept = (torch.rand(count, generator=generator) >= DROPPED).long()
    sizes = torch.full((count,), list(SIZE_WORDS).index(side))
    return latents[places, things, colours].float(), torch.stack(
        [(things + 1) * kept, colours * kept, sizes], 1
    )


def flow_loss(
    networks: Networks,
    clean: torch.Tensor,
    ids: torch.Tensor,
    side: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Mean squared error of the predicted velocity (noise - clean), more often at high noise."""
    noise = torch.randn(clean.shape, generator=generator)
    sigma = torch.sigmoid(NOISE_LOGIT[side] + 1.2 * torch.randn(len(clean), generator=generator))
    mixed = torch.lerp(clean, noise, sigma[:, None, None, None])
    with torch.autocast("cpu", torch.bfloat16):
        embeds, pooled = networks.text(ids)
        (velocity,) = networks.transformer(
            hidden_states=pack(mixed),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=sigma,
            img_ids=image_ids(*clean.shape[2:]),
            txt_ids=networks.text.text_ids(),
            return_dict=False,
        )
    return (velocity.float() - pack(noise - clean)).square().mean()


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a reader never sees half of one."""
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def arguments(doc: str | None, checkpoint: Path, mix: str) -> argparse.Namespace:
    """Command line of a training phase."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--steps", type=int, required=True, help="steps of this phase")
    parser.add_argument("--mix", default=mix, help="shares of steps by kind, in their order")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--decay", action="store_true", help="let the rate fall to zero")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, default=checkpoint)
    return parser.parse_args()


def picture_task(mix: str) -> Task:
    """Pictures of each size; latents of sizes which the mix leaves out are not read."""
    wanted = [side for side, share in zip(SIZE_WORDS, mix.split(","), strict=True) if float(share)]
    latents = {side: torch.load(WORK / f"latents-{side}.pt", mmap=True) for side in wanted}

    def loss(networks: Networks, kind: str, generator: torch.Generator) -> torch.Tensor:
        side = int(kind)
        clean, ids = batch_of(latents[side], side, generator)
        return flow_loss(networks, clean, ids, side, generator)

    return Task([str(side) for side in SIZE_WORDS], loss)


def main() -> None:
    """Run one phase of training; see README.md for the phases of the shipped weights."""
    args = arguments(__doc__, WORK / "model.pt", "0.7,0.3,0")
    rank = join()
    torch.manual_seed(args.seed)
    train(args, rank, Networks(), picture_task(args.mix))


def train(args: argparse.Namespace, rank: int, networks: nn.Module, task: Task) -> None:
    """Go on from the checkpoint, if there is one, for as many steps as asked."""
    ema = copy.deepcopy(networks).requires_grad_(False)
    chosen = optimizers(networks, args.rate)
    state: dict[str, Any] = {"step": 0, "cpu_s": 0.0}
    if args.checkpoint.exists():
        state = torch.load(args.checkpoint, weights_only=False)
        networks.load_state_dict(state["networks"])
        ema.load_state_dict(state["ema"])
        for optimizer, stored in zip(chosen, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
    run_phase(args, rank, networks, ema, chosen, task, state["step"], state["cpu_s"])


def run_phase(
    args: argparse.Namespace,
    rank: int,
    networks: nn.Module,
    ema: nn.Module,
    chosen: list[torch.optim.Optimizer],
    task: Task,
    first: int,
    cpu_s: float,
) -> None:
    """The loop. Ranks draw the same kind of batch each step, so that neither waits for long."""
    shares = torch.tensor([float(share) for share in args.mix.split(",")])
    shared = torch.Generator().manual_seed(args.seed * 1_000_003 + first)
    own = torch.Generator().manual_seed(args.seed * 1_000_003 + first + 7919 * (rank + 1))
    recent: dict[str, list[float]] = {kind: [] for kind in task.kinds}
    for step in range(first + 1, first + args.steps + 1):
        share = min(1.0, step / 200)
        if args.decay:
            share *= (first + args.steps + 1 - step) / args.steps
        for optimizer in chosen:
            for group in optimizer.param_groups:
                group["lr"] = args.rate * group["scale"] * share
        kind = task.kinds[int(torch.multinomial(shares, 1, generator=shared))]
        loss = task.loss(networks, kind, own)
        loss.backward()
        all_reduce_gradients(networks)
        torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        keep = min(1 - 1 / EMA_HORIZON, step / (step + 20))
        with torch.no_grad():
            for mean, now in zip(ema.parameters(), networks.parameters(), strict=True):
                mean.lerp_(now, 1 - keep)
        recent[kind].append(loss.item())
        last = step == first + args.steps
        if rank == 0 and (step % 50 == 0 or last):
            report = {of: round(sum(v[-50:]) / len(v[-50:]), 4) for of, v in recent.items() if v}
            print(f"{step} loss {report} cpu_s {cpu_s + time.process_time():.0f}", flush=True)
        if rank == 0 and (step % 100 == 0 or last):
            save(args.checkpoint, {
                "step": step, "cpu_s": cpu_s + time.process_time(), "args": vars(args),
                "networks": networks.state_dict(), "ema": ema.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in chosen],
            })  # fmt: skip


if __name__ == "__main__":
    main()
