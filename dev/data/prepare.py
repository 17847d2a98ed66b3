#!/usr/bin/env python3
"""Turns text into what train_gpt reads: llm.c token shards of a tokenizer, or plain text for byte-level training.

    python3 dev/data/prepare.py --out data/mine --tokenizer gpt2 text/*.txt
    python3 dev/data/prepare.py --out data/fineweb --tokenizer meta-llama/Llama-3.2-1B --dataset HuggingFaceFW/fineweb:sample-10BT
    python3 dev/data/prepare.py --out data/c4 --dataset allenai/c4:en --limit 2000000000
    ./train_gpt --train_data 'data/c4_train_*' --val_data 'data/c4_val_*'

Text files of your own need no preparation for byte-level training: hand them to --train_data as they are. Other datasets:
roneneldan/TinyStories, emozilla/pg19.

The first --val_size tokens (bytes of text) become OUT_val_000000, the rest OUT_train_000000 and so on. In shards every
document begins with the tokenizer's end-of-text token; in text files documents are a blank line apart. A shard is 256
int32 (magic number, version, number of tokens, zeros), then the tokens: uint16 (magic 20240520, version 1) for
vocabularies up to 65536, else uint32 (magic 20240801, version 7). --tokenizer needs the Python package transformers,
--dataset needs datasets.
"""
import argparse
import array
import glob
import importlib
import os
import sys

UINT16 = (20240520, 1, "H")
UINT32 = (20240801, 7, "I")


def package(name, flag):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        sys.exit(f"{flag}: needs the Python package {name}: pip install {name} ({error})")


def documents(arguments):
    """Yields one string a document: a file each, or a row each of the dataset."""
    for path in arguments.files:
        try:
            with open(path, "rb") as file:
                if b"\0" in file.read(1 << 16):
                    sys.exit(f"{path}: is no text: it has bytes of 0 (packed files, Parquet, NumPy: write the texts out "
                             "first)")
            with open(path, encoding="utf-8", errors="replace") as file:
                text = file.read()
        except OSError as error:
            sys.exit(f"{path}: cannot be read: {error.strerror}")
        yield text
    if arguments.dataset:
        load_dataset = package("datasets", "--dataset").load_dataset
        name, _, config = arguments.dataset.partition(":")
        for row in load_dataset(name, config or None, split="train", streaming=True):
            if arguments.column not in row:
                sys.exit(f"--column {arguments.column}: {arguments.dataset} has the columns {', '.join(row)}")
            text = row[arguments.column]
            if not isinstance(text, (str, type(None))):
                sys.exit(f"--column {arguments.column}: of {arguments.dataset} holds no text")
            if text:
                yield text


def write_whole(path, parts):
    """Writes arrays or bytes to a temporary name and renames it: the file is whole or absent."""
    with open(path + ".tmp", "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


class ShardWriter:
    """Documents as token shards. pending: tokens that are not in a file yet."""

    def __init__(self, shard_format, separator, encode):
        self.format, self.separator, self.encode = shard_format, separator, encode
        self.pending = array.array(shard_format[2])

    def add(self, text):
        self.pending.append(self.separator)
        self.pending.extend(self.encode(text))

    def write(self, name, count):
        header = array.array("i", [0] * 256)
        header[0], header[1], header[2] = self.format[0], self.format[1], count
        write_whole(name + ".bin", [header, self.pending[:count]])
        del self.pending[:count]
        print(f"{name}.bin: {count} tokens")


class TextWriter:
    """Documents as plain text. pending: bytes that are not in a file yet."""

    def __init__(self):
        self.pending = bytearray()

    def add(self, text):
        self.pending += text.encode("utf-8", errors="replace") + b"\n\n"

    def write(self, name, count):
        write_whole(name + ".txt", [self.pending[:count]])
        del self.pending[:count]
        print(f"{name}.txt: {count} bytes")


def make_writer(tokenizer_name):
    if tokenizer_name is None:
        return TextWriter()
    tokenizer = package("transformers", "--tokenizer").AutoTokenizer.from_pretrained(tokenizer_name)
    if tokenizer.eos_token_id is None:
        sys.exit(f"--tokenizer {tokenizer_name}: has no end-of-text token to separate documents with")
    print(f"train_gpt --vocab_size {len(tokenizer)} trains on these shards")
    return ShardWriter(UINT16 if len(tokenizer) <= 2**16 else UINT32, tokenizer.eos_token_id,
                       lambda text: tokenizer.encode(text, add_special_tokens=False))


def write_split(arguments, writer):
    """All documents through `writer` into the validation file and the training files."""
    old = glob.glob(glob.escape(arguments.out) + "_val_*") + glob.glob(glob.escape(arguments.out) + "_train_*")
    if old:
        sys.exit(f"--out {arguments.out}: {min(old)} is there already: remove what an earlier run wrote, or a pattern "
                 f"would take both, or give another name")
    num_files = {"val": 0, "train": 0}
    total = 0

    def write(split, count):
        nonlocal total
        writer.write(f"{arguments.out}_{split}_{num_files[split]:06d}", count)
        num_files[split] += 1
        total += count

    for text in documents(arguments):
        writer.add(text)
        if num_files["val"] == 0 and arguments.val_size > 0 and len(writer.pending) >= arguments.val_size:
            write("val", arguments.val_size)
        while len(writer.pending) >= arguments.file_size and (num_files["val"] > 0 or arguments.val_size == 0):
            write("train", arguments.file_size)
        if arguments.limit and total + len(writer.pending) >= arguments.limit:
            break
    if writer.pending and (num_files["val"] > 0 or arguments.val_size == 0):
        write("train", len(writer.pending))
    if num_files["train"] == 0:
        less = f"--limit {arguments.limit}" if arguments.limit else "the documents"
        sys.exit(f"--val_size {arguments.val_size}: {less} gives no more than that, nothing is left to train on")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="text files, one document each")
    parser.add_argument("--dataset", help="a Hugging Face dataset, NAME or NAME:CONFIG")
    parser.add_argument("--column", default="text", help="the dataset's column of text [text]")
    parser.add_argument("--tokenizer", help="a name or folder that transformers.AutoTokenizer loads; left out: plain text")
    parser.add_argument("--out", required=True, help="what the files' names begin with")
    parser.add_argument("--val_size", type=int, default=1_000_000, help="tokens or bytes for validation; 0: none [1000000]")
    parser.add_argument("--file_size", type=int, default=100_000_000, help="tokens or bytes of a file [100000000]")
    parser.add_argument("--limit", type=int, default=0, help="stop after about this many tokens or bytes; 0: all")
    arguments = parser.parse_args()
    if not arguments.files and not arguments.dataset:
        parser.error("give text files or --dataset")
    if not 0 < arguments.file_size < 2**31 or not 0 <= arguments.val_size < 2**31:
        parser.error("--file_size and --val_size must be less than 2^31: a shard's header counts its tokens in an int32")
    os.makedirs(os.path.dirname(arguments.out) or ".", exist_ok=True)
    write_split(arguments, make_writer(arguments.tokenizer))


if __name__ == "__main__":
    main()
