"""Teacher and student of recipes/smollm2.sh: a small real model, and a student with every second layer of it.

    python -m recipes.smollm2_models --model HuggingFaceTB/SmolLM2-135M-Instruct --out out/smollm2/models

writes OUT/teacher and OUT/student, plain Hugging Face directories. Where the hub cannot be reached, --gguf
FILE reads the model from a GGUF file (transformers needs the package gguf for it).
"""

import argparse
import copy
import os

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distil.artifacts import add_output_flags, finish_artifact, start_artifact
from distil.models import load_model, model_dir
from distil.prompts import load_tokenizer


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="directory or hub id")
    p.add_argument("--gguf", help="GGUF file to use instead")
    add_output_flags(p, resume=False)
    return p.parse_args(argv)


def load_gguf(path):
    directory, file = os.path.split(path)
    model = AutoModelForCausalLM.from_pretrained(directory or ".", gguf_file=file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory or ".", gguf_file=file)
    del model.config.quantization_config  # it is float32 now, and is to be saved as that
    model.hf_quantizer, model.is_quantized = None, False
    return model, tokenizer


def halve_layers(model):
    """A model with layers 0, 2, 4, ... of `model`, and everything else of it."""
    config = copy.deepcopy(model.config)
    kept = range(0, config.num_hidden_layers, 2)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    student = AutoModelForCausalLM.from_config(config)
    source = model.state_dict()
    weights = dict(source)
    for target, layer in enumerate(kept):
        for name in student.model.layers[target].state_dict():
            weights[f"model.layers.{target}.{name}"] = source[f"model.layers.{layer}.{name}"]
    student.load_state_dict({name: weights[name] for name in student.state_dict()})
    student.generation_config = model.generation_config
    return student


def main(args):
    if args.gguf:
        teacher, tokenizer = load_gguf(args.gguf)
    else:
        directory = model_dir(args.model, "--model")
        teacher, tokenizer = load_model(directory, "--model", "float32"), load_tokenizer(directory, "--model")
    start_artifact(args)
    files = []
    for name, model in {"teacher": teacher, "student": halve_layers(teacher)}.items():
        path = os.path.join(args.out, name)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        files += [f"{name}/{file}" for file in sorted(os.listdir(path))]
        layers, size = model.config.num_hidden_layers, model.num_parameters() / 1e6
        print(f"{path}: {layers} layers, {size:.1f} M parameters")
    finish_artifact(args, "smollm2_models", files, model=args.gguf or args.model)


if __name__ == "__main__":
    main(get_args())
