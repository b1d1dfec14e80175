"""Continue a piece of text with a checkpoint folder, through transformers alone.

    python examples/generate.py demo-out/tiny-dsa --prompt-file examples/tiny-mla/held_out/gzip.py.txt

Nothing of mla2dsa is imported: what it writes is an ordinary Hugging Face checkpoint.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the text to continue")
    source.add_argument("--prompt-file", type=Path, help="continue the beginning of this file")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="how much of it to use (default: 256 tokens)")
    parser.add_argument("--new-tokens", type=int, default=64, help="how much to write (default: 64 tokens)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32)
    text = args.prompt if args.prompt is not None else args.prompt_file.read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : args.prompt_tokens]
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=args.new_tokens, **sampling)[0]
    prompt, continuation = (tokenizer.decode(part) for part in (out[: ids.shape[1]], out[ids.shape[1] :]))
    print(f"{type(model).__name__}, {ids.shape[1]} + {len(out) - ids.shape[1]} tokens. The prompt ends with:\n")
    print("\n".join(prompt.splitlines()[-6:]))
    print("\n-------- and goes on:\n")
    print(continuation)


if __name__ == "__main__":
    main()
