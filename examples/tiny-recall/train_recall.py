"""Train tiny-recall, a DeepSeek-V3 MoE language model with dense MLA that finds things in long texts, on the CPU.

A run that was interrupted goes on from its newest checkpoint: give the same command again.

    python examples/tiny-recall/train_recall.py --out tiny-recall
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from recall_text import TEMPLATES, Recall, words_of
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AttentionInterface, DeepseekV3Config, DeepseekV3ForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent / "tiny-mla"))
import train as tiny
from corpus import read_documents, stdlib

CONTEXT = 8192
BALANCE = 1e-3  # step of the routers' correction bias (DeepSeek-V3, section 2.1.2)
EXPERTS_RATE = 0.25  # of the rate of the other matrices: AdamW, where those have Muon
DEFAULT_STAGES = "256x32x500,1024x8x200,4096x2x120,8192x1x60"


def model_config() -> DeepseekV3Config:
    """DeepSeek-V3's architecture and proportions at toy size: one dense layer, the others with experts."""
    return DeepseekV3Config(
        vocab_size=tiny.VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=128,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        norm_topk_prob=True,
        max_position_embeddings=CONTEXT,
        rope_theta=100000.0,
        rope_interleave=True,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="tiny_causal",
    )


def build_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention and MLPs, AdamW for the rest."""
    named = list(model.named_parameters())
    experts = [p for name, p in named if p.ndim == 3]
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name and ".gate.weight" not in name]
    others = [p for name, p in named if p.ndim == 1 or "embed" in name or ".gate.weight" in name]
    groups = [{"params": others, "share": 1.0}, {"params": experts, "share": EXPERTS_RATE}]
    return [
        torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0),
    ]


class Balance:
    """Keeps the experts of every layer equally busy, by the routers' correction bias alone."""

    def __init__(self, model: nn.Module) -> None:
        self.loads: dict[nn.Module, Tensor] = {}
        self.gates = {}
        for module in model.modules():
            if hasattr(module, "experts") and hasattr(module, "gate"):
                self.gates[module.experts] = module.gate
                module.experts.register_forward_pre_hook(self._count)

    def _count(self, experts: nn.Module, args: tuple[Tensor, ...]) -> None:
        chosen = next(arg for arg in args if not arg.is_floating_point())
        count = self.gates[experts].e_score_correction_bias.numel()
        self.loads[experts] = self.loads.get(experts, 0) + torch.bincount(chosen.flatten(), minlength=count)

    def step(self) -> None:
        for experts, load in self.loads.items():
            bias = self.gates[experts].e_score_correction_bias
            bias += BALANCE * torch.sign(load.float().mean() - load)
        self.loads.clear()


def batch_of(recall: Recall, stage: tiny.Stage, share: float) -> tuple[Tensor, Tensor]:
    rows = recall.rows(stage.context, stage.batch, share)
    return torch.tensor([row.tokens for row in rows]), torch.tensor([row.weights for row in rows])


def loss_of(model: nn.Module, tokens: Tensor, weights: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=tokens).logits[:, :-1]
    losses = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    wanted = weights[:, 1:].flatten()
    return (losses * wanted).sum() / wanted.sum()


@torch.no_grad()
def needles(model: nn.Module, recall: Recall, length: int, count: int, template: str) -> tuple[float, float]:
    """(share of single needles in text whose value is found, mean log-probability of a value): depths evenly spread."""
    found, sums = 0, 0.0
    for index in range(count):
        key, value = recall.name(), str(recall.random.randrange(10**4, 10**5))
        head, body, tail = recall._parts(template, key, value)
        room = length - 2 * len(head) - 2 * len(body) - len(tail)
        hay, depth = recall.text(room), int(room * index / max(1, count - 1))
        tokens = torch.tensor([[*hay[:depth], *head, *body, *tail, *hay[depth:], *head, *body]])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=tokens, logits_to_keep=len(body) + 1).logits[0, :-1].float()
        wanted = torch.tensor(body)
        found += bool((logits.argmax(-1) == wanted).all())
        sums += float(-F.cross_entropy(logits, wanted, reduction="sum"))
    return found / count, sums / count


def report(model: nn.Module, recall: Recall, data: Tensor, lengths: list[int], count: int) -> dict[str, object]:
    model.eval()
    kept = random.Random(1)
    recall.random, before = kept, recall.random
    figures: dict[str, object] = {
        f"needle_{length}": needles(model, recall, length, count, TEMPLATES[0]) for length in lengths
    }
    recall.random = before
    figures["held_nats_1024"] = tiny.evaluate(model, data, 1024, 24)
    model.train()
    return figures


def resume(state: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], recall: Recall) -> int:
    """How many steps are done, after loading what they led to."""
    if not state.exists():
        return 0
    saved = torch.load(state, weights_only=False)
    model.load_state_dict(saved["model"])
    for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(values)
    recall.random.setstate(saved["random"])
    return int(saved["done"])


def keep(state: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], recall: Recall, done: int) -> None:
    """Whole or not at all."""
    values = [optimizer.state_dict() for optimizer in optimizers]
    whole = {"model": model.state_dict(), "optimizers": values, "random": recall.random.getstate(), "done": done}
    torch.save(whole, state.with_suffix(".tmp"))
    state.with_suffix(".tmp").replace(state)


def update(model: nn.Module, optimizers: list[torch.optim.Optimizer], loss: Tensor, lr: float) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("share", 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def train(model: nn.Module, recall: Recall, held: Tensor, args: argparse.Namespace) -> None:
    optimizers, balance = build_optimizers(model), Balance(model)
    schedule = [stage for stage in args.stages for _ in range(stage.steps)]
    state, start = args.out / "state.pt", time.monotonic()
    done, kept = resume(state, model, optimizers, recall), start
    for step in range(done, len(schedule)):
        stage, lr = schedule[step], args.lr * tiny.rate_factor(step, len(schedule), args.decay_from)
        loss = loss_of(model, *batch_of(recall, stage, args.share))
        update(model, optimizers, loss, lr)
        balance.step()
        last = step + 1 == len(schedule) or schedule[step + 1] != stage
        if (step + 1) % 10 == 0 or last:
            seconds = time.monotonic() - start
            print(
                f"step {step + 1}/{len(schedule)}  {stage.context}  loss {loss.item():.4f}  {seconds:.0f} s", flush=True
            )
        if last or (step + 1) % 100 == 0:
            lengths = sorted({min(1024, 4 * stage.context), stage.context})
            print(json.dumps(report(model, recall, held, lengths, 20)), flush=True)
        if last or time.monotonic() - kept > 240:
            keep(state, model, optimizers, recall, step + 1)
            kept = time.monotonic()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint to write")
    parser.add_argument("--lib", type=Path, default=stdlib(), help="tree of .py files (default: this Python's library)")
    parser.add_argument("--stages", type=tiny.parse_stages, default=DEFAULT_STAGES)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=0.6, help="share of the rows that are recall")
    parser.add_argument("--decay-from", type=float, default=0.7, help="share of the steps before the rate decays")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    training, held_out = read_documents(args.lib, "train"), read_documents(args.lib, "held-out")
    tokenizer = Tokenizer.from_file(str(Path(tiny.__file__).parent / "tokenizer.json"))
    stream, held = tiny.encode(tokenizer, training).tolist(), tiny.encode(tokenizer, held_out)
    recall = Recall(tokenizer, stream, words_of(training), args.seed)
    AttentionInterface.register("tiny_causal", tiny.causal_attention)
    model = DeepseekV3ForCausalLM(model_config())
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(stream)} tokens of text", flush=True)
    train(model, recall, held, args)
    tiny.CONTEXT = CONTEXT
    tiny.save(model, tokenizer, args.out)
    lengths = [1024, 4096, 8192]
    figures = report(model.float(), recall, held, lengths, 40)
    (args.out / "training.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
