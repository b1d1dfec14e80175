"""Train tiny-mla, a 2M-parameter DeepSeek-V3 language model with dense MLA, on the CPU (about 35 minutes, one thread).

Stage lists are CONTEXTxBATCHxSTEPS. The committed weights took two runs, the second one starting from the first:

    python examples/tiny-mla/train.py --out stage1
    python examples/tiny-mla/train.py --init stage1 --out tiny-mla --stages 1024x4x280 \\
        --lr 3e-3 --seed 1 --p-copy 0.2 --decay-from 0.3
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import EOT, read_documents, stdlib
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AttentionInterface, DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 1024
CONTEXT = 1024  # what the checkpoint declares; a final stage at 2048 did not make it useful there
WARMUP_STEPS = 50
PLAIN_UP_TO = 256  # below this context plain matrix products beat the fused CPU kernel
FUTURE = torch.ones(PLAIN_UP_TO, PLAIN_UP_TO, dtype=torch.bool).triu(1)


@dataclass(frozen=True)
class Stage:
    """A stretch of training: `steps` batches of `batch` rows of `context` tokens."""

    context: int
    batch: int
    steps: int


def parse_stages(text: str) -> list[Stage]:
    """ "256x16x850,1024x4x280" -> two stages."""
    return [Stage(*map(int, stage.split("x"))) for stage in text.split(",")]


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """Byte-level BPE over the training split; `EOT` is id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> Tensor:
    """All documents as one int32 stream, each led by `EOT`."""
    return torch.tensor(
        [token for encoding in tokenizer.encode_batch(documents) for token in (0, *encoding.ids)], dtype=torch.int32
    )


def causal_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Causal attention of full rows. q, k: [B, H, T, dqk]; v: [B, H, T, dv] -> [B, T, H, dv]."""
    tokens, value_dim = q.shape[-2], v.shape[-1]
    if tokens <= PLAIN_UP_TO:
        scores = (q * scaling @ k.transpose(-1, -2)).masked_fill(FUTURE[:tokens, :tokens], float("-inf"))
        out = torch.softmax(scores, -1) @ v
    else:  # the fused kernel wants v as wide as q and k
        padded = F.pad(v, (0, q.shape[-1] - value_dim))
        out = F.scaled_dot_product_attention(q, k, padded, is_causal=True, scale=scaling)[..., :value_dim]
    return out.transpose(1, 2).contiguous(), None


def model_config() -> DeepseekV3Config:
    """DeepSeek-V3's architecture at toy size. Every layer is dense: the expert settings are never used."""
    return DeepseekV3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        first_k_dense_replace=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        n_group=1,
        topk_group=1,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        rope_interleave=True,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="tiny_causal",
    )


def build_model(init: Path | None) -> DeepseekV3ForCausalLM:
    """A fresh float32 model, or the one saved in `init`."""
    AttentionInterface.register("tiny_causal", causal_attention)
    if init is None:
        return DeepseekV3ForCausalLM(model_config())
    return DeepseekV3ForCausalLM.from_pretrained(init, dtype=torch.float32, attn_implementation="tiny_causal")


def copy_span(row: Tensor, generator: torch.Generator) -> None:
    """Overwrite a span in the second half of `row` [T] with one from its first half (a push towards induction)."""
    tokens, half = len(row), len(row) // 2
    length = int(torch.randint(tokens // 16, half, (), generator=generator))
    source = int(torch.randint(0, half - length + 1, (), generator=generator))
    target = int(torch.randint(half, tokens - length + 1, (), generator=generator))
    row[target : target + length] = row[source : source + length].clone()


def sample_batch(data: Tensor, stage: Stage, p_copy: float, generator: torch.Generator) -> Tensor:
    """Random rows of the token stream, [batch, context] int64; a share `p_copy` of them gets a copied span."""
    starts = torch.randint(0, len(data) - stage.context - 1, (stage.batch,), generator=generator)
    rows = torch.stack([data[start : start + stage.context] for start in starts]).long()
    for row in rows:
        if torch.rand((), generator=generator) < p_copy:
            copy_span(row, generator)
    return rows


def build_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the embedding and the norms."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_factor(step: int, total: int, decay_from: float) -> float:
    """Warm-up, then constant, then linear decay to 2 % over the last `1 - decay_from` of the steps."""
    factor = min(1.0, (step + 1) / WARMUP_STEPS)
    knee = int(decay_from * total)
    return factor if step <= knee else factor * max(0.02, (total - step) / (total - knee))


def train_step(model: nn.Module, optimizers: list[torch.optim.Optimizer], rows: Tensor, lr: float) -> float:
    """One update of all parameters; returns the mean loss of the batch in nats per token."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss.item())


@torch.no_grad()
def evaluate(model: nn.Module, data: Tensor, context: int, sequences: int) -> float:
    """Mean loss in nats per token over the first non-overlapping `sequences` rows of `data`, or as many as it holds."""
    losses = []
    for row in data[: len(data) // context * context].view(-1, context)[:sequences].long():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=row[None]).logits[0].float()
        losses.append(F.cross_entropy(logits[:-1], row[1:]))
    return float(torch.stack(losses).mean())


def train(model: nn.Module, data: Tensor, stages: list[Stage], args: argparse.Namespace) -> None:
    """Run all stages in order, printing a line every 20 steps."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizers = build_optimizers(model)
    total, start = sum(stage.steps for stage in stages), time.monotonic()
    schedule = [stage for stage in stages for _ in range(stage.steps)]
    for step, stage in enumerate(schedule):
        lr = args.lr * rate_factor(step, total, args.decay_from)
        loss = train_step(model, optimizers, sample_batch(data, stage, args.p_copy, generator), lr)
        if (step + 1) % 20 == 0 or step + 1 == total:
            seconds = time.monotonic() - start
            print(f"step {step + 1}/{total}  context {stage.context}  loss {loss:.4f}  {seconds:.0f} s", flush=True)


def save(model: DeepseekV3ForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """A plain Hugging Face folder in bfloat16."""
    model.set_attn_implementation("eager")  # the training-time attention is not known to other programs
    model.to(torch.bfloat16).save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOT, eos_token=EOT, pad_token=EOT, model_max_length=CONTEXT
    ).save_pretrained(out)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint to write")
    parser.add_argument("--init", type=Path, help="continue from this checkpoint, with its tokenizer")
    parser.add_argument("--lib", type=Path, default=stdlib(), help="tree of .py files (default: this Python's library)")
    parser.add_argument("--stages", type=parse_stages, default="256x16x850,1024x4x280,2048x2x30")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--p-copy", type=float, default=0.1, help="share of the rows that get a copied span")
    parser.add_argument("--decay-from", type=float, default=0.6, help="share of the steps before the rate decays")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)  # the order of sums, and with it the result, depends on the number of threads
    torch.manual_seed(args.seed)
    training, held_out = read_documents(args.lib, "train"), read_documents(args.lib, "held-out")
    tokenizer = Tokenizer.from_file(str(args.init / "tokenizer.json")) if args.init else train_tokenizer(training)
    data, held_data = encode(tokenizer, training), encode(tokenizer, held_out)
    print(f"{len(training)} + {len(held_out)} files, {len(data)} + {len(held_data)} tokens (training + held out)")
    model = build_model(args.init)
    train(model, data, args.stages, args)
    report = {
        "steps": sum(stage.steps for stage in args.stages),
        "tokens": sum(stage.context * stage.batch * stage.steps for stage in args.stages),
        "held_nats_1024": evaluate(model, held_data, 1024, 64),
        "held_nats_2048": evaluate(model, held_data, 2048, 32),
        "bytes_per_token": sum(len(text.encode()) for text in held_out) / len(held_data),
    }
    save(model, tokenizer, args.out)
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
