// checkpoint.h: folders of weights. Any Hugging Face Llama folder is loaded; what is saved is one too, with what a
// resumed run needs beside the model:
//
//   config.json, model.safetensors   as transformers reads them; weights float32 or bfloat16
//   generation_config.json, tokenizer files   of the folder the run started from, or of bytes; with those of bytes
//                                    llama.cpp's convert_hf_to_gguf.py takes the folder too
//   optimizer-00001-of-00002.safetensors ...   float32: "layer0.qkv.exp_avg", ".exp_avg_sq" and, with bfloat16 weights,
//                                    ".master"; names as in parameters.h. A tensor is whole, in whichever file; or,
//                                    of a run on several ranks, in pieces: "layer0.qkv.exp_avg[4096:8192]" are
//                                    elements 4096 to 8191, and every rank has written its own
//   state.json                       step, position in the data and which data, seeds, every resolved setting
//   manifest.json                    length and XXH3 hash of each file above; a folder that agrees with it is whole
//
// A folder is written under another name, each file and the folder are waited for until they are on the disk, and then
// it is renamed: OUTPUT_DIR/step00000400 is whole or is not there, whatever fails. Names that begin with ".partial-"
// are folders on their way in or out; the next save removes what a crash has left of them. One run at a time may save
// into an output folder (output_lock.h), which all its ranks must see. Any number of ranks goes on from what any other
// has written.
#pragma once
#include "checkpoint_folder.h"    // names and manifest; the newest whole folder is found, old ones are removed
#include "checkpoint_contents.h"  // what the files say: names and shapes of tensors, state.json
#include "checkpoint_load.h"      // load_model, load_checkpoint
#include "checkpoint_save.h"      // save_checkpoint
