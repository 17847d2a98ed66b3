#!/usr/bin/env python3
"""Random runs of ./train_gpt_cpu that are stopped or killed at any moment and gone on with, any number of times.

What they leave must be what the same run leaves that nobody interrupted: the same steps, evaluations, samples and
switches of attention in metrics.jsonl, each once and with the same numbers, and a last checkpoint of the same files,
byte for byte but for the settings in it. The CPU trainer repeats bit for bit, so there is no tolerance.

    dev/test/random_resumes.py --runs 20
    dev/test/random_resumes.py --seed 7 --runs 1 --verbose     one of them again, with its commands
    dev/test/random_resumes.py --planted                       the last resume has another --beta2: it must be noticed,
                                                               where there is anything left to do for it
"""
import argparse
import concurrent.futures
import glob
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGKILL, signal.SIGKILL)
COMPARED = ("step", "validation", "sample", "attention_switch")
VARYING = ("elapsed_ms", "tokens_per_second", "seconds_left", "seconds", "memory_gib")
RUN_LIMIT = 120  # seconds


def draw(r, corpus):
    """Flags of a run of a few milliseconds a step."""
    flags = {"num_layers": r.randint(1, 2), "width": 8 * r.randint(1, 3), "num_heads": 2,
             "num_kv_heads": r.randint(1, 2), "head_dim": 8, "ffn_width": 16, "seq_len": r.choice([16, 33, 64]),
             "batch_size": r.randint(1, 3), "max_steps": r.randint(60, 240), "warmup_steps": r.randint(0, 9),
             "schedule": r.choice(["cosine", "linear", "constant"]), "learning_rate": r.choice([1e-3, 3e-2]),
             "tied_embeddings": r.choice(["true", "false"]), "eval_every": r.choice([0, 7, 10]),
             "eval_batches": r.randint(1, 2), "sample_every": r.choice([0, 13]), "sample_tokens": r.choice([0, 8]),
             "checkpoint_every": r.choice([0, 1, 4, 10]), "keep_checkpoints": r.choice([0, 1, 3]),
             "save_dtype": r.choice(["auto", "bf16", "fp32"]), "seed": r.randint(0, 9),
             "shuffle_seed": r.randint(0, 9), "num_threads": 1}
    if flags["sample_tokens"] == 0:
        flags["sample_every"] = 0
    flags["global_batch"] = flags["batch_size"] * r.randint(1, 2)
    if r.random() < 0.4:
        flags.update(attention="lighthouse", seq_len=256, lighthouse_levels=2, lighthouse_pool=2, lighthouse_topk=128,
                     lighthouse_scorer=r.choice(["norm", "dilated"]), lighthouse_dense_layers=r.choice(["none", "0"]),
                     lighthouse_steps=r.choice([-1, 1, 20]), max_steps=r.randint(20, 60))
    return [word for name, value in flags.items() for word in ("--" + name, str(value))] + ["--train_data", corpus,
                                                                                         "--plain"]


def lines_of(folder):
    """The objects of metrics.jsonl that are whole; none when there is no file."""
    try:
        with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
            text = file.read()
    except OSError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1]]


def newest_checkpoint(folder):
    return max(glob.glob(os.path.join(folder, "step*")), default=None)


class Story:
    """One output folder, the commands that were run on it, and what went wrong."""

    def __init__(self, trainer, words, folder):
        self.trainer, self.words, self.folder = trainer, words, folder
        self.commands, self.wrong = [], []
        self.num_in_time = 0  # signals that came before the end

    def start(self, resume, more=()):
        """A process of a new run (resume ""), or that goes on by --resume "alone" or behind the whole "line"."""
        words = [] if resume == "alone" else list(self.words)
        words += ["--output_dir", self.folder] + (["--resume"] if resume else []) + list(more)
        self.commands.append(shlex.join([self.trainer] + words))
        return subprocess.Popen([self.trainer] + words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True, errors="replace")

    def finish(self, process, may_end_with=()):
        try:
            output = process.communicate(timeout=RUN_LIMIT)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            output = process.communicate()[0] + f"\nnot over after {RUN_LIMIT} s"
        if process.returncode != 0 and process.returncode not in may_end_with:
            self.wrong.append(f"status {process.returncode}: {output.strip()[-300:]}")

    def interrupt(self, r, resume):
        """A process that gets a signal as it comes to some step, or after some time."""
        process, by = self.start(resume), r.choice(SIGNALS)
        begun = len(lines_of(self.folder))
        lines, delay = r.randint(1, 40), r.choice([None, None, r.uniform(0.0, 0.15)])
        end = time.monotonic() + (delay if delay is not None else RUN_LIMIT)
        while process.poll() is None and time.monotonic() < end:
            if delay is None and len(lines_of(self.folder)) >= begun + lines:
                break
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(by)
            self.num_in_time += 1
            self.commands[-1] += f"  # {by.name}"
        # Before it can do anything about a signal, that ends it.
        self.finish(process, may_end_with=(-by,))


def events_of(folder):
    return [{key: value for key, value in line.items() if key not in VARYING}
            for line in lines_of(folder) if line["event"] in COMPARED]


def contents_of(path):
    """Of a checkpoint's file; of state.json without the settings, which say where a run was written and how begun, and
    nothing of the manifest, which has state.json's hash."""
    if not os.path.exists(path) or os.path.basename(path) == "manifest.json":
        return None
    with open(path, "rb") as file:
        contents = file.read()
    if os.path.basename(path) == "state.json":
        contents = {key: value for key, value in json.loads(contents).items() if key != "settings"}
    return contents


def differences(story, whole):
    """What a story has left otherwise than the run that was not interrupted."""
    found, expected = events_of(story.folder), events_of(whole.folder)
    for a, b in zip(found, expected):
        if a != b:
            return [f"metrics have {a} in place of {b}"]
    if len(found) != len(expected):
        return [f"metrics have {len(found)} events in place of {len(expected)}"]
    ours, theirs = newest_checkpoint(story.folder), newest_checkpoint(whole.folder)
    if ours is None or theirs is None or os.path.basename(ours) != os.path.basename(theirs):
        return [f"the last checkpoint is {ours}, not as {theirs}"]
    names = sorted(set(os.listdir(ours)) | set(os.listdir(theirs)))
    wrong = [f"{name} of the last checkpoint differs" for name in names
             if contents_of(os.path.join(ours, name)) != contents_of(os.path.join(theirs, name))]
    left = [name for name in os.listdir(story.folder) if name.startswith(".partial") or name.endswith(".new")]
    return wrong + [f"{name} is left" for name in left]


def run(seed, o, corpus):
    """Whether a run is right, and a text about it."""
    r = random.Random(seed)
    words = draw(r, corpus)
    with tempfile.TemporaryDirectory() as folder:
        whole = Story(o.trainer, words, os.path.join(folder, "whole"))
        whole.finish(whole.start(""))
        story = Story(o.trainer, words, os.path.join(folder, "interrupted"))
        resume, interruptions = "", r.randint(1, 5)
        for _ in range(interruptions):
            story.interrupt(r, resume)
            if newest_checkpoint(story.folder) is None:  # nothing to go on from: from the beginning
                shutil.rmtree(story.folder, ignore_errors=True)
                resume = ""
            else:
                resume = r.choice(["alone", "line"])
        story.finish(story.start(resume, ["--beta2", "0.9"] if o.planted else []))
        wrong = whole.wrong + story.wrong or differences(story, whole)
        text = f"seed {seed}: {story.num_in_time} interruptions, {len(events_of(whole.folder))} events"
        if o.planted:
            return bool(wrong), f"{text}: {'noticed' if wrong else 'not noticed'}"
        text += "".join(f"; {what}" for what in wrong)
        if wrong or o.verbose:
            text += "".join(f"\n     {command}" for command in whole.commands + story.commands)
        return not wrong, text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", default="./train_gpt_cpu")
    parser.add_argument("--seed", type=int, default=1, help="of the first run; the others' follow")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side")
    parser.add_argument("--planted", action="store_true", help="let the last resume train otherwise")
    parser.add_argument("--verbose", action="store_true", help="print every run's commands")
    o = parser.parse_args()
    if o.runs < 1 or o.jobs < 1:
        parser.error("--runs and --jobs must be at least 1")
    o.trainer = os.path.abspath(o.trainer)
    if not os.access(o.trainer, os.X_OK):
        parser.error(f"--trainer {o.trainer}: is not built: make train_gpt_cpu")
    passed = 0
    with tempfile.TemporaryDirectory() as folder:
        corpus = os.path.join(folder, "corpus.txt")
        with open(corpus, "w") as file:
            r = random.Random(0)
            file.write(" ".join("".join(r.choices("abcdefgh", k=r.randint(1, 7))) for _ in range(12000)))
        with concurrent.futures.ThreadPoolExecutor(o.jobs) as pool:
            for right, text in pool.map(lambda seed: run(seed, o, corpus), range(o.seed, o.seed + o.runs)):
                print("ok  " if right else "pass" if o.planted else "FAIL", text, flush=True)
                passed += right
    if o.planted:
        few = 2 * passed < o.runs
        print(f"{'FAIL' if few else 'ok  '} the planted error was noticed in {passed} of {o.runs} runs, at least half are asked")
        return 1 if few else 0
    print(f"{passed} passed, {o.runs - passed} failed")
    return 1 if passed < o.runs else 0


if __name__ == "__main__":
    sys.exit(main())
