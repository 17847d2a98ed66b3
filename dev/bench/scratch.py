"""Folders for what a run leaves behind, which goes with it: the checkpoint of its last step, and its data."""
import os
import shutil
import tempfile

IN_MEMORY = "/dev/shm"


def checkpoint_bytes(model, vocab_size):
    """model: the trainer's flags by name. Of a parameter 2 bytes of weight and 12 of AdamW's state."""
    width, head_dim = model["width"], model["head_dim"]
    heads = 2 * model["num_heads"] + 2 * model["num_kv_heads"]  # of q and of attention's output, of k and of v
    layer = width * (heads * head_dim + 3 * model["ffn_width"] + 2)
    return 14 * (model["num_layers"] * layer + 2 * vocab_size * width + width)


def scratch_folder(num_bytes):
    """A temporary folder, for a with statement: in memory where there is room for num_bytes, as in a container there
    often is not, else where such folders are."""
    # A quarter more: what else is written there meanwhile.
    roomy = os.path.isdir(IN_MEMORY) and shutil.disk_usage(IN_MEMORY).free >= 1.25 * num_bytes
    return tempfile.TemporaryDirectory(dir=IN_MEMORY if roomy else None)
