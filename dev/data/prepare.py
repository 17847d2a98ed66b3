#!/usr/bin/env python3
"""Turns text into llm.c token shards (uint16 or uint32), the second of the two formats train_gpt reads.

Byte-level training needs none of this: hand the text files to --train_data as they are.

    python3 dev/data/prepare.py --out data/fineweb --tokenizer gpt2 text/*.txt
    python3 dev/data/prepare.py --out data/fineweb --tokenizer meta-llama/Llama-3.2-1B --dataset HuggingFaceFW/fineweb:sample-10BT

Documents are separated by the tokenizer's end-of-text token. The first shard is named *_val_*, the others *_train_*.
Shard: 256 int32 (magic, version, number of tokens, zeros), then the tokens; uint16: magic 20240520, version 1; uint32:
magic 20240801, version 7. Needs the Python package tokenizers or transformers, and datasets for --dataset.
"""
import argparse
import array
import os
import sys

UINT16 = (20240520, 1, "H", 2**16)
UINT32 = (20240801, 7, "I", 2**32)


def documents(arguments):
    """Yields one string a document: a file each, or a row each of a Hugging Face dataset NAME[:CONFIG]."""
    for path in arguments.files:
        with open(path, encoding="utf-8", errors="replace") as file:
            yield file.read()
    if arguments.dataset:
        from datasets import load_dataset
        name, _, config = arguments.dataset.partition(":")
        for row in load_dataset(name, config or None, split="train", streaming=True):
            yield row[arguments.column]


def write_shard(path, tokens, shard_format):
    """tokens: list of int. Written to a temporary name and renamed, so that a shard is whole or absent."""
    magic, version, typecode, _ = shard_format
    header = array.array("i", [0] * 256)
    header[0:3] = array.array("i", [magic, version, len(tokens)])
    with open(path + ".tmp", "wb") as file:
        header.tofile(file)
        array.array(typecode, tokens).tofile(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)
    print(f"{path}: {len(tokens)} tokens")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="text files, one document each")
    parser.add_argument("--dataset", help="a Hugging Face dataset, NAME or NAME:CONFIG")
    parser.add_argument("--column", default="text", help="the dataset's column of text")
    parser.add_argument("--tokenizer", default="gpt2", help="a name or folder that transformers.AutoTokenizer loads")
    parser.add_argument("--out", required=True, help="prefix of the shards: OUT_train_000001.bin")
    parser.add_argument("--shard_tokens", type=int, default=100_000_000, help="tokens a shard")
    arguments = parser.parse_args()
    if not arguments.files and not arguments.dataset:
        parser.error("give text files or --dataset")
    if not 0 < arguments.shard_tokens < 2**31:
        parser.error("--shard_tokens must be from 1 to 2^31 - 1: the header stores it as an int32")

    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    separator = tokenizer.eos_token_id
    if separator is None:
        sys.exit(f"{arguments.tokenizer}: the tokenizer has no end-of-text token to separate documents with")
    shard_format = UINT16 if len(tokenizer) <= UINT16[3] else UINT32
    os.makedirs(os.path.dirname(arguments.out) or ".", exist_ok=True)

    pending, shard = [], 0
    def flush(count):
        nonlocal pending, shard
        split = "val" if shard == 0 else "train"
        write_shard(f"{arguments.out}_{split}_{shard:06d}.bin", pending[:count], shard_format)
        pending, shard = pending[count:], shard + 1

    for text in documents(arguments):
        pending.append(separator)
        pending.extend(tokenizer.encode(text, add_special_tokens=False))
        while len(pending) >= arguments.shard_tokens:
            flush(arguments.shard_tokens)
    if pending:
        flush(len(pending))


if __name__ == "__main__":
    main()
